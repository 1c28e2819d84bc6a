"""The trunk of every P-Decoder and its layers: project each captured level, then mix them from low to highest. Decoders
that read different blocks of one transformer read captures that hold what any of them reads.

Parameter names are those of DatasetDM's checkpoints, so that these load as they are.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import AnyCapture, ProjectedCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.domain import LARGEST_SIDE, Domain, mixtures
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.models.layers import image, pointwise, tokens
from datasetdm_fast.engine.models.packed import PackedConvolution, is_held
from datasetdm_fast.kernels import image_norm, pyramid, winograd
from datasetdm_fast.kernels.image_norm import EPS
from datasetdm_fast.kernels.upsample_concat import resize
from datasetdm_fast.stages import LEVELS, Level

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


CALL_RATE = 10.0  # of the weights of calls as a multiple of that of others, whose steps would hardly move them


class Decoder(nn.Module):
    """A trunk; subclasses add what turns it into labels. `forward(capture, text=None)` returns named tensors."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace, mixes: dict[str, tuple[int, int]]):
        super().__init__()
        self.config, self.ops = config, ops
        self.domain: Domain | None = None  # of a decoder in a folder, where its training has measured it
        self.levels_read = [name for name in LEVELS if name in mixes or name == "low"]
        for level in config.levels:
            if level.name in self.levels_read:
                self.add_module(
                    f"{level.name}_feature_conv", nn.Sequential(nn.Conv2d(level.channels, config.width, 1, bias=False))
                )
        for name, (channels_in, channels_out) in mixes.items():
            self.add_module(f"{name}_feature_mix_conv", SegBlock(channels_in, channels_out, ops, config.normalisation))
        if config.calls > 1:
            self.call_weights = nn.Parameter(torch.zeros(config.calls, len(LEVELS)))

    def projections(self) -> dict[str, Tensor]:
        """Level -> weight [F, channels, 1, 1] of the first layer, and where words are told apart T rows for tokens."""
        rows = {name: [self.get_submodule(f"{name}_feature_conv.0").weight] for name in self.levels_read}
        for level in self.config.levels:
            if shares := self.config.word_levels().get(level.name):
                some = next(self.parameters())
                heads = torch.tensor([share for part in shares for share in part])
                maps = heads[None, :, None] * torch.eye(level.tokens)[:, None]  # [T, heads, T]
                nothing = torch.zeros(level.tokens, level.halves * sum(level.features))  # of the features
                weight = torch.cat([nothing, maps.flatten(1)], 1)[..., None, None]
                rows.setdefault(level.name, []).append(weight.to(some.device, some.dtype))
        return {
            name: torch.cat(rows[name]) if len(rows[name]) > 1 else rows[name][0] for name in LEVELS if name in rows
        }

    def level_sums(self, capture: AnyCapture, levels: Sequence[Level]) -> dict[str, Tensor]:
        """Level -> the sums [B, F, h, w] that the first layer makes of it, of those of the model that are read; a
        ProjectedCapture, which holds them, must be this decoder's own.
        """
        if isinstance(capture, ProjectedCapture):
            return {name: total for name, total in zip(LEVELS, capture.sums) if total.shape[1]}
        weights = self.projections()
        return {
            level.name: pyramid.plain(features, maps, weights[level.name].to(features[0].device), level.side)
            for level, features, maps in zip(levels, capture.features, capture.maps)
            if level.name in weights
        }

    def call_shares(self) -> Tensor:
        """[calls, levels] the share of each call in what this decoder of several reads of a level."""
        return (CALL_RATE * self.call_weights).softmax(0)

    def level(self, capture: AnyCapture, name: str, side: int) -> Tensor:
        """The level `name` [B, F, h, w], yet to be resized to `side`; a ProjectedCapture must be this decoder's own."""
        place = LEVELS.index(name)
        convolution = self.get_submodule(f"{name}_feature_conv.0")
        if isinstance(capture, ProjectedCapture):
            total = capture.sums[place]
            return total[:, : convolution.out_channels] if name in self.config.word_levels() else total
        return self.ops.pyramid(capture.features[place], capture.maps[place], convolution.weight, side)

    @torch.no_grad()
    def stack(self) -> None:
        """Prepares a folded decoder, which is for inference on a GPU from then on; see StackedSegBlock."""
        for name, block in list(self.named_children()):
            if isinstance(block, SegBlock) and not block.is_running:
                setattr(self, name, StackedSegBlock(block))

    @torch.no_grad()
    def pack(self) -> None:
        """Prepares a folded decoder for inference on a CPU: small 3x3 convolutions by minimal filtering, which rounds
        alike on any number of threads where PyTorch's own one of a single small image does not.
        """
        for block in [module for module in self.modules() if isinstance(module, (SegBlock, Upscale))]:
            for name, child in list(block.named_children()):
                if type(child) is nn.Conv2d and winograd.takes(child.weight) and is_held(child.weight):
                    plain = SimpleNamespace(weight=child.weight, bias=child.bias, stride=1, padding=1)
                    setattr(block, name, PackedConvolution(plain))

    def token_attention(self, capture: AnyCapture) -> Tensor:
        """[B, T, h, w] the attention of each cell of the highest level to each token, by the heads that tell words."""
        total = None
        for name, shares in self.config.word_levels().items():
            place = LEVELS.index(name)
            if isinstance(capture, ProjectedCapture):
                maps = capture.sums[place][:, -self.config.levels[place].tokens :]
            else:
                maps = sum(
                    share * pyramid.planes(layer_maps[:, head : head + 1])
                    for layer_maps, part in zip(capture.maps[place], shares, strict=True)
                    for head, share in enumerate(part)
                )
            maps = resize(maps, capture.side)
            total = maps if total is None else total + maps
        return total

    def sketch(self, capture: AnyCapture) -> Tensor:
        """[B, D, h, w] mixtures of the channels of every level that is read, on one grid, for its domain."""
        side, parts = min(capture.side, LARGEST_SIDE), []
        held = capture.sums if isinstance(capture, ProjectedCapture) else [level[0] for level in capture.features]
        for name in self.levels_read:
            level = self.level(capture, name, held[LEVELS.index(name)].shape[-1]).float()
            weight = torch.from_numpy(mixtures(level.shape[1])).to(level.device)
            mixed = torch.einsum("mc,bchw->bmhw", weight, level)
            pooled = F.adaptive_avg_pool2d(mixed, side) if mixed.shape[-1] > side else mixed
            parts.append(F.interpolate(pooled, size=(side, side)))
        return torch.cat(parts, 1)

    def lowest(self, capture: AnyCapture) -> Tensor:
        """The level `low` at a quarter of the side of the highest."""
        side = capture.side // 4
        return resize(self.level(capture, "low", side), side)

    def mix(self, capture: AnyCapture, name: str, below: Tensor, side: int) -> Tensor:
        """The level `name` joined with the levels below it, both brought to `side`."""
        joined = self.ops.upsample_concat([below, self.level(capture, name, side)], side)
        return self.get_submodule(f"{name}_feature_mix_conv")(joined)

    def climb(self, capture: AnyCapture) -> Tensor:
        """All four levels mixed, at the resolution of the highest."""
        side = capture.side
        mid = self.mix(capture, "mid", self.lowest(capture), side // 2)
        return self.mix(capture, "highest", self.mix(capture, "high", mid, side), side)


def wide_mixes(width: int) -> dict[str, tuple[int, int]]:
    """Mixes that keep every channel they are given, as depth and heatmaps have them."""
    return {name: (count * width, count * width) for name, count in (("mid", 2), ("high", 3), ("highest", 4))}


def with_ops(decoder: Decoder, ops: SimpleNamespace) -> Decoder:
    """A copy of the decoder that computes with other operations and has the same weights, held once."""
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in decoder.parameters()
    }
    shared |= {id(decoder.config): decoder.config, id(decoder.domain): decoder.domain, id(decoder.ops): ops}
    # every module has a dozen empty containers, on which deepcopy would spend most of its time
    members = [value for module in decoder.modules() for value in vars(module).values()]
    shared |= {id(value): value.copy() for value in members if isinstance(value, (dict, set)) and not value}
    copied = copy.deepcopy(decoder, shared)
    for module in copied.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return copied


def is_folded(decoder: Decoder) -> bool:
    """Whether every image meets the same weights."""
    return not any(isinstance(module, SpectralConv2d) for module in decoder.modules())


def copy_for_gpu(decoder: Decoder, dtype: torch.dtype, ops: SimpleNamespace) -> Decoder:
    """A copy of the folded decoder for a GPU, of parameters and inputs in `dtype`; buffers stay in fp32."""
    copied = with_ops(decoder, ops).to(dtype)
    for module, exact in zip(copied.modules(), decoder.modules(), strict=True):
        module._buffers.update(exact._buffers)
    copied.stack()
    return copied


def copy_for_cpu(decoder: Decoder) -> Decoder:
    """A copy of the folded decoder for a CPU, with the same weights."""
    copied = with_ops(decoder, decoder.ops)
    copied.pack()
    return copied


@torch.no_grad()
def fold(decoder: Decoder) -> Decoder:
    """The decoder for inference, spectral norms divided into the weights as the first image would see them."""
    decoder.eval()
    for block in [module for module in decoder.modules() if isinstance(module, SegBlock)]:
        for name, child in list(block.named_children()):
            if isinstance(child, SpectralConv2d):
                with torch.device("meta"):  # no weights are drawn
                    plain = nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size, padding=child.padding)
                plain.weight, plain.bias = nn.Parameter(child.normalise_weight()), nn.Parameter(child.bias.clone())
                setattr(block, name, plain)
    return decoder.requires_grad_(False)


def read_together(model: Model, decoders: Mapping[str, Decoder]) -> tuple[Model, dict[str, Decoder]]:
    """The model whose captures hold the blocks of every decoder, and the decoders as they read these."""
    if not any(decoder.config.blocks for decoder in decoders.values()):
        return model, dict(decoders)
    usual = tuple(level.blocks for level in model.reading(()).levels if level.blocks)
    named = {label: decoder.config.blocks or usual for label, decoder in decoders.items()}
    union = [sorted({block for blocks in level for block in blocks}) for level in zip(*named.values())]
    model = model.reading(union)
    return model, {label: _widen(decoder, named[label], model.levels) for label, decoder in decoders.items()}


@torch.no_grad()
def _widen(decoder: Decoder, read: Sequence[tuple[int, ...]], levels: Sequence[Level]) -> Decoder:
    """The decoder, which reads its own blocks, for captures of these levels: weights of other blocks are zero."""
    if [*read] == [level.blocks for level in levels if level.blocks]:
        return decoder
    decoder, config = with_ops(decoder, decoder.ops), decoder.config
    shares, wide_shares = list(config.word_heads), list[float]()
    for level, theirs, blocks in zip(config.levels, levels, (*read, ()), strict=True):
        mine, shares = shares[: sum(level.heads)], shares[sum(level.heads) :]
        if mine:
            wide_shares += _spread(torch.tensor(mine, dtype=torch.float64), blocks, theirs.blocks).tolist()
        if blocks and level.name in decoder.levels_read:
            convolution = decoder.get_submodule(f"{level.name}_feature_conv.0")
            features = level.halves * sum(level.features)
            parts = convolution.weight[:, :features, 0, 0], convolution.weight[:, features:, 0, 0]
            wide = torch.cat([_spread(part, blocks, theirs.blocks) for part in parts], 1)[..., None, None]
            convolution.weight, convolution.in_channels = nn.Parameter(wide, requires_grad=False), theirs.channels
    wider = tuple(replace(theirs, side=level.side) for level, theirs in zip(config.levels, levels))
    decoder.config = replace(config, levels=wider, word_heads=tuple(wide_shares))
    return decoder


def _spread(values: Tensor, read: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Numbers of each block that is read, end to end in the last axis, as numbers of all blocks."""
    parts = values.unflatten(-1, (len(read), -1))
    wide = values.new_zeros(*parts.shape[:-2], len(blocks), parts.shape[-1])
    wide[..., [*map(blocks.index, read)], :] = parts
    return wide.flatten(-2)
