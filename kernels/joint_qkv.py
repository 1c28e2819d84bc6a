"""Queries, keys and values of packed products of streams: normalised, rotated by place, end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("joint_qkv", 4, BLOCK_S=16)}
Norms = Sequence[tuple[Tensor | None, Tensor | None]]  # weights [d] for queries and keys of each stream


def reference(
    packed: Sequence[Tensor], norms: Norms, turns: Tensor | None, heads: int, width: int, eps: float
) -> Tensor:
    """[R, N, 3, heads, d] of streams [R, S, 3 * heads * d and more]: queries and keys after an RMS norm of each head,
    where there are weights for it, every pair of their numbers turned by the cosine and sine `turns` [R or 1, N, d / 2,
    2] (Su et al. 2021); and values.
    """
    parts = []
    for stream, weights in zip(packed, norms, strict=True):
        part = stream[..., : 3 * heads * width].unflatten(-1, (3, heads, width)).unbind(2)
        normed = [
            x if weight is None else F.rms_norm(x, weight.shape, weight, eps)
            for x, weight in zip(part, (*weights, None), strict=True)
        ]
        parts.append(torch.stack(normed, 2))
    joint = torch.cat(parts, 1)
    if turns is None:
        return joint
    turned = turn(joint[:, :, :2], turns[:, :, None, None])
    return torch.cat([turned, joint[:, :, 2:]], 2)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Every pair of numbers of `x` [..., d] as a complex number times one of `turns` [..., d / 2, 2]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.to(wide).unbind(-1)
    pairs = torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1)
    return pairs.flatten(-2).to(x.dtype)


def plain(packed: Sequence[Tensor], norms: Norms, turns: Tensor | None, heads: int, width: int, eps: float) -> Tensor:
    """`reference`, every stream written where it belongs."""
    rows, counts = len(packed[0]), [stream.shape[1] for stream in packed]
    joint = packed[0].new_empty(rows, sum(counts), 3, heads, width)
    begin = 0
    for stream, count, weights in zip(packed, counts, norms, strict=True):
        part = stream[..., : 3 * heads * width].unflatten(-1, (3, heads, width))
        place = joint[:, begin : begin + count]
        for kind, weight in enumerate(weights):
            x = part[:, :, kind]
            x = x if weight is None else F.rms_norm(x, weight.shape, weight, eps)
            place[:, :, kind] = x if turns is None else turn(x, turns[:, begin : begin + count, None])
        place[:, :, 2] = part[:, :, 2]
        begin += count
    return joint


@jit
def _joint_qkv_kernel(
    x_ptr,  # [R, S, 3 * heads * d and more]
    query_weight_ptr,  # [d], or None
    key_weight_ptr,  # [d], or None
    turns_ptr,  # [R or 1, N, d / 2, 2] fp32, or None
    out_ptr,  # [R, N, 3, heads, d]
    image_stride,
    token_stride,
    turns_stride,  # tokens from one row of turns to the next, 0 where all share one
    rows,  # R * S * heads
    tokens,  # S
    whole,  # N
    begin,  # of this stream among the N
    heads,
    width,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kind, lane = tl.program_id(1), tl.arange(0, BLOCK_D)  # 0 queries, 1 keys, 2 values
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    head, token, image = row % heads, row // heads % tokens, row // heads // tokens
    is_lane = lane < width
    inside = (row < rows)[:, None] & is_lane[None, :]
    start = image * image_stride + token * token_stride + (kind * heads + head) * width
    x = tl.load(x_ptr + start[:, None] + lane[None, :], mask=inside, other=0.0)
    y = x.to(tl.float32)
    if query_weight_ptr is not None:
        y *= tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
        query_weight = tl.load(query_weight_ptr + lane, mask=is_lane, other=0.0).to(tl.float32)
        key_weight = tl.load(key_weight_ptr + lane, mask=is_lane, other=0.0).to(tl.float32)
        y *= tl.where(kind == 0, query_weight, key_weight)[None, :]
    place = begin + token
    if turns_ptr is not None:
        turn = (image * turns_stride + place) * width
        turns = tl.load(turns_ptr + turn[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        cosine, sine = tl.split(tl.reshape(turns, [BLOCK_S, BLOCK_D // 2, 2]))
        first, second = tl.split(tl.reshape(y, [BLOCK_S, BLOCK_D // 2, 2]))
        pairs = tl.join(first * cosine - second * sine, first * sine + second * cosine)
        y = tl.reshape(pairs, [BLOCK_S, BLOCK_D])
    y = tl.where(kind == 2, x.to(tl.float32), y).to(out_ptr.dtype.element_ty)
    end = (((image * whole + place) * 3 + kind) * heads + head) * width
    tl.store(out_ptr + end[:, None] + lane[None, :], y, mask=inside)


def fused(packed: Sequence[Tensor], norms: Norms, turns: Tensor | None, heads: int, width: int, eps: float) -> Tensor:
    """The result of `reference`, in one pass over each stream."""
    rows, counts, needed = len(packed[0]), [stream.shape[1] for stream in packed], 3 * heads * width
    whole, weights = sum(counts), [weight for pair in norms for weight in pair]
    fits = len(packed) == len(norms) and all(len(x) == rows and x.shape[2] >= needed for x in packed)
    fits = fits and all(weight is None or weight.shape == (width,) for weight in weights)
    fits = fits and all((query is None) == (key is None) for query, key in norms)
    fits = fits and (turns is None or turns.shape in ((1, whole, width // 2, 2), (rows, whole, width // 2, 2)))
    if not is_served("joint_qkv", *packed, *weights, turns, fits=fits):
        return reference(packed, norms, turns, heads, width, eps)
    out, begin = packed[0].new_empty(rows, whole, 3, heads, width), 0
    turns = None if turns is None else turns.contiguous()
    sizes = blocks(BLOCKS, "joint_qkv", out)
    for x, count, (query, key) in zip(packed, counts, norms):
        x = x if x.stride(2) == 1 else x.contiguous()
        with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
            _joint_qkv_kernel[(ceil_divide(rows * count * heads, sizes["BLOCK_S"]), 3)](
                x,
                query,
                key,
                turns,
                out,
                *x.stride()[:2],
                0 if turns is None or len(turns) == 1 else whole,
                rows * count * heads,
                count,
                whole,
                begin,
                heads,
                width,
                eps,
                BLOCK_D=round_up(width, 2),
                **sizes,
            )
        begin += count
    return out


def probe() -> Probe:
    weights = noise(2, 2, 64) + 1
    return [noise(2, 5, 400), noise(2, 3, 384)], list(map(tuple, weights)), noise(1, 8, 32, 2), 2, 64, 1e-6
