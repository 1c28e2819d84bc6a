"""Inputs of the operation masked_attention: those it is tested on, and those of a model's size."""

from __future__ import annotations

import torch

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


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
