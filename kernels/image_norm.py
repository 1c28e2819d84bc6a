"""Batch normalisation of a batch of one, for every image of a batch: statistics per image and channel, no affine."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.case import Case, noise

EPS = 1e-4


def reference(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] with zero mean and unit biased variance over H, W of each image."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + EPS)).to(x.dtype)


def cases() -> list[Case]:
    return [
        Case("smallest: a plane that varies", (noise(1, 1, 2, 2),), (1, 1, 2, 2)),
        Case("constant planes have no variance to divide by", (torch.full((2, 3, 4, 4), 5.0),), (2, 3, 4, 4)),
        Case("ragged planes, far from zero", (noise(3, 17, 5, 5) + 100,), (3, 17, 5, 5)),
        Case(
            "channels last, as the convolutions leave it",
            (noise(2, 33, 9, 13).contiguous(memory_format=torch.channels_last),),
            (2, 33, 9, 13),
        ),
        Case("planes of upstream's highest mix", (noise(1, 24, 64, 64),), (1, 24, 64, 64)),
    ]
