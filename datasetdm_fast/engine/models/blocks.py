"""Blocks of a small network, each one or two calls of csrc on a CPU: there Python and a library take longer to begin an
operation than its arithmetic takes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.engine.models.capture import CaptureHook
from datasetdm_fast.engine.models.layers import (
    Convolution,
    GroupNorm,
    LayerNorm,
    Resnet,
    Upsample,
    join_heads,
    split_heads,
    tokens,
)
from datasetdm_fast.engine.models.unet import Transformer, double_halves
from datasetdm_fast.kernels import products, winograd

LARGEST_BLOCK = 1 << 20  # weights; larger ones would be held twice for a gain that is small beside their arithmetic
_PACKING = threading.RLock()  # slices run at once, and what one of them computes with must not be exchanged


class Packing:
    """Weights in the order in which csrc reads them; it knows only where they lie, so `held` must outlive its block."""

    def __init__(self, in_pairs: bool = False) -> None:
        self.in_pairs = in_pairs  # of bf16, which the rows they are multiplied with are rounded to, too
        self.held: list[Tensor] = []

    def place(self, value: Tensor) -> int:
        self.held.append(value)
        return value.data_ptr()

    def panels(self, value: Tensor) -> int:
        return self.place(products.pair_inputs(value) if self.in_pairs else value)

    def norm(self, norm: GroupNorm | LayerNorm) -> _C.Norm:
        groups = norm.groups if isinstance(norm, GroupNorm) else 1
        return _C.Norm(self.place(norm.weight), self.place(norm.bias), len(norm.weight), groups, norm.eps)

    def linear(self, linear: Any) -> _C.Linear:
        outputs, inner = linear.weight.shape
        bias = 0 if linear.bias is None else self.place(linear.bias)
        return _C.Linear(self.panels(products.panels(linear.weight)), bias, inner, outputs, self.in_pairs)

    def convolution(self, layer: Convolution) -> _C.Convolution:
        return self.taps(layer.weight, layer.bias, layer.stride, layer.padding)

    def taps(self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 1) -> _C.Convolution:
        outputs, channels, taps, _ = weight.shape
        panels = self.panels(products.panels(weight.permute(0, 2, 3, 1).flatten(1)))
        transformed = winograd.transform_in_pairs if self.in_pairs else winograd.transform_weight
        minimal = self.place(transformed(weight)) if winograd.takes(weight) and stride == 1 else 0
        sizes = channels, outputs, taps, stride, padding
        return _C.Convolution(panels, self.place(bias), minimal, *sizes, self.in_pairs)


class Packed:
    """Something of csrc whose weights are packed at the first call."""

    _packed: tuple[Any, list[Tensor]] | None = None
    in_pairs = False  # see Packing

    def native(self) -> Any:
        with _PACKING:
            if self._packed is None:
                packing = Packing(self.in_pairs)
                self._packed = self.pack(packing), packing.held
        return self._packed[0]

    def pack(self, packing: Packing) -> Any:
        raise NotImplementedError


class Block(Packed, nn.Module):
    """The layers of a plain module under their own names."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self._parameters.update(plain._parameters)
        self._modules.update(plain._modules)


class ConvolutionBlock(Block):
    def __init__(self, plain: Convolution):
        super().__init__(plain)
        self.stride, self.padding = plain.stride, plain.padding

    def pack(self, packing: Packing) -> _C.Convolution:
        return packing.convolution(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        out = empty_image(batch, len(self.bias), (height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        places = x.data_ptr(), self.bias.data_ptr(), 0, out.data_ptr()
        self.native().run(*places, batch, height, width, torch.get_num_threads())
        return out


class UpsampleBlock(Block):
    def __init__(self, plain: Upsample):
        super().__init__(plain)
        self.taps = plain.taps

    def pack(self, packing: Packing) -> _C.Upsample:
        taps: Any = self.taps
        self.taps = None
        return _C.Upsample(packing.taps(taps, self.bias[: len(taps)]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        out = empty_image(batch, len(self.bias) // 4, 2 * height, 2 * width)
        self.native().run(x.data_ptr(), out.data_ptr(), batch, height, width, torch.get_num_threads())
        return out


class ResnetBlock(Block):
    def pack(self, packing: Packing) -> _C.Resnet:
        first = packing.norm(self.norm1), packing.convolution(self.conv1)
        second = packing.norm(self.norm2), packing.convolution(self.conv2)
        has_shortcut = isinstance(self.shortcut, Convolution)
        return _C.Resnet(*first, *second, packing.convolution(self.shortcut) if has_shortcut else None)

    def forward(self, x: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
        x = (x if skip is None else torch.cat([x, skip], 1)).contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        out = empty_image(batch, len(self.conv2.bias), height, width)
        places = x.data_ptr(), bias.data_ptr(), out.data_ptr()
        self.native().run(*places, batch, height, width, torch.get_num_threads())
        return out


class TransformerBlock(Block):
    """Two calls, as a hook may read the attention over the text between them."""

    def __init__(self, plain: Transformer):
        super().__init__(plain)
        (block,) = plain.blocks
        self.feature, self.heads, self.slot = plain.feature, block.heads, block.slot
        self.width = len(plain.exit.weight)

    @property
    def inner(self) -> nn.Module:
        """Its one attention block."""
        return self.blocks[0]

    def pack(self, packing: Packing) -> _C.Transformer:
        inner = self.inner
        before, after = (inner.self_qkv, inner.self_out, inner.text_q), (inner.text_out, inner.wide, inner.narrow)
        packed: list[Any] = list(map(packing.norm, (self.norm, inner.norm1, inner.norm2, inner.norm3)))
        packed += map(packing.linear, (self.entry, *before, *after, self.exit))
        packed.append(self.heads)
        return _C.Transformer(*packed)

    def forward(self, x: Tensor, texts: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        x, threads = x.contiguous(memory_format=torch.channels_last), torch.get_num_threads()
        batch, _, height, width = x.shape
        if hook.reads_self(height * width):  # its answer is the block's own
            qkv = self.inner.self_qkv(self.inner.norm1(self.entry(tokens(self.norm(x)))))
            hook.attend_self(self.slot, *split_heads(qkv, 3, self.heads))
        h, q = torch.empty((2, batch, height * width, self.width))
        self.native().before(x.data_ptr(), h.data_ptr(), q.data_ptr(), batch, height * width, threads)
        ((k, v),) = texts
        if len(k) != batch:
            x, h, q = double_halves(x), double_halves(h), double_halves(q)
        (q,) = split_heads(q, 1, self.heads)
        attended = join_heads(hook.attend(self.slot, q, k, v)).contiguous()
        out = torch.empty_like(x)
        places = x.data_ptr(), h.data_ptr(), attended.data_ptr(), out.data_ptr()
        self.native().after(*places, len(x), height * width, threads)
        hook.feature(self.feature, out)
        return out


def empty_image(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((batch, channels, height, width), memory_format=torch.channels_last)


BLOCKS = {Convolution: ConvolutionBlock, Upsample: UpsampleBlock, Resnet: ResnetBlock, Transformer: TransformerBlock}


def is_small(module: nn.Module) -> bool:
    """Whether its weights are fp32 and few enough for a block."""
    weights = list(module.parameters())
    few = sum(map(Tensor.numel, weights)) <= LARGEST_BLOCK
    return few and all(weight.dtype == torch.float32 for weight in weights)


def blockwise(module: nn.Module) -> nn.Module:
    """`module` with a block in the place of every layer that is small and has one."""
    for name, child in module.named_children():
        if type(child) not in BLOCKS:
            blockwise(child)
        elif is_small(child):
            setattr(module, name, BLOCKS[type(child)](child))
    return module
