"""Attention without the scores in memory: self-attention of the UNet, and cross-attention where nothing is captured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels import masked_attention
from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, padded, tl
from datasetdm_fast.kernels.masked_attention import LOG2_E, check
from datasetdm_fast.kernels.native import STORAGES, is_native, threads

NATIVE_KEYS = 1024  # all scores of a few queries are held at once; longer rows leave the second-level cache
EXACT_WIDEST = 64  # three products for one keep twice the factors in registers: wider fp32 heads would spill


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d] of `q` [B, heads, N, d], `k` and `v` [B, heads, S, d]."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(weights.to(v.dtype), v)


def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on a CPU: csrc/network_ops.cpp where the rows are short, PyTorch's own fused attention elsewhere."""
    if not is_native(q, k, v) or k.shape[2] > NATIVE_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(
        1, 2
    )  # heads side by side, as the layer after it reads them
    places = [part for x in (q, k, v, out) for part in (x.data_ptr(), x.stride()[:3])]
    _C.attention(STORAGES[q.dtype], *places, batch, heads, queries, k.shape[2], width, width**-0.5, threads(q))
    return out


@jit
def _attention_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, S, d]
    v_ptr,  # [B, heads, S, d]
    out_ptr,  # [B, heads, N, d]
    q_stride_image,
    # known, so that Triton sees heads of 40 start at multiples of 16 bytes and loads whole vectors
    q_stride_head: tl.constexpr,
    q_stride_query,
    q_stride_width,
    k_stride_image,
    k_stride_head: tl.constexpr,
    k_stride_cell,
    k_stride_width,
    v_stride_image,
    v_stride_head: tl.constexpr,
    v_stride_cell,
    v_stride_width,
    out_stride_image,
    out_stride_head: tl.constexpr,
    out_stride_query,
    out_stride_width,
    heads,
    queries,
    cells,
    scale,
    WIDTH: tl.constexpr,  # d = 40, 80, 160 are no powers of two: a wide part and a rest, 40 = 32 + 8
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    image, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    query = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = tl.arange(0, WIDE)
    is_query, is_wide = query < queries, wide < WIDTH
    q_ptr += image * q_stride_image + head * q_stride_head
    k_ptr += image * k_stride_image + head * k_stride_head
    v_ptr += image * v_stride_image + head * v_stride_head
    out_ptr += image * out_stride_image + head * out_stride_head
    q_place = query[:, None] * q_stride_query
    q = tl.load(q_ptr + q_place + wide[None, :] * q_stride_width, mask=is_query[:, None] & is_wide[None, :], other=0.0)
    answer = tl.zeros([BLOCK_N, WIDE], tl.float32)
    if REST > 0:
        rest = WIDE + tl.arange(0, REST)
        is_rest = rest < WIDTH
        q_rest = tl.load(
            q_ptr + q_place + rest[None, :] * q_stride_width, mask=is_query[:, None] & is_rest[None, :], other=0.0
        )
        answer_rest = tl.zeros([BLOCK_N, REST], tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, cells, BLOCK_S):
        cell = start + tl.arange(0, BLOCK_S).to(tl.int64)
        is_cell = cell < cells
        k = tl.load(
            k_ptr + cell[None, :] * k_stride_cell + wide[:, None] * k_stride_width,
            mask=is_cell[None, :] & is_wide[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision=PRECISION)
        if REST > 0:
            k_rest = tl.load(
                k_ptr + cell[None, :] * k_stride_cell + rest[:, None] * k_stride_width,
                mask=is_cell[None, :] & is_rest[:, None],
                other=0.0,
            )
            scores = tl.dot(q_rest, k_rest, scores, input_precision=PRECISION)
        scores *= scale
        if IS_RAGGED:
            scores = tl.where(is_cell[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        highest = higher
        v = tl.load(
            v_ptr + cell[:, None] * v_stride_cell + wide[None, :] * v_stride_width,
            mask=is_cell[:, None] & is_wide[None, :],
            other=0.0,
        )
        weights = weights.to(v.dtype)
        answer = tl.dot(weights, v, answer * fade[:, None], input_precision=PRECISION)
        if REST > 0:
            v_rest = tl.load(
                v_ptr + cell[:, None] * v_stride_cell + rest[None, :] * v_stride_width,
                mask=is_cell[:, None] & is_rest[None, :],
                other=0.0,
            )
            answer_rest = tl.dot(weights, v_rest, answer_rest * fade[:, None], input_precision=PRECISION)
    out_place = query[:, None] * out_stride_query
    answer = (answer / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_place + wide[None, :] * out_stride_width, answer, mask=is_query[:, None] & is_wide[None, :])
    if REST > 0:
        answer_rest = (answer_rest / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + out_place + rest[None, :] * out_stride_width,
            answer_rest,
            mask=is_query[:, None] & is_rest[None, :],
        )


def split(width: int) -> tuple[int, int]:
    """Sizes of the wide part and of the rest that hold `width`: powers of two from 16 up, the rest 0 where it saves
    nothing.
    """
    whole = padded(width)
    wide = whole // 2
    rest = padded(width - wide) if width > wide else 0
    return (whole, 0) if wide < 16 or wide + rest >= whole else (wide, rest)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `reference` says, lying in memory as [B, N, heads, d], so that joining the heads moves nothing."""
    check("attention", q, k, v)
    if not is_served("attention", q, k, v):
        return reference(q, k, v)
    if q.dtype == torch.float32 and q.shape[3] > EXACT_WIDEST:
        return masked_attention.fused(q, k, v)  # that kernel holds a part of a head at a time
    batch, heads, queries, width = q.shape
    cells, (wide, rest), sizes = k.shape[2], split(width), blocks(f"attention {max(64, padded(width))}", q)
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    _attention_kernel[ceil_divide(queries, sizes["BLOCK_N"]), batch * heads](
        q,
        k,
        v,
        out,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        heads,
        queries,
        cells,
        width**-0.5 * LOG2_E,
        WIDTH=width,
        WIDE=wide,
        REST=rest,
        IS_RAGGED=bool(cells % sizes["BLOCK_S"]),
        PRECISION=PRECISION,
        **sizes,
    )
    return out


def cases() -> list[Case]:
    def packed(batch, heads, cells, width):
        return tuple(noise(batch, cells, 3, heads, width).unbind(2)[i].transpose(1, 2) for i in range(3))

    def crossed(batch, heads, queries, tokens, width):
        return (
            noise(batch, heads, queries, width),
            noise(batch, heads, tokens, width),
            noise(batch, heads, tokens, width) + 1,
        )

    return [
        Case("smallest", crossed(1, 1, 1, 1, 1), (1, 1, 1, 1)),
        Case("ragged in every size", crossed(2, 3, 37, 67, 21), (2, 3, 37, 21)),
        Case("tiny preset's heads", packed(1, 3, 64, 16), (1, 3, 64, 16)),
        Case("SD 1.x first level's heads, packed", packed(2, 2, 130, 40), (2, 2, 130, 40)),
        Case("SD 1.x second level over text", crossed(1, 2, 64, 77, 80), (1, 2, 64, 80)),
        Case("SD 1.x lowest level's heads", packed(1, 2, 64, 160), (1, 2, 64, 160)),
        Case("SD 2.x heads, scores that overflow exp", tuple(8 * x for x in packed(1, 1, 96, 64)), (1, 1, 96, 64)),
    ]
