"""Masks of every query, resized: as logits, or as the cells that its attention is to leave out."""

import torch
from torch import Tensor

from datasetdm_fast.kernels.upsample_concat import resize


def reference(queries: Tensor, features: Tensor, side: int, is_blocking: bool = False) -> Tensor:
    """Logits [B, N, side, side] of `queries` [B, N, D] on `features` [B, D, h, w], or what is outside the mask."""
    logits = resize(torch.einsum("bnd,bdhw->bnhw", queries, features), side)
    return outside(logits) if is_blocking else logits


def outside(logits: Tensor) -> Tensor:
    """Whether a cell is outside the mask."""
    # Against the sigmoid, not the sign of the logit: just below zero the sigmoid rounds to one half, which upstream
    # lets through.
    return logits.sigmoid() < 0.5
