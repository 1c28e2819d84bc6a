"""Masked attention (equation 2 of arXiv 2112.01527): each query attends to the cells it does not block."""

import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d] over cells not `blocked` [B, N, S]; over all if all are blocked."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if blocked is not None:
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        scores = scores.masked_fill(blocked[:, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(weights.to(v.dtype), v)
