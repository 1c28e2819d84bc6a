"""Cross-attention that also returns its share of the captured level; on a GPU the maps themselves are never written.

The level reads the maps P only through the slice W of its bias-free 1x1 convolution, so P [V | W] gives both in one
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.attention import probabilities
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

MOST_TOKENS = 128  # all of a query's scores are held at once; texts of more are left to the plain form
WIDEST = 256  # channels of a head; wider ones are left to the plain form, too
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("attention_capture", 8, bits=(16,), BLOCK_S=64, BLOCK_D=16, BLOCK_F=64)
    | block_sizes("attention_capture", 8, bits=(32,), BLOCK_S=16, BLOCK_D=16, BLOCK_F=16),
    "sm_90": block_sizes("attention_capture", 8, bits=(16,), BLOCK_S=128, BLOCK_D=64, BLOCK_F=128),
}


def reference(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The answer [B, heads, N, d] and the projected maps [B, N, F] fp32, of `weight` [heads, T, F] for `q` [B, heads,
    N, d], `k`, `v` [B, heads, T, d].
    """
    maps = probabilities(q, k)
    projected = torch.einsum("bhnt,htf->bnf", maps, weight)
    return torch.matmul(maps, v), projected.to(torch.promote_types(projected.dtype, torch.float32))


def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`reference`, heads and tokens as one axis of one product."""
    maps = probabilities(q, k)
    projected = torch.matmul(maps.transpose(1, 2).flatten(2), weight.flatten(0, 1))
    return torch.matmul(maps, v), projected.to(torch.promote_types(projected.dtype, torch.float32))


@jit
def _attention_capture_kernel(
    q_ptr,  # [B, heads, N, d]
    k_ptr,  # [B, heads, T, d]
    v_ptr,  # [B, heads, T, d]
    weight_ptr,  # [heads, T, F]
    out_ptr,  # [B, heads, N, d]
    level_ptr,  # [B, N, F] fp32
    q_stride_image,
    # known, so that Triton sees heads of 40 start at multiples of 16 bytes and loads whole vectors
    q_stride_head: tl.constexpr,
    q_stride_query,
    k_stride_image,
    k_stride_head: tl.constexpr,
    k_stride_token,
    v_stride_image,
    v_stride_head: tl.constexpr,
    v_stride_token,
    weight_stride_head,
    weight_stride_token,
    out_stride_image,
    out_stride_head: tl.constexpr,
    out_stride_query,
    heads,
    queries,
    tokens,
    width,
    features,
    scale,
    WIDE: tl.constexpr,  # 77 tokens are no power of two: a wide part and a rest, 64 + 13
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    image, share = tl.program_id(2).to(tl.int64), tl.program_id(1)
    # Within an image 32 bits are enough, and take fewer registers.
    query, wide = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, WIDE)
    lane, feature = tl.arange(0, BLOCK_D), share * BLOCK_F + tl.arange(0, BLOCK_F)
    is_query, is_wide, is_feature = query < queries, wide < tokens, feature < features
    if REST > 0:
        rest = WIDE + tl.arange(0, REST)
        is_rest = rest < tokens

    # 1. Every head in turn; `level` adds up what the decoder's slice of weights makes of all maps
    level = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for i in range(heads):
        head = tl.cast(i, tl.int64)
        q_head = q_ptr + image * q_stride_image + head * q_stride_head
        k_head = k_ptr + image * k_stride_image + head * k_stride_head
        # 2. Scores over all tokens
        scores = tl.zeros([BLOCK_S, WIDE], tl.float32)
        if REST > 0:
            scores_rest = tl.zeros([BLOCK_S, REST], tl.float32)
        for start in range(0, width, BLOCK_D):
            column = start + lane
            is_column = column < width
            q = tl.load(
                q_head + query[:, None] * q_stride_query + column[None, :],
                mask=is_query[:, None] & is_column[None, :],
                other=0.0,
            )
            k = tl.load(
                k_head + wide[None, :] * k_stride_token + column[:, None],
                mask=is_wide[None, :] & is_column[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
            if REST > 0:
                k = tl.load(
                    k_head + rest[None, :] * k_stride_token + column[:, None],
                    mask=is_rest[None, :] & is_column[:, None],
                    other=0.0,
                )
                scores_rest = tl.dot(q, k, scores_rest, input_precision=PRECISION)
        # 3. Softmax over all tokens at once
        scores = tl.where(is_wide[None, :], scores * scale, float("-inf"))
        highest = tl.max(scores, 1)
        if REST > 0:
            scores_rest = tl.where(is_rest[None, :], scores_rest * scale, float("-inf"))
            highest = tl.maximum(highest, tl.max(scores_rest, 1))
        maps = tl.exp2(scores - highest[:, None])
        total = tl.sum(maps, 1)
        if REST > 0:
            maps_rest = tl.exp2(scores_rest - highest[:, None])
            total += tl.sum(maps_rest, 1)
            maps_rest = (maps_rest / total[:, None]).to(weight_ptr.dtype.element_ty)
        maps = (maps / total[:, None]).to(weight_ptr.dtype.element_ty)
        # 4. The maps times the decoder's weights of this head
        weight_head = weight_ptr + head * weight_stride_head + feature[None, :]
        weight = tl.load(
            weight_head + wide[:, None] * weight_stride_token, mask=is_wide[:, None] & is_feature[None, :], other=0.0
        )
        level = tl.dot(maps, weight, level, input_precision=PRECISION)
        if REST > 0:
            weight = tl.load(
                weight_head + rest[:, None] * weight_stride_token,
                mask=is_rest[:, None] & is_feature[None, :],
                other=0.0,
            )
            level = tl.dot(maps_rest, weight, level, input_precision=PRECISION)
        # 5. The maps times the values: the answer of attention, by one of the blocks that share these queries
        if share == 0:
            v_head = v_ptr + image * v_stride_image + head * v_stride_head
            out_head = out_ptr + image * out_stride_image + head * out_stride_head
            for start in range(0, width, BLOCK_D):
                column = start + lane
                is_column = column < width
                v = tl.load(
                    v_head + wide[:, None] * v_stride_token + column[None, :],
                    mask=is_wide[:, None] & is_column[None, :],
                    other=0.0,
                )
                answer = tl.dot(maps, v, input_precision=PRECISION)
                if REST > 0:
                    v = tl.load(
                        v_head + rest[:, None] * v_stride_token + column[None, :],
                        mask=is_rest[:, None] & is_column[None, :],
                        other=0.0,
                    )
                    answer = tl.dot(maps_rest, v, answer, input_precision=PRECISION)
                place = query[:, None] * out_stride_query + column[None, :]
                tl.store(
                    out_head + place, answer.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & is_column[None, :]
                )

    # 6. The level
    place = query[:, None] * features + feature[None, :]
    level_ptr += image * queries * features
    tl.store(level_ptr + place, level, mask=is_query[:, None] & is_feature[None, :])


def split(width: int) -> tuple[int, int]:
    """Sizes of the wide part and of the rest that hold `width`: powers of two from 16 up, the rest 0 where it saves
    nothing.
    """
    whole = round_up(width)
    wide = whole // 2
    rest = round_up(width - wide) if width > wide else 0
    return (whole, 0) if wide < 16 or wide + rest >= whole else (wide, rest)


def fused(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `reference`; the answer lies in memory as [B, N, heads, d]."""
    fits = q.ndim == 4 and k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    fits = fits and q.dtype == k.dtype == v.dtype == weight.dtype and q.shape[2] * weight.numel() > 0
    fits = fits and weight.ndim == 3 and weight.shape[:2] == (q.shape[1], k.shape[2])
    if not is_served("attention_capture", q, k, v, weight, fits=fits):
        return reference(q, k, v, weight)
    if k.shape[2] > MOST_TOKENS or q.shape[3] > WIDEST:
        return plain(q, k, v, weight)
    (batch, heads, queries, width), tokens, features = q.shape, k.shape[2], weight.shape[2]
    q, k, v, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, weight))
    (wide, rest), sizes = split(tokens), blocks(BLOCKS, "attention_capture", q)
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    level = q.new_empty((batch, queries, features), dtype=torch.float32)
    grid = ceil_divide(queries, sizes["BLOCK_S"]), ceil_divide(features, sizes["BLOCK_F"]), batch
    with torch.cuda.device_of(q):  # Triton launches on the current device of the thread
        _attention_capture_kernel[grid](
            q,
            k,
            v,
            weight,
            out,
            level,
            *[stride for x in (q, k, v) for stride in x.stride()[:3]],
            *weight.stride()[:2],
            *out.stride()[:3],
            heads,
            queries,
            tokens,
            width,
            features,
            width**-0.5 * LOG2_E,
            WIDE=wide,
            REST=rest,
            PRECISION=PRECISION,
            **sizes,
        )
    return out, level


def probe() -> Probe:
    q, k = noise(1, 2, 64, 160), noise(1, 2, 77, 160)
    return q, k, k + 1, noise(2, 77, 256)
