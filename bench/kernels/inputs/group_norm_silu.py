"""Inputs of the operation group_norm_silu: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        inputs = empty(batch, side, side, width).permute(0, 3, 1, 2), empty(width), empty(width), 32
        yield f"{width} channels", (*inputs, 1e-5)
        yield f"{width} channels, no SiLU", (*inputs, 1e-6, False)


def cases() -> list[Case]:
    def norm(batch, channels, groups, height, width, **options):
        x = noise(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
        x = x * options.pop("spread", 1) + options.pop("offset", 0)
        return x, noise(channels) + 1, noise(channels + 1)[1:], groups, 1e-5, options.pop("has_silu", True)

    return [
        Case("smallest plane that varies", norm(1, 2, 1, 1, 2), (1, 2, 1, 2)),
        Case("odd planes, ragged groups", norm(2, 33, 3, 7, 11), (2, 33, 7, 11)),
        Case("the norm before attention has no SiLU", norm(1, 96, 32, 9, 9, has_silu=False), (1, 96, 9, 9)),
        Case("far from zero", norm(1, 64, 32, 16, 16, offset=15), (1, 64, 16, 16)),
        Case("SD 1.x third level", norm(1, 1280, 32, 16, 16), (1, 1280, 16, 16)),
    ]
