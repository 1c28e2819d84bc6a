"""Blocks of a small network, each one or two calls of csrc on a CPU: there Python and a library take longer to begin an
operation than its arithmetic takes; and the whole UNet of such a network in one call.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from datasetdm_fast.engine.models.unet import Transformer, UNet, double_halves
from datasetdm_fast.kernels import cpu, winograd

LARGEST_BLOCK = 1 << 20  # weights; larger ones would be held twice for a gain that is small beside their arithmetic
_PACKING = threading.RLock()  # slices run at once, and what one of them computes with must not be exchanged


@dataclass
class Packing:
    """Weights in the order in which csrc reads them; it knows only where they lie, so `held` must outlive its block."""

    in_pairs: bool = False  # of bf16, which the rows they are multiplied with are rounded to, too
    held: list[Tensor] = field(default_factory=list)

    def place(self, value: Tensor) -> int:
        self.held.append(value)
        return value.data_ptr()

    def panels(self, value: Tensor) -> int:
        return self.place(cpu.pair_inputs(value) if self.in_pairs else value)

    def norm(self, norm: GroupNorm | LayerNorm) -> _C.Norm:
        groups = norm.groups if isinstance(norm, GroupNorm) else 1
        return _C.Norm(self.place(norm.weight), self.place(norm.bias), len(norm.weight), groups, norm.eps)

    def linear(self, linear: Any) -> _C.Linear:
        outputs, inner = linear.weight.shape
        bias = 0 if linear.bias is None else self.place(linear.bias)
        return _C.Linear(self.panels(cpu.panels(linear.weight)), bias, inner, outputs, self.in_pairs)

    def convolution(self, layer: Convolution) -> _C.Convolution:
        return self.taps(layer.weight, layer.bias, layer.stride, layer.padding)

    def taps(self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 1) -> _C.Convolution:
        outputs, channels, taps, _ = weight.shape
        panels = self.panels(cpu.panels(weight.permute(0, 2, 3, 1).flatten(1)))
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
    """All that a plain module has, under its own names."""

    def __init__(self, plain: nn.Module):
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)


class ConvolutionBlock(Block):
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
    taps: Tensor

    def pack(self, packing: Packing) -> _C.Upsample:
        return _C.Upsample(packing.taps(self.taps, self.bias[: len(self.taps)]))

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

    def pack(self, packing: Packing) -> _C.Transformer:
        (inner,) = self.blocks
        before, after = (inner.self_qkv, inner.self_out, inner.text_q), (inner.text_out, inner.wide, inner.narrow)
        packed: list[Any] = list(map(packing.norm, (self.norm, inner.norm1, inner.norm2, inner.norm3)))
        packed += map(packing.linear, (self.entry, *before, *after, self.exit))
        packed.append(inner.heads)
        return _C.Transformer(*packed)

    def forward(self, x: Tensor, texts: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        x, threads = x.contiguous(memory_format=torch.channels_last), torch.get_num_threads()
        (inner,), (batch, _, height, width) = self.blocks, x.shape
        if hook.reads_self(height * width):  # its answer is the block's own
            qkv = inner.self_qkv(inner.norm1(self.entry(tokens(self.norm(x)))))
            hook.attend_self(inner.slot, *split_heads(qkv, 3, inner.heads))
        h, q = torch.empty((2, batch, height * width, len(self.exit.weight)))
        self.native().before(x.data_ptr(), h.data_ptr(), q.data_ptr(), batch, height * width, threads)
        ((k, v),) = texts
        if len(k) != batch:
            x, h, q = double_halves(x), double_halves(h), double_halves(q)
        (q,) = split_heads(q, 1, inner.heads)
        attended = join_heads(hook.attend(inner.slot, q, k, v)).contiguous()
        out = torch.empty_like(x)
        places = x.data_ptr(), h.data_ptr(), attended.data_ptr(), out.data_ptr()
        self.native().after(*places, len(x), height * width, threads)
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


def has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether csrc has blocks of a UNet: where a pooled text adds to the timestep they are of another kind."""
    return not config.get("addition_embed_type")


def with_blocks(unet: UNet, in_pairs: bool = False) -> nn.Module:
    """`unet` with every block of csrc whose weights are fp32 and few enough; one block where all are. They multiply in
    fp32 or, where `in_pairs`, in bf16, with fp32 sums and fp32 between products.
    """
    blockwise(unet)
    blocks = unet.conv_in, unet.conv_out, *unet.blocks
    is_whole = all(isinstance(block, Block) for block in blocks) and unet.norm_out.weight.dtype == torch.float32
    for module in unet.modules():
        if isinstance(module, Block):
            module.in_pairs = in_pairs
    return UNetBlock(unet) if is_whole else unet


class UNetBlock(Block, UNet):
    """A UNet in one call of csrc, whose hook reads at its end; one of self-attention has blocks called singly."""

    def pack(self, packing: Packing) -> _C.UNet:
        parting = next(block for block in self.blocks if isinstance(block, TransformerBlock))
        steps = [
            _C.Step(block.native(), step.joins, step.keeps, block is parting)
            for block, step in zip(self.blocks, self.steps)
        ]
        return _C.UNet(self.conv_in.native(), steps, packing.norm(self.norm_out), self.conv_out.native())

    def forward(self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        batch, _, height, width = latents.shape
        if any(hook.reads_self(height * width // 4**depth) for depth in range(self.depths)):
            return super().forward(latents, biases, text, hook)
        if text[0].shape[1] != 2 * batch:  # csrc would read beyond its end
            raise ValueError(
                f"unet: keys and values of {text[0].shape[1]} texts for {batch} latents, expected {2 * batch}"
            )
        latents, text = latents.contiguous(memory_format=torch.channels_last), [table.contiguous() for table in text]
        native, threads = self.native(), torch.get_num_threads()
        out = empty_image(2 * batch, len(self.conv_out.bias), height, width)
        entry, outputs = None, []
        queries: list[Tensor] = []
        if type(hook) is not CaptureHook:  # it reads along
            first, *sizes = native.sizes(height, width)
            entry = empty_image(batch, *first)
            outputs = [
                None if step.slot is None else empty_image(2 * batch, *size) for step, size in zip(self.steps, sizes)
            ]
            for block, (_, rows, columns) in zip(self.blocks, sizes):  # the first transformer parts the halves
                if isinstance(block, TransformerBlock):
                    count = 2 * batch if queries else batch
                    queries.append(torch.empty(count, rows * columns, len(block.exit.weight)))
        native.run(
            latents.data_ptr(),
            biases.data_ptr(),
            [table.data_ptr() for table in text],
            out.data_ptr(),
            [0 if x is None else x.data_ptr() for x in (entry, *outputs)] if outputs else [],
            [q.data_ptr() for q in queries],
            batch,
            height,
            width,
            text[0].shape[-2],
            threads,
        )
        if not outputs:
            return out
        hook.feature(self.entry, double_halves(entry))  # called as single blocks do
        for step, x in zip(self.steps, outputs):
            if x is not None:
                hook.feature(step.slot, x)
        attending = [block.blocks[0] for block in self.blocks if isinstance(block, TransformerBlock)]
        for inner, q, (k, _) in zip(attending, queries, text):
            (q,) = split_heads(q if len(q) == len(k) else double_halves(q), 1, inner.heads)
            hook.on_queries(inner.slot, q, k)
        return out
