"""The fast engine on a CPU, in fp32 or bf16: a few images at once on every core, and large networks one at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AnyCapture, ProjectedCapture
from datasetdm_fast.engine.decoders.trunk import copy_for_cpu as packed_decoder
from datasetdm_fast.engine.engines.device import Lanes, available_memory, trim
from datasetdm_fast.engine.engines.fast.engine import (
    LAZY_NETWORKS,
    FastEngine,
    Inputs,
    Step,
    as_images,
    channels_last,
    chunk_of,
    slice_of,
)
from datasetdm_fast.engine.loading.model import WeightSource, as_widest
from datasetdm_fast.engine.models.blocks import LARGEST_BLOCK, has_blocks, with_blocks
from datasetdm_fast.engine.models.packed import norm_in_place, pack_layers
from datasetdm_fast.engine.models.unet import UNet
from datasetdm_fast.engine.models.vae import ImageDecoder
from datasetdm_fast.kernels import winograd
from datasetdm_fast.kernels.cpu import multiplies_tiles
from datasetdm_fast.stages import FACTOR

# weights that are computed with before they are stored, or stay in fp32: of timesteps, and of doubled cells
COMPUTED = ("time_emb", "add_embedding", "upsamplers")
LARGEST_IDLE = 2**27  # bytes; larger networks of LAZY_NETWORKS are unloaded while others compute, and read again later
PLENTY = 8  # times its bytes: where that much memory is available, a large network stays loaded, too


def size_of(module: nn.Module) -> int:
    """Bytes of its weights, but of packed ones."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def is_in_the_way(module: nn.Module) -> bool:
    """Whether it is too large to stay loaded while others compute."""
    size = size_of(module)
    return size > LARGEST_IDLE and available_memory() < PLENTY * size


def free_memory() -> None:
    """Gives back the memory of workspaces and caches."""
    winograd.free_buffers()
    trim()


class CpuEngine(FastEngine):
    """See FastEngine."""

    largest_stacked = 2**23
    _has_large_unet: bool
    _empty: tuple[Tensor, tuple[Tensor, ...]] | None  # the text of the unconditional rows, its keys and values

    def __init__(self, *arguments: Any, **choices: Any):
        self.lanes, self._calls = Lanes(), Lanes()  # for the slices of a batch, and for calls about one image
        super().__init__(*arguments, **choices)

    def _forms(self) -> tuple[torch.dtype, tuple[type[nn.Module], type[nn.Module]]]:
        config = self.model.denoiser.config
        is_block = self._has_usual_ops and not self.is_compiled and has_blocks(config)
        # its largest layer is a resnet that reads a skip
        is_one_block = is_block and 29 * max(config["block_out_channels"]) ** 2 <= LARGEST_BLOCK
        return torch.float32 if is_one_block else self.dtype, (UNet, ImageDecoder)

    def _sources(self, *names: str) -> dict[str, WeightSource]:
        """Weights that no module holds are stored as they are multiplied with."""

        def choose_dtype(dtype: torch.dtype, name: str, value: Tensor) -> torch.dtype:
            is_half = value.dim() > 1 and not any(part in name for part in COMPUTED)
            return dtype if is_half else as_widest(name, value)

        networks = {name: self.model.networks[name] for name in names or self.model.networks}
        dtypes = {name: self.unet_dtype if name == "unet" else self.dtype for name in networks}
        return {
            name: network.read()
            if name in self.model.backbone.of_kind("text_encoder")
            else network.read(functools.partial(choose_dtype, dtypes[name]), dtypes[name])
            for name, network in networks.items()
        }

    def _ready(self) -> None:
        self._has_large_unet = size_of(self.unet) > LARGEST_IDLE  # asked here, as packed weights are no parameters
        self.label_dtype, self._stored_decoders = torch.float32, self.decoders
        if not self.is_compiled:
            in_pairs = self.dtype == torch.bfloat16 and not multiplies_tiles(self.dtype)
            is_block = self._has_usual_ops and has_blocks(self.model.denoiser.config)
            self.unet = pack_layers(with_blocks(self.unet, in_pairs) if is_block else self.unet)
            if self._has_usual_ops:
                self._stored_decoders = {task: packed_decoder(decoder) for task, decoder in self.decoders.items()}
        trim()
        self._empty = None

    def _load_lazily(self, name: str) -> nn.Module:
        is_packed = name != "text_encoder" and not self.is_compiled
        free_memory()
        module = super()._load_lazily(name)
        module = pack_layers(module) if is_packed else module
        trim()  # what reading left behind
        return norm_in_place(module) if is_packed and name == "image_decoder" and self._has_usual_ops else module

    def _unload_except(self, *needed: str) -> None:
        for name in LAZY_NETWORKS:
            if name not in needed and (module := self.__dict__.get(name)) is not None and is_in_the_way(module):
                self.__dict__.pop(name, None)

    def _encode_keys_values(self, context: Tensor, images: int) -> tuple[Tensor, ...]:
        """Keys and values of the unconditional rows are cached from batch to batch where all are one text; otherwise
        each is computed alone, so that the batch changes no rounding.
        """
        batch, text = len(context) - images, context.to(self.unet_dtype)  # unconditional rows
        if not batch:
            return tuple(self.texts(text))
        if not torch.equal(context[:batch], context[:1].expand(batch, -1, -1)):
            rows = [self.texts(row) for row in text[:batch].split(1)]
            return tuple(torch.cat(parts, 1) for parts in zip(*rows, self.texts(text[batch:])))
        if self._empty is None or not torch.equal(self._empty[0], text[:1]):
            self._empty = (text[:1].clone(), self.texts(text[:1]))
        return tuple(
            torch.cat([unconditional.expand(-1, batch, -1, -1, -1), conditional], 1)
            for unconditional, conditional in zip(self._empty[1], self.texts(text[batch:]))
        )

    def _parts(self, step: Step, slices: Callable[[int], list[Inputs]], batch: int) -> list[tuple[Tensor, ...]]:
        return self.lanes.map(step, slices(slice_of(batch)))

    def _images(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        self._unload_except("image_decoder")
        decoder = self.image_decoder  # read once, before threads ask for it
        chunks = latents.split(min(chunk_of(latents.shape[-1] * FACTOR, latents.device), slice_of(len(latents))))
        if len(chunks) == 1 and is_in_the_way(decoder):
            del self.image_decoder  # the next call of another network would unload it
            return [as_images(decoder.decode_and_release(channels_last(chunks[0], self.dtype), free_memory))]
        return self.lanes.map(self._decode_part, [(chunk,) for chunk in chunks])

    def _run_decoder(self, task: str, capture: AnyCapture, text: Tensor | None) -> dict[str, Tensor]:
        decoder = self._stored_decoders[task]
        inputs = capture.to(next(decoder.parameters()).dtype)
        if not isinstance(inputs, ProjectedCapture):
            return decoder(inputs, text)
        winograd.free_buffers()  # workspaces that the UNet alone uses
        size = slice_of(inputs.batch)
        texts = [None] * inputs.batch if text is None else text.split(size)
        sums = zip(*(total.split(size) for total in inputs.sums))
        calls = [(ProjectedCapture(part, inputs.slices), words) for part, words in zip(sums, texts)]
        parts = self.lanes.map(decoder, calls)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @property
    def side_by_side(self) -> Callable[[Sequence[Callable[[], Any]]], list[Any]] | None:
        """A single small image's operations are too short for several cores."""
        self._refresh()
        if self.is_compiled or self._has_large_unet:
            return None
        return lambda calls: self._calls.map(lambda call: call(), [(call,) for call in calls])
