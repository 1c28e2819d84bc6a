"""Attention without the scores in memory: self-attention of the UNet, and cross-attention where nothing is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.case import BATCH, HEADS, LEVELS, TOKENS, Case, noise
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads

DEVICES = {"cpu": "native"}
NATIVE_KEYS = 1024  # all scores of a few queries are held at once; longer rows leave the second-level cache


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d] of `q` [B, heads, N, d], `k` and `v` [B, heads, S, d]."""
    return torch.matmul(probabilities(q, k), v)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) [B, heads, N, S], summed in fp32 whatever the storage."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by PyTorch's own fused attention, tuned for every device it knows."""
    return F.scaled_dot_product_attention(q, k, v)


def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on a CPU: csrc/network_ops.cpp where the rows are short, PyTorch's own fused attention elsewhere."""
    if not is_native(q, k, v) or k.shape[2] > NATIVE_KEYS or v.shape[3] != q.shape[3]:
        return plain(q, k, v)
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(
        1, 2
    )  # heads side by side, as the layer after it reads them
    places = [part for x in (q, k, v, out) for part in (x.data_ptr(), x.stride()[:3])]
    keys = k.shape[2]
    _C.attention(STORAGES[q.dtype], *places, batch, heads, queries, keys, width, width**-0.5, threads(q, 2 * keys))
    return out


def sizes(empty: Callable) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        cells, wide = side * side, width // HEADS
        q, k, v = empty(BATCH, cells, 3, HEADS, wide).permute(2, 0, 3, 1, 4).unbind(0)
        text = empty(BATCH, TOKENS, 2, HEADS, wide).permute(2, 0, 3, 1, 4).unbind(0)
        yield f"{cells} cells, heads of {wide}", (q, k, v)
        yield f"{cells} cells over {TOKENS} tokens, heads of {wide}", (q, *text)


def cases() -> list[Case]:
    def packed(batch, heads, cells, width):
        return tuple(noise(batch, cells, 3, heads, width).unbind(2)[i].transpose(1, 2) for i in range(3))

    def crossed(batch, heads, queries, tokens, width):
        return (
            noise(batch, heads, queries, width),
            noise(batch, heads, tokens, width),
            noise(batch, heads, tokens, width) + 1,
        )

    return [
        Case("smallest", crossed(1, 1, 1, 1, 1), (1, 1, 1, 1)),
        Case("ragged in every size", crossed(2, 3, 37, 67, 21), (2, 3, 37, 21)),
        Case("tiny preset's heads", packed(1, 3, 64, 16), (1, 3, 64, 16)),
        Case("SD 1.x first level's heads, packed", packed(2, 2, 130, 40), (2, 2, 130, 40)),
        Case("SD 1.x second level over text", crossed(1, 2, 64, 77, 80), (1, 2, 64, 80)),
        Case("SD 1.x lowest level's heads", packed(1, 2, 64, 160), (1, 2, 64, 160)),
        Case("SD 2.x heads, scores that overflow exp", tuple(8 * x for x in packed(1, 1, 96, 64)), (1, 1, 96, 64)),
    ]
