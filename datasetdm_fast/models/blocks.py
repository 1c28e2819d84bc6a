"""Blocks of a small network, each one or two calls of csrc on a CPU: there Python and a library take longer to begin an
operation than its arithmetic takes.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.kernels import products, winograd
from datasetdm_fast.models.capture import CaptureHook
from datasetdm_fast.models.layers import (
    Convolution,
    GroupNorm,
    LayerNorm,
    Linear,
    Resnet,
    join_heads,
    split_heads,
    tokens,
)
from datasetdm_fast.models.unet import Transformer, UNet

LARGEST_BLOCK = 1 << 20  # weights; larger ones would be held twice for a gain that is small beside their arithmetic
_PACKING = threading.Lock()  # slices run at once, and a block must not be exchanged while another slice is inside it


class Packing:
    """Weights in the order in which csrc reads them; it knows only where they lie, so `kept` must outlive its block."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def place(self, value: Tensor) -> int:
        self.kept.append(value)
        return value.data_ptr()

    def norm(self, norm: GroupNorm | LayerNorm) -> _C.Norm:
        groups = norm.groups if isinstance(norm, GroupNorm) else 1
        return _C.Norm(self.place(norm.weight), self.place(norm.bias), len(norm.weight), groups, norm.eps)

    def linear(self, linear: Linear) -> _C.Linear:
        outputs, inner = linear.weight.shape
        bias = 0 if linear.bias is None else self.place(linear.bias)
        return _C.Linear(self.place(products.panels(linear.weight)), bias, inner, outputs)

    def convolution(self, layer: Convolution) -> _C.Convolution:
        outputs, channels, taps, _ = layer.weight.shape
        panels = products.panels(layer.weight.permute(0, 2, 3, 1).flatten(1))
        minimal = (
            self.place(winograd.transformed(layer.weight)) if winograd.takes(layer.weight) and layer.stride == 1 else 0
        )
        places = self.place(panels), self.place(layer.bias), minimal
        return _C.Convolution(*places, channels, outputs, taps, layer.stride, layer.padding)


class Block(nn.Module):
    """The layers of a plain module under their own names; they are packed at the first call."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self._parameters.update(plain._parameters)
        self._modules.update(plain._modules)
        self._packed: tuple[Any, list[Tensor]] | None = None

    def native(self) -> Any:
        """The block of csrc."""
        with _PACKING:
            if self._packed is None:
                packing = Packing()
                self._packed = self.packed(packing), packing.kept
        return self._packed[0]

    def packed(self, packing: Packing) -> Any:
        raise NotImplementedError


class ConvolutionBlock(Block):
    def __init__(self, plain: Convolution):
        super().__init__(plain)
        self.stride, self.padding = plain.stride, plain.padding

    def packed(self, packing: Packing) -> _C.Convolution:
        return packing.convolution(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        out = _image(batch, len(self.bias), (height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        places = x.data_ptr(), self.bias.data_ptr(), 0, out.data_ptr()
        self.native().run(*places, batch, height, width, torch.get_num_threads())
        return out


class ResnetBlock(Block):
    def packed(self, packing: Packing) -> _C.Resnet:
        first = packing.norm(self.norm1), packing.convolution(self.conv1)
        second = packing.norm(self.norm2), packing.convolution(self.conv2)
        has_shortcut = isinstance(self.shortcut, Convolution)
        return _C.Resnet(*first, *second, packing.convolution(self.shortcut) if has_shortcut else None)

    def forward(self, x: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
        x = (x if skip is None else torch.cat([x, skip], 1)).contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        out = _image(batch, len(self.conv2.bias), height, width)
        places = x.data_ptr(), bias.data_ptr(), out.data_ptr()
        self.native().run(*places, batch, height, width, torch.get_num_threads())
        return out


class TransformerBlock(Block):
    """Two calls, as a hook may read the attention over the text between them."""

    def __init__(self, plain: Transformer):
        super().__init__(plain)
        self.heads, self.feature, self.layer, self.spread = plain.heads, plain.feature, plain.layer, plain.spread

    def packed(self, packing: Packing) -> _C.Transformer:
        norms = self.norm, self.norm1, self.norm2, self.norm3
        before, after = (
            (self.entry, self.self_qkv, self.self_out, self.text_q),
            (self.text_out, self.wide, self.narrow, self.exit),
        )
        return _C.Transformer(*map(packing.norm, norms), *map(packing.linear, (*before, *after)), self.heads)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], hook: CaptureHook) -> Tensor:
        x, threads = x.contiguous(memory_format=torch.channels_last), torch.get_num_threads()
        batch, _, height, width = x.shape
        if hook.reads_self(height * width):  # its answer is the block's own
            qkv = self.self_qkv(self.norm1(self.entry(tokens(self.norm(x)))))
            hook.attend_self(self.layer, *split_heads(qkv, 3, self.heads))
        h, q = torch.empty((2, batch, height * width, len(self.norm1.weight)))
        self.native().before(x.data_ptr(), h.data_ptr(), q.data_ptr(), batch, height * width, threads)
        x, h, q = self.spread(x), self.spread(h), self.spread(q)
        attended = join_heads(hook.attend(self.layer, *split_heads(q, 1, self.heads), *text)).contiguous()
        out = torch.empty_like(x)
        places = x.data_ptr(), h.data_ptr(), attended.data_ptr(), out.data_ptr()
        self.native().after(*places, len(x), height * width, threads)
        hook.feature(self.feature, out)
        return out


def _image(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((batch, channels, height, width), memory_format=torch.channels_last)


BLOCKS = {Convolution: ConvolutionBlock, Resnet: ResnetBlock, Transformer: TransformerBlock}


def with_blocks(unet: UNet) -> UNet:
    """`unet` with every block of csrc whose weights are fp32 and few enough."""
    _replace(unet)
    return unet


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        weights = list(child.parameters())
        is_small = sum(map(Tensor.numel, weights)) <= LARGEST_BLOCK
        if type(child) not in BLOCKS:
            _replace(child)
        elif is_small and all(weight.dtype == torch.float32 for weight in weights):
            setattr(module, name, BLOCKS[type(child)](child))
