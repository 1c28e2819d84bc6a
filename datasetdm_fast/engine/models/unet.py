"""A U-Net of cross attention without work done twice.

`TimeTable` runs once per timestep, `TextTable` once per prompt, `UNet` at every call: on B latents, doubled for the
halves of a CFG batch where they begin to differ. How many levels and blocks there are is read off the weights. A hook
of capture.py reads along.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.backbones.sd import heads_per_block
from datasetdm_fast.engine.models.capture import AttentionSlot, CaptureHook, Slot
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
from datasetdm_fast.stages import LEVELS

TRANSFORMER_EPS = 1e-6
LAYER_EPS = 1e-5
LONGEST_WAVE = 10000


def _list_down_mid_up(unet: Weights, depths: int, kind: str, least: str) -> list[tuple[Weights, int]]:
    """Every resnet or transformer in the order of the forward pass, with the depth of its block."""
    blocks = [(unet / "down_blocks" / depth, depth) for depth in range(depths)]
    blocks += [(unet / "mid_block", depths - 1)]
    blocks += [(unet / "up_blocks" / k, depths - 1 - k) for k in range(depths)]
    return [(place, depth) for block, depth in blocks for place in (block / kind).parts(least)]


def make_waves(values: Tensor, channels: int, shift: float, is_flipped: bool) -> Tensor:
    """The sines and cosines [..., channels] of one number or of numbers [..., 1], at half as many wave lengths;
    an odd channel is 0.
    """
    half = channels // 2
    exponent = -math.log(LONGEST_WAVE) * torch.arange(half, dtype=torch.float32, device=values.device) / (half - shift)
    angles = values * exponent.exp()
    waves = [angles.cos(), angles.sin()] if is_flipped else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, -1), (0, 1)) if channels % 2 else torch.cat(waves, -1)


class SizedText(nn.Module):
    """[R, E] what pooled texts [R, P] and the size of the image add to the embedding of a timestep."""

    def __init__(self, weights: Weights, config: Any, size: int):
        super().__init__()
        self.first, self.second = Linear(weights / "linear_1"), Linear(weights / "linear_2")
        sides = torch.tensor([size, size, 0.0, 0.0, size, size])  # of the image, where it was cut, and as wanted
        width, shift, is_flipped = config.addition_time_embed_dim, config.freq_shift, config.flip_sin_to_cos
        waves = make_waves(sides[:, None], width, shift, is_flipped).flatten()
        pooled, of_size = self.first.weight.split([self.first.weight.shape[1] - len(waves), len(waves)], 1)
        self.first.bias = frozen(self.first.bias + of_size @ waves)
        self.first.weight = frozen(pooled)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.second(F.silu(self.first(pooled)))


class TimeTable(nn.Module):
    """What a timestep adds in every resnet: biases end to end in fp32, with a pooled text a row for each."""

    def __init__(self, module: nn.Module, size: int = 0):
        super().__init__()
        config, weights = module.config, Weights(module.state_dict())
        resnets = _list_down_mid_up(weights, len(config.block_out_channels), "resnets", "conv1.bias")
        places, time = [place for place, _ in resnets], weights / "time_embedding"
        self.channels, self.shift = config.block_out_channels[0], config.freq_shift
        self.is_flipped = config.flip_sin_to_cos
        self.first, self.second = Linear(time / "linear_1"), Linear(time / "linear_2")
        self.rest = Linear(*(place / "time_emb_proj" for place in places))
        self.rest.bias = frozen(self.rest.bias + torch.cat([place["conv1.bias"] for place in places]))
        has_text, is_distilled = "add_embedding.linear_1.weight" in weights, "cond_proj.weight" in time
        self.added = SizedText(weights / "add_embedding", config, size) if has_text else None
        self.guided = Linear(time / "cond_proj") if is_distilled else None

    @property
    def reads(self) -> dict[str, int]:
        """The widths of what it reads beside the timestep, 0 of a number."""
        pooled = {} if self.added is None else {"pooled": self.added.first.weight.shape[1]}
        return pooled if self.guided is None else pooled | {"guidance": 0}

    def forward(self, timestep: Tensor, pooled: Tensor | None = None, guidance: float | None = None) -> Tensor:
        waves = make_waves(timestep, self.channels, self.shift, self.is_flipped)
        if self.guided is not None:
            assert guidance is not None
            scale = timestep * 0 + 1000 * (guidance - 1)
            waves = waves + self.guided(make_waves(scale, self.guided.weight.shape[1], 1, False))
        embedded = self.second(F.silu(self.first(waves)))
        return self.rest(F.silu(embedded if self.added is None else embedded + self.added(pooled)))


class TextTable(nn.Module):
    """Keys and values [2, N, heads, T, d] of all cross-attention layers for texts [N, T, D], in one product."""

    def __init__(self, module: nn.Module):
        super().__init__()
        weights, widths = Weights(module.state_dict()), module.config.block_out_channels
        transformers = _list_down_mid_up(weights, len(widths), "attentions", "norm.weight")
        blocks = [
            (block / "attn2", depth)
            for place, depth in transformers
            for block in (place / "transformer_blocks").parts("norm1.weight")
        ]
        heads = heads_per_block(module.config)
        self.heads = [heads[depth] for _, depth in blocks]
        self.packed = Linear(*(layer / name for layer, _ in blocks for name in ("to_k", "to_v")))
        self.widths = [2 * widths[depth] for _, depth in blocks]

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        parts = self.packed(text).split(self.widths, -1)
        return tuple(
            part.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
            for part, heads in zip(parts, self.heads)
        )


def double_halves(x: Tensor) -> Tensor:
    """The two halves of a CFG batch, still equal."""
    return torch.cat([x, x])


class AttentionBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward layers, each added to the tokens [R, S, C]."""

    def __init__(self, weights: Weights, heads: int, slot: AttentionSlot, ops: SimpleNamespace):
        super().__init__()
        itself, text = weights / "attn1", weights / "attn2"
        self.heads, self.slot, self.ops = heads, slot, ops
        self.rows: int | None = None  # that go through the feed-forward layers at once; None is all
        self.norm1, self.norm2, self.norm3 = (LayerNorm(weights / f"norm{k}", LAYER_EPS, ops) for k in (1, 2, 3))
        self.self_qkv = Linear(itself / "to_q", itself / "to_k", itself / "to_v")
        self.self_out = Linear(itself / "to_out" / 0)
        self.text_q, self.text_out = Linear(text / "to_q"), Linear(text / "to_out" / 0)
        self.wide, self.narrow = Linear(weights / "ff" / "net" / 0 / "proj"), Linear(weights / "ff" / "net" / 2)

    def forward(self, h: Tensor, text: Tensor, hook: CaptureHook) -> Tensor:
        q, k, v = split_heads(self.self_qkv(self.norm1(h)), 3, self.heads)
        h = self.self_out(join_heads(hook.attend_self(self.slot, q, k, v))).add_(h)
        (q,) = split_heads(self.text_q(self.norm2(h)), 1, self.heads)
        k, v = text
        if k.shape[0] != h.shape[0]:
            h, q = double_halves(h), double_halves(q)
        h = self.text_out(join_heads(hook.attend(self.slot, q, k, v))).add_(h)
        if self.rows is None:
            return self.fed_forward(h).add_(h)
        for part in h.flatten(0, 1).split(self.rows):
            part.add_(self.fed_forward(part))
        return h

    def fed_forward(self, h: Tensor) -> Tensor:
        return self.narrow(self.ops.geglu(self.wide(self.norm3(h))))


class Transformer(nn.Module):
    """Attention blocks between two linear layers, added to an image; where the text has a row for each half of a CFG
    batch and the image is that of both still, the halves part.
    """

    block: Any = AttentionBlock

    def __init__(self, weights: Weights, layers: Layers, heads: int, place: Slot):
        super().__init__()
        self.ops = layers.ops
        self.norm = layers.norm(weights / "norm", TRANSFORMER_EPS, has_silu=False)
        self.entry, self.exit = Linear(weights / "proj_in"), Linear(weights / "proj_out")
        blocks = (weights / "transformer_blocks").parts("norm1.weight")
        self.blocks = nn.ModuleList(
            self.block(block, heads, AttentionSlot(*place, k, len(blocks)), layers.ops)
            for k, block in enumerate(blocks)
        )

    def forward(self, x: Tensor, texts: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        h = self.entry(tokens(self.norm(x)))
        for block, text in zip(self.blocks, texts, strict=True):
            h = block(h, text, hook)
        x = x if x.shape[0] == h.shape[0] else double_halves(x)
        return image(self.exit(h), *x.shape[-2:]).add_(x)


class Step(NamedTuple):
    """What a block of the forward pass reads beside the image, and what becomes of its output."""

    reads: Literal["time", "text", "nothing"]
    slot: Slot | None  # the feature that its output is
    joins: bool = False  # it reads its input beside the last output that was kept
    keeps: bool = False


class CapturePlan(Layers):
    """How the blocks of one UNet are made, and what is captured of them: depth 0 is the highest level, and the middle
    block belongs to the lowest. The features of a level are numbered in the order of the forward pass.
    """

    block: Any = Transformer
    doubled = staticmethod(double_halves)

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        config = module.config
        super().__init__(config.norm_num_groups, config.norm_eps, ops)
        self.weights, self.heads = Weights(module.state_dict()), heads_per_block(config)
        self.depths = len(config.block_out_channels)
        self._places = [count() for _ in LEVELS]

    def feature(self, depth: int) -> Slot:
        level = len(LEVELS) - 1 - depth
        return level, next(self._places[level])

    def steps(self) -> Iterator[tuple[nn.Module, Step]]:
        """Every block between the first and the last convolution."""
        downs, last = [self.weights / "down_blocks" / depth for depth in range(self.depths)], self.depths - 1
        ups = [self.weights / "up_blocks" / (last - depth) for depth in range(self.depths)]
        for depth, place in enumerate(downs):
            maps = len((ups[depth] / "attentions").parts("norm.weight"))  # those of the up block come first
            yield from self._pairs(place, depth, maps, keeps=True)
            if depth < last:
                shrink = self.convolution(place / "downsamplers" / 0 / "conv", stride=2)
                yield shrink, Step("nothing", self.feature(depth + 1), keeps=True)
        middle = self.weights / "mid_block"
        first, second = self.resnets(middle)
        yield first, Step("time", None)
        # without a feature: the level reads the block's own output
        yield self.block(middle / "attentions" / 0, self, self.heads[-1], (0, 0)), Step("text", None)
        yield second, Step("time", (0, next(self._places[0])))
        for depth in reversed(range(self.depths)):
            yield from self._pairs(ups[depth], depth, 0, joins=True)
            if depth:
                grow = self.upsample(ups[depth] / "upsamplers" / 0 / "conv")
                yield grow, Step("nothing", self.feature(depth - 1))

    def _pairs(
        self, place: Weights, depth: int, first_map: int, joins: bool = False, keeps: bool = False
    ) -> Iterator[tuple[nn.Module, Step]]:
        """The resnets of a block, each with the transformer after it where it has some."""
        transformers = (place / "attentions").parts("norm.weight")
        for k, resnet in enumerate(self.resnets(place)):
            slot = self.feature(depth)
            if not transformers:
                yield resnet, Step("time", slot, joins, keeps)
                continue
            yield resnet, Step("time", None, joins)
            transformer = self.block(transformers[k], self, self.heads[depth], (slot[0], first_map + k))
            yield transformer, Step("text", slot, keeps=keeps)


class UNet(nn.Module):
    """UNet output [R, C, h, w] for latents [B, C, h, w], one or R rows of TimeTable, TextTable of R = B or 2B."""

    plan = CapturePlan

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        plan = self.plan(module, ops)
        self.doubled, self.depths = plan.doubled, plan.depths
        self.conv_in = plan.convolution(plan.weights / "conv_in")
        self.entry = plan.feature(0)
        blocks, self.steps = zip(*plan.steps())
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = plan.norm(plan.weights / "conv_norm_out")
        self.conv_out = Convolution(plan.weights / "conv_out")
        resnets = [k for k, step in enumerate(self.steps) if step.reads == "time"]
        self.widths, self.last = [len(blocks[k].conv1.bias) for k in resnets], resnets[-1]
        # its text attentions, in the order of TextTable
        self.text_layers = [module.slot for module in self.modules() if isinstance(module, AttentionBlock)]

    def forward(self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        time, texts = iter(biases.split(self.widths, -1)), iter(text)
        x = self.conv_in(latents)
        skips = [x if latents.shape[0] == text[0].shape[1] else self.doubled(x)]
        hook.feature(self.entry, skips[0])
        if biases.ndim == 2:  # the first resnet already differs
            x = skips[0]
        for block, step in zip(self.blocks, self.steps):
            if step.reads == "time":
                x = block(x, next(time), skips.pop()) if step.joins else block(x, next(time))
            elif step.reads == "text":
                x = block(x, [table for _, table in zip(block.blocks, texts)], hook)
            else:
                x = block(x)
            if step.slot is not None:
                hook.feature(step.slot, x)
            if step.keeps:
                skips.append(x)
        return self.conv_out(self.norm_out(x))

    @property
    def deep(self) -> Slot:
        """The feature before the last resnet: all that lies below the first skip ends in it."""
        return self.steps[self.last - 1].slot

    def forward_from(
        self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], deep: Any, hook: CaptureHook
    ) -> Tensor:
        """The output where the feature `deep` is that of an earlier call (DeepCache, Ma et al. 2023)."""
        x = self.conv_in(latents)
        skip = x if latents.shape[0] == text[0].shape[1] else self.doubled(x)
        x = self.blocks[self.last](deep, biases.split(self.widths, -1)[-1], skip)
        for transformer in self.blocks[self.last + 1 :]:
            x = transformer(x, text[-len(transformer.blocks) :], hook)
        return self.conv_out(self.norm_out(x))
