"""The mean and the variance of a whole image from those of its chunks.

Chan, Golub & LeVeque (1979): of parts k with counts n_k, means m_k and sums of squares M_k around these means,

    n = sum n_k      m = sum n_k m_k / n      M = sum (M_k + n_k (m_k - m)^2)

Means come first, as the distances are taken from the mean of all; differences of large squares never occur.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.kernels.add_statistics import CHUNK
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, jit, tl

BLOCKS = {"untuned": block_sizes("group_norm_parts merge", 8, BLOCK_C=32, BLOCK_N=128)}
MOST_CHUNKS = 32  # that every block of a norm reads again; more are merged first


@jit
def merge_chunks(
    mean_ptr,  # [B, chunks, C]
    spread_ptr,  # [B, chunks, C]
    image,
    channel,  # [BLOCK_C]
    channels,
    cells,
    chunks,
    chunk_cells,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean m and spread M of every channel of an image, from the chunks of it."""
    is_channel = channel < channels

    # 1. m, weighted by the cells of each chunk; the last chunk may have fewer
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        inside = (chunk < chunks)[:, None] & is_channel[None, :]
        place = (image * chunks + chunk)[:, None] * channels + channel[None, :]
        count = tl.minimum(cells - chunk * chunk_cells, chunk_cells).to(tl.float32)[:, None]
        total += tl.load(mean_ptr + place, mask=inside, other=0.0).to(tl.float32) * count
    mean = tl.sum(total, 0) / cells

    # 2. M, from the spread of each chunk and the distance of its mean
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, chunks, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        inside = (chunk < chunks)[:, None] & is_channel[None, :]
        place = (image * chunks + chunk)[:, None] * channels + channel[None, :]
        count = tl.minimum(cells - chunk * chunk_cells, chunk_cells).to(tl.float32)[:, None]
        distance = tl.load(mean_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        spread = tl.load(spread_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, spread + count * distance * distance, 0.0)
    return mean, tl.sum(total, 0)


@jit
def _group_norm_parts_merge_kernel(
    mean_ptr,  # [B, chunks, C]
    spread_ptr,  # [B, chunks, C]
    whole_mean_ptr,  # [B, C] fp32
    whole_spread_ptr,  # [B, C] fp32
    channels,
    cells,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the statistics of all chunks of an image into one."""
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    mean, spread = merge_chunks(mean_ptr, spread_ptr, image, channel, channels, cells, chunks, CHUNK, BLOCK_N, BLOCK_C)
    place = image * channels + channel
    tl.store(whole_mean_ptr + place, mean, mask=is_channel)
    tl.store(whole_spread_ptr + place, spread, mask=is_channel)


def merge_statistics(statistics: Tensor, cells: int) -> Tensor:
    """The statistics [2, B, 1, C] of whole images from those [2, B, chunks, C] of their chunks."""
    _, batch, chunks, channels = statistics.shape
    whole = statistics.new_empty((2, batch, 1, channels), dtype=torch.float32)
    sizes = blocks(BLOCKS, "group_norm_parts merge", statistics, BLOCK_C=channels)
    _group_norm_parts_merge_kernel[ceil_divide(channels, sizes["BLOCK_C"]), batch](
        *statistics, *whole, channels, cells, chunks, CHUNK=CHUNK, **sizes
    )
    return whole
