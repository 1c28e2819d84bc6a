"""The gated unit of the feed-forward layers of transformers: by GELU in U-Nets, by SiLU in FLUX.2 and Z-Image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {"untuned": block_sizes("geglu", 4, BLOCK_C=1024)}


def reference(x: Tensor, has_silu: bool = False) -> Tensor:
    """The first half of `x` [..., 2C] times the exact GELU of the second; or the SiLU of the first times that."""
    first, second = x.chunk(2, -1)
    return F.silu(first) * second if has_silu else first * F.gelu(second)


def native(x: Tensor, has_silu: bool = False) -> Tensor:
    """`reference` on a CPU; with GELU from csrc/network_ops.cpp, one pass."""
    if has_silu or not is_native(x) or x.shape[-1] % 2:
        return reference(x, has_silu)
    x, channels = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    _C.geglu(STORAGES[x.dtype], x.data_ptr(), out.data_ptr(), out.numel() // channels, channels, threads(x))
    return out


@jit
def times_gelu(hidden, gate):
    """`hidden` times the exact GELU of `gate`, in fp32. How often a normal number exceeds `size` is formula 26.2.17 of
    Abramowitz and Stegun, off by at most 7.5e-8; it takes a third of the instructions of a library's erf.
    """
    size = tl.abs(gate)
    t = 1.0 / (1.0 + 0.2316419 * size)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return hidden * (tl.maximum(gate, 0.0) - size * tail * tl.exp2(size * size * -0.7213475204444817))


@jit
def _geglu_kernel(
    x_ptr,  # [S, 2C]
    out_ptr,  # [S, C]
    channels,
    row_stride,
    HAS_SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    first = tl.load(x_ptr + row * row_stride + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + row * row_stride + channels + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_SILU:
        y = first / (1.0 + tl.exp2(first * -1.4426950408889634)) * second
    else:
        y = times_gelu(first, second)
    tl.store(out_ptr + row * channels + channel, y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor, has_silu: bool = False) -> Tensor:
    """The result of `reference`, in one pass; `x` may be a slice of wider rows."""
    if not is_served("geglu", x, fits=x.shape[-1] % 2 == 0):
        return reference(x, has_silu)
    channels = x.shape[-1] // 2
    out, flat = x.new_empty((*x.shape[:-1], channels)), x.flatten(0, -2)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    sizes = blocks(BLOCKS, "geglu", x, BLOCK_C=channels)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _geglu_kernel[(len(flat), ceil_divide(channels, sizes["BLOCK_C"]))](
            flat, out, channels, flat.stride(0), HAS_SILU=has_silu, **sizes
        )
    return out


def probe() -> Probe:
    return noise(2, 5, 2600)[..., 40:], True
