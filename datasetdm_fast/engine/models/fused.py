"""UNet and image decoder for a GPU: the same weights under the same names, with fewer passes over memory.

Every image travels with the statistics that the next norm reads, taken where it was written. Biases and residuals are
added inside products or together with these statistics; the bias of a convolution before a norm is that norm's shift;
a skip is read where it lies.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.models.capture import CaptureHook, Slot
from datasetdm_fast.engine.models.layers import (
    Convolution,
    GroupNorm,
    Layers,
    Resnet,
    Upsample,
    Weights,
    frozen,
    image,
    join_heads,
    split_heads,
    tokens,
)
from datasetdm_fast.engine.models.unet import AttentionBlock, CapturePlan, Transformer, UNet, double_halves
from datasetdm_fast.engine.models.vae import BlockLayers, ImageDecoder, SpatialAttention


class Measured(NamedTuple):
    image: Tensor  # [B, C, h, w], channels-last
    statistics: Tensor  # [2, B, chunks, C] fp32, see kernels/add_statistics.py


def both_doubled(x: Measured) -> Measured:
    return Measured(double_halves(x.image), torch.cat([x.statistics, x.statistics], 1))


class MeasuredConvolution(Convolution):
    def __init__(self, weights: Weights, ops: SimpleNamespace, stride: int = 1):
        super().__init__(weights, stride)
        self.ops = ops

    def forward(self, x: Tensor | Measured) -> Measured:  # type: ignore[override] # it adds nothing
        x = x.image if isinstance(x, Measured) else x
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return Measured(*self.ops.add_statistics(y, None, self.bias))


class MeasuredUpsample(Upsample):
    def __init__(self, weights: Weights, ops: SimpleNamespace):
        super().__init__(weights)
        self.ops = ops

    def forward(self, x: Measured) -> Measured:
        places = F.conv2d(x.image, self.weight, None, padding=1)
        return Measured(*self.ops.place_statistics(places, self.bias[: len(self.bias) // 4]))


class MeasuredGroupNorm(GroupNorm):
    def __init__(self, weights: Weights, groups: int, eps: float, ops: SimpleNamespace, has_silu: bool = True):
        super().__init__(weights, groups, eps, ops, has_silu)
        self.op = ops.group_norm_parts

    def forward(self, *parts: Measured) -> Tensor:
        images, statistics = zip(*parts)
        return self.op(images, statistics, None, self.weight, self.bias, self.groups, self.eps, self.has_silu)

    def shift_and_normalise(self, x: Tensor, shift: Tensor) -> Tensor:
        """The norm of an image `x` without statistics plus `shift` [C]."""
        return self.op([x], [], shift, self.weight, self.bias, self.groups, self.eps, self.has_silu)


class MeasuredResnet(Resnet):
    def __init__(self, weights: Weights, groups: int, eps: float, ops: SimpleNamespace):
        super().__init__(weights, groups, eps, ops)
        self.ops = ops
        self.norm1 = MeasuredGroupNorm(weights / "norm1", groups, eps, ops)
        self.norm2 = MeasuredGroupNorm(weights / "norm2", groups, eps, ops)
        added = [self.conv2] if isinstance(self.shortcut, nn.Identity) else [self.conv2, self.shortcut]
        self.bias = frozen(sum(layer.bias for layer in added))

    def forward(self, x: Measured, bias: Tensor | None = None, skip: Measured | None = None) -> Measured:
        parts = [x] if skip is None else [x, skip]
        h = F.conv2d(self.norm1(*parts), self.conv1.weight, None, padding=1)
        h = self.norm2.shift_and_normalise(h, self.conv1.bias if bias is None else bias)
        h = F.conv2d(h, self.conv2.weight, None, padding=1)
        if isinstance(self.shortcut, nn.Identity):
            return Measured(*self.ops.add_statistics(h, x.image, self.bias))
        return added_product(self.ops, [tokens(part.image) for part in parts], self.shortcut.weight, self.bias, h)


def added_product(
    ops: SimpleNamespace, parts: Sequence[Tensor], weight: Tensor, bias: Tensor, residual: Tensor
) -> Measured:
    """The image `residual` [B, N, h, w] plus the concatenated tokens `parts` [B, S, K_i] under `weight` [N, K]."""
    out, statistics = ops.linear_add(parts, weight.flatten(1), bias, tokens(residual))
    return Measured(image(out, *residual.shape[-2:]), statistics)


class ShiftedBlock(AttentionBlock):
    """Its tokens lack the biases of products added so far, in earlier blocks, too: norms shift by these."""

    def shift_norms(self, missing: Tensor | None) -> Tensor:
        """Takes what its input lacks, and returns what its output lacks."""
        biases: list[Any] = [self.self_out.bias, self.text_out.bias, self.narrow.bias]
        after_self = biases[0] if missing is None else missing + biases[0]
        self.shift1 = None if missing is None else frozen(missing)
        self.shift2, self.shift3 = frozen(after_self), frozen(after_self + biases[1])
        return self.shift3 + biases[2]

    def forward(self, h: Tensor, text: Tensor, hook: CaptureHook) -> Tensor:
        q, k, v = split_heads(self.self_qkv(self.norm1(h, self.shift1)), 3, self.heads)
        self.self_out.add_to(h, join_heads(hook.attend_self(self.slot, q, k, v)))
        (q,) = split_heads(self.text_q(self.norm2(h, self.shift2)), 1, self.heads)
        k, v = text
        if k.shape[0] != h.shape[0]:
            h, q = double_halves(h), double_halves(q)
        self.text_out.add_to(h, join_heads(hook.attend(self.slot, q, k, v)))
        gated = self.ops.linear_geglu(self.norm3(h, self.shift3), self.wide.weight, self.wide.bias)
        self.narrow.add_to(h, gated)
        return h


class MeasuredTransformer(Transformer):
    """The last product, which is linear, has in its own bias the biases that the tokens lack."""

    block = ShiftedBlock

    def __init__(self, weights: Weights, layers: Layers, heads: int, place: Slot):
        super().__init__(weights, layers, heads, place)
        missing, bias = None, self.exit.bias
        for block in self.blocks:
            missing = block.shift_norms(missing)
        self.bias = frozen(bias + self.exit.weight @ missing)

    def forward(self, x: Measured, texts: Sequence[Tensor], hook: CaptureHook) -> Measured:
        h = self.entry(tokens(self.norm(x)))
        for block, text in zip(self.blocks, texts, strict=True):
            h = block(h, text, hook)
        residual = x.image if len(x.image) == len(h) else double_halves(x.image)
        return added_product(self.ops, [h], self.exit.weight, self.bias, residual)


class MeasuredAttention(SpatialAttention):
    def forward(self, x: Measured) -> Measured:
        q, k, v = split_heads(self.qkv(tokens(self.norm(x))), 3, 1)
        return added_product(
            self.ops, [join_heads(self.ops.attention(q, k, v))], self.out.weight, self.out.bias, x.image
        )


class MeasuredLayers(Layers):
    def convolution(self, place: Weights, stride: int = 1) -> nn.Module:
        return MeasuredConvolution(place, self.ops, stride)

    def upsample(self, place: Weights) -> nn.Module:
        return MeasuredUpsample(place, self.ops)

    def resnet(self, place: Weights) -> nn.Module:
        return MeasuredResnet(place, self.groups, self.eps, self.ops)

    def norm(self, place: Weights, eps: float | None = None, has_silu: bool = True) -> nn.Module:
        return MeasuredGroupNorm(place, self.groups, eps or self.eps, self.ops, has_silu)


class MeasuredPlan(MeasuredLayers, CapturePlan):
    block, doubled = MeasuredTransformer, staticmethod(both_doubled)


class MeasuredBlockLayers(MeasuredLayers, BlockLayers):
    block = MeasuredAttention


class ImagesOnly:
    """A hook behind a network of Measured."""

    def __init__(self, hook: Any):
        self.hook, self.attend, self.attend_self = hook, hook.attend, hook.attend_self

    def feature(self, slot: Slot, x: Measured) -> None:
        self.hook.feature(slot, x.image)


class FusedUNet(UNet):
    plan = MeasuredPlan

    def forward(self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        images: Any = ImagesOnly(hook)
        return super().forward(latents, biases, text, images)

    def forward_from(
        self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], deep: Any, hook: CaptureHook
    ) -> Tensor:
        images: Any = ImagesOnly(hook)
        nothing = deep.new_zeros(deep.shape[1])
        deep = Measured(*self.conv_in.ops.add_statistics(deep, None, nothing))
        return super().forward_from(latents, biases, text, deep, images)


class FusedImageDecoder(ImageDecoder):
    plan = MeasuredBlockLayers
