"""Masks of every query: its embedding times the mask features, resized; as logits, or as the cells its attention is to
leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import Case, noise


def reference(queries: Tensor, features: Tensor, side: int, is_blocking: bool = False) -> Tensor:
    """Logits [B, N, side, side] of `queries` [B, N, D] on `features` [B, D, h, w]; or, if `is_blocking`, whether a cell
    is outside the mask.
    """
    logits = resize(torch.einsum("bnd,bdhw->bnhw", queries, features), side)
    return outside(logits) if is_blocking else logits


def outside(logits: Tensor) -> Tensor:
    """Whether a cell is outside the mask."""
    # Against the sigmoid, not the sign of the logit: just below zero the sigmoid rounds to one half, which upstream
    # lets through.
    return logits.sigmoid() < 0.5


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 1, 1), noise(1, 1, 1, 1), 1), (1, 1, 1, 1)),
        Case("as it lies, odd widths", (noise(3, 5, 13), noise(3, 13, 7, 7), 7), (3, 5, 7, 7)),
        Case("down to a memory level of a 128-pixel image", (noise(2, 20, 64), noise(2, 64, 40, 40), 5), (2, 20, 5, 5)),
        Case("cells left out, as it lies", (noise(2, 7, 19), noise(2, 19, 6, 6), 6, True), (2, 7, 6, 6)),
        Case(
            "upstream's first memory level, cells left out",
            (noise(1, 100, 256), noise(1, 256, 160, 160), 20, True),
            (1, 100, 20, 20),
        ),
    ]
