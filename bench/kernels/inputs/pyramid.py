"""Inputs of the operation pyramid: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, FEATURES, HEADS, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        features = [empty(batch, side, side, count).permute(0, 3, 1, 2) for count in (width, 2 * width)]
        weight = empty(FEATURES, 3 * width + HEADS * TOKENS, 1, 1)
        yield f"{width} channels", (features, [empty(batch, HEADS, side * side, TOKENS)], weight, 64)


def cases() -> list[Case]:
    def level(batch, width, side, channels, heads, tokens, out):
        features = [noise(batch, c, side, side) for c in channels]
        maps = [torch.softmax(noise(batch, h, side * side, tokens), -1) for h in heads]
        return features, maps, noise(width, sum(channels) + sum(heads) * tokens, 1, 1, scale=0.05), out

    def channels_last(inputs):
        return [x.contiguous(memory_format=torch.channels_last) for x in inputs[0]], *inputs[1:]

    return [
        Case("smallest: one feature, one map, one cell", level(1, 1, 1, (2,), (1,), 1, 1), (1, 1, 1, 1)),
        Case("widths no block size divides", level(2, 7, 3, (5, 11), (3,), 13, 5), (2, 7, 5, 5)),
        Case("channels last, resized down", channels_last(level(1, 9, 6, (20, 34), (2,), 5, 4)), (1, 9, 4, 4)),
        Case("no resize at the highest level", level(3, 64, 16, (96, 96, 160), (3, 3, 3), 77, 16), (3, 64, 16, 16)),
        Case("SD 1.x low level, doubled", level(1, 256, 8, (2560, 2560), (8,), 77, 16), (1, 256, 16, 16)),
    ]
