"""Inputs of the operation attention_shares: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, FEATURES, HEADS, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = 1) -> Iterator[tuple[str, tuple]]:
    for name, tokens, heads, width in (("SD 3.5 medium", 333, 24, 64), ("FLUX", 512, 24, 128)):
        q, k, _ = empty(batch, 4096 + tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, sums = q[:, :, :4096], k[:, :, 4096:], empty(batch, heads, 4096 + tokens).float()[..., :4096]
        yield name, (q, k, sums, None, empty(heads, tokens, FEATURES))
        yield f"{name}, mean of the heads", (q, k, sums, None, None)
        mask = empty(batch, 1, 1, tokens).bool()
        yield f"{name}, masked", (q, k, sums, mask, empty(heads, tokens, FEATURES))
    for (side, channels), keys in ((LEVELS[1], LEVELS[1][0] ** 2), (LEVELS[2], TOKENS)):  # averages of U-Nets
        cells, width = side * side, channels // HEADS
        q, k = (empty(BATCH, count, HEADS, width).transpose(1, 2) for count in (cells, keys))
        yield f"{cells} cells over {keys}, heads of {width}", (q, k, empty(BATCH, HEADS, cells).float(), None, None)


def cases() -> list[Case]:
    def text(batch, heads, cells, tokens, width, features, hidden=0):
        q, k = noise(batch, cells, heads, width).transpose(1, 2), noise(batch, heads, tokens, width)
        sums = noise(batch, heads, cells) + 5
        shown = tokens - hidden - torch.arange(batch).view(-1, 1, 1, 1)  # of each image
        mask = torch.arange(tokens) < shown if hidden else None
        weight = noise(heads, tokens, features) if features else None
        return (q, k, sums, mask, weight), (batch, cells, features or tokens)

    return [
        Case("smallest", *text(1, 1, 1, 1, 1, 1)),
        Case("ragged in every size", *text(2, 3, 21, 13, 11, 9)),
        Case("hidden tokens", *text(2, 2, 19, 40, 16, 17, hidden=7)),
        Case("the mean of the heads", *text(2, 3, 21, 35, 16, 0)),
        Case("the mean of the heads, hidden tokens", *text(2, 2, 19, 40, 16, 0, hidden=7)),
        Case("more tokens than a block, hidden ones among them", *text(1, 2, 17, 150, 64, 70, hidden=3)),
        Case("FLUX.1's heads, more features than a block", *text(1, 2, 33, 70, 128, 140)),
        Case("the mean of SD 1.x's widest heads", *text(1, 2, 33, 77, 160, 0)),
    ]
