"""Attention that also adds the mean of its heads' probabilities to a running sum; no map of a single head is written.

Two kernels: one gives the answer and each row's logarithm of its sum, by which the other forms the probabilities again,
tile by tile, head after head. Values of no width ask for the sum alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.kernels import attention
from datasetdm_fast.kernels.attention import probabilities
from datasetdm_fast.kernels.attention_capture import LOG2_E, WIDEST
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import noise

DEVICES = {"cpu": "native", "untuned": "fused"}
LEAST = 64  # channels of a tile of values: ptxas of CUDA 12.8 spoils the addresses of narrower ones on an H100
BLOCKS = {
    "untuned": block_sizes("attention_average", 4, bits=(16,), BLOCK_S=64, BLOCK_K=64, BLOCK_D=32)
    | block_sizes("attention_average", 4, bits=(32,), BLOCK_S=32, BLOCK_K=32, BLOCK_D=16)
}


def reference(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The answer [B, heads, N, e] of `q` [B, heads, N, d], `k` [B, heads, S, d] and `v` [B, heads, S, e], and `total`
    [B, N, S] plus `share` of the mean over heads of softmax(q k^T / sqrt(d)), in fp32.
    """
    maps = probabilities(q, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(maps, v), total.to(wide) + share * maps.to(wide).mean(1)


def plain(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`reference`, a head at a time."""
    return _answer(attention.plain, q, k, v), add_probabilities(q, k, total, share)


def native(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`reference` on a CPU, with the answer of attention there, bit by bit."""
    return _answer(attention.native, q, k, v), add_probabilities(q, k, total, share)


def _answer(form: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return form(q, k, v) if v.shape[3] else q.new_empty((*q.shape[:3], 0))


def add_probabilities(q: Tensor, k: Tensor, total: Tensor, share: float) -> Tensor:
    heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    total = total.to(wide, copy=True)
    for head in range(heads):
        total.add_(probabilities(q[:, head], k[:, head]).to(wide), alpha=share / heads)
    return total


@jit
def _attention_rows_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, S, d]
    v_ptr,  # [B, heads, S, e]
    out_ptr,  # [B, heads, N, e]
    rows_ptr,  # [B, heads, N] fp32: logarithm to base 2 of the sum of a row's exponentials
    q_stride_image,
    q_stride_head,
    q_stride_query,
    q_stride_width,
    k_stride_image,
    k_stride_head,
    k_stride_key,
    k_stride_width,
    v_stride_image,
    v_stride_head,
    v_stride_key,
    v_stride_width,
    out_stride_image,
    out_stride_head,
    out_stride_query,
    out_stride_width,
    heads,
    queries,
    keys,
    depth,
    width,
    scale,
    WIDTH: tl.constexpr,  # 0: the values have no width
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    is_query = query < queries
    q_head = q_ptr + image * q_stride_image + head * q_stride_head + query[:, None] * q_stride_query
    k_head = k_ptr + image * k_stride_image + head * k_stride_head

    # 1. Online softmax (Milakov & Gimelshein 2018): running maximum, sum and answer over blocks of keys
    highest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    if WIDTH > 0:
        column = tl.arange(0, WIDTH).to(tl.int64)
        is_column = column < width
        v_head = v_ptr + image * v_stride_image + head * v_stride_head + column[None, :] * v_stride_width
        answer = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    for start in range(0, keys, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K).to(tl.int64)
        is_key = key < keys
        # scores of this block, in parts of the width
        scores = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        for begin in range(0, depth, BLOCK_D):
            row = begin + lane
            is_row = row < depth
            q = tl.load(q_head + row[None, :] * q_stride_width, mask=is_query[:, None] & is_row[None, :], other=0.0)
            k = tl.load(
                k_head + key[None, :] * k_stride_key + row[:, None] * k_stride_width,
                mask=is_row[:, None] & is_key[None, :],
                other=0.0,
            )
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        scores = tl.where(is_key[None, :], scores * scale, float("-inf"))
        # the new maximum, by which sum and answer so far shrink
        reached = tl.maximum(highest, tl.max(scores, 1))
        shrunk, maps = tl.exp2(highest - reached), tl.exp2(scores - reached[:, None])
        total = total * shrunk + tl.sum(maps, 1)
        if WIDTH > 0:
            v = tl.load(v_head + key[:, None] * v_stride_key, mask=is_key[:, None] & is_column[None, :], other=0.0)
            answer = tl.dot(maps.to(v.dtype), v, answer * shrunk[:, None], input_precision=PRECISION)
        highest = reached

    # 2. The logarithm of each row's sum, and the answer of attention
    tl.store(rows_ptr + (image * heads + head) * queries + query, highest + tl.log2(total), mask=is_query)
    if WIDTH > 0:
        out_head = out_ptr + image * out_stride_image + head * out_stride_head
        tl.store(
            out_head + query[:, None] * out_stride_query + column[None, :] * out_stride_width,
            (answer / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=is_query[:, None] & is_column[None, :],
        )


@jit
def _attention_average_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, S, d]
    rows_ptr,  # [B, heads, N] fp32
    total_ptr,  # [B, N, S]
    sum_ptr,  # [B, N, S] fp32
    q_stride_image,
    q_stride_head,
    q_stride_query,
    q_stride_width,
    k_stride_image,
    k_stride_head,
    k_stride_key,
    k_stride_width,
    total_stride_image,
    total_stride_query,
    total_stride_key,
    heads,
    queries,
    keys,
    depth,
    scale,
    share,  # of one head
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    key = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    is_query, is_key = query < queries, key < keys
    q_image = q_ptr + image * q_stride_image + query[:, None] * q_stride_query
    k_image = k_ptr + image * k_stride_image + key[None, :] * k_stride_key
    probabilities = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for i in range(heads):
        head = tl.cast(i, tl.int64)
        scores = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        for begin in range(0, depth, BLOCK_D):
            row = begin + lane
            is_row = row < depth
            q = tl.load(
                q_image + head * q_stride_head + row[None, :] * q_stride_width,
                mask=is_query[:, None] & is_row[None, :],
                other=0.0,
            )
            k = tl.load(
                k_image + head * k_stride_head + row[:, None] * k_stride_width,
                mask=is_row[:, None] & is_key[None, :],
                other=0.0,
            )
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        sums = tl.load(rows_ptr + (image * heads + head) * queries + query, mask=is_query, other=0.0)
        probabilities += tl.exp2(scores * scale - sums[:, None])
    is_inside = is_query[:, None] & is_key[None, :]
    before = total_ptr + image * total_stride_image
    total = tl.load(before + query[:, None] * total_stride_query + key[None, :] * total_stride_key, mask=is_inside)
    place = sum_ptr + (image * queries + query)[:, None] * keys + key[None, :]
    tl.store(place, total.to(tl.float32) + probabilities * share, mask=is_inside)


def fused(q: Tensor, k: Tensor, v: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The result of `reference`; the answer lies in memory as [B, N, heads, e]."""
    is_pair = q.ndim == k.ndim == v.ndim == 4 and q.dtype == k.dtype == v.dtype and q.shape[:2] == k.shape[:2]
    fits = is_pair and q.shape[3] == k.shape[3] and v.shape[:3] == k.shape[:3] and total.numel() > 0
    fits = fits and total.shape == (q.shape[0], q.shape[2], k.shape[2])
    if not is_served("attention_average", q, k, v, total, fits=fits):
        return reference(q, k, v, total, share)
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return plain(q, k, v, total, share)
    (batch, heads, queries, depth), keys, width = q.shape, k.shape[2], v.shape[3]
    sizes = blocks(BLOCKS, "attention_average", q)
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    rows = q.new_empty((batch, heads, queries), dtype=torch.float32)
    probabilities = q.new_empty((batch, queries, keys), dtype=torch.float32)
    scale = depth**-0.5 * LOG2_E
    with torch.cuda.device_of(q):  # Triton launches on the current device of the thread
        _attention_rows_kernel[ceil_divide(queries, sizes["BLOCK_S"]), heads, batch](
            q,
            k,
            v if width else q,
            out if width else q,
            rows,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            heads,
            queries,
            keys,
            depth,
            width,
            scale,
            WIDTH=round_up(width, LEAST) if width else 0,
            PRECISION=PRECISION,
            **sizes,
        )
        _attention_average_kernel[ceil_divide(queries, sizes["BLOCK_S"]), ceil_divide(keys, sizes["BLOCK_K"]), batch](
            q,
            k,
            rows,
            total,
            probabilities,
            *q.stride(),
            *k.stride(),
            *total.stride(),
            heads,
            queries,
            keys,
            depth,
            scale,
            share / heads,
            PRECISION=PRECISION,
            **sizes,
        )
    return out, probabilities


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    qk, total = noise(1, 2, 130, 80), noise(1, 130, 130).abs() / 130
    return qk, qk, qk + 1, total, 0.2
