"""Attention that also adds the mean of its heads' probabilities to a running sum; no map of a single head is written.

On a GPU the attention of libraries returns the logarithms of its sums (attention_sums.py), by which the shares of the
heads are known (attention_shares.py). Values of no width ask for the sum alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from datasetdm_fast.kernels import attention, attention_shares, attention_sums
from datasetdm_fast.kernels.attention import probabilities
from datasetdm_fast.kernels.launch import is_served
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"cpu": "native", "untuned": "fused"}


def reference(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The answer [B, heads, N, d] of `q` [B, heads, N, d], `k` and `v` [B, heads, S, d], or nothing where `v` has no
    width; and `total` [B, N, S] plus `share` of the mean over heads of softmax(q k^T / sqrt(d)), in fp32.
    """
    maps = probabilities(q, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(maps, v), total.to(wide) + share * maps.to(wide).mean(1)


def plain(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`reference`, a head at a time."""
    return _answer(attention.plain, q, k, v), add_probabilities(q, k, total, share)


def native(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`reference` on a CPU, with the answer of attention there, bit by bit."""
    return _answer(attention.native, q, k, v), add_probabilities(q, k, total, share)


def _answer(form: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return form(q, k, v) if v.shape[3] else q.new_empty((*q.shape[:3], 0))


def add_probabilities(q: Tensor, k: Tensor, total: Tensor, share: float) -> Tensor:
    heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    total = total.to(wide, copy=True)
    for head in range(heads):
        total.add_(probabilities(q[:, head], k[:, head]).to(wide), alpha=share / heads)
    return total


def fused(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The result of `reference`; the answer lies in memory as [B, N, heads, d]."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    fits = k.shape == (batch, heads, keys, width) and v.shape in (k.shape, k[..., :0].shape)
    fits = fits and total.shape == (batch, queries, keys) and total.numel() > 0 and q.dtype == k.dtype == v.dtype
    if not is_served("attention_average", q, k, v, total, fits=fits):
        return reference(q, k, v, total, share)
    answer, sums = attention_sums.plain(q, k, v if v.shape[3] else k)
    shares = attention_shares.fused(q, k, sums, None, None)
    return answer[..., : v.shape[3]], torch.add(total, shares, alpha=share)


def probe() -> Probe:
    qk, total = noise(1, 2, 130, 80), noise(1, 130, 130).abs() / 130
    return qk, qk, qk + 1, total, 0.2
