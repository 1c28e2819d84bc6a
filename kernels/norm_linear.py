"""A layer norm and the linear layer that reads it alone, whose output may be gated. Folded they are one product: the
norm's weight lies in that of the layer, and a row's mean and deviation correct its output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels import geglu, layer_norm, linear_geglu
from datasetdm_fast.kernels.described_product import SUFFIX, find_described_sizes, multiply
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, find_sizes, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import noise

DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("norm_linear statistics", 4, BLOCK_S=4)}
Norm = tuple[Tensor, Tensor, float, Tensor | None]  # weight [K], bias [K], eps, and a shift [K] as in `layer_norm`


def reference(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, sums: Tensor | None = None, has_gate: bool = False
) -> Tensor:
    """The `norm` of `x` [..., K] under `weight` [N, K] and `bias` [N]; with a gate, as in `linear_geglu`, [..., N / 2].

    `sums` [2, N] are those of `fold`, which made the norm's own weight ones and its bias zero.
    """
    x = F.linear(layer_norm.reference(x, *norm), weight, bias)
    return geglu.reference(x) if has_gate else x


# Fold


def fold(norm: Norm, weight: Tensor, bias: Tensor | None) -> tuple[Norm, Tensor, Tensor, Tensor]:
    """This operation with the norm's weight and bias in those of the layer; and the sums in fp32 over each row of
    the weight, of itself and times the shift.
    """
    gain, offset, eps, shift = norm
    dtype = torch.promote_types(weight.dtype, torch.float32)
    folded, carried = weight * gain, weight.to(dtype) @ offset.to(dtype)
    carried = carried if bias is None else carried + bias
    wide = folded.to(dtype)  # as it was rounded, so that a row's mean is taken off exactly
    shifted = wide.new_zeros(len(wide)) if shift is None else wide @ shift.to(dtype)
    even = torch.ones_like(gain), torch.zeros_like(offset), eps, shift
    return even, folded, carried.to(weight.dtype), torch.stack([wide.sum(1), shifted])


def can_fold(weight: Tensor, has_gate: bool) -> bool:
    """Whether the product of a folded norm was the fastest on the GPU where `weight` lies."""
    return find_sizes(BLOCKS, f"{name_product(has_gate)} {SUFFIX}", weight) is not None


def name_product(has_gate: bool) -> str:
    return "norm_linear gated" if has_gate else "norm_linear"


# Statistics


@jit
def _norm_linear_statistics_kernel(
    x_ptr,  # [S, K]
    shift_ptr,  # [K], or None
    mean_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32
    rows,
    channels,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_C)
    is_row, is_channel = row < rows, channel < channels
    inside = is_row[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + row[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        x = tl.where(inside, x, 0.0)
    mean = tl.sum(x, 1) / channels
    distance = tl.where(inside, x - mean[:, None], 0.0)
    tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(scale_ptr + row, tl.rsqrt(tl.sum(distance * distance, 1) / channels + eps), mask=is_row)


# Launch


def fused(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, sums: Tensor | None = None, has_gate: bool = False
) -> Tensor:
    """The result of `reference`."""
    gain, offset, eps, shift = norm
    fits = weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])
    fits = fits and (sums is None or sums.shape == (2, len(weight))) and (len(weight) % 2 == 0 or not has_gate)
    if not is_served("norm_linear", x, gain, offset, shift, weight, bias, sums, fits=fits):
        return reference(x, norm, weight, bias, sums, has_gate)
    x, channels = x.contiguous(), len(weight) // (1 + has_gate)
    out = x.new_empty((*x.shape[:-1], channels))
    described = find_described_sizes(BLOCKS, name_product(has_gate), x, weight, out)
    if sums is None or not described:
        y = layer_norm.fused(x, gain, offset, eps, shift)
        return linear_geglu.fused(y, weight, bias) if has_gate else F.linear(y, weight, bias)
    width = x.shape[-1]
    rows, sizes = x.numel() // width, blocks(BLOCKS, "norm_linear statistics", x)
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _norm_linear_statistics_kernel[(ceil_divide(rows, sizes["BLOCK_S"]),)](
            x, shift, *statistics, rows, width, eps, BLOCK_C=round_up(width, 1), **sizes
        )
    multiply(described, x, weight, bias, out, norm=(*statistics, *sums))
    return out


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    weight, norm = noise(2560, 320, scale=2 * 320**-0.5), (noise(320) + 1, noise(321)[1:], 1e-5, noise(322)[2:])
    return noise(1, 9, 320), norm, weight, noise(2560), None, True
