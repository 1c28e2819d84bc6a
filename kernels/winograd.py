"""3x3 convolutions on a CPU with a quarter of the products, from csrc/winograd.cpp."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import threads

PANEL = 16  # outputs that lie side by side in the weight, and what channels and outputs must be multiples of
_KEPT: dict[int, Tensor] = {}  # memory of each thread, by its number


def takes(weight: Tensor) -> bool:
    """Whether `convolve` has a form of this weight."""
    outputs, channels, *taps = weight.shape
    return weight.dtype == torch.float32 and taps == [3, 3] and outputs % PANEL == channels % PANEL == 0


def transformed(weight: Tensor, out: Tensor | None = None) -> Tensor:  # [36, P, I, 16] of [O, I, 3, 3]
    """The weight as `convolve` reads it, computed in fp64."""
    outputs, channels = weight.shape[:2]
    shape = 36, -(-outputs // (2 * PANEL)) * 2, channels, PANEL
    found = torch.empty(shape) if out is None else out[: math.prod(shape)].view(shape)
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    _C.winograd_weight(weight.data_ptr(), found.data_ptr(), channels, outputs, threads(found))
    return found


def transformed_for_now(weight: Tensor) -> Tensor:
    """The same in memory of this thread, until its next call."""
    size, thread = 36 * (len(weight) + PANEL) * weight.shape[1], threading.get_ident()
    if (kept := _KEPT.get(thread)) is None or len(kept) < size:
        del kept  # before the larger one is there
        _KEPT.pop(thread, None)
        kept = _KEPT[thread] = torch.empty(size)
    return transformed(weight, kept)


def let_go() -> None:
    """Frees what the threads keep."""
    _KEPT.clear()


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
