"""Batch normalisation of each image alone, without affine, and ReLU."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels import add_statistics, group_norm_silu
from datasetdm_fast.kernels.add_statistics import CHUNK, rows
from datasetdm_fast.kernels.cpu import is_native
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl
from datasetdm_fast.kernels.merge_statistics import MOST_CHUNKS, merge_chunks, merge_statistics
from datasetdm_fast.kernels.noise import Probe, noise

EPS = 1e-4
DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("image_norm", 4, BLOCK_S=64, BLOCK_C=64, BLOCK_N=16),
    "sm_90": block_sizes("image_norm", 2, bits=(16,), BLOCK_S=64, BLOCK_C=64, BLOCK_N=16),
}
SPAN = 256  # cells of a block: reading the statistics again is little beside them


def reference(x: Tensor, has_relu: bool = False) -> Tensor:
    """`x` [B, C, H, W] with zero mean and unit biased variance over H, W of each image; with ReLU where one follows."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + EPS)).to(x.dtype)
    return F.relu(y) if has_relu else y


def native(x: Tensor, has_relu: bool = False) -> Tensor:
    """`reference` on a CPU over a channels-last image: a group norm of csrc with a group a channel."""
    if x.ndim != 4 or not is_native(x.permute(0, 2, 3, 1)):
        return reference(x, has_relu)
    channels = x.shape[1]
    y = group_norm_silu.native(x, *_unchanging(channels, x.dtype), channels, EPS, has_silu=False)
    return y.relu_() if has_relu else y


@cache
def _unchanging(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)


class _TrainedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean((2, 3), keepdim=True)
        centred = wide - mean
        variance = centred.square().mean((2, 3), keepdim=True)
        scale = torch.rsqrt(variance + EPS)
        normed = centred.mul_(scale)
        ctx.save_for_backward(normed, scale)
        ctx.mark_non_differentiable(mean, variance)
        return F.relu(normed.to(x.dtype)), mean, variance

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        normed, scale = ctx.saved_tensors
        out = gradients[0]
        wide = torch.ops.aten.threshold_backward(out.to(normed.dtype), normed, 0)
        first, second = (gradient.mean((2, 3), keepdim=True) for gradient in (wide, wide * normed))
        return torch.addcmul(wide - first, normed, second, value=-1).mul_(scale).to(out.dtype)


def normalise_trained(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `reference` with ReLU, and mean and biased variance [B, C, 1, 1], for training."""
    return _TrainedNorm.apply(x)


@jit
def _image_norm_kernel(
    x_ptr,  # [B, S, C]
    mean_ptr,  # [B, chunks, C] fp32
    spread_ptr,  # [B, chunks, C] fp32
    out_ptr,  # [B, S, C]
    channels,
    cells,
    chunks,
    chunk_cells,
    eps,
    HAS_RELU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    centre, spread = merge_chunks(
        mean_ptr, spread_ptr, image, channel, channels, cells, chunks, chunk_cells, BLOCK_N, BLOCK_C
    )
    scale = tl.rsqrt(spread / cells + eps)
    for step in range(0, SPAN, BLOCK_S):
        cell = tl.program_id(0).to(tl.int64) * SPAN + step + tl.arange(0, BLOCK_S)
        inside = (cell < cells)[:, None] & is_channel[None, :]
        place = (image * cells + cell)[:, None] * channels + channel[None, :]
        y = (tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :]
        if HAS_RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor, has_relu: bool = False) -> Tensor:
    """The result of `reference`, channels-last, in two passes."""
    if not is_served("image_norm", x):
        return reference(x, has_relu)
    (batch, channels, height, width), image_rows, cells = x.shape, rows(x), x.shape[2] * x.shape[3]
    statistics = add_statistics.fused(image_rows.unflatten(1, (height, width)).permute(0, 3, 1, 2), None, None)[1]
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        is_merged = statistics.shape[2] > MOST_CHUNKS
        statistics = merge_statistics(statistics, cells) if is_merged else statistics
        sizes = blocks(BLOCKS, "image_norm", x)
        grid = ceil_divide(cells, SPAN), ceil_divide(channels, sizes["BLOCK_C"]), batch
        out = torch.empty_like(image_rows)
        _image_norm_kernel[grid](
            image_rows,
            *statistics,
            out,
            channels,
            cells,
            statistics.shape[2],
            cells if is_merged else CHUNK,
            EPS,
            HAS_RELU=has_relu,
            SPAN=SPAN,
            **sizes,
        )
    return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def probe() -> Probe:
    return (noise(1, 24, 64, 64),)
