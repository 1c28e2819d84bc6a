"""The one resize of every decoder: bilinear, half-pixel centres, no antialiasing."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import jit, tl


def resize(x: Tensor, side: int) -> Tensor:
    """`x` [B, C, h, w] at side x side cells."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


@jit
def neighbours(place, length, side):
    """The two cells of an axis of `length` that `place` of its resize to `side` lies between, and the share of the
    second.
    """
    source = tl.maximum((place + 0.5) * (length * 1.0 / side) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int64), length - 1)
    return first, tl.minimum(first + 1, length - 1), source - first.to(tl.float32)
