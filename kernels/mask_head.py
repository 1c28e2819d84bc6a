"""Mask logits of every query: its embedding times the mask features, resized."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import Case, noise


def reference(queries: Tensor, features: Tensor, side: int) -> Tensor:
    """Logits [B, N, side, side] of `queries` [B, N, D] on `features` [B, D, h, w]."""
    return resize(torch.einsum("bnd,bdhw->bnhw", queries, features), side)


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 1, 1), noise(1, 1, 1, 1), 1), (1, 1, 1, 1)),
        Case("as it lies, odd widths", (noise(3, 5, 13), noise(3, 13, 7, 7), 7), (3, 5, 7, 7)),
        Case("down to a memory level of a 128-pixel image", (noise(2, 20, 64), noise(2, 64, 40, 40), 5), (2, 20, 5, 5)),
        Case("upstream's second memory level", (noise(1, 100, 256), noise(1, 256, 160, 160), 40), (1, 100, 40, 40)),
    ]
