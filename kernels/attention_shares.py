"""What decoders read of a joint attention's shares that go to text, from the logarithms of its sums."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 512  # bytes of a head, whose channels are held at once; wider ones are left to the plain form
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("attention_shares", 8, bits=(16,), BLOCK_S=64, BLOCK_T=64, BLOCK_F=64)
    | block_sizes("attention_shares", 8, bits=(32,), BLOCK_S=16, BLOCK_T=32, BLOCK_F=32)
}


def reference(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """[B, S, F] sum over heads and tokens of the `shares` times `weight` [heads, T, F]; without one the mean of the
    heads, [B, S, T].
    """
    maps = shares(q, k, sums, mask)
    if weight is None:
        return maps.mean(1)
    projected = torch.einsum("bhst,htf->bsf", maps.to(weight.dtype), weight)
    return projected.to(maps.dtype)


def shares(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, S, T] exp(q k^T / sqrt(d) - the logarithm `sums` [B, heads, S] of the sum over all keys), 0 for tokens
    that `mask` [B, 1, 1, T] hides; `q` and `k` are of the cells and of the text.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).mT) / q.shape[-1] ** 0.5
    parts = scores.sub_(sums[..., None]).exp_()
    return parts if mask is None else parts * mask


def plain(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """`reference` an image at a time, heads and tokens as one axis of one product."""
    masks = [None] * len(k) if mask is None else mask.split(1)
    rows = []
    for row in zip(q.split(1), k.split(1), sums.split(1), masks, strict=True):
        maps = shares(*row)
        rows.append(maps.mean(1) if weight is None else project(maps, weight))
    return torch.cat(rows)


def project(maps: Tensor, weight: Tensor) -> Tensor:
    flat = maps.to(weight.dtype).transpose(1, 2).flatten(2)
    return torch.matmul(flat, weight.flatten(0, 1)).to(maps.dtype)


@jit
def shares_of_block(
    q, k_ptr, sums, mask_ptr, token, tokens, k_stride_token, lane, is_lane, scale, PRECISION: tl.constexpr
):
    """The shares [S, T] of a block of tokens, from the queries of a head and the logarithms to base 2 of their sums."""
    is_token = token < tokens
    if mask_ptr is not None:
        is_token &= tl.load(mask_ptr + token, mask=is_token, other=0) != 0
    inside = is_token[None, :] & is_lane[:, None]
    k = tl.load(k_ptr + token[None, :] * k_stride_token + lane[:, None], mask=inside, other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    return tl.where(is_token[None, :], tl.exp2(scores - sums[:, None]), 0.0)


@jit
def _attention_shares_kernel(
    q_ptr,  # [B, heads, S, d]
    k_ptr,  # [B, heads, T, d]
    sums_ptr,  # [B, heads, S] fp32
    mask_ptr,  # [B, T] u8, or None
    weight_ptr,  # [heads, T, F], or None: the mean of the heads
    out_ptr,  # [B, S, F] fp32
    q_stride_image,
    q_stride_head,
    q_stride_cell,
    k_stride_image,
    k_stride_head,
    k_stride_token,
    sums_stride_image,
    sums_stride_head,
    weight_stride_head,
    weight_stride_token,
    heads,
    cells,
    tokens,
    width,
    features,
    scale,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    lane, is_cell, is_feature = tl.arange(0, WIDTH), cell < cells, feature < features
    is_lane = lane < width
    if mask_ptr is not None:
        mask_ptr += image * tokens
    total = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for i in range(heads):
        head = tl.cast(i, tl.int64)
        q_head = q_ptr + image * q_stride_image + head * q_stride_head
        q_place = q_head + cell[:, None] * q_stride_cell + lane[None, :]
        q = tl.load(q_place, mask=is_cell[:, None] & is_lane[None, :], other=0.0)
        sums_head = sums_ptr + image * sums_stride_image + head * sums_stride_head
        sums = tl.load(sums_head + cell, mask=is_cell, other=0.0).to(tl.float32) * 1.4426950408889634
        k_head = k_ptr + image * k_stride_image + head * k_stride_head
        if weight_ptr is None:  # features are the tokens themselves
            parts = shares_of_block(
                q, k_head, sums, mask_ptr, feature, tokens, k_stride_token, lane, is_lane, scale, PRECISION
            )
            total += parts / heads
        else:
            for start in range(0, tokens, BLOCK_T):
                token = start + tl.arange(0, BLOCK_T)
                parts = shares_of_block(
                    q, k_head, sums, mask_ptr, token, tokens, k_stride_token, lane, is_lane, scale, PRECISION
                )
                place = head * weight_stride_head + token[:, None] * weight_stride_token + feature[None, :]
                inside = (token < tokens)[:, None] & is_feature[None, :]
                weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
                total = tl.dot(parts.to(weight.dtype), weight, total, input_precision=PRECISION)
    place = (image * cells + cell)[:, None] * features + feature[None, :]
    tl.store(out_ptr + place, total, mask=is_cell[:, None] & is_feature[None, :])


def fused(q: Tensor, k: Tensor, sums: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """The result of `reference`; the shares are never written."""
    (batch, heads, cells, width), tokens = q.shape, k.shape[2]
    fits = k.shape == (batch, heads, tokens, width) and sums.shape == (batch, heads, cells)
    fits = fits and (weight is None or weight.shape[:2] == (heads, tokens))
    fits = fits and (mask is None or mask.shape == (batch, 1, 1, tokens))
    if not is_served("attention_shares", q, k, sums, weight, fits=fits):
        return reference(q, k, sums, mask, weight)
    if width * q.element_size() > WIDEST:
        return plain(q, k, sums, mask, weight)
    q, k, sums = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, sums))
    # one precision for both products
    weight = None if weight is None else weight.to(q.dtype).contiguous()
    features, sizes = tokens if weight is None else weight.shape[2], blocks(BLOCKS, "attention_shares", q)
    out = q.new_empty((batch, cells, features), dtype=torch.float32)
    grid = ceil_divide(cells, sizes["BLOCK_S"]), ceil_divide(features, sizes["BLOCK_F"]), batch
    with torch.cuda.device_of(q):  # Triton launches on the current device of the thread
        _attention_shares_kernel[grid](
            q,
            k,
            sums,
            None if mask is None else mask.to(torch.uint8).contiguous(),
            weight,
            out,
            *q.stride()[:3],
            *k.stride()[:3],
            *sums.stride()[:2],
            *((0, 0) if weight is None else weight.stride()[:2]),
            heads,
            cells,
            tokens,
            width,
            features,
            width**-0.5 * LOG2_E,
            PRECISION=PRECISION,
            WIDTH=round_up(width, 16),
            **sizes,
        )
    return out


def probe() -> Probe:
    q, k = noise(1, 2, 70, 64), noise(1, 2, 300, 64)
    return q, k, torch.full((1, 2, 70), 6.0), None, noise(2, 300, 96)
