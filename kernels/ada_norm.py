"""Norms of transformers whose scale and shift are those of the timestep, with the gated residual before them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.noise import noise


def reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x` [R, S, C] plus `gate` [R or 1, C] times `branch`; and its layer norm, or RMS norm times `weight` [C] where
    one is given, times 1 + `scale` plus `shift` [R or 1, C]. A `branch_weight` is that of an RMS norm of the branch.
    """
    if branch is not None:
        if branch_weight is not None:
            branch = F.rms_norm(branch, branch_weight.shape, branch_weight, eps)
        x = x + (branch if gate is None else gate[:, None] * branch)
    if weight is None:
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        normed = F.rms_norm(x, weight.shape, weight, eps)
    if scale is not None:
        normed = normed * (1 + scale[:, None])
    return x, normed if shift is None else normed + shift[:, None]


def plain(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference` in fewer passes."""
    if branch is not None and gate is not None and branch_weight is None:
        x, branch = torch.addcmul(x, branch, gate[:, None]), None
    if scale is None or shift is None:
        return reference(x, branch, gate, branch_weight, scale, shift, weight, eps)
    x, normed = reference(x, branch, gate, branch_weight, None, None, weight, eps)
    return x, torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    vectors = noise(2, 3, 1280)
    return noise(2, 5, 1280), noise(2, 5, 1280) + 1, vectors[:, 0], None, vectors[:, 1], vectors[:, 2], None, 1e-6
