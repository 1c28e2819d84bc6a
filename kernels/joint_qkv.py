"""Queries, keys and values of a joint attention from the packed products of its streams: normalised, rotated by the
places of their tokens, and end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.noise import noise

Norms = Sequence[tuple[Tensor | None, Tensor | None]]  # weights [d] for queries and keys of each stream


def reference(
    packed: Sequence[Tensor], norms: Norms, turns: Tensor | None, heads: int, width: int, eps: float
) -> Tensor:
    """[R, N, 3, heads, d] of streams [R, S, 3 * heads * d and more]: queries and keys after an RMS norm of each head,
    where there are weights for it, every pair of their numbers turned by the cosine and sine `turns` [R or 1, N, d / 2,
    2] (Su et al. 2021); and values.
    """
    parts = []
    for stream, weights in zip(packed, norms, strict=True):
        part = stream[..., : 3 * heads * width].unflatten(-1, (3, heads, width)).unbind(2)
        normed = [
            x if weight is None else F.rms_norm(x, weight.shape, weight, eps)
            for x, weight in zip(part, (*weights, None), strict=True)
        ]
        parts.append(torch.stack(normed, 2))
    joint = torch.cat(parts, 1)
    if turns is None:
        return joint
    turned = turn(joint[:, :, :2], turns[:, :, None, None])
    return torch.cat([turned, joint[:, :, 2:]], 2)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Every pair of numbers of `x` [..., d] as a complex number times one of `turns` [..., d / 2, 2]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.to(wide).unbind(-1)
    pairs = torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1)
    return pairs.flatten(-2).to(x.dtype)


def plain(packed: Sequence[Tensor], norms: Norms, turns: Tensor | None, heads: int, width: int, eps: float) -> Tensor:
    """`reference`, every stream written where it belongs."""
    rows, counts = len(packed[0]), [stream.shape[1] for stream in packed]
    joint = packed[0].new_empty(rows, sum(counts), 3, heads, width)
    begin = 0
    for stream, count, weights in zip(packed, counts, norms, strict=True):
        part = stream[..., : 3 * heads * width].unflatten(-1, (3, heads, width))
        place = joint[:, begin : begin + count]
        for kind, weight in enumerate(weights):
            x = part[:, :, kind]
            x = x if weight is None else F.rms_norm(x, weight.shape, weight, eps)
            place[:, :, kind] = x if turns is None else turn(x, turns[:, begin : begin + count, None])
        place[:, :, 2] = part[:, :, 2]
        begin += count
    return joint


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    weights = noise(2, 2, 64) + 1
    return [noise(2, 5, 400), noise(2, 3, 384)], list(map(tuple, weights)), noise(1, 8, 32, 2), 2, 64, 1e-6
