"""Attention without the scores in memory, by the online softmax of FlashAttention (arXiv 2205.14135, algorithm 1):
self-attention of the U-Net, and cross-attention where nothing is captured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, is_native, multiplies_tiles, threads
from datasetdm_fast.kernels.launch import (
    PRECISION,
    block_sizes,
    blocks,
    ceil_divide,
    is_served,
    jit,
    names_of,
    round_up,
    tl,
)
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("attention", 8, 3, bits=(16,), BLOCK_N=128, BLOCK_S=64)
    | block_sizes("attention", 4, 1, bits=(32,), BLOCK_N=64, BLOCK_S=32)
}
LIBRARY_WIDTHS = (64, 96, 128, 192, 256)  # to which the attention of libraries pads heads
WIDEST_TILE = 64  # channels; wider ones do not fit into the shared memory of every GPU
MANY_KEYS = 1024  # fewer are bound by memory, where wide tiles cost nothing
LIBRARY = ("sm_90",)  # where cuDNN's takes less time than ours: 1.26 ms of 1.58 at the first level of SD 1.4, 8 images
TILED_WIDTH = 80  # heads wider than this are as fast or faster by PyTorch's own
WIDE, FEW_KEYS = 64, 128  # heads wider than this over more keys are faster by PyTorch's own, which holds larger blocks


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d] of `q` [B, heads, N, d], `k` and `v` [B, heads, S, d]."""
    return torch.matmul(probabilities(q, k), v)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) [B, heads, N, S], summed in fp32 whatever the storage."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`reference` by PyTorch's own fused attention, tuned for every device it knows."""
    return F.scaled_dot_product_attention(q, k, v)


def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`reference` on a CPU: by csrc where that is faster, by PyTorch's own fused attention elsewhere."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if k.shape != (batch, heads, keys, width) or v.shape[:3] != k.shape[:3]:
        return reference(q, k, v)  # PyTorch's own does not refuse all that do not fit
    is_wide = width > WIDE and keys > FEW_KEYS and q.dtype == torch.float32
    if not is_native(q, k, v) or is_wide or v.shape[3] != width:
        return plain(q, k, v)
    in_tiles = multiplies_tiles(q.dtype)
    if in_tiles and not (width <= TILED_WIDTH and width % 2 == 0 and _C.multiplies_tiles()):
        # PyTorch's own answers some numbers that are not finite with zeros
        return plain(q, k, v).add_(0 * (q.sum(-1, keepdim=True) + k.sum((-2, -1), keepdim=True)))
    # heads side by side, as the layer after it reads them
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    arguments: list[Any] = [part for x in (q, k, v, out) for part in (x.data_ptr(), x.stride()[:3])]
    arguments += [batch, heads, queries, keys, width, width**-0.5, threads(q, 2 * keys)]
    if in_tiles:
        _C.tiled_attention(*arguments)
    else:
        _C.attention(STORAGES[q.dtype], *arguments)
    return out


def split(width: int) -> tuple[int, int]:
    """The two tiles in which the kernel holds a head: 40 channels take 48 instead of 64."""
    wide = max(round_up(width + 1) // 2, 16)
    return wide, round_up(width - wide) if width > wide else 0


def library_width(width: int) -> int:
    return next((size for size in LIBRARY_WIDTHS if size >= width), width)


@jit
def _attention_kernel(
    q_ptr,  # [B, heads, N, d], heads side by side as in `k_ptr` and `v_ptr`
    k_ptr,  # [B, heads, S, d]
    v_ptr,  # [B, heads, S, d]
    out_ptr,  # [B, N, heads, d]
    queries,
    keys,
    scale,  # of scores that are powers of two
    q_image_stride,
    q_row_stride,
    k_image_stride,
    k_row_stride,
    v_image_stride,
    v_row_stride,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head, of which Triton is to know what divides it
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the tile of a head's first channels
    BLOCK_R: tl.constexpr,  # the tile of the rest
):
    image, first = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * WIDTH
    query = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane, rest, column = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    is_query, is_rest = (query < queries)[:, None], (rest < WIDTH)[None, :]
    row_ptr = q_ptr + image * q_image_stride + first + query[:, None] * q_row_stride
    q = tl.load(row_ptr + lane[None, :], mask=is_query, other=0.0)
    q_rest = tl.load(row_ptr + rest[None, :], mask=is_query & is_rest, other=0.0)
    k_ptr += image * k_image_stride + first
    v_ptr += image * v_image_stride + first
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    answer = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    answer_rest = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, keys, BLOCK_S):
        cell = start + column
        is_cell = (cell < keys)[:, None]
        skipped = tl.cast(start, tl.int64)  # within a block 32 bits are enough, and take fewer registers
        key_ptr = k_ptr + skipped * k_row_stride + column[:, None] * k_row_stride
        k = tl.load(key_ptr + lane[None, :], mask=is_cell, other=0.0)
        k_rest = tl.load(key_ptr + rest[None, :], mask=is_cell & is_rest, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION) * scale
        scores = tl.where((cell < keys)[None, :], scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        share = tl.exp2(highest - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * share + tl.sum(weights, 1)
        weights = weights.to(k.dtype)
        value_ptr = v_ptr + skipped * v_row_stride + column[:, None] * v_row_stride
        v = tl.load(value_ptr + lane[None, :], mask=is_cell, other=0.0)
        v_rest = tl.load(value_ptr + rest[None, :], mask=is_cell & is_rest, other=0.0)
        answer = tl.dot(weights, v, answer * share[:, None], input_precision=PRECISION)
        answer_rest = tl.dot(weights, v_rest, answer_rest * share[:, None], input_precision=PRECISION)
        highest = top
    place_ptr = out_ptr + (image * queries + query)[:, None] * (tl.num_programs(1) * WIDTH) + first
    tl.store(place_ptr + lane[None, :], (answer / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
    tl.store(
        place_ptr + rest[None, :], (answer_rest / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query & is_rest
    )


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result of `reference`; by PyTorch's own fused attention unless many keys fill narrower tiles here."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    fits = k.shape == (batch, heads, keys, width) and v.shape[:3] == k.shape[:3]
    if not is_served("attention", q, k, v, fits=fits):
        return reference(q, k, v)
    wide, rest = split(width)
    is_packed = all(x.stride(3) == 1 and x.stride(1) == width for x in (q, k, v))
    is_narrower = rest > 0 and wide <= WIDEST_TILE and 4 * (wide + rest) <= 3 * library_width(width)
    is_ours = is_packed and is_narrower and names_of(q.device)[0] not in LIBRARY
    if keys < MANY_KEYS or v.shape[3] != width or not is_ours:
        return plain(q, k, v)
    out, sizes = q.new_empty(batch, queries, heads, width), blocks(BLOCKS, "attention", q)
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))]
    with torch.cuda.device_of(q):  # Triton launches on the current device of the thread
        _attention_kernel[ceil_divide(queries, sizes["BLOCK_N"]), heads, batch](
            q,
            k,
            v,
            out,
            queries,
            keys,
            width**-0.5 * math.log2(math.e),
            *strides,
            PRECISION=PRECISION,
            WIDTH=width,
            BLOCK_D=wide,
            BLOCK_R=rest,
            **sizes,
        )
    return out.transpose(1, 2)


def probe() -> Probe:
    q, k, v = noise(1, MANY_KEYS + 6, 3, 2, 40).permute(2, 0, 3, 1, 4)
    return q[:, :, :9], k, v
