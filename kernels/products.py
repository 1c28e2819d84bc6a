"""Weights in the panels that csrc/products.cpp multiplies with on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # outputs that lie side by side


def panels(weight: Tensor) -> Tensor:  # [P, I, 16] of [O, I]
    """The weight as the products of csrc read it: an even number of panels, the last ones filled up with zeros."""
    outputs, inner = weight.shape
    padded = torch.zeros(-(-outputs // (2 * PANEL)) * 2 * PANEL, inner)
    padded[:outputs] = weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pair_inputs(panels: Tensor) -> Tensor:  # [..., (I + 1) / 2, 16, 2] bf16 of [..., I, 16]
    """The panels rounded to bf16, with each two inputs of an output side by side; an odd one beside a zero."""
    even = F.pad(panels, (0, 0, 0, panels.shape[-2] % 2))
    return even.unflatten(-2, (-1, 2)).transpose(-1, -2).to(torch.bfloat16).contiguous()


def unpair_inputs(pairs: Tensor) -> Tensor:  # [..., I, 16] of [..., I / 2, 16, 2]
    """The panels that `pair_inputs` was given, of an even number of inputs."""
    return pairs.transpose(-1, -2).flatten(-3, -2)
