"""Matrix products in 16 bits whose tiles are loaded and stored by descriptors (TMA), and whose programs may take
several tiles each: what `linear_geglu` and `linear_add` launch on a GPU for which their BLOCKS have a row of it. An
NVIDIA H200 took 0.84 and 0.83 of the time of their kernels by pointers, over the sizes of Stable Diffusion 1.x for 8
images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.kernels.geglu import times_gelu
from datasetdm_fast.kernels.launch import Blocks, TensorDescriptor, ceil_divide, find_sizes, jit, tl

SUFFIX = "described"  # of a row in BLOCKS
ALIGNMENT = 16  # bytes, of where a tensor and each of its rows begin


# Kernel


@jit
def _described_product_kernel(
    x_desc,  # [S, K]
    weight_desc,  # [PARTS, C, K + L]
    second_desc,  # [S, L], or None
    residual_desc,  # [S, C], or None
    out_desc,  # [S, C]
    bias_ptr,  # [PARTS * C], or None
    mean_ptr,  # [S / BLOCK_S, C] fp32, or None
    spread_ptr,  # [S / BLOCK_S, C] fp32, or None
    rows,
    channels,
    width,
    second_width,
    PARTS: tl.constexpr,  # 2: the second half of the weights is the gate of the first
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Columns run fastest, so that programs of the same rows find them in the cache. The loop over tiles and that over
    # their inner blocks become one, so that the next tile is loaded while this one is stored.
    across, lane = tl.cdiv(channels, BLOCK_C), tl.arange(0, PARTS * BLOCK_C)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_S) * across, tl.num_programs(0), flatten=True):
        row, channel = tile // across * BLOCK_S, tile % across * BLOCK_C
        total = tl.zeros([BLOCK_S, PARTS * BLOCK_C], tl.float32)
        for start in range(0, width, BLOCK_K):
            weight = tl.reshape(weight_desc.load([0, channel, start]), [PARTS * BLOCK_C, BLOCK_K])
            total = tl.dot(x_desc.load([row, start]), weight.T, total)
        if second_desc is not None:
            for start in range(0, second_width, BLOCK_K):
                weight = tl.reshape(weight_desc.load([0, channel, width + start]), [PARTS * BLOCK_C, BLOCK_K])
                total = tl.dot(second_desc.load([row, start]), weight.T, total)
        if bias_ptr is not None:
            column = channel + lane % BLOCK_C
            bias = tl.load(bias_ptr + lane // BLOCK_C * channels + column, mask=column < channels, other=0.0)
            total += bias.to(tl.float32)[None, :]
        # Half of the columns after the other, as both would need twice the shared memory. Hidden values, their gates
        # and both halves lie in the same thread, so they are told apart without an exchange.
        if PARTS == 2:
            parts = tl.permute(tl.reshape(total, [BLOCK_S, 2, 2, BLOCK_C // 2]), [0, 3, 2, 1])
            hidden, gate = tl.split(parts)
            left, right = tl.split(times_gelu(hidden, gate))
        else:
            left, right = tl.split(tl.permute(tl.reshape(total, [BLOCK_S, 2, BLOCK_C // 2]), [0, 2, 1]))
        line = (tile // across).to(tl.int64) * channels
        _store(left, residual_desc, out_desc, mean_ptr, spread_ptr, row, channel, line, channels)
        _store(right, residual_desc, out_desc, mean_ptr, spread_ptr, row, channel + BLOCK_C // 2, line, channels)


@jit
def _store(y, residual_desc, out_desc, mean_ptr, spread_ptr, row, channel, line, channels):
    """`y` plus its residual, and the statistics of what was stored."""
    if residual_desc is not None:
        y += residual_desc.load([row, channel]).to(tl.float32)
    stored = y.to(out_desc.dtype)
    out_desc.store([row, channel], stored)
    if mean_ptr is not None:
        y = stored.to(tl.float32)
        mean = tl.sum(y, 0) / y.shape[0]
        distance = y - mean[None, :]
        column = channel + tl.arange(0, y.shape[1])
        tl.store(mean_ptr + line + column, mean, mask=column < channels)
        tl.store(spread_ptr + line + column, tl.sum(distance * distance, 0), mask=column < channels)


# Launch


def find_described_sizes(table: Mapping[str, Blocks], kernel: str, *tensors: Tensor) -> dict[str, int] | None:
    """The row of `kernel` for products by descriptors, None where there is none or a tensor begins at no such place."""
    sizes = find_sizes(table, f"{kernel} {SUFFIX}", tensors[0])
    counts = [(x.storage_offset(), x.shape[-1]) for x in tensors]
    fits = all(count * tensors[0].element_size() % ALIGNMENT == 0 for pair in counts for count in pair)
    return sizes if fits else None


def multiply(
    sizes: Mapping[str, int],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    second: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    """Fills `out` [..., C], and `statistics`, with the product of contiguous `x` [..., K] and `weight` [C, K + L].

    A `weight` of [2C, K] gates the first half of the product by the second. `second` [..., L] is multiplied beside `x`.
    """
    block_s, block_c, block_k = (sizes[name] for name in ("BLOCK_S", "BLOCK_C", "BLOCK_K"))
    (rows, width), (*_, channels), inner = x.flatten(0, -2).shape, out.shape, weight.shape[1]
    parts, most = len(weight) // channels, sizes["PROGRAMS"] * count_cores(x.device)
    tiles = ceil_divide(rows, block_s) * ceil_divide(channels, block_c)
    strides = [channels * inner, inner, 1]
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _described_product_kernel[(min(tiles, most or tiles),)](
            describe_rows(x, block_s, block_k),
            TensorDescriptor(weight, [parts, channels, inner], strides, [parts, block_c, block_k]),
            describe_rows(second, block_s, block_k),
            describe_rows(residual, block_s, block_c // 2),
            describe_rows(out, block_s, block_c // 2),
            bias,
            *((None, None) if statistics is None else statistics),
            rows,
            channels,
            width,
            inner - width,
            PARTS=parts,
            **{name: size for name, size in sizes.items() if name != "PROGRAMS"},
        )


def describe_rows(x: Tensor | None, *block: int) -> Any:
    """Blocks of the rows of contiguous `x` [..., C]."""
    return None if x is None else TensorDescriptor.from_tensor(x.flatten(0, -2), list(block))


def count_cores(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that its programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
