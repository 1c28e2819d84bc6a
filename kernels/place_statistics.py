"""The four places of every doubled cell side by side, with their bias and the statistics of what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.add_statistics import CHUNK, empty_statistics, rows, take_statistics
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("place_statistics", 8, BLOCK_C=64),
    "sm_90": block_sizes("place_statistics", 4, bits=(16,), BLOCK_C=64),
}


def reference(places: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The image [B, C, 2h, 2w] whose cell (2y + r, 2x + c) is cell (y + r, x + c) of the channels 2r + c of `places`
    [B, 4C, h + 1, w + 1], plus `bias` [C]; and its statistics [2, B, chunks, C].
    """
    height, width = (side - 1 for side in places.shape[2:])
    places = places.unflatten(1, (2, 2, -1))
    out = places.new_empty(len(places), 2 * height, 2 * width, len(bias)).permute(0, 3, 1, 2)
    for row in (0, 1):
        for column in (0, 1):
            cells = places[:, row, column, :, row : row + height, column : column + width]
            out[:, :, row::2, column::2] = cells + bias[:, None, None]
    return out, take_statistics(out)


@jit
def _place_statistics_kernel(
    x_ptr,  # [B, h + 1, w + 1, 4C]
    bias_ptr,  # [C]
    out_ptr,  # [B, 2h, 2w, C]
    mean_ptr,  # [B, chunks, C] fp32
    spread_ptr,  # [B, chunks, C] fp32
    channels,
    height,  # of `out`
    width,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, image, cells = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), height * width
    cell = chunk * CHUNK + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    inside = (cell < cells)[:, None] & is_channel[None, :]
    row, column = cell // width, cell % width
    source = (image * (height // 2 + 1) + row // 2 + row % 2) * (width // 2 + 1) + column // 2 + column % 2
    place = (source * 4 + 2 * (row % 2) + column % 2)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    stored = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (image * cells + cell)[:, None] * channels + channel[None, :], stored, mask=inside)
    x = tl.where(inside, stored.to(tl.float32), 0.0)
    mean = tl.sum(x, 0) / tl.minimum(cells - chunk * CHUNK, CHUNK).to(tl.float32)
    distance = tl.where(inside, x - mean[None, :], 0.0)
    line = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean_ptr + line, mean, mask=is_channel)
    tl.store(spread_ptr + line, tl.sum(distance * distance, 0), mask=is_channel)


def fused(places: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `reference`, channels-last, in one pass."""
    batch, wide, height, width = places.shape
    if not is_served("place_statistics", places, bias, fits=wide == 4 * len(bias)):
        return reference(places, bias)
    channels, height, width = len(bias), 2 * (height - 1), 2 * (width - 1)
    out = places.new_empty((batch, height * width, channels))
    statistics, sizes = empty_statistics(out, channels), blocks(BLOCKS, "place_statistics", places)
    grid = statistics.shape[2], ceil_divide(channels, sizes["BLOCK_C"]), batch
    with torch.cuda.device_of(places):  # Triton launches on the current device of the thread
        _place_statistics_kernel[grid](
            rows(places),
            bias,
            out,
            *statistics,
            channels,
            height,
            width,
            CHUNK=CHUNK,
            BLOCK_S=min(CHUNK, round_up(height * width)),
            **sizes,
        )
    return out.unflatten(1, (height, width)).permute(0, 3, 1, 2), statistics


def probe() -> Probe:
    return noise(1, 2560, 9, 9), noise(640)
