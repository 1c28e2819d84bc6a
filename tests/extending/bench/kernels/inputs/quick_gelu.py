"""Inputs of the operation quick_gelu."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    yield "text encoder", (empty(batch, TOKENS, 3072),)


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 1),), (1, 1)),
        Case("odd rows of odd width, deep in both tails", (noise(3, 7, 19, scale=4),), (3, 7, 19)),
        Case("text encoder, a few tokens", (noise(1, 9, 3072),), (1, 9, 3072)),
    ]
