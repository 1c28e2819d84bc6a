"""Attention of a decoder's queries over cells or over each other, read from packed products: positions are added where
queries and keys are read, and cells outside of a query's last mask are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels import masked_attention
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 128  # channels of a head; tiles of wider ones do not fit into every GPU, and are left to the reference
DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("query_attention", 4, 2, bits=(16,), BLOCK_N=32, BLOCK_S=64)
    | block_sizes("query_attention", 2, 1, bits=(32,), BLOCK_N=16, BLOCK_S=16),
    "sm_90": block_sizes("query_attention", 4, 2, bits=(16,), BLOCK_N=16, BLOCK_S=128),
}


def reference(
    q: Tensor, k: Tensor, v: Tensor, heads: int, q_place: Tensor, k_place: Tensor, logits: Tensor | None = None
) -> Tensor:
    """softmax((q + q_place) (k + k_place)^T / sqrt(d)) v [B, N, C] of `q` [B, N, C], `k` and `v` [B, S, C], each of
    `heads` side by side; `q_place` [N, C] or [B, N, C] and `k_place` [S, C] or [B, S, C] are their positions' shares.
    A query does not see cells whose `logits` [B, N, S] are of a sigmoid below one half, unless all are.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q + q_place, k + k_place, v))
    # Against the sigmoid, not the sign of the logit: see mask_head.
    blocked = None if logits is None else logits.sigmoid() < 0.5
    return masked_attention.reference(q, k, v, blocked).transpose(1, 2).flatten(2)


@jit
def _load_placed(
    x_ptr, place_ptr, row, is_row, row_stride, place_stride, lane, is_lane
):  # rows of one head plus their positions' shares
    inside = is_row[:, None] & is_lane[None, :]
    x = tl.load(x_ptr + row[:, None] * row_stride + lane[None, :], mask=inside, other=0.0)
    place = tl.load(place_ptr + row[:, None] * place_stride + lane[None, :], mask=inside, other=0.0)
    return (x.to(tl.float32) + place.to(tl.float32)).to(x.dtype)


@jit
def is_masked(logits_ptr, query, cell, is_query, is_cell, cells):  # [N, S]: outside of the last mask
    inside = is_query[:, None] & is_cell[None, :]
    logits = tl.load(logits_ptr + query[:, None] * cells + cell[None, :], mask=inside, other=float("-inf"))
    return tl.sigmoid(logits.to(tl.float32)).to(logits.dtype) < 0.5


@jit
def _query_attention_kernel(
    q_ptr,  # [B, N, C]
    k_ptr,  # [B, S, C]
    v_ptr,  # [B, S, C]
    q_place_ptr,  # [N, C], or [B, N, C]
    k_place_ptr,  # [S, C], or [B, S, C]
    logits_ptr,  # [B, N, S], or None
    out_ptr,  # [B, N, C]
    queries,
    cells,
    width,  # of a head
    scale,
    q_image_stride,
    q_row_stride,
    k_image_stride,
    k_row_stride,
    v_image_stride,
    v_row_stride,
    q_place_image_stride,
    q_place_stride,
    k_place_image_stride,
    k_place_stride,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    is_query, is_lane, first = query < queries, lane < width, head * width
    q = _load_placed(
        q_ptr + image * q_image_stride + first,
        q_place_ptr + image * q_place_image_stride + first,
        query, is_query, q_row_stride, q_place_stride, lane, is_lane,
    )  # fmt: skip
    keys_ptr, values_ptr = k_ptr + image * k_image_stride + first, v_ptr + image * v_image_stride + first
    places_ptr = k_place_ptr + image * k_place_image_stride + first

    # 1. Which queries see any cell of their own mask; those that see none attend to all (Mask2Former)
    seen = tl.zeros([BLOCK_N], tl.int32)  # whether a query sees any cell of its own
    if logits_ptr is not None:
        masks_ptr = logits_ptr + image * queries * cells
        for start in range(0, cells, BLOCK_S):
            cell = start + column
            blocked = is_masked(masks_ptr + start, query, column, is_query, cell < cells, cells)
            seen = tl.maximum(seen, tl.max((blocked == 0).to(tl.int32), 1))

    # 2. Online softmax over blocks of cells
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    answer = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, cells, BLOCK_S):
        cell = start + column
        is_cell = cell < cells
        skipped = tl.cast(start, tl.int64)  # within a block 32 bits are enough, and take fewer registers
        k = _load_placed(
            keys_ptr + skipped * k_row_stride,
            places_ptr + skipped * k_place_stride,
            column, is_cell, k_row_stride, k_place_stride, lane, is_lane,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(is_cell[None, :], scores, float("-inf"))
        if logits_ptr is not None:
            blocked = is_masked(masks_ptr + start, query, column, is_query, is_cell, cells)
            scores = tl.where(blocked & (seen > 0)[:, None], float("-inf"), scores)
        top = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)  # nothing is seen so far
        weights = tl.exp(scores - finite[:, None])
        share = tl.exp(highest - finite)
        inside = is_cell[:, None] & is_lane[None, :]
        value_ptr = values_ptr + skipped * v_row_stride + column[:, None] * v_row_stride
        v = tl.load(value_ptr + lane[None, :], mask=inside, other=0.0)
        total = total * share + tl.sum(weights, 1)
        answer = tl.dot(weights.to(v.dtype), v, answer * share[:, None], input_precision=PRECISION)
        highest = top

    # 3. The answer
    answer = answer / total[:, None]
    place = (image * queries + query)[:, None] * (tl.num_programs(1) * width) + first + lane[None, :]
    tl.store(out_ptr + place, answer.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & is_lane[None, :])


def fused(
    q: Tensor, k: Tensor, v: Tensor, heads: int, q_place: Tensor, k_place: Tensor, logits: Tensor | None = None
) -> Tensor:
    """The result of `reference`; neither scores nor separate heads are written."""
    (batch, queries, channels), cells = q.shape, k.shape[1]
    fits = channels % heads == 0 and k.shape == v.shape == (batch, cells, channels)
    fits = fits and q_place.shape[-2:] == q.shape[1:] and k_place.shape[-2:] == k.shape[1:]
    fits = fits and (logits is None or logits.shape == (batch, queries, cells))
    inputs = q, k, v, q_place, k_place
    if not is_served("query_attention", *inputs, logits, fits=fits) or channels // heads > WIDEST:
        return reference(q, k, v, heads, q_place, k_place, logits)
    q, k, v, q_place, k_place = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    out, width = q.new_empty(q.shape), channels // heads
    together = cells if width % 16 == 0 else 32  # each value of other heads is loaded by an address of its own
    sizes = blocks(BLOCKS, "query_attention", q, BLOCK_N=queries, BLOCK_S=min(cells, together))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    strides += [stride for x in (q_place, k_place) for stride in (x.expand(batch, -1, -1)).stride()[:2]]
    with torch.cuda.device_of(q):  # Triton launches on the current device of the thread
        _query_attention_kernel[ceil_divide(queries, sizes["BLOCK_N"]), heads, batch](
            q,
            k,
            v,
            q_place,
            k_place,
            None if logits is None else logits.contiguous(),
            out,
            queries,
            cells,
            width,
            width**-0.5,
            *strides,
            PRECISION=PRECISION,
            BLOCK_D=round_up(width),
            **sizes,
        )
    return out


def probe() -> Probe:
    k, v = noise(1, 100, 2, 64).unbind(2)
    places = noise(40, 64, 1)[..., 0], noise(1, 100, 64, 1)[..., 0]
    return noise(1, 40, 64), k, v + 1, 2, *places, noise(1, 40, 100) + torch.tensor(0.3).logit()
