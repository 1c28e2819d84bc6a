"""Layers of UNet and autoencoder, filled from diffusers state dicts; images are channels-last throughout."""

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEAST_APART = 2**20  # bytes
PLACES = 0, 1  # the first and the second half of a doubled cell, along an axis


def room(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor; a large one has memory of its own, which the system has back when it goes: what an allocator
    keeps of freed weights would be as large as half a model.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_APART:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


class Uninitialised(TorchFunctionMode):
    """Within its block modules are built without drawing their weights, which takes seconds; buffers are written."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init" or function in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **kwargs or {})


@dataclass(frozen=True)
class Weights:
    """A state dict seen from a prefix."""

    state: Mapping[str, Tensor]
    prefix: str = ""

    def __truediv__(self, name: str | int) -> "Weights":
        return Weights(self.state, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def parts(self, least: str) -> list["Weights"]:
        """The numbered parts of a module, each of which has the tensor `least`."""
        return list(takewhile(lambda part: least in part, map(self.__truediv__, count())))

    def parameter(self, name: str) -> nn.Parameter:
        """The tensor itself where the state gives it away, else a copy."""
        if getattr(self.state, "is_given_away", False):
            return nn.Parameter(self[name], requires_grad=False)
        return frozen(self[name])


def frozen(value: Tensor) -> nn.Parameter:
    """A copy of its own on the host, so that neither side's changes reach the other."""
    value = value.detach()
    order = (0, 2, 3, 1) if value.ndim == 4 else range(value.ndim)
    copy = room([value.shape[axis] for axis in order], value.dtype)
    if value.ndim == 4:
        copy = copy.permute(0, 3, 1, 2)
    return nn.Parameter(copy.copy_(value), requires_grad=False)


class Linear(nn.Module):
    """One linear map from one or several, packed along the output; a 1x1 convolution is one too."""

    def __init__(self, *parts: Weights):
        super().__init__()
        weights = [part["weight"].flatten(1) for part in parts]
        self.weight = frozen(weights[0] if len(weights) == 1 else torch.cat(weights))
        self.bias = frozen(torch.cat([part["bias"] for part in parts])) if "bias" in parts[0] else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """`total` with the product, without bias, added in place."""
        return total.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.T).unflatten(0, total.shape[:-1])


class Convolution(nn.Module):
    def __init__(self, weights: Weights, stride: int = 1, padding: int = 1):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight, self.bias = frozen(weights["weight"]), frozen(weights["bias"])

    def forward(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The convolution with its own bias or another, plus `residual`."""
        y = F.conv2d(x, self.weight, self.bias if bias is None else bias, self.stride, self.padding)
        return y if residual is None else y.add_(residual)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product, whose rounding on a CPU does not depend on the number of threads."""
    return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)


def sigmoid(x: Tensor) -> Tensor:
    """`x.sigmoid()`. On a CPU how threads share `x` changes its last bit there, but not that of an exponential, whose
    gradient is no number at its far end. Exported and compiled graphs have the sigmoid itself.
    """
    is_graph = not isinstance(x, Tensor) or torch.compiler.is_compiling()
    is_shared = not is_graph and x.is_cpu and not x.requires_grad
    return (1 + (-x).exp()).reciprocal() if is_shared else x.sigmoid()


class Pointwise(nn.Module):
    def __init__(self, weights: Weights):
        super().__init__()
        self.weight, self.bias = frozen(weights["weight"]), frozen(weights["bias"])

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class GroupNorm(nn.Module):
    """Group normalisation, with SiLU after it where a convolution follows."""

    def __init__(self, weights: Weights, groups: int, eps: float, ops: SimpleNamespace, has_silu: bool = True):
        super().__init__()
        self.groups, self.eps, self.has_silu, self.op = groups, eps, has_silu, ops.group_norm_silu
        self.weight, self.bias = frozen(weights["weight"]), frozen(weights["bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias, self.groups, self.eps, has_silu=self.has_silu)


class LayerNorm(nn.Module):
    def __init__(self, weights: Weights, eps: float, ops: SimpleNamespace):
        super().__init__()
        self.eps, self.op = eps, ops.layer_norm
        self.weight, self.bias = frozen(weights["weight"]), frozen(weights["bias"])

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """The norm of `x`, or of `x` plus `shift` [C]."""
        shifts = () if shift is None else (shift,)
        return self.op(x, self.weight, self.bias, self.eps, *shifts)


class Resnet(nn.Module):
    """Two normalised convolutions and a shortcut; a timestep's bias [C] or [B, C] of the first is an argument."""

    def __init__(self, weights: Weights, groups: int, eps: float, ops: SimpleNamespace):
        super().__init__()
        self.norm1 = GroupNorm(weights / "norm1", groups, eps, ops)
        self.conv1 = Convolution(weights / "conv1")
        self.norm2 = GroupNorm(weights / "norm2", groups, eps, ops)
        self.conv2 = Convolution(weights / "conv2")
        self.shortcut = (
            Convolution(weights / "conv_shortcut", padding=0) if "conv_shortcut.weight" in weights else nn.Identity()
        )

    def forward(self, x: Tensor, bias: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], 1)
        if bias is None or bias.ndim == 1:
            h = self.conv1(self.norm1(x), bias)
        else:  # a row for each image
            h = self.conv1(self.norm1(x), bias.new_zeros(bias.shape[1])).add_(bias[:, :, None, None])
        h = self.norm2(h)  # under one name, as two large images would be held
        return self.conv2(h, residual=self.shortcut(x))


class Upsample(nn.Module):
    """Each cell doubled along both axes, then a 3x3 convolution.

    Two of three taps fall on one cell, so four 2x2 convolutions, one a place, do it with 4 products for 9.
    """

    stride = padding = 1

    def __init__(self, weights: Weights):
        super().__init__()
        taps = weights["weight"]  # of the 3x3 convolution
        self.taps: Tensor | None = taps  # of which other forms are made
        rows = [_pair(taps, 2, row) for row in PLACES]
        by_place = torch.cat([_pair(row, 3, column) for row in rows for column in PLACES])  # [4 * out, in, 2, 2]
        dtype = getattr(weights.state, "computed_as", None)  # where that is known from the start
        self.weight = frozen(by_place if dtype is None else by_place.to(dtype))
        self.bias = frozen(weights["bias"].repeat(4))

    def plain_taps(self) -> Tensor | None:
        """The taps in the type of the weight, as long as they are here: they are no parameter, so `to` leaves them."""
        return None if self.taps is None else self.taps.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return join_places(F.conv2d(x, self.weight, self.bias, padding=1))


def join_places(x: Tensor) -> Tensor:  # [B, C, 2 * h, 2 * w] of [B, 4 * C, h + 1, w + 1]
    """The answer of an Upsample, from those of its four convolutions."""
    places = x.unflatten(1, (2, 2, -1))
    height, width = x.shape[2] - 1, x.shape[3] - 1
    doubled = x.new_empty(len(x), 2 * height, 2 * width, places.shape[3]).permute(0, 3, 1, 2)
    for row in PLACES:
        for column in PLACES:
            doubled[:, :, row::2, column::2] = places[:, row, column, :, row : row + height, column : column + width]
    return doubled


def _pair(weight: Tensor, axis: int, place: int) -> Tensor:
    """Three taps along `axis` as two, for the first or the second place of a doubled cell."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first + middle, last] if place else [first, middle + last], axis)


@dataclass
class Layers:
    """How the layers of a network with these norms are made of its weights."""

    groups: int
    eps: float
    ops: SimpleNamespace
    convolution: ClassVar[Callable[..., nn.Module]] = Convolution  # whose output is normed, or captured
    upsample: ClassVar[Callable[..., nn.Module]] = Upsample

    def resnet(self, place: Weights) -> nn.Module:
        return Resnet(place, self.groups, self.eps, self.ops)

    def resnets(self, block: Weights) -> list[nn.Module]:
        """Those of a block."""
        return list(map(self.resnet, (block / "resnets").parts("conv1.bias")))

    def norm(self, place: Weights, eps: float | None = None, has_silu: bool = True) -> nn.Module:
        return GroupNorm(place, self.groups, eps or self.eps, self.ops, has_silu)


def tokens(x: Tensor) -> Tensor:
    """[B, S, C] of a channels-last image [B, C, h, w], without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(x: Tensor, height: int, width: int) -> Tensor:
    """The channels-last image [B, C, h, w] of tokens [B, S, C], without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Packed projections [B, S, parts * C] as `parts` tensors [B, heads, S, d]."""
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, -1))


def join_heads(x: Tensor) -> Tensor:
    """[B, S, C] of [B, heads, S, d]."""
    return x.transpose(1, 2).flatten(2)
