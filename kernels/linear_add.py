"""Products added to a residual, with the statistics of the sum; several inputs are never concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.add_statistics import CHUNK, empty_statistics, take_statistics
from datasetdm_fast.kernels.described_product import SUFFIX, find_described_sizes, multiply
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("linear_add", 8, 3, bits=(16,), BLOCK_C=128, BLOCK_K=64)
    | block_sizes("linear_add", 8, 2, bits=(32,), BLOCK_C=64, BLOCK_K=32),
    "sm_90": block_sizes("linear_add", 4, 3, bits=(16,), BLOCK_C=64, BLOCK_K=64)
    | block_sizes(f"linear_add {SUFFIX}", 4, 4, bits=(16,), BLOCK_C=64, BLOCK_K=64, PROGRAMS=2),
}


def reference(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """`residual` [B, S, N] plus `parts` [B, S, K_i] under `weight` and `bias`, and statistics [2, B, chunks, N]."""
    out = F.linear(torch.cat(list(parts), -1), weight, bias) + residual
    return out, take_statistics(out.transpose(1, 2)[..., None])


@jit
def _add_product(
    total,
    x_ptr,
    weight_ptr,
    row,
    column,
    is_row,
    is_column,
    width,
    weight_stride,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`total` plus rows [S, K] times columns of [N, K]."""
    lane = tl.arange(0, BLOCK_K)
    for start in range(0, width, BLOCK_K):
        inner = start + lane
        is_inner = inner < width
        x = tl.load(x_ptr + row[:, None] * width + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + column[None, :] * weight_stride + inner[:, None],
            mask=is_column[None, :] & is_inner[:, None],
            other=0.0,
        )
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    return total


@jit
def _linear_add_kernel(
    x_ptr,  # [B, S, K]
    weight_ptr,  # [N, K] of rows `weight_stride` apart
    second_ptr,  # [B, S, L], or None
    second_weight_ptr,  # [N, L] of rows `weight_stride` apart, or None
    bias_ptr,  # [N], or None
    residual_ptr,  # [B, S, N]
    out_ptr,  # [B, S, N]
    mean_ptr,  # [B, chunks, N] fp32
    spread_ptr,  # [B, chunks, N] fp32
    cells,
    channels,
    width,
    second_width,
    weight_stride,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Columns run fastest, so that the blocks of one chunk find its rows in the cache.
    chunk, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    cell = chunk * CHUNK + tl.arange(0, BLOCK_S)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_cell, is_channel, row = cell < cells, channel < channels, image * cells + cell
    inside = is_cell[:, None] & is_channel[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    total = _add_product(
        total, x_ptr, weight_ptr, row, channel, is_cell, is_channel, width, weight_stride, PRECISION, BLOCK_K
    )
    if second_ptr is not None:
        total = _add_product(
            total,
            second_ptr,
            second_weight_ptr,
            row,
            channel,
            is_cell,
            is_channel,
            second_width,
            weight_stride,
            PRECISION,
            BLOCK_K,
        )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * channels + channel[None, :]
    total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, stored, mask=inside)
    total = tl.where(inside, stored.to(tl.float32), 0.0)
    mean = tl.sum(total, 0) / tl.minimum(cells - chunk * CHUNK, CHUNK).to(tl.float32)
    distance = tl.where(inside, total - mean[None, :], 0.0)
    line = (image * tl.num_programs(1) + chunk) * channels + channel
    tl.store(mean_ptr + line, mean, mask=is_channel)
    tl.store(spread_ptr + line, tl.sum(distance * distance, 0), mask=is_channel)


def fused(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `reference`, in one pass: neither the concatenation nor the product is written."""
    whole = (*parts[0].shape[:2], len(weight))
    fits = len(parts) in (1, 2) and weight.shape[1] == sum(part.shape[2] for part in parts) and residual.shape == whole
    fits = fits and all(part.shape[:2] == whole[:2] for part in parts) and (bias is None or bias.shape == whole[2:])
    if not is_served("linear_add", *parts, weight, residual, bias, fits=fits):
        return reference(parts, weight, bias, residual)
    first, *others = (part.contiguous() for part in parts)
    weight, residual = weight.contiguous(), residual.contiguous()
    (batch, cells, width), channels = first.shape, len(weight)
    out, statistics = torch.empty_like(residual), empty_statistics(first, channels)
    rows = min(CHUNK, round_up(cells))
    described = find_described_sizes(BLOCKS, "linear_add", first, weight, *others, residual)
    if described and cells % rows == 0:
        second = others[0] if others else None
        described = described | {"BLOCK_S": rows}  # the row of BLOCKS stays as it is
        multiply(described, first, weight, bias, out, second=second, residual=residual, statistics=statistics)
        return out, statistics
    sizes = blocks(BLOCKS, "linear_add", first, BLOCK_C=channels, BLOCK_K=width)
    second = (others[0], weight[:, width:]) if others else (None, None)
    grid = ceil_divide(channels, sizes["BLOCK_C"]), statistics.shape[2], batch
    with torch.cuda.device_of(first):  # Triton launches on the current device of the thread
        _linear_add_kernel[grid](
            first,
            weight[:, :width],
            *second,
            bias,
            residual,
            out,
            *statistics,
            cells,
            channels,
            width,
            weight.shape[1] - width,
            weight.shape[1],
            PRECISION=PRECISION,
            CHUNK=CHUNK,
            BLOCK_S=rows,
            **sizes,
        )
    return out, statistics


def probe(cells: int = 144) -> Probe:
    """Inputs on which a device is checked against the reference; their last chunk is not whole."""
    weight, residual = noise(320, 960, scale=960**-0.5), noise(1, cells, 320, 1)[..., 0]
    return [noise(1, cells, 640), noise(1, cells, 320)], weight, noise(320), residual


def described_probe() -> Probe:
    """Inputs of whole chunks, as the kernel by descriptors takes them."""
    return probe(CHUNK)
