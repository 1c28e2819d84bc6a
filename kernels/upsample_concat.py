"""Two levels brought to one size and joined along their channels: upsampling and concatenation in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl
from datasetdm_fast.kernels.noise import Probe, noise

LARGEST_RESIZED = 2**31 - 2  # numbers that PyTorch's resize of channels-last images takes or makes at once on a GPU


def resize(x: Tensor, side: int) -> Tensor:
    """`x` [B, C, h, w] at side x side cells."""
    if x.shape[-2:] == (side, side):
        return x
    if isinstance(x, Tensor) and x.is_cuda and len(x) > 1:  # not of a graph that is written
        numbers = x.shape[1] * max(side**2, x.shape[2] * x.shape[3])
        if len(x) * numbers > LARGEST_RESIZED:
            return torch.cat([resize(part, side) for part in x.split(max(LARGEST_RESIZED // numbers, 1))])
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("upsample_concat", 4, BLOCK_S=32, BLOCK_C=64)}


def reference(levels: Sequence[Tensor], side: int) -> Tensor:
    """[B, sum of C, side, side] of `levels`, each [B, C, h, w], resized bilinearly and concatenated."""
    return torch.cat([resize(level, side) for level in levels], 1)


@jit
def resize_level(
    x_ptr, place, inside, row, column, channel, height, width, stride_channel, stride_row, stride_column, side
):  # the cells [S, C] of one image of one level
    row = tl.maximum((row + 0.5) * (height * 1.0 / side) - 0.5, 0.0)
    column = tl.maximum((column + 0.5) * (width * 1.0 / side) - 0.5, 0.0)
    top, left = tl.minimum(row.to(tl.int64), height - 1), tl.minimum(column.to(tl.int64), width - 1)
    bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
    down, across = (row - top.to(tl.float32))[:, None], (column - left.to(tl.float32))[:, None]
    x_ptr += place + channel[None, :] * stride_channel
    upper, lower = (top * stride_row)[:, None], (bottom * stride_row)[:, None]
    near, far = (left * stride_column)[:, None], (right * stride_column)[:, None]
    a = tl.load(x_ptr + upper + near, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + upper + far, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + lower + near, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(x_ptr + lower + far, mask=inside, other=0.0).to(tl.float32)
    first, second = a + across * (b - a), c + across * (d - c)
    return first + down * (second - first)


@jit
def _upsample_concat_kernel(
    x_ptr,  # [B, C, h, w]
    second_ptr,  # [B, D, k, l]
    out_ptr,  # [B, side, side, C + D]
    height,
    width,
    second_height,
    second_width,
    side,
    channels,
    second_channels,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    second_stride_image,
    second_stride_channel,
    second_stride_row,
    second_stride_column,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, blocks = tl.program_id(2).to(tl.int64), tl.cdiv(channels, BLOCK_C)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row, column, all_channels = cell // side, cell % side, channels + second_channels
    out_ptr += (image * side * side + cell)[:, None] * all_channels
    if tl.program_id(1) < blocks:
        channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (cell < side * side)[:, None] & (channel < channels)[None, :]
        y = resize_level(
            x_ptr, image * stride_image, inside, row, column, channel, height, width, stride_channel, stride_row,
            stride_column, side,
        )  # fmt: skip
        tl.store(out_ptr + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        channel = (tl.program_id(1) - blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (cell < side * side)[:, None] & (channel < second_channels)[None, :]
        y = resize_level(
            second_ptr, image * second_stride_image, inside, row, column, channel, second_height, second_width,
            second_stride_channel, second_stride_row, second_stride_column, side,
        )  # fmt: skip
        tl.store(out_ptr + channels + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(levels: Sequence[Tensor], side: int) -> Tensor:
    """The result of `reference` for two levels, channels-last in memory, in one pass."""
    first = levels[0]
    fits = len(levels) == 2 and all(level.ndim == 4 and len(level) == len(first) for level in levels)
    if not is_served("upsample_concat", *levels, fits=fits and levels[1].dtype == first.dtype):
        return reference(levels, side)
    counts, sizes = [level.shape[1] for level in levels], blocks(BLOCKS, "upsample_concat", first)
    out = first.new_empty((len(first), side, side, sum(counts)))
    columns = sum(ceil_divide(count, sizes["BLOCK_C"]) for count in counts)
    strides = [stride for level in levels for stride in level.stride()]
    extents = [extent for level in levels for extent in level.shape[2:]]
    with torch.cuda.device_of(first):  # Triton launches on the current device of the thread
        _upsample_concat_kernel[ceil_divide(side * side, sizes["BLOCK_S"]), columns, len(first)](
            *levels, out, *extents, side, *counts, *strides, **sizes
        )
    return out.permute(0, 3, 1, 2)


def probe() -> Probe:
    below, level = (
        noise(1, *shape).contiguous(memory_format=torch.channels_last) for shape in ((96, 8, 8), (48, 16, 16))
    )
    return [below, level], 16
