"""One level of the captured pyramid brought to one width: resize every feature and map, concatenate, convolve 1x1."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.upsample_concat import resize


def planes(attention: Tensor) -> Tensor:
    """Maps [B, heads, S, T] as channels [B, heads * T, h, w], the token index running fastest."""
    batch, heads, cells, tokens = attention.shape
    side = int(cells**0.5)
    return attention.transpose(2, 3).reshape(batch, heads * tokens, side, side)


def reference(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """The level [B, F, side, side] of `features` [B, 2C, h, w] and `maps` [B, heads, S, T] under `weight`."""
    tensors = [*features, *(planes(layer) for layer in maps)]
    return F.conv2d(torch.cat([resize(x, side) for x in tensors], 1), weight)


def add_product(total: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`total` [B, F, S] with `weight` [F, C] times `x` [B, C, S] added in place, summed in its own type."""
    if total.dtype == x.dtype:
        return total.baddbmm_(weight.expand(len(x), *weight.shape), x)
    return total.add_(torch.matmul(weight, x))


def plain(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """The level of `reference`, each tensor projected where it lies and the sum resized, as both are linear."""
    widths = [x.shape[1] for x in features] + [layer.shape[1] * layer.shape[3] for layer in maps]
    parts = weight.flatten(1).split(widths, 1)
    first, exact = features[0], torch.promote_types(features[0].dtype, torch.float32)
    total = first.new_zeros((len(first), len(weight), first.shape[-2] * first.shape[-1]), dtype=exact)
    for x, part in zip(features, parts):
        total = add_product(total, part, x.flatten(2))
    for layer, part in zip(maps, parts[len(features) :]):
        for head, tokens in enumerate(part.split(layer.shape[3], 1)):
            total = add_product(total, tokens, layer[:, head].transpose(1, 2))
    return resize(total.to(weight.dtype).unflatten(2, first.shape[-2:]), side)
