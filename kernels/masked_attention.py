"""Attention of queries over the cells they did not block."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, tl

WIDEST = 256
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction


def reference(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d]; `blocked` [B, N, S] is shared by the heads, and a query that blocked
    every cell sees all.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if blocked is not None:
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        scores = scores.masked_fill(blocked[:, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(weights.to(v.dtype), v)


@jit
def _masked_attention_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, S, d]
    v_ptr,  # [B, heads, S, d]
    blocked_ptr,  # [B, N, S] bytes, or None
    out_ptr,  # [B, heads, N, d]
    q_stride_image,
    q_stride_head,
    q_stride_query,
    q_stride_width,
    k_stride_image,
    k_stride_head,
    k_stride_cell,
    k_stride_width,
    v_stride_image,
    v_stride_head,
    v_stride_cell,
    v_stride_width,
    out_stride_image,
    out_stride_head,
    out_stride_query,
    out_stride_width,
    heads,
    queries,
    cells,
    width,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    query = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * BLOCK_D + lane  # of the answer: wide heads are shared among programs
    is_query, is_column = query < queries, column < width
    q_ptr += image * q_stride_image + head * q_stride_head
    k_ptr += image * k_stride_image + head * k_stride_head
    v_ptr += image * v_stride_image + head * v_stride_head
    out_ptr += image * out_stride_image + head * out_stride_head
    if blocked_ptr is not None:
        blocked_row = blocked_ptr + (image * queries + query)[:, None] * cells
        is_shut = tl.full([BLOCK_N], 1, tl.int32)
        for start in range(0, cells, BLOCK_S):
            cell = start + tl.arange(0, BLOCK_S)
            blocked = tl.load(blocked_row + cell[None, :], mask=is_query[:, None] & (cell < cells)[None, :], other=1)
            is_shut = tl.minimum(is_shut, tl.min(blocked.to(tl.int32), 1))
    answer = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, cells, BLOCK_S):
        cell = start + tl.arange(0, BLOCK_S).to(tl.int64)
        is_cell = cell < cells
        scores = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for part in range(0, width, BLOCK_D):
            row = part + lane
            is_row = row < width
            q = tl.load(
                q_ptr + query[:, None] * q_stride_query + row[None, :] * q_stride_width,
                mask=is_query[:, None] & is_row[None, :],
                other=0.0,
            )
            k = tl.load(
                k_ptr + cell[None, :] * k_stride_cell + row[:, None] * k_stride_width,
                mask=is_cell[None, :] & is_row[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        scores *= scale
        is_open = is_cell[None, :]
        if blocked_ptr is not None:
            blocked = tl.load(blocked_row + cell[None, :], mask=is_query[:, None] & is_cell[None, :], other=0)
            is_open = is_open & ((blocked == 0) | (is_shut[:, None] == 1))
        scores = tl.where(is_open, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        ground = tl.where(higher == float("-inf"), 0.0, higher)  # nothing open yet: -inf less itself is no number
        fade = tl.exp2(highest - ground)
        weights = tl.exp2(scores - ground[:, None])
        total = total * fade + tl.sum(weights, 1)
        highest = higher
        v = tl.load(
            v_ptr + cell[:, None] * v_stride_cell + column[None, :] * v_stride_width,
            mask=is_cell[:, None] & is_column[None, :],
            other=0.0,
        )
        answer = tl.dot(weights.to(v.dtype), v, answer * fade[:, None], input_precision=PRECISION)
    answer = (answer / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + query[:, None] * out_stride_query + column[None, :] * out_stride_width,
        answer,
        mask=is_query[:, None] & is_column[None, :],
    )


def check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses what is no q [B, heads, N, d] with k and v [B, heads, S, d]."""
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together")
    if not q.shape[2] or not k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} queries over {k.shape[2]} cells leave nothing to attend to")
    if q.shape[3] > WIDEST:
        raise ValueError(f"{op}: heads of width {q.shape[3]} are too wide, at most {WIDEST} are supported")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected one dtype")


def fused(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
    """What `reference` says, lying in memory as [B, N, heads, d]."""
    check("masked_attention", q, k, v)
    (batch, heads, queries, width), cells = q.shape, k.shape[2]
    if blocked is not None and (
        blocked.shape != (batch, queries, cells) or blocked.dtype != torch.bool or blocked.device != q.device
    ):
        raise ValueError(
            f"masked_attention: blocked is {blocked.dtype} {list(blocked.shape)} on {blocked.device}, expected bools "
            f"{[batch, queries, cells]}"
        )
    if not is_served("masked_attention", q, k, v):
        return reference(q, k, v, blocked)
    sizes = blocks("masked_attention", q)
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    _masked_attention_kernel[
        ceil_divide(queries, sizes["BLOCK_N"]), batch * heads, ceil_divide(width, sizes["BLOCK_D"])
    ](
        q,
        k,
        v,
        None if blocked is None else blocked.contiguous().view(torch.uint8),
        out,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        heads,
        queries,
        cells,
        width,
        width**-0.5 * LOG2_E,
        PRECISION=PRECISION,
        **sizes,
    )
    return out


def cases() -> list[Case]:
    def attention(batch, heads, queries, cells, width, share=None):
        q, k, v = (
            noise(batch, heads, queries, width),
            noise(batch, heads, cells, width),
            noise(batch, heads, cells, width) + 1,
        )
        return q, k, v, None if share is None else torch.sigmoid(noise(batch, queries, cells)) < share

    def all_blocked():
        q, k, v, blocked = attention(2, 2, 5, 9, 8, 0.5)
        blocked[0, 3] = True
        return q, k, v, blocked

    def several_blocks():
        q, k, v, blocked = attention(2, 2, 70, 200, 32, 0.5)
        blocked[1, :, :128] = True
        return q, k, v, blocked

    return [
        Case("smallest", attention(1, 1, 1, 1, 1), (1, 1, 1, 1)),
        Case("self-attention blocks nothing", attention(3, 2, 20, 20, 16), (3, 2, 20, 16)),
        Case("a head wider than a block, ragged", attention(1, 2, 9, 33, 75, 0.5), (1, 2, 9, 75)),
        Case("a query that blocked every cell", all_blocked(), (2, 2, 5, 8)),
        Case("several blocks of cells, some wholly blocked", several_blocks(), (2, 2, 70, 32)),
        Case("upstream's first memory level", attention(1, 8, 100, 400, 32, 0.7), (1, 8, 100, 32)),
    ]
