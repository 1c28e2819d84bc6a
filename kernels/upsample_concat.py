"""Several levels brought to one size and joined along their channels: upsampling and concatenation in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import BATCH, FEATURES, Case, noise
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl

DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("upsample_concat", 4, BLOCK_S=32, BLOCK_C=64)}


def reference(levels: Sequence[Tensor], side: int) -> Tensor:
    """[B, sum of C, side, side] of `levels`, each [B, C, h, w], resized bilinearly and concatenated."""
    return torch.cat([resize(level, side) for level in levels], 1)


@jit
def _upsample_concat_kernel(
    x_ptr,  # [B, C, h, w]
    out_ptr,  # [B, side, side, all channels], from the first channel that is written here
    height,
    width,
    side,
    channels,
    all_channels,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cell < side * side)[:, None] & (channel < channels)[None, :]
    row = tl.maximum((cell // side + 0.5) * (height * 1.0 / side) - 0.5, 0.0)
    column = tl.maximum((cell % side + 0.5) * (width * 1.0 / side) - 0.5, 0.0)
    top, left = tl.minimum(row.to(tl.int64), height - 1), tl.minimum(column.to(tl.int64), width - 1)
    bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
    down, across = (row - top.to(tl.float32))[:, None], (column - left.to(tl.float32))[:, None]
    x_ptr += image * stride_image + channel[None, :] * stride_channel
    upper, lower = (top * stride_row)[:, None], (bottom * stride_row)[:, None]
    near, far = (left * stride_column)[:, None], (right * stride_column)[:, None]
    a = tl.load(x_ptr + upper + near, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + upper + far, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + lower + near, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(x_ptr + lower + far, mask=inside, other=0.0).to(tl.float32)
    first, second = a + across * (b - a), c + across * (d - c)
    place = (image * side * side + cell)[:, None] * all_channels + channel[None, :]
    tl.store(out_ptr + place, (first + down * (second - first)).to(out_ptr.dtype.element_ty), mask=inside)


def fused(levels: Sequence[Tensor], side: int) -> Tensor:
    """What `reference` says, channels-last in memory: each level is written where it lies in the joined tensor, at any
    strides.
    """
    first = levels[0]
    if any(level.ndim != 4 or len(level) != len(first) or level.dtype != first.dtype for level in levels):
        shapes = [f"{list(level.shape)} {level.dtype}" for level in levels]
        raise ValueError(f"upsample_concat: {', '.join(shapes)} are not images [B, C, h, w] of one batch and dtype")
    if not is_served("upsample_concat", *levels):
        return reference(levels, side)
    channels, start = sum(level.shape[1] for level in levels), 0
    out, sizes = first.new_empty((len(first), side, side, channels)), blocks(BLOCKS, "upsample_concat", first)
    for level in levels:
        grid = ceil_divide(side * side, sizes["BLOCK_S"]), ceil_divide(level.shape[1], sizes["BLOCK_C"]), len(level)
        count, height, width = level.shape[1:]
        with torch.cuda.device_of(first):  # Triton launches on the current device of the thread
            _upsample_concat_kernel[grid](
                level, out[..., start:], height, width, side, count, channels, *level.stride(), **sizes
            )
        start += count
    return out.permute(0, 3, 1, 2)


def sizes(empty: Callable) -> Iterator[tuple[str, tuple]]:
    """The two joins of a decoder that resize: mid level and what lies below it, high level and both."""
    for side, below in ((32, FEATURES), (64, 2 * FEATURES)):
        levels = [
            empty(BATCH, side // 2, side // 2, count).permute(0, 3, 1, 2) for count in (below, FEATURES)
        ]  # the lower ones lie a level deeper
        yield f"{below} and {FEATURES} channels at {side} cells", (levels, side)


def cases() -> list[Case]:
    def levels(batch, *shapes):
        return [noise(batch, *shape) for shape in shapes]

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    parts = noise(2, 6, 6, 40).permute(0, 3, 1, 2)[:, 3:37]  # what one decoder reads of the sums of several
    return [
        Case("smallest: one cell", (levels(1, (1, 1, 1)), 1), (1, 1, 1, 1)),
        Case("up, down and as it is, odd widths", (levels(2, (5, 3, 3), (7, 9, 8), (3, 5, 5)), 5), (2, 15, 5, 5)),
        Case("a slice of channels-last sums beside planes", ([noise(2, 33, 3, 3), parts], 6), (2, 67, 6, 6)),
        Case(
            "demo's decoders: the high level doubled",
            ([channels_last(x) for x in levels(1, (96, 8, 8), (48, 16, 16))], 16),
            (1, 144, 16, 16),
        ),
    ]
