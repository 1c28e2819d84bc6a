"""The trunk of every P-Decoder: project each captured level, then mix them from low to highest.

Parameter names are those of DatasetDM's checkpoints, so that these load as they are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.image_norm import EPS
from datasetdm_fast.models.decoder_config import DecoderConfig
from datasetdm_fast.models.layers import pointwise
from datasetdm_fast.stages import LEVELS

SPECTRAL_EPS = 1e-4
MOMENTUM = 0.1


class SpectralConv2d(nn.Conv2d):
    """A convolution with its weight divided by the largest singular value, estimated by one power iteration from `u0`.

    In training mode `u0` moves with every forward; in eval mode each forward starts from the stored one.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        self.register_buffer("u0", F.normalize(torch.randn(1, channels_out), dim=-1))
        self.register_buffer("sv0", torch.ones(1))

    def normalised(self) -> Tensor:
        """The weight [out, in, k, k] over its estimated norm; in training mode the estimate is kept for the next call."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix, eps=SPECTRAL_EPS)
            u = F.normalize(v @ matrix.T, eps=SPECTRAL_EPS)
        sigma = (v @ matrix.T @ u.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.u0.copy_(u)
                self.sv0.copy_(sigma[None])
        return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        weight = self.normalised()
        return pointwise(x, weight, self.bias) if self.kernel_size == (1, 1) else F.conv2d(x, weight, self.bias, padding=self.padding)

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The plain convolution that this one is to the next image."""
        plain = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, padding=self.padding)
        plain.weight.copy_(self.normalised())
        plain.bias.copy_(self.bias)
        return plain


class SegBlock(nn.Module):
    """A residual block without upsampling; its ReLUs worked in place upstream, so the shortcut carries relu(norm(x))."""

    def __init__(self, channels_in: int, channels_out: int, ops: SimpleNamespace, normalisation: str):
        super().__init__()
        self.ops, self.is_running = ops, normalisation == "running"
        self.conv1 = SpectralConv2d(channels_in, channels_out, 3)
        self.conv2 = SpectralConv2d(channels_out, channels_out, 3)
        self.conv_sc = SpectralConv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        for name, channels in (("1", channels_in), ("2", channels_out)):
            self.register_buffer(f"stored_mean{name}", torch.zeros(channels))
            self.register_buffer(f"stored_var{name}", torch.ones(channels))

    def normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                now = x.float().mean((0, 2, 3))
                squares = (x.float() - now[:, None, None]).square_().sum((0, 2, 3))  # a third of the time of var over these axes
                mean.lerp_(now, MOMENTUM)
                variance.lerp_(squares / (x.numel() // x.shape[1] - 1), MOMENTUM)
        elif self.is_running:
            return F.batch_norm(x, mean, variance, eps=EPS)
        return self.ops.image_norm(x)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.normalise(x, self.stored_mean1, self.stored_var1))
        h = F.relu(self.normalise(self.conv1(x), self.stored_mean2, self.stored_var2))
        return self.conv2(h) + self.conv_sc(x)


class Upscale(nn.Module):
    """A bilinear resize to r times the side, plus what a convolution says about each of the r x r sub-cells."""

    def __init__(self, channels_in: int, channels_out: int, times: int):
        super().__init__()
        self.times = times
        self.reduce = nn.Conv2d(channels_in, channels_out, 1)
        self.detail = nn.Conv2d(channels_out, channels_out * times * times, 3, padding=1)
        nn.init.zeros_(self.detail.weight)  # starts as the plain resize
        nn.init.zeros_(self.detail.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = pointwise(x, self.reduce.weight, self.reduce.bias)
        return resize(x, x.shape[-1] * self.times) + F.pixel_shuffle(self.detail(F.relu(x)), self.times)


class Decoder(nn.Module):
    """A trunk; subclasses add what turns it into labels. `forward(capture, text=None)` returns named tensors."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace, mixes: dict[str, tuple[int, int]]):
        super().__init__()
        self.config, self.ops = config, ops
        for level in config.levels:
            if level.name in mixes or level.name == "low":
                self.add_module(f"{level.name}_feature_conv", nn.Sequential(nn.Conv2d(level.channels, config.width, 1, bias=False)))
        for name, (channels_in, channels_out) in mixes.items():
            self.add_module(f"{name}_feature_mix_conv", SegBlock(channels_in, channels_out, ops, config.normalisation))

    def save_pretrained(self, folder: str | Path, storage: str = "fp32") -> Path:
        """The folder with `config.json` and `model.safetensors`; see decoders.save_decoder."""
        from datasetdm_fast.models.decoders import save_decoder

        return save_decoder(self, folder, storage)

    @staticmethod
    def from_pretrained(folder: str | Path, *, strict: bool = False) -> Decoder:
        """The decoder of whatever kind a folder holds, for inference; see decoders.load_decoder."""
        from datasetdm_fast.models.decoders import load_decoder

        return load_decoder(folder, strict=strict)

    def projections(self) -> dict[str, Tensor]:
        """Level -> weight [F, channels, 1, 1] of the first layer, for the levels this decoder reads."""
        return {name: self.get_submodule(f"{name}_feature_conv.0").weight for name in LEVELS if hasattr(self, f"{name}_feature_conv")}

    def project(self, capture: Capture | ProjectedCapture, name: str, side: int) -> Tensor:
        """The captured level `name` at `width` channels [B, F, side, side]; a ProjectedCapture must be this decoder's own part."""
        place = LEVELS.index(name)
        if isinstance(capture, ProjectedCapture):
            return resize(capture.sums[place], side)
        convolution = self.get_submodule(f"{name}_feature_conv.0")
        return self.ops.pyramid(capture.features[place], capture.maps[place], convolution.weight, side)

    def mix(self, capture: Capture | ProjectedCapture, name: str, below: Tensor, side: int) -> Tensor:
        """The level `name` joined with the levels below it, at its own resolution."""
        joined = torch.cat([below, self.project(capture, name, side)], 1)
        return self.get_submodule(f"{name}_feature_mix_conv")(joined)

    def climb(self, capture: Capture | ProjectedCapture) -> Tensor:
        """All four levels mixed, at the resolution of the highest."""
        side = capture.side
        low = resize(self.project(capture, "low", side // 4), side // 2)
        mid = resize(self.mix(capture, "mid", low, side // 2), side)
        return self.mix(capture, "highest", self.mix(capture, "high", mid, side), side)


def wide_mixes(width: int) -> dict[str, tuple[int, int]]:
    """Mixes that keep every channel they are given, as depth and heatmaps have them."""
    return {name: (count * width, count * width) for name, count in (("mid", 2), ("high", 3), ("highest", 4))}


def with_ops(decoder: Decoder, ops: SimpleNamespace) -> Decoder:
    """A copy of the decoder that computes with other operations."""
    copied = copy.deepcopy(decoder)
    for module in copied.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return copied


def fold(decoder: Decoder) -> Decoder:
    """The decoder for inference, its spectral norms divided into plain weights as the first image after loading would see them."""
    decoder.eval()
    for block in [module for module in decoder.modules() if isinstance(module, SegBlock)]:
        for name, child in list(block.named_children()):
            if isinstance(child, SpectralConv2d):
                setattr(block, name, child.folded())
    return decoder
