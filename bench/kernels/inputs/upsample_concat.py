"""Inputs of the operation upsample_concat: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, FEATURES, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    """The two joins of a decoder that resize: mid level and what lies below it, high level and both."""
    for side, below in ((32, FEATURES), (64, 2 * FEATURES)):
        levels = [
            empty(batch, side // 2, side // 2, count).permute(0, 3, 1, 2) for count in (below, FEATURES)
        ]  # the lower ones lie a level deeper
        yield f"{below} and {FEATURES} channels at {side} cells", (levels, side)


def cases() -> list[Case]:
    def levels(batch, *shapes):
        return [noise(batch, *shape) for shape in shapes]

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    parts = noise(2, 6, 6, 40).permute(0, 3, 1, 2)[:, 3:37]  # what one decoder reads of the sums of several
    return [
        Case("smallest: one cell", (levels(1, (1, 1, 1), (1, 1, 1)), 1), (1, 2, 1, 1)),
        Case("up and down, odd widths", (levels(2, (5, 3, 3), (7, 9, 8)), 5), (2, 12, 5, 5)),
        Case("a slice of channels-last sums beside planes", ([noise(2, 33, 3, 3), parts], 6), (2, 67, 6, 6)),
        Case(
            "demo's decoders: the high level doubled",
            ([channels_last(x) for x in levels(1, (96, 8, 8), (48, 16, 16))], 16),
            (1, 144, 16, 16),
        ),
    ]
