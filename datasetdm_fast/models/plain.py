"""The operations the lean models are built with, in plain PyTorch: what a faster form of each has to say."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`x` [B, C, h, w], each group of channels of each image with zero mean and unit variance, then scaled and shifted."""
    return F.group_norm(x, groups, weight, bias, eps)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels of `x` [..., 2C] times the GELU of the second."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, S, d]."""
    return F.scaled_dot_product_attention(q, k, v)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) [B, heads, S, T], summed in fp32 whatever the storage."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def attention_capture(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The attention output [B, heads, S, d], and its maps under `weight` [heads, T, F], summed over heads and tokens: [B, S, F]."""
    maps = probabilities(q, k)
    joined = maps.transpose(1, 2).flatten(2)  # [B, S, heads * T]
    return torch.matmul(maps, v), torch.matmul(joined, weight.flatten(0, 1))


PLAIN = SimpleNamespace(
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    layer_norm=layer_norm,
    geglu=geglu,
    attention=attention,
    attention_capture=attention_capture,
)
