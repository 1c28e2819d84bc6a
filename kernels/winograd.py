"""3x3 convolutions on a CPU with a quarter of the products, from csrc/winograd.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import threads

PANEL = 16  # outputs that lie side by side in the weight, and what channels and outputs must be multiples of
# Rows that make the 6 values which are multiplied of 3 taps: at the points 0, +-1/2, +-3/2 and infinity.
TAPS = (
    (16 / 9, 0, 0),
    (-1, -1 / 2, -1 / 4),
    (-1, 1 / 2, -1 / 4),
    (1 / 9, 1 / 6, 1 / 4),
    (1 / 9, -1 / 6, 1 / 4),
    (0, 0, 1),
)


def takes(weight: Tensor) -> bool:
    """Whether `convolve` has a form of this weight."""
    outputs, channels, *taps = weight.shape
    return weight.dtype == torch.float32 and taps == [3, 3] and outputs % PANEL == channels % PANEL == 0


def transformed(weight: Tensor) -> Tensor:  # [36, P, I, 16] of [O, I, 3, 3]
    """The weight as `convolve` reads it, computed in fp64."""
    taps = torch.tensor(TAPS, dtype=torch.float64)
    outputs, channels = weight.shape[:2]
    padded = torch.zeros(36, -(-outputs // (2 * PANEL)) * 2 * PANEL, channels)
    for start in range(0, outputs, PANEL):  # a panel at a time: in fp64 a whole weight would be eight times as large
        part = weight[start : start + PANEL].double()
        padded[:, start : start + PANEL] = torch.einsum("yr,oirs,xs->yxoi", taps, part, taps).flatten(0, 1)
    return padded.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, is_doubled: bool = False
) -> Tensor:
    """F.conv2d of channels-last `x` [B, I, h, w] with padding 1, plus `residual`; where `is_doubled`, of `x` with every
    cell doubled along both axes.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if is_doubled:
        height, width = 2 * height, 2 * width
    out = torch.empty((batch, len(bias), height, width), memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    sizes = batch, height, width, channels, len(bias)
    _C.winograd(*places, out.data_ptr(), *sizes, is_doubled, threads(out, 2 * channels))
    return out
