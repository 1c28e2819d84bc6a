"""Layers for a CPU, whose weights are laid out once as its convolutions and products read them."""

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.engine.models.blocks import Block
from datasetdm_fast.engine.models.layers import Convolution, GroupNorm, Linear, Resnet, Upsample, join_places
from datasetdm_fast.engine.models.unet import AttentionBlock
from datasetdm_fast.engine.models.vae import ImageDecoder
from datasetdm_fast.kernels import group_norm_silu, winograd
from datasetdm_fast.kernels.cpu import multiplies_tiles, threads

ROWS = 2048  # that oneDNN is to expect
FED_ROWS = 1024  # through the feed-forward layers at once: what is eight times as wide stays in a cache
# Inputs times outputs of a weight that is held transformed for Winograd's F(4x4, 3x3): 36 numbers of its 9 taps, four
# times the memory. Larger ones are transformed at every call.
LARGEST_HELD = 1 << 16
FEWEST_TILES = 8  # of 4x4 results; with fewer, reading the transformed weight takes longer than it saves


class PackedLinear(nn.Module):
    """A Linear in oneDNN's weight order: with AVX-512 about a tenth faster, most where there are few rows.

    The plain weight is packed at the first call and then dropped, so that it is not held twice.
    """

    def __init__(self, linear: Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: Any = None

    def held_weight(self) -> Tensor:
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        # Slices run at once: the packed weight is in place before the plain one goes.
        if (weight := self.weight) is not None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self.weight = None
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class PackedConvolution(nn.Module):
    """A Convolution by Winograd's minimal filtering where it is 3x3 and large enough, else in oneDNN's weight order.

    A plain weight goes when the form is made that every later call takes. Where calls for one image have too few tiles
    for a weight that is held transformed, calls for more may have enough, so it stays.
    """

    def __init__(self, convolution: Any):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.padding = convolution.stride, convolution.padding
        self.is_minimal = self.stride == self.padding == 1 and winograd.takes(self.weight)
        self.is_held, self.outputs = is_held(self.weight), len(self.weight)
        self._transformed: Any = None  # forms of the weight, each made at its first use
        self._panels: Any = None
        self._packed: Any = None

    def held_weight(self) -> Tensor:
        if self._panels is not None:
            return winograd.from_panels(self._panels, self.outputs)
        return self._transformed if self._packed is None else self._packed.to_dense()

    def forward(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        weight, images, (height, width) = self.weight, len(x), x.shape[-2:]
        # Slices run at once: another form is in place before the plain one goes.
        if self.is_minimal and not self.is_held:
            if weight is not None:
                self._panels = winograd.in_panels(weight)
                self.weight = None
            return winograd.convolve(x, self._panels, bias, residual)
        if self.is_minimal and (weight is None or _has_tiles(height, width, images)):
            if self._transformed is None:
                self._transformed = winograd.transform_weight(weight)
            if self._packed is None and _has_tiles(height, width, 1):
                self.weight = None
            return winograd.convolve(x, self._transformed, bias, residual)
        places = [self.padding] * 2, [self.stride] * 2, [1, 1], 1
        if self._packed is None and weight is not None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *places, list(x.shape))
            if not self.is_minimal:
                self.weight = None
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self._packed, bias, *places, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self._packed, bias, *places, "add", 1.0, None, [], ""
        )


class PackedUpsample(nn.Module):
    """An Upsample by Winograd's minimal filtering, which reads every cell where it doubles it, where that is faster."""

    def __init__(self, upsample: Upsample):
        super().__init__()
        self.bias, is_small, taps = upsample.bias, is_held(upsample.taps), upsample.taps
        self.weight = upsample.weight if is_small else None
        self._minimal = winograd.transform_weight(taps) if is_small else winograd.in_panels(taps)

    def plain_taps(self) -> Tensor | None:
        """The 3x3 taps where nothing else is held."""
        return winograd.from_panels(self._minimal, len(self.bias) // 4) if self.weight is None else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.weight is not None and not _has_tiles(2 * height, 2 * width, len(x)):
            return join_places(F.conv2d(x, self.weight, self.bias, padding=1))
        return winograd.convolve(x, self._minimal, self.bias[: len(self.bias) // 4], is_doubled=True)


class PackedPlaces(PackedConvolution):
    """An Upsample whose four convolutions are in oneDNN's weight order."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return join_places(super().forward(x))


TILE_ROWS = 16  # of a tile of csrc (AMX), whose convolution reads weight and image once from memory
TILED_CHANNELS = 2 * TILE_ROWS  # what channels and outputs must be multiples of


def fits_tiles(weight: Tensor) -> bool:
    """Whether `convolve_tiles` has a form of this weight: 3x3 taps, or the four 2x2 of a doubled image."""
    outputs, channels, *taps = weight.shape
    is_whole = outputs % TILED_CHANNELS == channels % TILED_CHANNELS == 0 and (
        taps == [3, 3] or (taps == [2, 2] and outputs % 128 == 0)
    )
    return is_whole and multiplies_tiles(weight.dtype) and _C.multiplies_tiles()


def in_tiles(weight: Tensor) -> Tensor:  # [O / 32, I / 32, h, w, 2, 16, 16, 2] of [O, I, h, w]
    """The weight as `convolve_tiles` reads it: tiles of 16 outputs and 32 channels, in pairs of these."""
    tiles = weight.detach().unflatten(1, (-1, TILE_ROWS, 2)).unflatten(0, (-1, 2, TILE_ROWS))
    return tiles.permute(0, 3, 6, 7, 1, 4, 2, 5).contiguous()


def from_tiles(tiles: Tensor) -> Tensor:
    """The weight that `in_tiles` was given."""
    return (
        tiles.permute(0, 4, 6, 1, 5, 7, 2, 3).flatten(3, 5).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    )


def convolve_tiles(x: Tensor, tiles: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """F.conv2d of channels-last `x` [B, I, h, w] with padding 1, plus `residual`; with 2x2 taps, of the four places of
    an image that is doubled along both axes, joined.
    """
    batch, channels, height, width = x.shape
    side, times = tiles.shape[2], 2 if tiles.shape[2] == 2 else 1
    outputs = len(tiles) * TILED_CHANNELS // times**2
    shape = batch, outputs, height * times, width * times
    if x.dtype != tiles.dtype or channels != tiles.shape[1] * TILED_CHANNELS or len(bias) != outputs:
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


class TiledConvolution(PackedConvolution):
    """A 3x3 Convolution, or an Upsample, by tiles of csrc, mostly faster than oneDNN's."""

    def held_weight(self) -> Tensor:
        return from_tiles(self._packed)

    def forward(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        # Slices run at once: the tiles are in place before the plain weight goes.
        if (weight := self.weight) is not None:
            self._packed = in_tiles(weight)
            self.weight = None
        return convolve_tiles(x, self._packed, self.bias if bias is None else bias, residual)


class TiledPlaces(TiledConvolution):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.bias[: len(self.bias) // 4])


# of a GroupNorm whose image no other layer reads, in the memory of that: no fresh pages, and a third less to move
NORM_IN_PLACE = functools.partial(group_norm_silu.native, in_place=True)


class InPlaceResnet(nn.Module):
    """A Resnet with a convolution as its shortcut whose input no other layer reads: the shortcut comes first, the norms
    take the memory of their images, and that of the input is free for the second convolution.
    """

    def __init__(self, resnet: Resnet):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv2
        self.norm1.op = self.norm2.op = NORM_IN_PLACE
        self.shortcut = resnet.shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shortcut(x)
        h = self.conv1(self.norm1(x))
        x.untyped_storage().resize_(0)  # whoever called still holds its name
        return self.conv2(self.norm2(h), residual=residual)


def norm_in_place(decoder: ImageDecoder) -> ImageDecoder:
    """`decoder` with norms that write over their images, each of which is read by one layer alone."""
    for k, layer in enumerate(decoder.layers):
        if type(layer) is Resnet and not isinstance(layer.shortcut, nn.Identity):
            decoder.layers[k] = InPlaceResnet(layer)
        elif type(layer) is GroupNorm:
            layer.op = NORM_IN_PLACE
    return decoder


def pack_layers(module: nn.Module) -> nn.Module:
    """`module` with every layer packed whose storage this CPU's oneDNN takes."""
    if not torch.backends.mkldnn.is_available():
        return module
    for name, child in module.named_children():
        if isinstance(child, Block):
            continue
        if isinstance(child, AttentionBlock):
            child.rows = FED_ROWS
        if isinstance(child, Resnet) and child.norm2.op is group_norm_silu.native:
            child.norm2.op = NORM_IN_PLACE
        if isinstance(child, Upsample):
            child.taps = child.plain_taps()
            if winograd.takes(child.taps):
                setattr(module, name, PackedUpsample(child))
            elif multiplies_tiles(child.weight.dtype):
                takes = fits_tiles(child.weight)
                setattr(module, name, TiledPlaces(child) if takes else PackedPlaces(child))
            child.taps = None  # read by no call
        elif type(child) not in PACKED:
            pack_layers(child)
        elif type(child) is Linear and torch.backends.cpu.get_cpu_capability() == "AVX2":
            continue  # there PyTorch's own products are up to a tenth faster
        elif type(child) is Convolution and child.stride == child.padding == 1 and fits_tiles(child.weight):
            setattr(module, name, TiledConvolution(child))
        elif child.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            setattr(module, name, PACKED[type(child)](child))
    return module


PACKED: dict[Any, Any] = {Linear: PackedLinear, Convolution: PackedConvolution}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network with every weight in its plain order, those of packed layers among them; a weight that is
    held transformed alone is given as `winograd.transform_weight` makes it. An Upsample has its taps, too, or these
    alone: in half precision its weight, which is sums of them, is not that of its rounded taps.
    """
    away = {
        f"{name}.weight": layer.held_weight()
        for name, layer in module.named_modules()
        if isinstance(layer, (PackedLinear, PackedConvolution)) and layer.weight is None
    }
    taps = {
        f"{name}.taps": layer.plain_taps()
        for name, layer in module.named_modules()
        if isinstance(layer, (Upsample, PackedUpsample))
    }
    return module.state_dict() | away | {name: value for name, value in taps.items() if value is not None}


def weight_as(held: Tensor, weight: Tensor) -> Tensor:
    """A plain weight in the form of one of `weights_of`."""
    return weight if held.shape == weight.shape else winograd.transform_weight(weight)


def is_held(weight: Tensor) -> bool:
    return len(weight) * weight.shape[1] <= LARGEST_HELD


def _has_tiles(height: int, width: int, images: int) -> bool:
    return min(height, width) >= 4 and images * -(-height // 4) * -(-width // 4) >= FEWEST_TILES


def place_module(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`module` on the device, its convolutions channels-last."""
    return module.eval().to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def copy_in_dtype(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy on the device with its weights in `dtype`; buffers keep their own: a rotary frequency in 8 bits would turn
    the last of 500 tokens by a radian too much.
    """
    # not by diffusers' own `to`, which warns of modules to be kept in fp32 where there are none
    copied = nn.Module.to(copy.deepcopy(module), device, dtype)
    for part, source in zip(copied.modules(), module.modules(), strict=True):
        for name, value in source.named_buffers(recurse=False):
            setattr(part, name, value.to(device))
    return copied


def state_distance(value: Tensor, truth: Tensor) -> float:
    """The largest difference of two weights, over the largest number in `truth`; NaN is farther than any."""
    if not truth.numel():
        return 0.0
    farthest = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    return float(farthest.nan_to_num(nan=torch.finfo(torch.double).max))


def largest_distance(held: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """state_distance of the farthest weight, in whatever form it is held; a missing one is farther than any."""
    if not _weight_places(truth) <= _weight_places(held):
        return float(torch.finfo(torch.double).max)
    shared = truth.keys() & held.keys()
    return max((state_distance(held[key], weight_as(held[key], truth[key])) for key in shared), default=0.0)


def _weight_places(names: Iterable[str]) -> set[str]:
    """Where weights stand, by their names: the taps of an Upsample stand where its weight does."""
    return {name.removesuffix(".weight").removesuffix(".taps") for name in names}
