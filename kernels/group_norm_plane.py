"""Group normalisation and SiLU of small planes in one launch: a block holds whole groups and takes their statistics."""

from __future__ import annotations

from datasetdm_fast.kernels.launch import block_sizes, jit, tl

BLOCKS = {"untuned": block_sizes("group_norm_parts plane", 16)}
PLANE, PLANE_LANES = 2**14, 64  # values that one block holds, and channels of it


@jit
def _group_norm_parts_plane_kernel(
    x_ptr,  # [B, S, C]
    shift_ptr,  # [C] or [B, C], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [B, S, C]
    channels,
    cells,
    width,  # channels of a group
    shift_stride,  # of an image; 0 where all have one
    eps,
    HAS_SILU: tl.constexpr,
    GROUPS: tl.constexpr,  # of a block
    TAKEN: tl.constexpr,  # their channels, of which Triton is to know what divides them
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. The cells of this block's groups; channels of all groups lie end to end
    first = tl.program_id(0) * TAKEN
    cell, lane = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    channel, is_ours = first + lane, lane < TAKEN
    inside = (cell < cells)[:, None] & is_ours[None, :]
    is_member = (lane // width)[:, None] == tl.arange(0, GROUPS)[None, :]
    image = tl.program_id(1).to(tl.int64) * cells * channels
    place = cell[:, None] * channels + channel[None, :]  # inside an image, where 32 bits are enough
    x = tl.load(x_ptr + image + place, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift_ptr += tl.program_id(1).to(tl.int64) * shift_stride
        x += tl.load(shift_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)[None, :]
        x = tl.where(inside, x, 0.0)

    # 2. Mean, then variance around it, of each group
    size = width * 1.0 * cells
    centre = tl.sum(tl.where(is_member, tl.sum(x, 0)[:, None], 0.0), 0) / size
    x -= tl.sum(tl.where(is_member, centre[None, :], 0.0), 1)[None, :]
    squares = tl.sum(tl.where(inside, x * x, 0.0), 0)
    scale = tl.rsqrt(tl.sum(tl.where(is_member, squares[:, None], 0.0), 0) / size + eps)
    scale = tl.sum(tl.where(is_member, scale[None, :], 0.0), 1)

    # 3. Scale, bias and SiLU
    scale *= tl.load(weight_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)
    y = x * scale[None, :] + tl.load(bias_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)[None, :]
    if HAS_SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + image + place, y.to(out_ptr.dtype.element_ty), mask=inside)
