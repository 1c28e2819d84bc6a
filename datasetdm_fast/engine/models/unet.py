"""The UNet of Stable Diffusion 1.x and 2.x without work done twice.

`TimeTable` runs once per timestep, `TextTable` once per prompt, `UNet` at every call: on B latents, doubled at the
first text attention, as both halves of a CFG batch are equal until then. A hook of capture.py reads along.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.backbones.sd import heads_per_block
from datasetdm_fast.engine.models.capture import CaptureHook, Slot
from datasetdm_fast.engine.models.layers import (
    Convolution,
    LayerNorm,
    Layers,
    Linear,
    Weights,
    frozen,
    image,
    join_heads,
    split_heads,
    tokens,
)

TRANSFORMER_EPS = 1e-6
LAYER_EPS = 1e-5
DEPTHS = 4


def _resnet_places(unet: Weights, count: int) -> list[Weights]:
    """Every resnet in the order of the forward pass."""
    down = [unet / "down_blocks" / depth / "resnets" / i for depth in range(DEPTHS) for i in range(count)]
    middle = [unet / "mid_block" / "resnets" / i for i in (0, 1)]
    return [*down, *middle, *(unet / "up_blocks" / k / "resnets" / i for k in range(DEPTHS) for i in range(count + 1))]


def _transformer_places(unet: Weights, count: int) -> list[tuple[Weights, int]]:
    """Every transformer in the order of the forward pass, with the depth of its block."""
    lowest = DEPTHS - 1
    down = [(unet / "down_blocks" / depth / "attentions" / i, depth) for depth in range(lowest) for i in range(count)]
    up = [(unet / "up_blocks" / k / "attentions" / i, lowest - k) for k in range(1, DEPTHS) for i in range(count + 1)]
    return [*down, (unet / "mid_block" / "attentions" / 0, lowest), *up]


class TimeTable(nn.Module):
    """What a timestep adds in every resnet: the biases of their first convolutions end to end, kept in fp32."""

    def __init__(self, module: nn.Module):
        super().__init__()
        config, weights = module.config, Weights(module.state_dict())
        places = _resnet_places(weights, config.layers_per_block)
        self.channels, self.shift = config.block_out_channels[0], config.freq_shift
        self.is_flipped = config.flip_sin_to_cos
        self.first = Linear(weights / "time_embedding" / "linear_1")
        self.second = Linear(weights / "time_embedding" / "linear_2")
        self.rest = Linear(*(place / "time_emb_proj" for place in places))
        self.rest.bias = frozen(self.rest.bias + torch.cat([place["conv1.bias"] for place in places]))

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.channels // 2
        exponent = (
            -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - self.shift)
        )
        angles = timestep * exponent.exp()
        waves = torch.cat([angles.cos(), angles.sin()] if self.is_flipped else [angles.sin(), angles.cos()])
        return self.rest(F.silu(self.second(F.silu(self.first(waves)))))


class TextTable(nn.Module):
    """Keys and values [2, N, heads, T, d] of all cross-attention layers for texts [N, T, D], in one product."""

    def __init__(self, module: nn.Module):
        super().__init__()
        config = module.config
        places = _transformer_places(Weights(module.state_dict()), config.layers_per_block)
        layers = [place / "transformer_blocks" / 0 / "attn2" for place, _ in places]
        heads = heads_per_block(config)
        self.heads = [heads[depth] for _, depth in places]
        self.packed = Linear(*(layer / name for layer in layers for name in ("to_k", "to_v")))
        self.widths = [2 * config.block_out_channels[depth] for _, depth in places]

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        parts = self.packed(text).split(self.widths, -1)
        return tuple(
            part.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
            for part, heads in zip(parts, self.heads)
        )


Spread = Callable[[Any], Any]  # of a tensor, or of one with its statistics


def keep_as_is(x: Tensor) -> Tensor:
    return x


def double_halves(x: Tensor) -> Tensor:
    """The two halves of a CFG batch, still equal."""
    return torch.cat([x, x])


class Transformer(nn.Module):
    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        heads: int,
        feature: Slot | None,
        layer: Slot,
        spread: Spread = keep_as_is,
    ):
        super().__init__()
        ops = layers.ops
        block = weights / "transformer_blocks" / 0
        itself, text = block / "attn1", block / "attn2"
        self.heads, self.feature, self.layer, self.ops = heads, feature, layer, ops
        self.rows: int | None = None  # that go through the feed-forward layers at once; None is all
        self.spread = spread  # `double_halves` in the first transformer, where the CFG halves part
        self.norm = layers.norm(weights / "norm", TRANSFORMER_EPS, has_silu=False)
        self.entry, self.exit = Linear(weights / "proj_in"), Linear(weights / "proj_out")
        self.norm1, self.norm2, self.norm3 = (LayerNorm(block / f"norm{k}", LAYER_EPS, ops) for k in (1, 2, 3))
        self.self_qkv = Linear(itself / "to_q", itself / "to_k", itself / "to_v")
        self.self_out = Linear(itself / "to_out" / 0)
        self.text_q, self.text_out = Linear(text / "to_q"), Linear(text / "to_out" / 0)
        self.wide, self.narrow = Linear(block / "ff" / "net" / 0 / "proj"), Linear(block / "ff" / "net" / 2)

    def forward(self, x: Tensor, text: Tensor, hook: CaptureHook) -> Tensor:
        h = self.entry(tokens(self.norm(x)))
        q, k, v = split_heads(self.self_qkv(self.norm1(h)), 3, self.heads)
        h = self.self_out(join_heads(hook.attend_self(self.layer, q, k, v))).add_(h)
        (q,) = split_heads(self.text_q(self.norm2(h)), 1, self.heads)
        x, h, q = self.spread(x), self.spread(h), self.spread(q)
        k, v = text
        h = self.text_out(join_heads(hook.attend(self.layer, q, k, v))).add_(h)
        if self.rows is None:
            h = self.fed_forward(h).add_(h)
        else:
            for part in h.flatten(0, 1).split(self.rows):
                part.add_(self.fed_forward(part))
        x = image(self.exit(h), *x.shape[-2:]).add_(x)
        hook.feature(self.feature, x)
        return x

    def fed_forward(self, h: Tensor) -> Tensor:
        return self.narrow(self.ops.geglu(self.wide(self.norm3(h))))


class CapturePlan(Layers):
    """Where the blocks of one UNet lie: depth 0 is the highest level, 3 the lowest."""

    block: Any = Transformer
    doubled = staticmethod(double_halves)

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        config = module.config
        super().__init__(config.norm_num_groups, config.norm_eps, ops)
        self.weights, self.count = Weights(module.state_dict()), config.layers_per_block
        self.heads = heads_per_block(config)

    def feature(self, depth: int, place: int) -> Slot:
        """Per level: the entry, the down blocks, the middle block or the upsampler, then the up blocks."""
        return DEPTHS - 1 - depth, place

    def transformer(
        self, place: Weights, depth: int, feature: int | None, layer: int, spread: Spread = keep_as_is
    ) -> Transformer:
        slot = None if feature is None else self.feature(depth, feature)
        return self.block(place, self, self.heads[depth], slot, (DEPTHS - 1 - depth, layer), spread)


class Down(nn.Module):
    def __init__(self, plan: CapturePlan, depth: int):
        super().__init__()
        weights, count = plan.weights / "down_blocks" / depth, plan.count
        self.resnets = nn.ModuleList(plan.resnet(weights / "resnets" / i) for i in range(count))
        self.features = [plan.feature(depth, 1 + i) for i in range(count)]
        self.transformers, self.shrink = nn.ModuleList(), None
        if depth < DEPTHS - 1:
            spreads = [double_halves if depth == i == 0 else keep_as_is for i in range(count)]
            self.transformers.extend(
                plan.transformer(weights / "attentions" / i, depth, 1 + i, count + 1 + i, spread)
                for i, spread in enumerate(spreads)
            )
            self.shrink = plan.convolution(weights / "downsamplers" / 0 / "conv", stride=2)
            self.entry = plan.feature(depth + 1, 0)

    def forward(
        self, x: Tensor, time: Iterator[Tensor], text: Iterator[Tensor], skips: list[Tensor], hook: CaptureHook
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(time))
            if self.shrink is None:
                hook.feature(self.features[i], x)
            else:
                x = self.transformers[i](x, next(text), hook)
            skips.append(x)
        if self.shrink is not None:
            x = self.shrink(x)
            hook.feature(self.entry, x)
            skips.append(x)
        return x


class Middle(nn.Module):
    def __init__(self, plan: CapturePlan):
        super().__init__()
        weights = plan.weights / "mid_block"
        self.first, self.last = plan.resnet(weights / "resnets" / 0), plan.resnet(weights / "resnets" / 1)
        self.slot = plan.feature(DEPTHS - 1, 1 + plan.count)
        # without a feature: the level reads the block's own output
        self.transformer = plan.transformer(weights / "attentions" / 0, DEPTHS - 1, None, 0)

    def forward(self, x: Tensor, time: Iterator[Tensor], text: Iterator[Tensor], hook: CaptureHook) -> Tensor:
        x = self.transformer(self.first(x, next(time)), next(text), hook)
        x = self.last(x, next(time))
        hook.feature(self.slot, x)
        return x


class Up(nn.Module):
    def __init__(self, plan: CapturePlan, depth: int):
        super().__init__()
        weights, count = plan.weights / "up_blocks" / (DEPTHS - 1 - depth), plan.count
        self.resnets = nn.ModuleList(plan.resnet(weights / "resnets" / i) for i in range(count + 1))
        self.features = [plan.feature(depth, 2 + count + i) for i in range(count + 1)]
        self.transformers, self.grow = nn.ModuleList(), None
        if depth < DEPTHS - 1:
            self.transformers.extend(
                plan.transformer(weights / "attentions" / i, depth, 2 + count + i, i) for i in range(count + 1)
            )
        if depth:
            self.grow = plan.upsample(weights / "upsamplers" / 0 / "conv")
            self.grown = plan.feature(depth - 1, 1 + count)

    def forward(
        self, x: Tensor, time: Iterator[Tensor], text: Iterator[Tensor], skips: list[Tensor], hook: CaptureHook
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(time), skips.pop())
            if self.transformers:
                x = self.transformers[i](x, next(text), hook)
            else:
                hook.feature(self.features[i], x)
        if self.grow is not None:
            x = self.grow(x)
            hook.feature(self.grown, x)
        return x


class UNet(nn.Module):
    """UNet output [2B, 4, h, w] for latents [B, 4, h, w], a row of TimeTable, and TextTable of [2B, T, D]."""

    plan = CapturePlan

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        plan = self.plan(module, ops)
        self.doubled = plan.doubled
        self.widths = [len(place["conv1.bias"]) for place in _resnet_places(plan.weights, plan.count)]
        self.conv_in, self.entry = plan.convolution(plan.weights / "conv_in"), plan.feature(0, 0)
        self.down = nn.ModuleList(Down(plan, depth) for depth in range(DEPTHS))
        self.middle = Middle(plan)
        self.up = nn.ModuleList(Up(plan, depth) for depth in reversed(range(DEPTHS)))
        self.norm_out = plan.norm(plan.weights / "conv_norm_out")
        self.conv_out = Convolution(plan.weights / "conv_out")
        # the slots of its text attentions, in the order of TextTable
        self.text_layers = [module.layer for module in self.modules() if isinstance(module, Transformer)]

    def forward(self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        time, texts = iter(biases.split(self.widths)), iter(text)
        x = self.conv_in(latents)
        skips = [self.doubled(x)]
        hook.feature(self.entry, skips[0])
        for block in self.down:
            x = block(x, time, texts, skips, hook)
        x = self.middle(x, time, texts, hook)
        for block in self.up:
            x = block(x, time, texts, skips, hook)
        return self.conv_out(self.norm_out(x))
