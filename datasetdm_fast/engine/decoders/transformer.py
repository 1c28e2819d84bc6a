"""The transformer decoder of queries over image features."""

import math
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.decoders.config import DecoderConfig

TEMPERATURE = 10000.0


def sine_position(side: int, channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the normalised row, then of the column, of each cell [side * side, channels]."""
    if torch.is_inference_mode_enabled() and type(like) is Tensor:
        return _kept_position(side, channels, like.device, like.dtype)
    return _position(side, channels, like.device, like.dtype)


def _position(side: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    half = channels // 2
    place = torch.arange(1, side + 1, dtype=torch.float32, device=device) / (side + 1e-6) * 2 * math.pi
    exponent = 2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half
    angles = place[:, None] / TEMPERATURE**exponent
    waves = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)  # [side, half]
    rows, columns = waves[:, None].expand(side, side, half), waves[None].expand(side, side, half)
    return torch.cat([rows, columns], 2).flatten(0, 1).to(dtype)


_kept_position = cache(_position)


class Attention(nn.Module):
    """Multi-head attention with packed input projections."""

    def __init__(self, width: int, heads: int, ops: SimpleNamespace):
        super().__init__()
        self.heads, self.ops = heads, ops
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None = None) -> Tensor:
        """The answer [B, N, C] of `keys` and `values` [B, S, C] to `queries` [B, N, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, keys, values), weights, biases)
        )
        return self.out_proj(self.ops.masked_attention(q, k, v, blocked).transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__()
        self.self_attn = Attention(config.width, config.heads, ops)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        placed = content + position
        return self.norm(content + self.self_attn(placed, placed, content))


class CrossAttention(nn.Module):
    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__()
        self.multihead_attn = Attention(config.width, config.heads, ops)
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, content: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, blocked: Tensor
    ) -> Tensor:
        return self.norm(content + self.multihead_attn(content + position, memory + memory_position, memory, blocked))


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, content: Tensor) -> Tensor:
        return self.norm(content + self.linear2(F.relu(self.linear1(content))))


class MaskEmbedding(nn.Module):
    """Three linear layers with ReLU between, from a query to the mask features' channels."""

    def __init__(self, width: int, mask_dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, mask_dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
