"""Cross-attention that also returns its share of the captured level; the maps themselves are never written.

The level reads the maps P only through the slice W of its bias-free 1x1 convolution, so P [V | W] gives both in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.attention import LOG2_E, check
from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, padded, tl

MOST_TOKENS = 128  # all of a query's scores are held at once


def reference(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The answer [B, heads, N, d] and the projected maps [B, N, F] fp32, of `weight` [F, heads, T] for `q` [B, heads, N, d], `k`, `v` [B, heads, T, d]."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    exact = torch.promote_types(scores.dtype, torch.float32)
    maps = torch.softmax(scores, -1, dtype=exact).to(v.dtype)
    return torch.matmul(maps, v), torch.einsum("bhnt,fht->bnf", maps, weight).to(exact)


@jit
def _attention_capture_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, T, d]
    v_ptr,  # [B, heads, T, d]
    weight_ptr,  # [F, heads, T]
    out_ptr,  # [B, heads, N, d]
    level_ptr,  # [B, N, F] fp32
    q_stride_image,
    q_stride_head,
    q_stride_query,
    q_stride_width,
    k_stride_image,
    k_stride_head,
    k_stride_token,
    k_stride_width,
    v_stride_image,
    v_stride_head,
    v_stride_token,
    v_stride_width,
    weight_stride_feature,
    weight_stride_head,
    weight_stride_token,
    out_stride_image,
    out_stride_head,
    out_stride_query,
    out_stride_width,
    heads,
    queries,
    tokens,
    width,
    features,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    image, share = tl.program_id(2).to(tl.int64), tl.program_id(1)
    query = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    feature = share.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_query, is_token, is_feature = query < queries, token < tokens, feature < features
    level = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for head in range(heads):
        q_head = q_ptr + image * q_stride_image + head * q_stride_head
        k_head = k_ptr + image * k_stride_image + head * k_stride_head
        scores = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
        for start in range(0, width, BLOCK_D):
            column = start + lane
            is_column = column < width
            q = tl.load(q_head + query[:, None] * q_stride_query + column[None, :] * q_stride_width, mask=is_query[:, None] & is_column[None, :], other=0.0)
            k = tl.load(k_head + token[None, :] * k_stride_token + column[:, None] * k_stride_width, mask=is_token[None, :] & is_column[:, None], other=0.0)
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        scores = tl.where(is_token[None, :], scores * scale, float("-inf"))
        maps = tl.exp2(scores - tl.max(scores, 1)[:, None])
        maps = (maps / tl.sum(maps, 1)[:, None]).to(weight_ptr.dtype.element_ty)
        place = feature[None, :] * weight_stride_feature + head * weight_stride_head + token[:, None] * weight_stride_token
        weight = tl.load(weight_ptr + place, mask=is_token[:, None] & is_feature[None, :], other=0.0)
        level = tl.dot(maps, weight, level, input_precision=PRECISION)
        if share == 0:
            v_head = v_ptr + image * v_stride_image + head * v_stride_head
            out_head = out_ptr + image * out_stride_image + head * out_stride_head
            for start in range(0, width, BLOCK_D):
                column = start + lane
                is_column = column < width
                v = tl.load(v_head + token[:, None] * v_stride_token + column[None, :] * v_stride_width, mask=is_token[:, None] & is_column[None, :], other=0.0)
                answer = tl.dot(maps, v, input_precision=PRECISION).to(out_ptr.dtype.element_ty)
                tl.store(out_head + query[:, None] * out_stride_query + column[None, :] * out_stride_width, answer, mask=is_query[:, None] & is_column[None, :])
    row = (image * queries + query)[:, None] * features + feature[None, :]
    tl.store(level_ptr + row, level, mask=is_query[:, None] & is_feature[None, :])


def fused(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What `reference` says; the answer lies in memory as [B, N, heads, d]."""
    check("attention_capture", q, k, v)
    (batch, heads, queries, width), tokens = q.shape, k.shape[2]
    if weight.ndim != 3 or weight.shape[1:] != (heads, tokens) or weight.dtype != q.dtype:
        raise ValueError(f"attention_capture: weight {list(weight.shape)} {weight.dtype} is not [F, {heads}, {tokens}] {q.dtype}")
    if not is_served("attention_capture", q, k, v, weight):
        return reference(q, k, v, weight)
    if tokens > MOST_TOKENS:
        raise ValueError(f"attention_capture: {tokens} tokens are too many to hold at once, at most {MOST_TOKENS} are supported")
    features, sizes = len(weight), blocks("attention_capture", q)
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    level = q.new_empty((batch, queries, features), dtype=torch.float32)
    _attention_capture_kernel[ceil_divide(queries, sizes["BLOCK_S"]), ceil_divide(features, sizes["BLOCK_F"]), batch](
        q,
        k,
        v,
        weight,
        out,
        level,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *weight.stride(),
        *out.stride(),
        heads,
        queries,
        tokens,
        width,
        features,
        width**-0.5 * LOG2_E,
        PRECISION=PRECISION,
        BLOCK_T=padded(tokens),
        **sizes,
    )
    return out, level


def cases() -> list[Case]:
    def layer(batch, heads, queries, tokens, width, features):
        q, k, v = noise(batch, heads, queries, width), noise(batch, heads, tokens, width), noise(batch, heads, tokens, width) + 1
        return Case(
            f"{heads} heads of {width}, {queries} queries, {tokens} tokens, {features} features",
            (q, k, v, noise(features, heads, tokens)),
            ((batch, heads, queries, width), (batch, queries, features)),
        )

    return [
        layer(1, 1, 1, 1, 1, 1)._replace(reason="smallest"),
        layer(2, 3, 21, 13, 11, 9)._replace(reason="ragged in every size"),
        layer(1, 3, 64, 77, 32, 32)._replace(reason="demo model's middle"),
        layer(1, 2, 80, 77, 40, 200)._replace(reason="SD 1.x first level's heads, several blocks of features"),
        layer(2, 2, 64, 77, 80, 64)._replace(reason="SD 1.x second level's heads"),
        layer(1, 2, 64, 77, 160, 256)._replace(reason="SD 1.x lowest level's heads, its whole width"),
    ]
