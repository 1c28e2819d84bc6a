"""What decoders read of a joint attention's shares that go to text, from the logarithms of its sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.kernels.noise import noise


def reference(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """[B, S, F] sum over heads and tokens of the `shares` times `weight` [heads, T, F]; without one the mean of the
    heads, [B, S, T].
    """
    maps = shares(q, k, sums, mask)
    return maps.mean(1) if weight is None else torch.einsum("bhst,htf->bsf", maps, weight.to(maps.dtype))


def shares(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, S, T] exp(q k^T / sqrt(d) - the logarithm `sums` [B, heads, S] of the sum over all keys), 0 for tokens
    that `mask` [B, 1, 1, T] hides; `q` and `k` are of the cells and of the text.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).mT) / q.shape[-1] ** 0.5
    parts = scores.sub_(sums[..., None]).exp_()
    return parts if mask is None else parts * mask


def plain(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """`reference` an image at a time, heads and tokens as one axis of one product."""
    masks = [None] * len(k) if mask is None else mask.split(1)
    rows = []
    for row in zip(q.split(1), k.split(1), sums.split(1), masks, strict=True):
        maps = shares(*row)
        rows.append(maps.mean(1) if weight is None else _project(maps, weight.to(maps.dtype)))
    return torch.cat(rows)


def _project(maps: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(maps.transpose(1, 2).flatten(2), weight.flatten(0, 1))


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    q, k = noise(1, 2, 70, 64), noise(1, 2, 300, 64)
    return q, k, torch.full((1, 2, 70), 6.0), None, noise(2, 300, 96)
