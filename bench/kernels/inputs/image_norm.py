"""Inputs of the operation image_norm: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, FEATURES, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, count in ((32, 2), (64, 2), (64, 4)):
        yield (
            f"{count * FEATURES} channels at {side} cells",
            (
                empty(batch, side, side, count * FEATURES).permute(0, 3, 1, 2),
                True,
            ),
        )


def cases() -> list[Case]:
    return [
        Case("smallest: a plane that varies", (noise(1, 1, 2, 2),), (1, 1, 2, 2)),
        Case("several chunks, negative values cut", (noise(2, 35, 13, 21), True), (2, 35, 13, 21)),
        Case("more chunks than a block reads", (noise(2, 36, 70, 61),), (2, 36, 70, 61)),
        Case("constant planes have no variance to divide by", (torch.full((2, 3, 4, 4), 5.0),), (2, 3, 4, 4)),
        Case("ragged planes, far from zero", (noise(3, 17, 5, 5) + 100,), (3, 17, 5, 5)),
        Case(
            "channels last, as the convolutions leave it",
            (noise(2, 33, 9, 13).contiguous(memory_format=torch.channels_last),),
            (2, 33, 9, 13),
        ),
        Case("planes of upstream's highest mix", (noise(1, 24, 64, 64),), (1, 24, 64, 64)),
    ]
