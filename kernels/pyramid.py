"""One level of the captured pyramid brought to one width: resize every feature and map, concatenate, convolve 1x1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.bilinear import neighbours, resize
from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, tl


def planes(attention: Tensor) -> Tensor:
    """Maps [B, heads, S, T] as channels [B, heads * T, h, w], the token index running fastest."""
    batch, heads, cells, tokens = attention.shape
    side = int(cells**0.5)
    return attention.transpose(2, 3).reshape(batch, heads * tokens, side, side)


def reference(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """The projected level [B, F, side, side] of `features` [B, 2C, h, w] and `maps` [B, heads, S, T] under `weight` [F,
    channels, 1, 1].
    """
    tensors = [*features, *(planes(layer) for layer in maps)]
    return F.conv2d(torch.cat([resize(x, side) for x in tensors], 1), weight)


def add_product(total: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`total` [B, F, S] with `weight` [F, C] times `x` [B, C, S] added in place; narrow types are multiplied as they
    are and summed in fp32.
    """
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
    """The same level, each tensor projected where it lies and only the sum resized: both are linear and act on
    different axes.
    """
    widths = [x.shape[1] for x in features] + [layer.shape[1] * layer.shape[3] for layer in maps]
    parts = weight.flatten(1).split(widths, 1)
    total = added_features(features, parts)
    for layer, part in zip(maps, parts[len(features) :]):
        for head, tokens in enumerate(part.split(layer.shape[3], 1)):
            total = add_product(total, tokens, layer[:, head].transpose(1, 2))
    return resize(total.to(weight.dtype).unflatten(2, features[0].shape[-2:]), side)


def without_maps(
    features: Sequence[Tensor], attention: Sequence[tuple[Tensor, Tensor, Tensor]], weight: Tensor, side: int
) -> tuple[Tensor, list[Tensor]]:
    """The same level and the answers [B, heads, S, d] of its cross-attentions, whose maps exist one head at a time: P
    [V | W] for each.

    `attention` holds the queries [B, heads, S, d], keys and values [B, heads, T, d] of each layer.
    """
    widths = [x.shape[1] for x in features] + [k.shape[1] * k.shape[2] for _, k, _ in attention]
    parts = weight.flatten(1).split(widths, 1)
    total, answers = added_features(features, parts), []
    for (q, k, v), part in zip(attention, parts[len(features) :]):
        answer = torch.empty_like(q.transpose(2, 3), memory_format=torch.contiguous_format)
        for head, tokens in enumerate(part.split(k.shape[2], 1)):
            scores = torch.matmul(
                k[:, head] * q.shape[-1] ** -0.5, q[:, head].transpose(1, 2)
            )  # [B, T, S]: the map lies as the projection reads it
            attended = torch.softmax(scores, 1, dtype=total.dtype).to(v.dtype)
            answer[:, head] = torch.matmul(v[:, head].transpose(1, 2), attended)
            total = add_product(total, tokens, attended)
        answers.append(answer.transpose(2, 3))
    return resize(total.to(weight.dtype).unflatten(2, features[0].shape[-2:]), side), answers


@jit
def _pyramid_kernel(
    x_ptr,  # [B, parts, C, S]: a feature has one part, maps have one for each head
    weight_ptr,  # [F, parts * C], a slice of the level's weight
    total_ptr,  # [B, S, F] fp32
    parts,
    channels,
    cells,
    features,
    stride_image,
    stride_part,
    stride_channel,
    stride_cell,
    weight_stride_feature,
    IS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    feature = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    lane = tl.arange(0, BLOCK_C).to(tl.int64)
    is_cell, is_feature = cell < cells, feature < features
    x_ptr += image * stride_image + cell[:, None] * stride_cell
    weight_ptr += feature[None, :] * weight_stride_feature
    total = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for _ in range(parts):
        for start in range(0, channels, BLOCK_C):
            channel = start + lane
            is_channel = channel < channels
            x = tl.load(
                x_ptr + channel[None, :] * stride_channel, mask=is_cell[:, None] & is_channel[None, :], other=0.0
            )
            weight = tl.load(weight_ptr + channel[:, None], mask=is_channel[:, None] & is_feature[None, :], other=0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_ptr += stride_part
        weight_ptr += channels
    inside = is_cell[:, None] & is_feature[None, :]
    place = (image * cells + cell)[:, None] * features + feature[None, :]
    if not IS_FIRST:
        total += tl.load(total_ptr + place, mask=inside, other=0.0)
    tl.store(total_ptr + place, total, mask=inside)


@jit
def _pyramid_resize_kernel(
    total_ptr,  # [B, height, width, F] fp32
    out_ptr,  # [B, side, side, F]
    height,
    width,
    side,
    features,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    feature = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (cell < side * side)[:, None] & (feature < features)[None, :]
    top, bottom, down = neighbours(cell // side, height, side)
    left, right, across = neighbours(cell % side, width, side)
    total_ptr += image * height * width * features + feature[None, :]
    a = tl.load(total_ptr + (top * width + left)[:, None] * features, mask=inside, other=0.0)
    b = tl.load(total_ptr + (top * width + right)[:, None] * features, mask=inside, other=0.0)
    c = tl.load(total_ptr + (bottom * width + left)[:, None] * features, mask=inside, other=0.0)
    d = tl.load(total_ptr + (bottom * width + right)[:, None] * features, mask=inside, other=0.0)
    upper, lower = a + across[:, None] * (b - a), c + across[:, None] * (d - c)
    place = (image * side * side + cell)[:, None] * features + feature[None, :]
    tl.store(out_ptr + place, (upper + down[:, None] * (lower - upper)).to(out_ptr.dtype.element_ty), mask=inside)


def fused(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor, side: int) -> Tensor:
    """What `reference` says, channels-last in memory: every tensor is read once, and only their sum, a few channels
    wide, is resized.
    """
    check(features, maps, weight)
    if not is_served("pyramid", *features, *maps, weight):
        return reference(features, maps, weight, side)
    tensors = [x.flatten(2)[:, None] for x in features] + [
        layer.transpose(2, 3) for layer in maps
    ]  # [B, 1 or heads, C or T, S]
    flat, (height, width), sizes = weight.flatten(1).contiguous(), features[0].shape[2:], blocks("pyramid", weight)
    batch, wide, cells, start = len(features[0]), len(weight), height * width, 0
    total = torch.empty((batch, cells, wide), dtype=torch.float32, device=weight.device)
    grid = (ceil_divide(cells, sizes["BLOCK_S"]), ceil_divide(wide, sizes["BLOCK_F"]), batch)
    for x in tensors:
        (_, parts, channels, _), options = x.shape, {"IS_FIRST": start == 0, "PRECISION": PRECISION, **sizes}
        _pyramid_kernel[grid](
            x, flat[:, start:], total, parts, channels, cells, wide, *x.stride(), flat.stride(0), **options
        )
        start += parts * channels
    out, sizes = weight.new_empty((batch, side, side, wide)), blocks("pyramid resize", weight)
    grid = (ceil_divide(side * side, sizes["BLOCK_S"]), ceil_divide(wide, sizes["BLOCK_F"]), batch)
    _pyramid_resize_kernel[grid](total, out, height, width, side, wide, **sizes)
    return out.permute(0, 3, 1, 2)


def check(features: Sequence[Tensor], maps: Sequence[Tensor], weight: Tensor) -> None:
    """Refuses tensors that are not one level of one weight."""
    if not features:
        raise ValueError("pyramid: a level without features has no size")
    cells, channels = (
        features[0].shape[2] * features[0].shape[3],
        sum(x.shape[1] for x in features) + sum(x.shape[1] * x.shape[3] for x in maps),
    )
    if any(x.shape[0] != features[0].shape[0] or x.shape[2:] != features[0].shape[2:] for x in features) or any(
        x.shape[2] != cells for x in maps
    ):
        raise ValueError(
            f"pyramid: {[list(x.shape) for x in [*features, *maps]]} are not features and maps of one level"
        )
    if weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"pyramid: a weight {list(weight.shape)} does not fit {channels} channels")
    if any(x.dtype != weight.dtype for x in [*features, *maps]):
        raise ValueError(
            f"pyramid: features and maps are {sorted({str(x.dtype) for x in [*features, *maps]})}, expected the "
            f"weight's {weight.dtype}"
        )


def cases() -> list[Case]:
    def level(batch, width, side, channels, heads, tokens, out):
        features = [noise(batch, c, side, side) for c in channels]
        maps = [torch.softmax(noise(batch, h, side * side, tokens), -1) for h in heads]
        return features, maps, noise(width, sum(channels) + sum(heads) * tokens, 1, 1, scale=0.05), out

    def channels_last(inputs):
        return [x.contiguous(memory_format=torch.channels_last) for x in inputs[0]], *inputs[1:]

    return [
        Case("smallest: one feature, one map, one cell", level(1, 1, 1, (2,), (1,), 1, 1), (1, 1, 1, 1)),
        Case("widths no block size divides", level(2, 7, 3, (5, 11), (3,), 13, 5), (2, 7, 5, 5)),
        Case("channels last, resized down", channels_last(level(1, 9, 6, (20, 34), (2,), 5, 4)), (1, 9, 4, 4)),
        Case("no resize at the highest level", level(3, 64, 16, (96, 96, 160), (3, 3, 3), 77, 16), (3, 64, 16, 16)),
        Case("SD 1.x low level, doubled", level(1, 256, 8, (2560, 2560), (8,), 77, 16), (1, 256, 16, 16)),
    ]
