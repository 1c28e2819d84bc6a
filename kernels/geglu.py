"""The gated unit of the transformers' feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.case import BATCH, LEVELS, Case, noise
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl

DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {"untuned": block_sizes("geglu", 4, BLOCK_S=8, BLOCK_C=256)}


def reference(x: Tensor) -> Tensor:
    """The first half of `x` [..., 2C] times the exact GELU of the second half."""
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)


def native(x: Tensor) -> Tensor:
    """The same on a CPU, from csrc/network_ops.cpp: one pass."""
    if not is_native(x) or x.shape[-1] % 2:
        return reference(x)
    x, channels = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    _C.geglu(STORAGES[x.dtype], x.data_ptr(), out.data_ptr(), out.numel() // channels, channels, threads(x))
    return out


@jit
def gated(hidden, gate):
    """`hidden` times the exact GELU of `gate`, in fp32. One less erf is formula 7.1.26 of Abramowitz and Stegun, off by
    at most 1.5e-7, which takes a third of the instructions of a library's.
    """
    size = tl.abs(gate) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * gate * tail * tl.exp2(size * size * -1.4426950408889634)
    return hidden * tl.where(gate < 0, tail, gate - tail)


@jit
def _geglu_kernel(
    x_ptr,  # [S, 2C]
    out_ptr,  # [S, C]
    rows,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    place = row[:, None] * (2 * channels) + channel[None, :]
    hidden = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + place + channels, mask=inside, other=0.0).to(tl.float32)
    place = row[:, None] * channels + channel[None, :]
    tl.store(out_ptr + place, gated(hidden, gate).to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor) -> Tensor:
    """What `reference` says, in one pass."""
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: {x.shape[-1]} channels are not two halves")
    if not is_served("geglu", x):
        return reference(x)
    x, channels, sizes = x.contiguous(), x.shape[-1] // 2, blocks(BLOCKS, "geglu", x)
    out = x.new_empty((*x.shape[:-1], channels))
    rows = out.numel() // channels
    grid = ceil_divide(channels, sizes["BLOCK_C"]), ceil_divide(rows, sizes["BLOCK_S"])
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _geglu_kernel[grid](x, out, rows, channels, **sizes)
    return out


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        yield f"{4 * width} channels of {side} cells", (empty(batch, side * side, 8 * width),)


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 2),), (1, 1)),
        Case("odd rows of odd width, deep in both tails", (noise(3, 7, 38, scale=4),), (3, 7, 19)),
        Case("SD 1.x first level, a few tokens", (noise(1, 9, 2560),), (1, 9, 1280)),
    ]
