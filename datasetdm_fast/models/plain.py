"""The operations the lean models are built with, in plain PyTorch: what a faster form of each has to say."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True) -> Tensor:
    """SiLU of the normalised `x` [B, C, h, w]; without SiLU where the norm stands alone."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if has_silu else x


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
    """The attention output [B, heads, S, d], and its maps under `weight` [heads, T, F], summed over heads and tokens:
    [B, S, F] fp32.
    """
    maps = probabilities(q, k)
    projected = torch.matmul(maps.transpose(1, 2).flatten(2), weight.flatten(0, 1))
    return torch.matmul(maps, v), projected.to(torch.promote_types(projected.dtype, torch.float32))


PLAIN = SimpleNamespace(
    group_norm_silu=group_norm_silu,
    layer_norm=layer_norm,
    geglu=geglu,
    attention=attention,
    attention_capture=attention_capture,
)
