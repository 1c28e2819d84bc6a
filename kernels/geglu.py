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
BLOCKS = {"untuned": block_sizes("geglu", 4, BLOCK_S=4, BLOCK_C=512)}


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
def _geglu_kernel(
    x_ptr,  # [S, 2C]
    out_ptr,  # [S, C]
    rows,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    place = row[:, None] * (2 * channels) + channel[None, :]
    hidden = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + place + channels, mask=inside, other=0.0).to(tl.float32)
    y = hidden * gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor) -> Tensor:
    """What `reference` says."""
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: rows of {x.shape[-1]} have no two halves")
    if not is_served("geglu", x):
        return reference(x)
    x, channels = x.contiguous(), x.shape[-1] // 2
    rows, sizes = x.numel() // (2 * channels), blocks(BLOCKS, "geglu", x)
    out = x.new_empty((*x.shape[:-1], channels))
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _geglu_kernel[ceil_divide(rows, sizes["BLOCK_S"]), ceil_divide(channels, sizes["BLOCK_C"])](
            x, out, rows, channels, **sizes
        )
    return out


def sizes(empty: Callable) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        yield f"{4 * width} channels", (empty(BATCH, side * side, 8 * width),)


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 2),), (1, 1)),
        Case("odd rows of odd width, deep in both tails", (noise(3, 7, 38, scale=4),), (3, 7, 19)),
        Case("SD 1.x first level, a few tokens", (noise(1, 9, 2560),), (1, 9, 1280)),
    ]
