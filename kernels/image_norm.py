"""Batch normalisation of a batch of one, for every image of a batch: statistics per image and channel, no affine."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import blocks, ceil_divide, is_served, jit, plane_strides, tl

EPS = 1e-4


def reference(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] with zero mean and unit biased variance over H, W of each image."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + EPS)).to(x.dtype)


@jit
def _image_norm_kernel(
    x_ptr,  # [B, C, S]
    out_ptr,  # [B, C, S]
    channels,
    cells,
    stride_image,
    stride_channel,
    stride_cell,
    out_stride_image,
    out_stride_channel,
    out_stride_cell,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_S).to(tl.int64)
    is_channel = (channel < channels)[None, :]
    x_ptr += image * stride_image + channel[None, :] * stride_channel
    out_ptr += image * out_stride_image + channel[None, :] * out_stride_channel
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, cells, BLOCK_S):
        cell = (start + lane)[:, None]
        total += tl.load(x_ptr + cell * stride_cell, mask=(cell < cells) & is_channel, other=0.0).to(tl.float32)
    mean = (tl.sum(total, 0) / cells)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, cells, BLOCK_S):
        cell = (start + lane)[:, None]
        inside = (cell < cells) & is_channel
        x = tl.load(x_ptr + cell * stride_cell, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, (x - mean) * (x - mean), 0.0)
    scale = tl.rsqrt(tl.sum(total, 0) / cells + eps)[None, :]
    for start in range(0, cells, BLOCK_S):
        cell = (start + lane)[:, None]
        inside = (cell < cells) & is_channel
        x = tl.load(x_ptr + cell * stride_cell, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + cell * out_stride_cell, ((x - mean) * scale).to(out_ptr.dtype.element_ty), mask=inside)


def fused(x: Tensor) -> Tensor:
    """What `reference` says, in the layout of `x`."""
    if x.ndim != 4:
        raise ValueError(f"image_norm: x {list(x.shape)} is not [B, C, H, W]")
    if not is_served("image_norm", x):
        return reference(x)
    (batch, channels, height, width), out = x.shape, torch.empty_like(x)
    strides, out_strides = plane_strides("image_norm", x), plane_strides("image_norm", out)
    sizes = blocks("image_norm planes" if strides[2] == 1 else "image_norm", x)
    grid = (ceil_divide(channels, sizes["BLOCK_C"]), batch)
    _image_norm_kernel[grid](x, out, channels, height * width, *strides, *out_strides, EPS, **sizes)
    return out


def cases() -> list[Case]:
    return [
        Case("smallest: a plane that varies", (noise(1, 1, 2, 2),), (1, 1, 2, 2)),
        Case("constant planes have no variance to divide by", (torch.full((2, 3, 4, 4), 5.0),), (2, 3, 4, 4)),
        Case("ragged planes, far from zero", (noise(3, 17, 5, 5) + 100,), (3, 17, 5, 5)),
        Case(
            "channels last, as the convolutions leave it",
            (noise(2, 33, 9, 13).contiguous(memory_format=torch.channels_last),),
            (2, 33, 9, 13),
        ),
        Case("planes of upstream's highest mix", (noise(1, 24, 64, 64),), (1, 24, 64, 64)),
    ]
