"""Weights in the panels that csrc/products.cpp multiplies with on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16  # outputs that lie side by side


def panels(weight: Tensor) -> Tensor:  # [P, I, 16] of [O, I]
    """The weight as the products of csrc read it: an even number of panels, the last ones filled up with zeros."""
    outputs, inner = weight.shape
    padded = torch.zeros(-(-outputs // (2 * PANEL)) * 2 * PANEL, inner)
    padded[:outputs] = weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
