"""Group normalisation and SiLU in one pass over a channels-last tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads
from datasetdm_fast.kernels.launch import (
    block_sizes,
    blocks,
    ceil_divide,
    is_served,
    jit,
    plane_strides,
    round_up,
    tl,
)
from datasetdm_fast.kernels.noise import noise

DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("group_norm_silu", 4, BLOCK_S=64, BLOCK_C=64)
    | block_sizes("group_norm_silu combine", 4, BLOCK_N=16)
}


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True) -> Tensor:
    """SiLU of the normalised `x` [B, C, h, w]; without SiLU where the norm stands alone."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if has_silu else x


def native(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True, *, in_place: bool = False
) -> Tensor:
    """`reference` on a CPU over a channels-last image, from csrc/network_ops.cpp: statistics, norm and SiLU without a
    map between; `in_place` in the memory of the image, where that lies as it is read.
    """
    fits = x.ndim == 4 and weight.shape == bias.shape == x.shape[1:2]
    if not fits or not is_native(weight, bias) or not is_native(x.permute(0, 2, 3, 1)) or x.dtype != weight.dtype:
        return reference(x, weight, bias, groups, eps, has_silu)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
    places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    _C.group_norm(STORAGES[x.dtype], *places, batch, height * width, channels, groups, eps, has_silu, threads(x))
    return out


@jit
def _group_norm_silu_sums_kernel(
    x_ptr,  # [B, C, S]
    mean_ptr,  # [B, chunks, C] fp32, of the cells of one chunk
    spread_ptr,  # [B, chunks, C] fp32, sum of squares around that mean
    channels,
    cells,
    stride_image,
    stride_channel,
    stride_cell,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    cell = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cell < cells)[:, None] & (channel < channels)[None, :]
    place = image * stride_image + cell[:, None] * stride_cell + channel[None, :] * stride_channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(cells - chunk * BLOCK_S, BLOCK_S).to(tl.float32)
    mean = tl.sum(x, 0) / count
    distance = tl.where(inside, x - mean[None, :], 0.0)
    row = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean_ptr + row, mean, mask=channel < channels)
    tl.store(spread_ptr + row, tl.sum(distance * distance, 0), mask=channel < channels)


@jit
def _group_norm_silu_combine_kernel(
    mean_ptr,  # [B, chunks, C] fp32
    spread_ptr,  # [B, chunks, C] fp32
    weight_ptr,  # [C]
    centre_ptr,  # [B, C] fp32
    scale_ptr,  # [B, C] fp32
    channels,
    cells,
    chunks,
    width,  # channels of a group
    eps,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    group, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_G)
    channel = group * width + lane
    is_ours = lane < width
    first = (image * chunks + tl.arange(0, BLOCK_N))[:, None] * channels + channel[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        inside = (chunk < chunks)[:, None] & is_ours[None, :]
        row = first + tl.cast(start, tl.int64) * channels
        count = tl.minimum(cells - chunk * CHUNK, CHUNK).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0)
        total += tl.where(inside, mean * count[:, None], 0.0)
    size = width * 1.0 * cells
    centre = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        inside = (chunk < chunks)[:, None] & is_ours[None, :]
        row = first + tl.cast(start, tl.int64) * channels
        count = tl.minimum(cells - chunk * CHUNK, CHUNK).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0)
        spread = tl.load(spread_ptr + row, mask=inside, other=0.0)
        total += tl.where(inside, spread + count[:, None] * (mean - centre) * (mean - centre), 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / size
    weight = tl.load(weight_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)
    tl.store(centre_ptr + image * channels + channel, centre, mask=is_ours)
    tl.store(scale_ptr + image * channels + channel, weight * tl.rsqrt(variance + eps), mask=is_ours)


@jit
def _group_norm_silu_kernel(
    x_ptr,  # [B, C, S]
    centre_ptr,  # [B, C] fp32
    scale_ptr,  # [B, C] fp32
    bias_ptr,  # [C]
    out_ptr,  # [B, C, S]
    channels,
    cells,
    stride_image,
    stride_channel,
    stride_cell,
    out_stride_image,
    out_stride_channel,
    out_stride_cell,
    HAS_SILU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cell < cells)[:, None] & (channel < channels)[None, :]
    is_channel = channel < channels
    place = image * stride_image + cell[:, None] * stride_cell + channel[None, :] * stride_channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(centre_ptr + image * channels + channel, mask=is_channel, other=0.0)
    scale = tl.load(scale_ptr + image * channels + channel, mask=is_channel, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    y = (x - centre[None, :]) * scale[None, :] + bias[None, :]
    if HAS_SILU:
        y = y / (1.0 + tl.exp(-y))
    place = image * out_stride_image + cell[:, None] * out_stride_cell + channel[None, :] * out_stride_channel
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True) -> Tensor:
    """The result of `reference`; both layouts are served, channels-last is the fast one."""
    batch, channels, height, width = x.shape
    fits = channels % groups == 0 and weight.shape == bias.shape == (channels,)
    if not is_served("group_norm_silu", x, weight, bias, fits=fits):
        return reference(x, weight, bias, groups, eps, has_silu)
    cells, sizes = height * width, dict(blocks(BLOCKS, "group_norm_silu", x))
    sizes["BLOCK_C"] = min(sizes["BLOCK_C"], round_up(channels, 1))
    strides, chunks = plane_strides("group_norm_silu", x), ceil_divide(cells, sizes["BLOCK_S"])
    grid = (chunks, ceil_divide(channels, sizes["BLOCK_C"]), batch)
    mean, spread = torch.empty((2, batch, chunks, channels), dtype=torch.float32, device=x.device)
    centre, scale = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    out_strides = plane_strides("group_norm_silu", out)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _group_norm_silu_sums_kernel[grid](x, mean, spread, channels, cells, *strides, **sizes)
        _group_norm_silu_combine_kernel[groups, batch](
            mean,
            spread,
            weight,
            centre,
            scale,
            channels,
            cells,
            chunks,
            channels // groups,
            eps,
            CHUNK=sizes["BLOCK_S"],
            BLOCK_G=round_up(channels // groups, 1),
            **blocks(BLOCKS, "group_norm_silu combine", x),
        )
        _group_norm_silu_kernel[grid](
            x, centre, scale, bias, out, channels, cells, *strides, *out_strides, HAS_SILU=has_silu, **sizes
        )
    return out


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    x = noise(1, 1280, 16, 16).contiguous(memory_format=torch.channels_last)
    return x, noise(1280) + 1, noise(1281)[1:], 32, 1e-5
