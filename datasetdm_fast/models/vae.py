"""The autoencoder between images and latents."""

from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.models.layers import (
    Convolution,
    GroupNorm,
    Linear,
    Pointwise,
    Resnet,
    Upsample,
    Weights,
    image,
    join_heads,
    split_heads,
    tokens,
)

EPS = 1e-6


class SpatialAttention(nn.Module):
    def __init__(self, weights: Weights, groups: int, ops: SimpleNamespace):
        super().__init__()
        self.ops = ops
        self.norm = GroupNorm(weights / "group_norm", groups, EPS, ops, has_silu=False)
        self.qkv = Linear(weights / "to_q", weights / "to_k", weights / "to_v")
        self.out = Linear(weights / "to_out" / 0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(tokens(self.norm(x))), 3, 1)
        return x + image(self.out(join_heads(self.ops.attention(q, k, v))), *x.shape[-2:])


class Downsample(Convolution):
    def __init__(self, weights: Weights):
        super().__init__(weights, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def _resnets(weights: Weights, groups: int, ops: SimpleNamespace) -> list[Resnet]:
    found = []
    while "conv1.weight" in (place := weights / "resnets" / len(found)):
        found.append(Resnet(place, groups, EPS, ops))
    return found


def _middle(weights: Weights, groups: int, ops: SimpleNamespace) -> list[nn.Module]:
    first, last = _resnets(weights, groups, ops)
    attention = (
        [SpatialAttention(weights / "attentions" / 0, groups, ops)] if "attentions.0.to_q.weight" in weights else []
    )
    return [first, *attention, last]


def _ending(weights: Weights, groups: int, ops: SimpleNamespace) -> list[nn.Module]:
    return [GroupNorm(weights / "conv_norm_out", groups, EPS, ops), Convolution(weights / "conv_out")]


class ImageDecoder(nn.Module):
    """Images [B, 3, H, W] about -1 .. 1 from scaled latents [B, 4, h, w]."""

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        state, config = Weights(module.state_dict()), module.config
        weights, groups = state / "decoder", config.norm_num_groups
        self.scale = 1 / config.scaling_factor
        entry = [Pointwise(state / "post_quant_conv")] if "post_quant_conv.weight" in state else []
        blocks: list[nn.Module] = []
        for k in range(len(config.block_out_channels)):
            blocks += _resnets(weights / "up_blocks" / k, groups, ops)
            place = weights / "up_blocks" / k / "upsamplers" / 0 / "conv"
            blocks += [Upsample(place)] if "weight" in place else []
        self.layers = nn.Sequential(
            *entry,
            Convolution(weights / "conv_in"),
            *_middle(weights / "mid_block", groups, ops),
            *blocks,
            *_ending(weights, groups, ops),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents * self.scale)


class ImageEncoder(nn.Module):
    """Means and log-variances of the latents [B, 8, h, w], not yet scaled, of images [B, 3, H, W] in -1 .. 1."""

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        state, config = Weights(module.state_dict()), module.config
        weights, groups = state / "encoder", config.norm_num_groups
        blocks: list[nn.Module] = []
        for k in range(len(config.block_out_channels)):
            blocks += _resnets(weights / "down_blocks" / k, groups, ops)
            place = weights / "down_blocks" / k / "downsamplers" / 0 / "conv"
            blocks += [Downsample(place)] if "weight" in place else []
        exit_ = [Convolution(state / "quant_conv", padding=0)] if "quant_conv.weight" in state else []
        self.layers = nn.Sequential(
            Convolution(weights / "conv_in"),
            *blocks,
            *_middle(weights / "mid_block", groups, ops),
            *_ending(weights, groups, ops),
            *exit_,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
