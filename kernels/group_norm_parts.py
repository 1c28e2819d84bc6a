"""GroupNorm and SiLU over the concatenation of one or two images, which is never written, from statistics of chunks
that operations before it have stored (add_statistics.py); of a small plane a block takes those of its own groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels import add_statistics
from datasetdm_fast.kernels.add_statistics import CHUNK, rows, take_statistics
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.merge_statistics import MOST_CHUNKS, merge_statistics
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("group_norm_parts", 4, BLOCK_S=32, BLOCK_N=16) | block_sizes("group_norm_parts plane", 16)
}
LANES = 128  # channels of a block: whole groups, and the lanes beyond them idle
SPAN = 512  # cells of a block: reading the statistics again is little beside them
PLANE, PLANE_LANES = 2**14, 64  # values of a small plane that one block holds, and channels of it


def reference(
    parts: Sequence[Tensor],
    statistics: Sequence[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    has_silu: bool = True,
) -> Tensor:
    """SiLU of the normalised concatenation [B, C, h, w] of `parts` plus `shift` [C] or [B, C]; its mean and variance
    are those of `statistics`, one statistics [2, B, chunks, C_i] a part, or where that is empty its own.
    """
    x = torch.cat(list(parts), 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    means, spreads = (torch.cat(list(statistics), 3) if statistics else take_statistics(x)).to(exact)
    shift = (x.new_zeros(x.shape[1], dtype=exact) if shift is None else shift.to(exact)).expand(len(x), -1)
    cells, chunks = x.shape[2] * x.shape[3], means.shape[1]
    counts = torch.full((chunks, 1), float(CHUNK), dtype=exact, device=x.device)
    counts[-1] = cells - CHUNK * (chunks - 1)
    means, size = (means + shift[:, None]).unflatten(2, (groups, -1)), cells * x.shape[1] // groups
    counts = counts[..., None]
    centre = (means * counts).sum((1, 3), keepdim=True) / size
    variance = (spreads.unflatten(2, (groups, -1)) + counts * (means - centre) ** 2).sum((1, 3)) / size
    y = (x.to(exact) + shift[:, :, None, None]).unflatten(1, (groups, -1)) - centre.reshape(len(x), groups, 1, 1, 1)
    y = (y * torch.rsqrt(variance + eps)[..., None, None, None]).flatten(1, 2)
    y = (y * weight.to(exact)[:, None, None] + bias.to(exact)[:, None, None]).to(x.dtype)
    return F.silu(y) if has_silu else y


@jit
def _both(first_ptr, second_ptr, place, second_place, is_first, is_second):
    """The value at one of two places, in fp32, and 0 at neither."""
    x = tl.load(first_ptr + place, mask=is_first, other=0.0).to(tl.float32)
    if second_ptr is not None:
        x += tl.load(second_ptr + second_place, mask=is_second, other=0.0).to(tl.float32)
    return x


@jit
def _group_norm_parts_kernel(
    x_ptr,  # [B, S, C]
    mean_ptr,  # [B, chunks, C]
    spread_ptr,  # [B, chunks, C]
    second_ptr,  # [B, S, D], or None
    second_mean_ptr,  # [B, chunks, D], or None
    second_spread_ptr,  # [B, chunks, D], or None
    shift_ptr,  # [C + D] or [B, C + D], or None
    weight_ptr,  # [C + D]
    bias_ptr,  # [C + D]
    out_ptr,  # [B, S, C + D]
    first_channels,
    second_channels,
    cells,
    chunks,
    chunk_cells,
    width,  # channels of a group
    shift_stride,  # of an image; 0 where all have one
    eps,
    HAS_SILU: tl.constexpr,
    GROUPS: tl.constexpr,  # of a block
    TAKEN: tl.constexpr,  # their channels, of which Triton is to know what divides them
    SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. Where this block lies: SPAN cells of an image, and the channels of whole groups
    image, channels = tl.program_id(2).to(tl.int64), first_channels + second_channels
    # Only the starts need 64 bits: from there on 32 are enough, and take fewer registers.
    begin, line = tl.program_id(0).to(tl.int64) * SPAN, image * chunks
    cell_row = image * cells + begin
    mean_ptr, spread_ptr, x_ptr = (
        mean_ptr + line * first_channels,
        spread_ptr + line * first_channels,
        x_ptr + cell_row * first_channels,
    )
    if second_ptr is not None:
        second_mean_ptr, second_spread_ptr, second_ptr = (
            second_mean_ptr + line * second_channels,
            second_spread_ptr + line * second_channels,
            second_ptr + cell_row * second_channels,
        )
    first = tl.program_id(1) * TAKEN
    member = tl.arange(0, BLOCK_W)
    channel = first + (tl.arange(0, GROUPS) * width)[:, None] + member[None, :]
    is_first = ((member < width)[None, :] & (channel < first_channels))[None, :, :]
    is_second = ((member < width)[None, :] & (channel >= first_channels))[None, :, :]
    shift = tl.zeros([GROUPS, BLOCK_W], tl.float32)
    if shift_ptr is not None:
        shift_ptr += image * shift_stride
        inside = (member < width)[None, :] & (channel < channels)
        shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    # 2. The mean of each group over all chunks (the merge of merge_statistics.py, of groups in the place of channels)
    total = tl.zeros([BLOCK_N, GROUPS, BLOCK_W], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        row, is_chunk = chunk[:, None, None], (chunk < chunks)[:, None, None]
        count = tl.minimum(cells - chunk * chunk_cells, chunk_cells).to(tl.float32)[:, None, None]
        place, second_place = (row * first_channels + channel, row * second_channels + channel - first_channels)
        mean = _both(mean_ptr, second_mean_ptr, place, second_place, is_chunk & is_first, is_chunk & is_second)
        total += tl.where(is_chunk & (is_first | is_second), (mean + shift[None, :, :]) * count, 0.0)
    centre = tl.sum(tl.sum(total, 0), 1) / (width * 1.0 * cells)

    # 3. Its variance around that mean
    total = tl.zeros([BLOCK_N, GROUPS, BLOCK_W], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        row, is_chunk = chunk[:, None, None], (chunk < chunks)[:, None, None]
        count = tl.minimum(cells - chunk * chunk_cells, chunk_cells).to(tl.float32)[:, None, None]
        place, second_place = (row * first_channels + channel, row * second_channels + channel - first_channels)
        mean = _both(mean_ptr, second_mean_ptr, place, second_place, is_chunk & is_first, is_chunk & is_second)
        spread = _both(spread_ptr, second_spread_ptr, place, second_place, is_chunk & is_first, is_chunk & is_second)
        distance = mean + shift[None, :, :] - centre[None, :, None]
        total += tl.where(is_chunk & (is_first | is_second), spread + count * distance * distance, 0.0)
    scale = tl.rsqrt(tl.sum(tl.sum(total, 0), 1) / (width * 1.0 * cells) + eps)

    # 4. Scale and bias of each channel; channels of all groups lie end to end now, so rows are read in whole vectors
    lane = tl.arange(0, BLOCK_C)
    channel, is_ours = first + lane, lane < TAKEN
    is_member = (lane // width)[:, None] == tl.arange(0, GROUPS)[None, :]
    centre = tl.sum(tl.where(is_member, centre[None, :], 0.0), 1)
    scale = tl.sum(tl.where(is_member, scale[None, :], 0.0), 1)
    scale *= tl.load(weight_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        centre -= tl.load(shift_ptr + channel, mask=is_ours, other=0.0).to(tl.float32)
    is_first, is_second = is_ours & (channel < first_channels), is_ours & (channel >= first_channels)

    # 5. Normalise, activate and write the cells
    for step in range(0, SPAN, BLOCK_S):
        cell = (step + tl.arange(0, BLOCK_S))[:, None]
        is_cell = cell < cells - begin
        place, second_place = cell * first_channels + channel, cell * second_channels + channel - first_channels
        x = _both(x_ptr, second_ptr, place, second_place, is_cell & is_first[None, :], is_cell & is_second[None, :])
        y = (x - centre[None, :]) * scale[None, :] + bias[None, :]
        if HAS_SILU:
            y = y / (1.0 + tl.exp(-y))
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + cell_row * channels + cell * channels + channel, y, mask=is_cell & is_ours[None, :])


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


def fused(
    parts: Sequence[Tensor],
    statistics: Sequence[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    has_silu: bool = True,
) -> Tensor:
    """The result of `reference`, channels-last; missing statistics are taken first."""
    channels, x = sum(part.shape[1] for part in parts), parts[0]
    chunks = ceil_divide(x.shape[2] * x.shape[3], CHUNK)
    fits = len(parts) in (1, 2) and channels % groups == 0 and len(weight) == len(bias) == channels
    fits = fits and all(part[:, :1].shape == x[:, :1].shape for part in parts)
    fits = fits and [each.shape for each in statistics] in ([], [(2, len(x), chunks, part.shape[1]) for part in parts])
    fits = fits and (shift is None or shift.shape in ((channels,), (len(parts[0]), channels)))
    if not is_served("group_norm_parts", *parts, *statistics, shift, weight, bias, fits=fits):
        return reference(parts, statistics, shift, weight, bias, groups, eps, has_silu)
    (batch, _, height, width), members = x.shape, channels // groups
    cells = height * width
    is_plane = not statistics and len(parts) == 1 and round_up(cells) * max(round_up(members), PLANE_LANES) <= PLANE
    together = groups_of_block(groups, members, PLANE_LANES if is_plane else LANES)
    shift = shift if shift is None or shift.stride(-1) == 1 else shift.contiguous()
    sides, shift_stride = [rows(part) for part in parts], shift.stride(0) if shift is not None and shift.ndim > 1 else 0
    out = x.new_empty((batch, cells, channels))
    common = {"HAS_SILU": has_silu, "GROUPS": together, "TAKEN": together * members}
    common["BLOCK_C"] = round_up(together * members)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        if is_plane:
            sizes = blocks(BLOCKS, "group_norm_parts plane", x)
            arrays, numbers = (sides[0], shift, weight, bias, out), (channels, cells, members, shift_stride, eps)
            _group_norm_parts_plane_kernel[groups // together, batch](
                *arrays, *numbers, BLOCK_S=round_up(cells), **common, **sizes
            )
        else:
            taken = [part.contiguous() for part in statistics]
            statistics = taken or [add_statistics.fused(part, None, None)[1] for part in parts]
            is_merged = chunks > MOST_CHUNKS
            statistics = [merge_statistics(part, cells) for part in statistics] if is_merged else statistics
            sizes = blocks(BLOCKS, "group_norm_parts", x, 1, BLOCK_N=statistics[0].shape[2])
            second = (sides[1], *statistics[1]) if len(parts) == 2 else (None, None, None)
            _group_norm_parts_kernel[ceil_divide(cells, SPAN), groups // together, batch](
                sides[0],
                *statistics[0],
                *second,
                shift,
                weight,
                bias,
                out,
                x.shape[1],
                channels - x.shape[1],
                cells,
                statistics[0].shape[2],
                cells if is_merged else CHUNK,
                members,
                shift_stride,
                eps,
                SPAN=min(SPAN, ceil_divide(cells, sizes["BLOCK_S"]) * sizes["BLOCK_S"]),
                BLOCK_W=round_up(members, 1),
                **common,
                **sizes,
            )
    return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def groups_of_block(groups: int, members: int, lanes: int) -> int:
    """How many groups of so many members a block takes: a power of two that divides them and fits its lanes."""
    together = 1
    while groups % (2 * together) == 0 and 2 * together * members <= lanes:
        together *= 2
    return together


def probe() -> Probe:
    parts = [noise(1, channels, 12, 12) for channels in (1280, 640)]
    affine = noise(1920) + 1, noise(1921)[1:]
    return parts, [take_statistics(part) for part in parts], noise(1922)[2:], *affine, 32, 1e-5
