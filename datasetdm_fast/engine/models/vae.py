"""The autoencoder between images and latents."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.backbones import Latents
from datasetdm_fast.engine.models.layers import (
    Convolution,
    Layers,
    Linear,
    Pointwise,
    Weights,
    image,
    join_heads,
    split_heads,
    tokens,
)

EPS = 1e-6
USUAL = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}  # of diffusers


def has_usual_form(config: Any) -> bool:
    """Whether a diffusers autoencoder with this configuration is made of the layers below."""
    kinds = (set(getattr(config, key, [kind])) == {kind} for key, kind in USUAL.items())
    return hasattr(config, "norm_num_groups") and getattr(config, "act_fn", "silu") == "silu" and all(kinds)


class SpatialAttention(nn.Module):
    def __init__(self, weights: Weights, layers: Layers):
        super().__init__()
        self.ops = layers.ops
        self.norm = layers.norm(weights / "group_norm", has_silu=False)
        self.qkv = Linear(weights / "to_q", weights / "to_k", weights / "to_v")
        self.out = Linear(weights / "to_out" / 0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(tokens(self.norm(x))), 3, 1)
        return x + image(self.out(join_heads(self.ops.attention(q, k, v))), *x.shape[-2:])


class Downsample(Convolution):
    def __init__(self, weights: Weights):
        super().__init__(weights, stride=2, padding=0)

    def forward(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)), bias, residual)


class BlockLayers(Layers):
    """Layers, and the blocks of one half of the autoencoder."""

    block = SpatialAttention

    def middle(self, weights: Weights) -> list[nn.Module]:
        first, last = self.resnets(weights)
        attention = [self.block(weights / "attentions" / 0, self)] if "attentions.0.to_q.weight" in weights else []
        return [first, *attention, last]


class ImageDecoder(nn.Module):
    """Images [B, 3, H, W] about -1 .. 1 from scaled latents [B, C, h, w], or without `latents` from unscaled ones."""

    plan = BlockLayers

    def __init__(self, module: nn.Module, ops: SimpleNamespace, latents: Latents | None = None):
        super().__init__()
        state, config = Weights(module.state_dict()), module.config
        plan, weights = self.plan(config.norm_num_groups, EPS, ops), state / "decoder"
        self.latents = latents
        entry = [Pointwise(state / "post_quant_conv")] if "post_quant_conv.weight" in state else []
        blocks: list[nn.Module] = []
        for k in range(len(config.block_out_channels)):
            blocks += plan.resnets(weights / "up_blocks" / k)
            place = weights / "up_blocks" / k / "upsamplers" / 0 / "conv"
            blocks += [plan.upsample(place)] if "weight" in place else []
        self.layers = nn.Sequential(
            *entry,
            plan.convolution(weights / "conv_in"),
            *plan.middle(weights / "mid_block"),
            *blocks,
            plan.norm(weights / "conv_norm_out"),
            Convolution(weights / "conv_out"),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(self._unscale(latents))

    def _unscale(self, latents: Tensor) -> Tensor:
        space = self.latents
        if space is None:
            return latents
        if not space.mean:
            return latents * (1 / space.scale)
        channels = zip(latents.split(1, 1), space.mean, space.std, strict=True)
        return torch.cat([part * std + mean for part, mean, std in channels], 1)

    def decode_and_release(self, latents: Tensor, make_room: Callable[[], None]) -> Tensor:
        """Image of the latents; each layer is freed once it is done, and memory is made where images have grown."""
        x, layers = self._unscale(latents), list(self.layers)
        del self.layers
        while layers:
            width = x.shape[-1]
            x = layers.pop(0)(x)
            if x.shape[-1] > width:
                make_room()
        return x


class ImageEncoder(nn.Module):
    """Means and log-variances of the latents [B, 2 C, h, w], not yet scaled, of images [B, 3, H, W] in -1 .. 1."""

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        state, config = Weights(module.state_dict()), module.config
        plan, weights = BlockLayers(config.norm_num_groups, EPS, ops), state / "encoder"
        blocks: list[nn.Module] = []
        for k in range(len(config.block_out_channels)):
            blocks += plan.resnets(weights / "down_blocks" / k)
            place = weights / "down_blocks" / k / "downsamplers" / 0 / "conv"
            blocks += [Downsample(place)] if "weight" in place else []
        exit_ = [Convolution(state / "quant_conv", padding=0)] if "quant_conv.weight" in state else []
        self.layers = nn.Sequential(
            Convolution(weights / "conv_in"),
            *blocks,
            *plan.middle(weights / "mid_block"),
            plan.norm(weights / "conv_norm_out"),
            Convolution(weights / "conv_out"),
            *exit_,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
