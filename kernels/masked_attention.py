"""Attention of queries over the cells they did not block."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.case import Case, noise


def reference(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d]; `blocked` [B, N, S] is shared by the heads, and a query that blocked
    every cell sees all.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if blocked is not None:
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        scores = scores.masked_fill(blocked[:, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(weights.to(v.dtype), v)


def cases() -> list[Case]:
    def attention(batch, heads, queries, cells, width, share=None):
        q, k, v = (
            noise(batch, heads, queries, width),
            noise(batch, heads, cells, width),
            noise(batch, heads, cells, width) + 1,
        )
        return q, k, v, None if share is None else torch.sigmoid(noise(batch, queries, cells)) < share

    def all_blocked():
        q, k, v, blocked = attention(2, 2, 5, 9, 8, 0.5)
        blocked[0, 3] = True
        return q, k, v, blocked

    def several_blocks():
        q, k, v, blocked = attention(2, 2, 70, 200, 32, 0.5)
        blocked[1, :, :128] = True
        return q, k, v, blocked

    return [
        Case("smallest", attention(1, 1, 1, 1, 1), (1, 1, 1, 1)),
        Case("self-attention blocks nothing", attention(3, 2, 20, 20, 16), (3, 2, 20, 16)),
        Case("a head wider than a block, ragged", attention(1, 2, 9, 33, 75, 0.5), (1, 2, 9, 75)),
        Case("a query that blocked every cell", all_blocked(), (2, 2, 5, 8)),
        Case("several blocks of cells, some wholly blocked", several_blocks(), (2, 2, 70, 32)),
        Case("upstream's first memory level", attention(1, 8, 100, 400, 32, 0.7), (1, 8, 100, 32)),
    ]
