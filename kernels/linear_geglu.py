"""The first product of the transformers' feed-forward layers with its gate applied: neither half is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels import geglu
from datasetdm_fast.kernels.described_product import SUFFIX, find_described_sizes, multiply
from datasetdm_fast.kernels.geglu import times_gelu
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("linear_geglu", 8, 3, bits=(16,), BLOCK_S=128, BLOCK_C=64, BLOCK_K=64)
    | block_sizes("linear_geglu", 8, 2, bits=(32,), BLOCK_S=64, BLOCK_C=32, BLOCK_K=32),
    "sm_90": block_sizes(f"linear_geglu {SUFFIX}", 8, 3, bits=(16,), BLOCK_S=128, BLOCK_C=128, BLOCK_K=64, PROGRAMS=1),
}


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first half of `x` [..., K] under `weight` [2C, K] and `bias` [2C], times the exact GELU of the second."""
    return geglu.reference(F.linear(x, weight, bias))


@jit
def _linear_geglu_kernel(
    x_ptr,  # [S, K]
    weight_ptr,  # [2C, K]
    bias_ptr,  # [2C]
    out_ptr,  # [S, C]
    rows,
    channels,
    width,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Columns run fastest, so that the blocks of the same rows find them in the cache; along one axis of blocks, as of
    # others a GPU takes 65,535.
    tile, across = tl.program_id(0), tl.cdiv(channels, BLOCK_C)
    row = (tile // across).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tile % across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row, is_channel, lane = row < rows, channel < channels, tl.arange(0, BLOCK_K)
    hidden = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    gate = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    gate_ptr = weight_ptr + tl.cast(channels, tl.int64) * width
    for start in range(0, width, BLOCK_K):
        inner = start + lane
        is_inner = inner < width
        place = channel[None, :] * width + inner[:, None]
        inside = is_channel[None, :] & is_inner[:, None]
        x = tl.load(x_ptr + row[:, None] * width + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        hidden = tl.dot(x, tl.load(weight_ptr + place, mask=inside, other=0.0), hidden, input_precision=PRECISION)
        gate = tl.dot(x, tl.load(gate_ptr + place, mask=inside, other=0.0), gate, input_precision=PRECISION)
    hidden += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + channels + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * channels + channel[None, :]
    tl.store(
        out_ptr + place,
        times_gelu(hidden, gate).to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_channel[None, :],
    )


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result of `reference`."""
    fits = len(weight) % 2 == 0 and weight.shape[1] == x.shape[-1] and bias.shape == weight.shape[:1]
    if not is_served("linear_geglu", x, weight, bias, fits=fits):
        return reference(x, weight, bias)
    x, weight, channels, width = x.contiguous(), weight.contiguous(), len(weight) // 2, x.shape[-1]
    out = x.new_empty((*x.shape[:-1], channels))
    if described := find_described_sizes(BLOCKS, "linear_geglu", x, weight, out):
        multiply(described, x, weight, bias, out)
        return out
    rows, sizes = x.numel() // width, blocks(BLOCKS, "linear_geglu", x)
    tiles = ceil_divide(channels, sizes["BLOCK_C"]) * ceil_divide(rows, sizes["BLOCK_S"])
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _linear_geglu_kernel[(tiles,)](x, weight, bias, out, rows, channels, width, PRECISION=PRECISION, **sizes)
    return out


def probe() -> Probe:
    return noise(1, 9, 320), noise(2560, 320, scale=2 * 320**-0.5), noise(2560)
