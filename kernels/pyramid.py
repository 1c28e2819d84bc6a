"""One level of the captured pyramid brought to one width: resize every feature and map, concatenate, convolve 1x1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import Case, noise


def planes(attention: Tensor) -> Tensor:
    """Maps [B, heads, S, T] as channels [B, heads * T, h, w], the token index running fastest."""
    batch, heads, cells, tokens = attention.shape
    side = int(cells**0.5)
    return attention.transpose(2, 3).reshape(batch, heads * tokens, side, side)


def reference(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """The projected level [B, F, side, side] of `features` [B, 2C, h, w] and `maps` [B, heads, S, T] under `weight` [F, channels, 1, 1]."""
    tensors = [*features, *(planes(layer) for layer in maps)]
    return F.conv2d(torch.cat([resize(x, side) for x in tensors], 1), weight)


def add_product(total: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`total` [B, F, S] with `weight` [F, C] times `x` [B, C, S] added in place; narrow types are multiplied as they are and summed in fp32."""
    if total.dtype == x.dtype:
        return total.baddbmm_(weight.expand(len(x), *weight.shape), x)
    return total.add_(torch.matmul(weight, x))


def added_features(features: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The sum [B, F, h w] of every feature under its part [F, C] of the level's weight."""
    first, exact = features[0], torch.promote_types(features[0].dtype, torch.float32)
    total = first.new_zeros((len(first), len(parts[0]), first.shape[-2] * first.shape[-1]), dtype=exact)
    for x, part in zip(features, parts):
        total = add_product(total, part, x.flatten(2))
    return total


def projected(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """The same level, each tensor projected where it lies and only the sum resized: both are linear and act on different axes."""
    widths = [x.shape[1] for x in features] + [layer.shape[1] * layer.shape[3] for layer in maps]
    parts = weight.flatten(1).split(widths, 1)
    total = added_features(features, parts)
    for layer, part in zip(maps, parts[len(features) :]):
        for head, tokens in enumerate(part.split(layer.shape[3], 1)):
            total = add_product(total, tokens, layer[:, head].transpose(1, 2))
    return resize(total.to(weight.dtype).unflatten(2, features[0].shape[-2:]), side)


def without_maps(features: Sequence[Tensor], attention: Sequence[tuple[Tensor, Tensor, Tensor]], weight: Tensor, side: int) -> tuple[Tensor, list[Tensor]]:
    """The same level and the answers [B, heads, S, d] of its cross-attentions, whose maps exist one head at a time: P [V | W] for each.

    `attention` holds the queries [B, heads, S, d], keys and values [B, heads, T, d] of each layer.
    """
    widths = [x.shape[1] for x in features] + [k.shape[1] * k.shape[2] for _, k, _ in attention]
    parts = weight.flatten(1).split(widths, 1)
    total, answers = added_features(features, parts), []
    for (q, k, v), part in zip(attention, parts[len(features) :]):
        answer = torch.empty_like(q)
        for head, tokens in enumerate(part.split(k.shape[2], 1)):
            scores = torch.matmul(q[:, head] * q.shape[-1] ** -0.5, k[:, head].transpose(1, 2))
            attended = torch.softmax(scores, -1, dtype=total.dtype).to(v.dtype)  # [B, S, T]
            answer[:, head] = torch.matmul(attended, v[:, head])
            total = add_product(total, tokens, attended.transpose(1, 2))
        answers.append(answer)
    return resize(total.to(weight.dtype).unflatten(2, features[0].shape[-2:]), side), answers


def cases() -> list[Case]:
    def level(batch, width, side, channels, heads, tokens, out):
        features = [noise(batch, c, side, side) for c in channels]
        maps = [torch.softmax(noise(batch, h, side * side, tokens), -1) for h in heads]
        return features, maps, noise(width, sum(channels) + sum(heads) * tokens, 1, 1, scale=0.05), out

    return [
        Case("smallest: one feature, one map, one cell", level(1, 1, 1, (2,), (1,), 1, 1), (1, 1, 1, 1)),
        Case("widths no block size divides", level(2, 7, 3, (5, 11), (3,), 13, 5), (2, 7, 5, 5)),
        Case("no resize at the highest level", level(3, 64, 16, (96, 96, 160), (3, 3, 3), 77, 16), (3, 64, 16, 16)),
        Case("SD 1.x low level, doubled", level(1, 256, 8, (2560, 2560), (8,), 77, 16), (1, 256, 16, 16)),
    ]
