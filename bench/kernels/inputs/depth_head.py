"""Inputs of the operation depth_head: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    hidden = 1024
    weights = empty(hidden, hidden, 3, 3), empty(hidden), empty(1, hidden, 3, 3), empty(1)
    yield "64 cells to 512 pixels", (empty(batch, hidden, 64, 64), *weights, (160, 512))


def cases() -> list[Case]:
    def head(batch, channels, hidden, side, sides):
        weight, last = noise(hidden, channels, 3, 3, scale=0.1), noise(1, hidden, 3, 3, scale=0.1)
        return noise(batch, channels, side, side), weight, noise(hidden), last, noise(1), sides

    return [
        Case("smallest", head(2, 1, 1, 1, (1,)), (2, 1, 1, 1)),
        Case("two resizes, odd sides, a ragged last chunk", head(2, 5, 67, 3, (7, 23)), (2, 1, 23, 23)),
        Case("more channels than are held at once", head(1, 3, 131, 2, (5,)), (1, 1, 5, 5)),
        Case("demo's cells and channels", head(1, 32, 32, 16, (40, 64)), (1, 1, 64, 64)),
    ]
