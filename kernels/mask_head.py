"""Masks of every query: its embedding times the mask features, resized; as logits, or as the cells its attention is to
leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.bilinear import neighbours, resize
from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, tl


def reference(queries: Tensor, features: Tensor, side: int, is_blocking: bool = False) -> Tensor:
    """Logits [B, N, side, side] of `queries` [B, N, D] on `features` [B, D, h, w]; or, if `is_blocking`, whether a cell
    is outside the mask.
    """
    logits = resize(torch.einsum("bnd,bdhw->bnhw", queries, features), side)
    # Against the sigmoid, not the sign of the logit: just below zero the sigmoid rounds to one half, which upstream
    # lets through.
    return logits.sigmoid() < 0.5 if is_blocking else logits


@jit
def _mask_head_kernel(
    queries_ptr,  # [B, N, D]
    features_ptr,  # [B, D, h, w]
    out_ptr,  # [B, N, side, side], logits or bytes
    count,  # of queries
    width,
    features_height,
    features_width,
    side,
    queries_stride_image,
    queries_stride_query,
    queries_stride_width,
    features_stride_image,
    features_stride_width,
    features_stride_row,
    features_stride_column,
    IS_RESIZED: tl.constexpr,
    IS_BLOCKING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    is_query, is_cell = query < count, cell < side * side
    row, column = cell // side, cell % side
    queries_ptr += image * queries_stride_image + query[:, None] * queries_stride_query
    features_ptr += image * features_stride_image
    # The resize and the product act on different axes, so the few cells that are asked for are resized before they are
    # multiplied.
    if IS_RESIZED:
        top, bottom, down = neighbours(row, features_height, side)
        left, right, across = neighbours(column, features_width, side)
    logits = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for start in range(0, width, BLOCK_D):
        channel = start + lane
        is_channel = channel < width
        inside = is_channel[:, None] & is_cell[None, :]
        queries = tl.load(
            queries_ptr + channel[None, :] * queries_stride_width,
            mask=is_query[:, None] & is_channel[None, :],
            other=0.0,
        )
        plane = features_ptr + channel[:, None] * features_stride_width
        if IS_RESIZED:
            a = tl.load(
                plane + (top * features_stride_row + left * features_stride_column)[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            b = tl.load(
                plane + (top * features_stride_row + right * features_stride_column)[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            c = tl.load(
                plane + (bottom * features_stride_row + left * features_stride_column)[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            d = tl.load(
                plane + (bottom * features_stride_row + right * features_stride_column)[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            upper, lower = a + across[None, :] * (b - a), c + across[None, :] * (d - c)
            features = (upper + down[None, :] * (lower - upper)).to(queries.dtype)
        else:
            features = tl.load(
                plane + (row * features_stride_row + column * features_stride_column)[None, :], mask=inside, other=0.0
            )
        logits = tl.dot(queries, features, logits, input_precision=PRECISION)
    place = (image * count + query)[:, None] * side * side + cell[None, :]
    if IS_BLOCKING:
        logits = tl.sigmoid(logits) < 0.5
    tl.store(out_ptr + place, logits.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & is_cell[None, :])


def fused(queries: Tensor, features: Tensor, side: int, is_blocking: bool = False) -> Tensor:
    """What `reference` says."""
    if (
        queries.ndim != 3
        or features.ndim != 4
        or queries.shape[0] != features.shape[0]
        or queries.shape[2] != features.shape[1]
    ):
        raise ValueError(
            f"mask_head: queries {list(queries.shape)} and features {list(features.shape)} do not belong together"
        )
    if queries.dtype != features.dtype:
        raise ValueError(f"mask_head: queries are {queries.dtype} and features {features.dtype}, expected one dtype")
    if not is_served("mask_head", queries, features):
        return reference(queries, features, side, is_blocking)
    (batch, count, width), (height, across), sizes = queries.shape, features.shape[2:], blocks("mask_head", queries)
    out = queries.new_empty((batch, count, side, side), dtype=torch.bool if is_blocking else queries.dtype)
    _mask_head_kernel[ceil_divide(side * side, sizes["BLOCK_S"]), ceil_divide(count, sizes["BLOCK_N"]), batch](
        queries,
        features,
        out.view(torch.uint8) if is_blocking else out,
        count,
        width,
        height,
        across,
        side,
        *queries.stride(),
        *features.stride(),
        IS_RESIZED=(height, across) != (side, side),
        IS_BLOCKING=is_blocking,
        PRECISION=PRECISION,
        **sizes,
    )
    return out


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 1, 1), noise(1, 1, 1, 1), 1), (1, 1, 1, 1)),
        Case("as it lies, odd widths", (noise(3, 5, 13), noise(3, 13, 7, 7), 7), (3, 5, 7, 7)),
        Case("down to a memory level of a 128-pixel image", (noise(2, 20, 64), noise(2, 64, 40, 40), 5), (2, 20, 5, 5)),
        Case("cells left out, as it lies", (noise(2, 7, 19), noise(2, 19, 6, 6), 6, True), (2, 7, 6, 6)),
        Case(
            "upstream's first memory level, cells left out",
            (noise(1, 100, 256), noise(1, 256, 160, 160), 20, True),
            (1, 100, 20, 20),
        ),
    ]
