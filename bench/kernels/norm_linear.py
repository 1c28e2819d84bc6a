"""A layer norm and the linear layer that reads it alone, whose output may be gated. Folded they are one product: the
norm's weight lies in that of the layer, and a row's mean and deviation correct its output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.described_product import find_described_sizes, multiply
from datasetdm_fast.kernels import geglu, layer_norm, linear_geglu
from datasetdm_fast.kernels.launch import Blocks, block_sizes, blocks, ceil_divide, jit, round_up, tl

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


def usual(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, sums: Tensor | None = None, has_gate: bool = False
) -> Tensor:
    """What is launched today."""
    y = layer_norm.fused(x, *norm)
    return linear_geglu.fused(y, weight, bias) if has_gate else F.linear(y, weight, bias)


def described(
    table: Mapping[str, Blocks],
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    sums: Tensor | None = None,
    has_gate: bool = False,
) -> Tensor | None:
    """The result of `reference`; None where the norm is not folded, or no descriptor fits."""
    (*_, eps, shift), x, width = norm, x.contiguous(), x.shape[-1]
    out = x.new_empty((*x.shape[:-1], len(weight) // (1 + has_gate)))
    sizes = find_described_sizes(table, "norm_linear gated" if has_gate else "norm_linear", x, weight, out)
    if sums is None or not sizes:
        return None
    rows, row = x.numel() // width, blocks(BLOCKS, "norm_linear statistics", x)
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _norm_linear_statistics_kernel[(ceil_divide(rows, row["BLOCK_S"]),)](
            x, shift, *statistics, rows, width, eps, BLOCK_C=round_up(width, 1), **row
        )
    multiply(sizes, x, weight, bias, out, norm=(*statistics, *sums))
    return out
