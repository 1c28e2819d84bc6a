"""Inputs of the operation geglu: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    side, width = LEVELS[0]
    yield f"{width} channels", (empty(batch, side * side, 8 * width),)
    yield "FLUX.2 klein, one stream", (empty(1, 4608, 9 * 3072)[..., 3 * 3072 :], True)
    yield "Z-Image", (empty(2, 4224, 2 * 10240), True)


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 2),), (1, 1)),
        Case("odd rows of odd width, deep in both tails", (noise(3, 7, 38, scale=4),), (3, 7, 19)),
        Case("SiLU, a slice of wider rows", (noise(2, 5, 80)[..., 20:54], True), (2, 5, 17)),
        Case("SD 1.x first level, a few tokens", (noise(1, 9, 2560),), (1, 9, 1280)),
    ]
