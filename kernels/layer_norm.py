"""Layer normalisation over the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 8192  # a row is held in registers
DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("layer_norm", 4, BLOCK_S=2),
    "sm_90": block_sizes("layer_norm", 4, bits=(16,), BLOCK_S=4),
}


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """`x` [..., C], plus a `shift` [C], with zero mean and unit variance along C, times `weight` plus `bias`."""
    x = x if shift is None else x + shift
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def native(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """`reference` on a CPU, from csrc/network_ops.cpp."""
    fits = weight.shape == bias.shape == x.shape[-1:]
    if shift is not None or not fits or not is_native(x, weight, bias):
        return reference(x, weight, bias, eps, shift)
    x = x.contiguous()
    out = torch.empty_like(x)
    channels = len(weight)
    places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    _C.layer_norm(STORAGES[x.dtype], *places, x.numel() // channels, channels, eps, threads(x))
    return out


@jit
def _layer_norm_kernel(
    x_ptr,  # [S, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [C], or None
    out_ptr,  # [S, C]
    rows,
    channels,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    inside = (row < rows)[:, None] & is_channel[None, :]
    place = row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        x = tl.where(inside, x, 0.0)
    distance = tl.where(inside, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(distance * distance, 1) / channels + eps)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    y = distance * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """The result of `reference`."""
    channels = x.shape[-1]
    fits = all(vector is None or vector.shape == (channels,) for vector in (weight, bias, shift))
    if not is_served("layer_norm", x, weight, bias, shift, fits=fits):
        return reference(x, weight, bias, eps, shift)
    if channels > WIDEST:
        raise ValueError(f"layer_norm: rows of {channels} do not fit into registers, at most {WIDEST} do")
    x = x.contiguous()
    rows, sizes, out = x.numel() // channels, blocks(BLOCKS, "layer_norm", x), torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _layer_norm_kernel[(ceil_divide(rows, sizes["BLOCK_S"]),)](
            x, weight, bias, shift, out, rows, channels, eps, BLOCK_C=round_up(channels, 1), **sizes
        )
    return out


def probe() -> Probe:
    return noise(2, 5, 1280), noise(1280) + 1, noise(1281)[1:], 1e-5
