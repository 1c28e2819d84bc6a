"""A product added to a residual and normalised along its channels: the end of every step of a decoder's transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 256  # channels of a row, which lies in registers; wider ones are left to the reference
DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("linear_norm", 4, 3, bits=(16,), BLOCK_S=16, BLOCK_K=32)
    | block_sizes("linear_norm", 4, 2, bits=(32,), BLOCK_S=16, BLOCK_K=32),
    "sm_90": block_sizes("linear_norm", 4, 3, bits=(16,), BLOCK_S=32, BLOCK_K=32),
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    has_relu: bool = False,
) -> Tensor:
    """`residual` [..., N] plus `x` [..., K] or its ReLU under `weight` and `bias`, normed by `gain` and `shift`."""
    x = F.relu(x) if has_relu else x
    return F.layer_norm(residual + F.linear(x, weight, bias), gain.shape, gain, shift, eps)


@jit
def _linear_norm_kernel(
    x_ptr,  # [S, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [S, N]
    gain_ptr,  # [N]
    shift_ptr,  # [N]
    out_ptr,  # [S, N]
    rows,
    channels,
    width,
    eps,
    HAS_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel, lane = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    is_row, is_channel = row < rows, channel < channels
    inside = is_row[:, None] & is_channel[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + lane
        is_inner = inner < width
        x = tl.load(x_ptr + row[:, None] * width + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        if HAS_RELU:
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x_ptr.dtype.element_ty)
        place = channel[None, :] * width + inner[:, None]
        weight = tl.load(weight_ptr + place, mask=is_channel[None, :] & is_inner[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    place = row[:, None] * channels + channel[None, :]
    total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    distance = tl.where(inside, total - (tl.sum(total, 1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(distance * distance, 1) / channels + eps)
    gain = tl.load(gain_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    y = distance * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    has_relu: bool = False,
) -> Tensor:
    """The result of `reference`, in one pass."""
    channels, width = weight.shape
    fits = x.shape[-1] == width and residual.shape == (*x.shape[:-1], channels)
    fits = fits and bias.shape == gain.shape == shift.shape == (channels,)
    if not is_served("linear_norm", x, weight, bias, residual, gain, shift, fits=fits) or channels > WIDEST:
        return reference(x, weight, bias, residual, gain, shift, eps, has_relu)
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    rows, sizes, out = x.numel() // width, blocks(BLOCKS, "linear_norm", x), torch.empty_like(residual)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _linear_norm_kernel[(ceil_divide(rows, sizes["BLOCK_S"]),)](
            x,
            weight,
            bias,
            residual,
            gain,
            shift,
            out,
            rows,
            channels,
            width,
            eps,
            HAS_RELU=has_relu,
            PRECISION=PRECISION,
            BLOCK_C=round_up(channels),
            **sizes,
        )
    return out


def probe() -> Probe:
    rows, weight, affine = noise(1, 5, 256, 1)[..., 0], noise(256, 256, scale=1 / 16), (noise(256) + 1, noise(257)[1:])
    return noise(1, 5, 256), weight, noise(258)[2:], rows, *affine, 1e-5
