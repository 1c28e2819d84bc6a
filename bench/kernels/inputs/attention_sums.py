"""Inputs of the operation attention_sums: those it is tested on, and those of a model's size."""

from __future__ import annotations

import torch

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


def cases() -> list[Case]:
    def joint(rows, heads, tokens, width, hidden=0):
        q, k, v = noise(rows, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        mask = (torch.arange(tokens) < tokens - hidden).expand(rows, 1, 1, tokens) if hidden else None
        return (q, k, v + 1, mask), ((rows, heads, tokens, width), (rows, heads, tokens))

    return [
        Case("smallest", *joint(1, 1, 1, 1)),
        Case("ragged in every size", *joint(2, 3, 21, 11)),
        Case("hidden keys", *joint(2, 2, 40, 16, hidden=7)),
        Case("FLUX.1's heads", *joint(1, 2, 70, 128)),
    ]
