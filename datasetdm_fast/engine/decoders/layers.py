"""Layers that several decoders share."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.models.layers import image, pointwise, tokens
from datasetdm_fast.kernels import image_norm, winograd
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.image_norm import EPS

MASKS = 160 / 64  # side of the masks over the same

SPECTRAL_EPS = 1e-4
MOMENTUM = 0.1


class SpectralConv2d(nn.Conv2d):
    """A convolution with its weight divided by the largest singular value, estimated by one power iteration from `u0`.

    In training mode `u0` moves with every forward; in eval mode each forward starts from the stored one.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        start = torch.empty(1, channels_out)
        if not start.is_meta:  # see models.layers.Uninitialised
            start = F.normalize(start.normal_(), dim=-1)
        self.register_buffer("u0", start)
        self.register_buffer("sv0", torch.ones(1))

    def normalise_weight(self) -> Tensor:
        """The weight [out, in, k, k] over its estimated norm; in training the estimate is kept for the next call."""
        matrix = self.weight.flatten(1)
        with torch.autocast(matrix.device.type, enabled=False):  # a narrow norm would scale every output by its error
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
        weight = self.normalise_weight()
        if self.kernel_size == (1, 1):
            return pointwise(x, weight, self.bias)
        if self.training:
            return winograd.convolve_trained(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=self.padding)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The plain convolution that this one is to the next image."""
        plain = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, padding=self.padding)
        plain.weight, plain.bias = nn.Parameter(self.normalise_weight()), nn.Parameter(self.bias.clone())
        return plain


class SegBlock(nn.Module):
    """A residual block without upsampling; as upstream's in-place ReLU has it, the shortcut carries relu(norm(x))."""

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
        """relu(norm(x))."""
        if self.training:
            normed, means, variances = image_norm.normalise_trained(x)
            with torch.no_grad():
                count, now = x.shape[2] * x.shape[3], means.mean(0)
                squares = count * (variances + (means - now).square()).sum(0)
                mean.lerp_(now.flatten(), MOMENTUM)
                variance.lerp_(squares.flatten() / (count * len(x) - 1), MOMENTUM)
            return normed
        if self.is_running:
            exact = x.to(mean.dtype if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)
            return F.relu(F.batch_norm(exact, mean, variance, eps=EPS).to(x.dtype))
        return self.ops.image_norm(x, has_relu=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalise(x, self.stored_mean1, self.stored_var1)
        h = self.normalise(self.conv1(x), self.stored_mean2, self.stored_var2)
        return self.conv2(h) + self.conv_sc(x)


class StackedSegBlock(nn.Module):
    """A folded SegBlock whose norms are of each image: these take out the bias of the first convolution, those of the
    others are added with the shortcut.
    """

    def __init__(self, block: SegBlock):
        super().__init__()
        self.ops, self.first, self.second = block.ops, block.conv1.weight, block.conv2.weight
        self.shortcut = None if isinstance(block.conv_sc, nn.Identity) else block.conv_sc.weight.flatten(1)
        self.bias = block.conv2.bias.detach() + (0 if self.shortcut is None else block.conv_sc.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.ops.image_norm(x, has_relu=True)
        h = self.ops.image_norm(F.conv2d(x, self.first, padding=1), has_relu=True)
        h = F.conv2d(h, self.second, padding=1)
        if self.shortcut is None:
            return self.ops.add_statistics(h, x, self.bias)[0]
        return image(self.ops.linear_add([tokens(x)], self.shortcut, self.bias, tokens(h))[0], *h.shape[-2:])


class Upscale(nn.Module):
    """A bilinear resize to r times the side, plus the output of a convolution for each of the r x r sub-cells."""

    def __init__(self, channels_in: int, channels_out: int, times: int):
        super().__init__()
        self.times = times
        self.reduce = nn.Conv2d(channels_in, channels_out, 1)
        self.detail = nn.Conv2d(channels_out, channels_out * times * times, 3, padding=1)
        nn.init.zeros_(self.detail.weight)  # starts as the plain resize
        nn.init.zeros_(self.detail.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = pointwise(x, self.reduce.weight, self.reduce.bias)
        detail, reduced = self.detail, F.relu(x)
        places = winograd.convolve_trained(reduced, detail.weight, detail.bias) if self.training else detail(reduced)
        return resize(x, x.shape[-1] * self.times) + F.pixel_shuffle(places, self.times)
