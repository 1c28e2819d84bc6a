"""Convolutions in bf16 on a CPU that multiplies tiles (AMX), without a weight or an image read twice from memory."""

import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import multiplies_tiles, threads

ROWS = 16  # of a tile
SQUARE = 2 * ROWS  # what channels and outputs must be multiples of


def takes(weight: Tensor) -> bool:
    """Whether `convolve` has a form of this weight: 3x3 taps, or the four 2x2 of a doubled image."""
    outputs, channels, *taps = weight.shape
    is_whole = outputs % SQUARE == channels % SQUARE == 0 and (
        taps == [3, 3] or (taps == [2, 2] and outputs % 128 == 0)
    )
    return is_whole and multiplies_tiles(weight.dtype) and _C.multiplies_tiles()


def in_tiles(weight: Tensor) -> Tensor:  # [O / 32, I / 32, h, w, 2, 16, 16, 2] of [O, I, h, w]
    """The weight as `convolve` reads it: tiles of 16 outputs and 32 channels, in pairs of these."""
    tiles = weight.detach().unflatten(1, (-1, ROWS, 2)).unflatten(0, (-1, 2, ROWS))
    return tiles.permute(0, 3, 6, 7, 1, 4, 2, 5).contiguous()


def from_tiles(tiles: Tensor) -> Tensor:
    """The weight that `in_tiles` was given."""
    return (
        tiles.permute(0, 4, 6, 1, 5, 7, 2, 3).flatten(3, 5).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    )


def convolve(x: Tensor, tiles: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """F.conv2d of channels-last `x` [B, I, h, w] with padding 1, plus `residual`; with 2x2 taps, of the four places of
    an image that is doubled along both axes, joined.
    """
    batch, channels, height, width = x.shape
    side, times = tiles.shape[2], 2 if tiles.shape[2] == 2 else 1
    outputs = len(tiles) * SQUARE // times**2
    shape = batch, outputs, height * times, width * times
    if x.dtype != tiles.dtype or channels != tiles.shape[1] * SQUARE or len(bias) != outputs:
        raise ValueError(f"convolve: {x.dtype} of {channels} channels, bias of {len(bias)}, tiles {[*tiles.shape]}")
    if residual is not None and (residual.dtype != x.dtype or residual.shape != shape):
        raise ValueError(f"convolve: residual {residual.dtype} {[*residual.shape]}, expected {x.dtype} {[*shape]}")
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(shape, memory_format=torch.channels_last, dtype=x.dtype)
    bias = bias.float().contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    places = x.data_ptr(), tiles.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    sizes, count = (batch, height, width, channels, outputs), threads(out, 2 * channels)
    _C.tiled_convolution(*places, out.data_ptr(), *sizes, side, count)
    return out
