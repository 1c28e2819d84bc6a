"""An image plus a residual and a bias, with the statistics of what comes out, which the next group norm reads."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("add_statistics", 8, BLOCK_C=64)}
CHUNK = 128  # cells that have one mean and one spread a channel, in every operation that writes or reads statistics


def reference(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` [B, C, h, w] plus `residual` of its shape and `bias` [C], and the statistics [2, B, chunks, C] of the sum."""
    x = x if residual is None else x + residual
    x = x if bias is None else x + bias[:, None, None]
    return x, take_statistics(x)


def take_statistics(x: Tensor) -> Tensor:
    """Means, and sums of squares around them, of every channel over each CHUNK cells of `x` [B, C, h, w], in fp32."""
    cells = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    means = torch.stack([part.mean(2) for part in cells.split(CHUNK, 2)], 1)
    parts = zip(cells.split(CHUNK, 2), means.unbind(1))
    return torch.stack([means, torch.stack([(part - mean[..., None]).square().sum(2) for part, mean in parts], 1)])


def empty_statistics(x: Tensor, channels: int) -> Tensor:
    """Room for the statistics of an image with as many cells as `x` [B, S, ...] has rows."""
    return x.new_empty((2, len(x), ceil_divide(x.shape[1], CHUNK), channels), dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """The cells [B, S, C] of an image [B, C, h, w], without a copy where it is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


@jit
def _add_statistics_kernel(
    x_ptr,  # [B, S, C]
    residual_ptr,  # [B, S, C], or None
    bias_ptr,  # [C], or None
    out_ptr,  # [B, S, C], None where nothing is added
    mean_ptr,  # [B, chunks, C] fp32
    spread_ptr,  # [B, chunks, C] fp32
    channels,
    cells,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    cell = chunk * CHUNK + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    inside = (cell < cells)[:, None] & is_channel[None, :]
    place = (image * cells + cell)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if out_ptr is not None:
        stored = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, stored, mask=inside)
        x = stored.to(tl.float32)
    x = tl.where(inside, x, 0.0)
    mean = tl.sum(x, 0) / tl.minimum(cells - chunk * CHUNK, CHUNK).to(tl.float32)
    distance = tl.where(inside, x - mean[None, :], 0.0)
    row = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean_ptr + row, mean, mask=is_channel)
    tl.store(spread_ptr + row, tl.sum(distance * distance, 0), mask=is_channel)


def fused(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result of `reference`, channels-last; `x` itself where nothing is added."""
    fits = (residual is None or residual.shape == x.shape) and (bias is None or bias.shape == x.shape[1:2])
    if not is_served("add_statistics", x, residual, bias, fits=fits):
        return reference(x, residual, bias)
    (batch, channels, height, width), cells = x.shape, rows(x)
    out = None if residual is None and bias is None else torch.empty_like(cells)
    statistics, sizes = empty_statistics(cells, channels), blocks(BLOCKS, "add_statistics", x)
    grid = statistics.shape[2], ceil_divide(channels, sizes["BLOCK_C"]), batch
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _add_statistics_kernel[grid](
            cells,
            None if residual is None else rows(residual),
            bias,
            out,
            *statistics,
            channels,
            height * width,
            CHUNK=CHUNK,
            BLOCK_S=min(CHUNK, round_up(height * width)),
            **sizes,
        )
    return x if out is None else out.unflatten(1, (height, width)).permute(0, 3, 1, 2), statistics


def probe() -> Probe:
    x, residual = noise(1, 1280, 8, 8), noise(1280, 1, 8, 8).transpose(0, 1)
    return x, residual, noise(1280)
