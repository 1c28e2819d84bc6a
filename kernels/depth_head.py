"""The depth head: resize in steps, 3x3 convolution, ReLU, 3x3 convolution to one plane."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import Case, noise
from datasetdm_fast.kernels.launch import PRECISION, blocks, ceil_divide, is_served, jit, padded, tl

SLICE = 256  # hidden channels whose products are held at once: 36 MiB per image of 64 x 64 cells in fp32
CHUNK = 64  # hidden channels held at full size at once: 64 MiB per image of 512 pixels in fp32


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """Depth logits [B, 1, H, W] of `x` [B, C, h, w], resized to each of `sides` in turn before the convolutions."""
    for side in sides:
        x = resize(x, side)
    return F.conv2d(F.relu(F.conv2d(x, weight, bias, padding=1)), last_weight, last_bias, padding=1)


def resize_matrix(start: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """The resizes along one axis as a matrix [H, h], with the dtype and device of `like`."""
    rows = torch.eye(start, dtype=like.dtype, device=like.device)[
        None
    ]  # [1, h, h]: row i is what cell i gives to each place
    for side in sides:
        rows = F.interpolate(rows, size=side, mode="linear", align_corners=False)
    return rows[0].T


def shifted(matrix: Tensor) -> Tensor:
    """Row y of the three matrices [3, H, h] is row y - 1, y, y + 1 of `matrix`, zero beyond the border as the
    convolution pads.
    """
    padded = F.pad(matrix, (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + len(matrix)] for tap in range(3)])


def low_resolution(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The same logits from nine products at the resolution of `x`, each resized, shifted and added: about 30 times less
    arithmetic.

    The resize is linear along space and the taps are linear along channels, so they commute; the shifts go into the
    resize matrices.
    """
    side = x.shape[-1]
    matrices = shifted(resize_matrix(side, sides, x))
    across = matrices.permute(0, 2, 1).reshape(3 * side, -1)  # [3 w, W]
    down = matrices.permute(1, 0, 2).reshape(-1, 3 * side)  # [H, 3 h]
    answer = last_bias[:, None, None]
    for start in range(0, len(weight), CHUNK):
        part = weight[start : start + CHUNK]
        taps = torch.einsum("bcyx,oclk->boylkx", x, part)  # y, x: cells; l, k: rows and columns of the 3x3 taps
        rows = taps.reshape(*taps.shape[:4], 3 * side) @ across  # [B, o, h, 3, W]
        hidden = down @ rows.transpose(2, 3).reshape(len(x), len(part), 3 * side, -1)
        hidden = F.relu(hidden + bias[start : start + CHUNK, None, None])
        answer = answer + F.conv2d(hidden, last_weight[:, start : start + CHUNK], padding=1)
    return answer


def compiled(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The same logits on a CPU, for inference: the nine products are matrix products, and csrc/depth_head.cpp adds them
    up without the wide map.

    Products in fp64 are added in fp64, all others in fp32.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, weight, bias, last_weight, last_bias)):
        raise RuntimeError(
            "depth_head: the compiled form has no backward; run under torch.no_grad(), or train with low_resolution"
        )
    if x.device.type != "cpu":
        raise ValueError(
            f"depth_head: the compiled form got a tensor on {x.device}, expected one on the CPU; use the fused form "
            "there"
        )
    for side in sides[:-2]:
        x = resize(x, side)
    batch, _, side, _ = x.shape
    middle, full = (sides[-2] if len(sides) > 1 else side), sides[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cells = x.detach().flatten(2).transpose(1, 2)  # [B, h h, C]
    taps = last_weight.detach()[0].flatten(1).T.to(wide)  # [9, D]
    logits = last_bias.detach().to(wide).repeat(batch, full, full)
    for start in range(0, len(weight), SLICE):
        part = weight.detach()[start : start + SLICE].permute(2, 3, 0, 1).reshape(-1, weight.shape[1])  # [9 d, C]
        products = F.linear(cells, part).to(wide).view(batch, side, side, 9, -1)
        arrays = (products, bias.detach()[start : start + SLICE].to(wide), taps[:, start : start + SLICE].contiguous())
        _C.depth_head_add(*(one.numpy() for one in arrays), middle, logits.numpy(), torch.get_num_threads())
    return logits[:, None].to(x.dtype)


@jit
def _depth_head_kernel(
    taps_ptr,  # [B, O, 3, 3, h, w]: what each tap of the first convolution says of each cell
    down_ptr,  # [3, H, h] fp32, the resize of rows, shifted for each tap row
    first_ptr,  # [3, H] int32, the first row of cells each of them reads
    across_ptr,  # [3, w, W], the resize of columns
    bias_ptr,  # [O]
    last_ptr,  # [O, 9]
    planes_ptr,  # [B, 9, H, W] fp32: what each tap of the second convolution says of each pixel
    hidden,
    height,
    width,
    pixel_height,
    pixel_width,
    SPAN: tl.constexpr,  # most rows of cells that any row of pixels reads
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    row, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    cell, plane = tl.arange(0, BLOCK_W).to(tl.int64), tl.arange(0, 16).to(tl.int64)
    is_pixel, is_cell, is_plane = pixel < pixel_width, cell < width, plane < 9
    planes = tl.zeros([16, BLOCK_X], tl.float32)
    for start in range(0, hidden, BLOCK_O):
        channel = start + tl.arange(0, BLOCK_O).to(tl.int64)
        is_channel = channel < hidden
        inside = is_channel[:, None] & is_cell[None, :]
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        wide = tl.zeros([BLOCK_O, BLOCK_X], tl.float32) + bias[:, None]
        for column_tap in range(3):
            # One row of pixels reads a few rows of cells: those are added first, at the width of the cells.
            narrow = tl.zeros([BLOCK_O, BLOCK_W], tl.float32)
            for row_tap in range(3):
                first = tl.load(first_ptr + row_tap * pixel_height + row).to(tl.int64)
                tap = ((image * hidden + channel) * 9 + row_tap * 3 + column_tap) * height
                for step in range(SPAN):
                    source = tl.minimum(first + step, height - 1)
                    is_source = first + step < height
                    share = tl.load(
                        down_ptr + (row_tap * pixel_height + row) * height + source, mask=is_source, other=0.0
                    )
                    x = tl.load(taps_ptr + (tap + source)[:, None] * width + cell[None, :], mask=inside, other=0.0)
                    narrow += share * x.to(tl.float32)
            place = (column_tap * width + cell)[:, None] * pixel_width + pixel[None, :]
            across = tl.load(across_ptr + place, mask=is_cell[:, None] & is_pixel[None, :], other=0.0)
            wide = tl.dot(narrow.to(across.dtype), across, wide, input_precision=PRECISION)
        last = tl.load(
            last_ptr + channel[None, :] * 9 + plane[:, None], mask=is_channel[None, :] & is_plane[:, None], other=0.0
        )
        planes = tl.dot(last, tl.maximum(wide, 0.0).to(last.dtype), planes, input_precision=PRECISION)
    place = ((image * 9 + plane)[:, None] * pixel_height + row) * pixel_width + pixel[None, :]
    tl.store(planes_ptr + place, planes, mask=is_plane[:, None] & is_pixel[None, :])


@jit
def _depth_head_sum_kernel(
    planes_ptr,  # [B, 9, H, W] fp32
    bias_ptr,  # [1]
    out_ptr,  # [B, 1, H, W]
    height,
    width,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = pixel // width, pixel % width
    inside = pixel < height * width
    logits = tl.zeros([BLOCK], tl.float32) + tl.load(bias_ptr).to(tl.float32)
    for tap in tl.static_range(9):
        near_row, near_column = row + tap // 3 - 1, column + tap % 3 - 1
        is_near = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
        place = ((image * 9 + tap) * height + near_row) * width + near_column
        logits += tl.load(planes_ptr + place, mask=inside & is_near, other=0.0)
    tl.store(out_ptr + image * height * width + pixel, logits.to(out_ptr.dtype.element_ty), mask=inside)


@cache
def resize_tables(
    height: int, width: int, sides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The resizes as the kernel reads them: of rows [3, H, h], the first row each reads [3, H], of columns [3, w, W],
    and the most rows read.
    """
    down = shifted(resize_matrix(height, sides, torch.empty(0)))
    across = shifted(resize_matrix(width, sides, torch.empty(0))).transpose(1, 2).contiguous()
    is_read = down > 0
    first = is_read.int().argmax(2)
    last = height - 1 - is_read.flip(2).int().argmax(2)
    span = int(torch.where(is_read.any(2), last - first + 1, 1).max())
    return down.to(device), first.int().to(device), across.to(device, dtype), span


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """What `reference` says: nine products at the resolution of `x`, then resizes, bias, ReLU and both convolutions'
    taps, the wide map never stored.
    """
    channels, hidden = x.shape[1], len(weight)
    if (
        weight.shape != (hidden, channels, 3, 3)
        or last_weight.shape != (1, hidden, 3, 3)
        or bias.shape != (hidden,)
        or last_bias.shape != (1,)
    ):
        shapes = [list(each.shape) for each in (weight, bias, last_weight, last_bias)]
        raise ValueError(
            f"depth_head: {shapes} are not the weights and biases of two 3x3 convolutions from {channels} channels to 1"
        )
    if not is_served("depth_head", x, weight, bias, last_weight, last_bias):
        return reference(x, weight, bias, last_weight, last_bias, sides)
    (batch, _, height, width), side, sizes = x.shape, sides[-1], blocks("depth_head", x)
    down, first, across, span = resize_tables(height, width, tuple(sides), x.dtype, x.device)
    taps = torch.matmul(
        weight.permute(0, 2, 3, 1).reshape(9 * hidden, channels), x.reshape(batch, channels, height * width)
    )
    planes = torch.empty((batch, 9, side, side), dtype=torch.float32, device=x.device)
    out = x.new_empty((batch, 1, side, side))
    last = last_weight.reshape(hidden, 9)
    _depth_head_kernel[ceil_divide(side, sizes["BLOCK_X"]), side, batch](
        taps,
        down,
        first,
        across,
        bias,
        last,
        planes,
        hidden,
        height,
        width,
        side,
        side,
        SPAN=span,
        PRECISION=PRECISION,
        BLOCK_W=padded(width),
        **sizes,
    )
    sizes = blocks("depth_head sum", x)
    _depth_head_sum_kernel[ceil_divide(side * side, sizes["BLOCK"]), batch](planes, last_bias, out, side, side, **sizes)
    return out


def cases() -> list[Case]:
    def head(batch, channels, hidden, side, sides):
        weight, last = noise(hidden, channels, 3, 3, scale=0.1), noise(1, hidden, 3, 3, scale=0.1)
        return noise(batch, channels, side, side), weight, noise(hidden), last, noise(1), sides

    return [
        Case("smallest", head(2, 1, 1, 1, (1,)), (2, 1, 1, 1)),
        Case("two resizes, odd sides, a ragged last chunk", head(1, 5, 67, 3, (7, 17)), (1, 1, 17, 17)),
        Case("demo's cells and channels", head(1, 32, 32, 16, (40, 64)), (1, 1, 64, 64)),
    ]
