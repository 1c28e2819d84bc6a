"""The fast engine of models whose image and text tokens attend to one another: our own transformer, in bf16 on a GPU,
and captures that cost a few rows of products and what attention tells of its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.config import FP8
from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, ProjectedCapture, Text
from datasetdm_fast.engine.backbones.joint_attention import ConceptReader, JointReference, with_concepts
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import engine_call, resolve_device
from datasetdm_fast.engine.engines.fast.engine import (
    DTYPES,
    as_images,
    channels_last,
    chunk_of,
    encode_in_chunks,
    moments_of,
    sample_moments,
)
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading.model import Model, Network
from datasetdm_fast.engine.models.capture import CallReader, ProjectingReader, Projection, RawReader, append_rows
from datasetdm_fast.engine.models.fp8 import with_fp8_products
from datasetdm_fast.engine.models.fused import FusedImageDecoder
from datasetdm_fast.engine.models.mmdit import MMDiT
from datasetdm_fast.engine.models.packed import (
    copy_in_dtype,
    largest_distance,
    norm_in_place,
    pack_layers,
    place_module,
    weights_of,
)
from datasetdm_fast.engine.models.vae import ImageDecoder, ImageEncoder, has_usual_form
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels import plain
from datasetdm_fast.kernels.choice import operations
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.plugins import load_place


class JointEngine(TorchEngine):
    """See engine.Engine; text encoders are the model's own modules, or copies in bf16, and so is an autoencoder of
    another form than models.vae's.
    """

    name = "fast"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        compile: bool = False,
    ):
        place = resolve_device(device)
        precision = ("bf16" if place.type == "cuda" else "fp32") if dtype == "auto" else dtype
        if precision not in ("bf16", "fp32"):
            raise Refused(
                f"dtype: {precision}: {model.backbone.title} runs in bf16 and fp32, its activations leave fp16's range",
                "Use --dtype bf16 or --dtype fp32.",
            )
        self.dtype, self.truth = DTYPES[precision], model
        self.ops = plain if compile else operations(place, self.dtype)
        is_copied = precision != "fp32" or place.type != "cpu"
        others = {
            name: copy_in_dtype(network.module, place, self.dtype)
            for name, network in model.networks.items()
            if is_copied and name != model.backbone.denoiser
        }
        held = model.with_modules(**others)
        network = Network(model.denoiser.config, lambda: self._build_network().to(place), lambda _: {})
        self.held = replace(held, networks={**held.networks, model.backbone.denoiser: network})
        super().__init__(self.held, decoders, device=device)
        self.joint = cast(JointReference, self.reference)  # of what is held here, not of the model
        self.model, self.precision, self.is_compiled, self.speeds = model, precision, compile, (FP8,)
        self.projection = Projection(model.levels, self.decoders).to(self.device)

    @cached_property
    def network(self) -> MMDiT:
        """Our transformer; the rows by which decoders multiply the tokens of a block are appended to its product."""
        network = cast(MMDiT, self.held.denoiser.module)
        append_rows(network, self.projection)
        return network

    @cached_property
    def _called(self) -> Callable[..., Tensor]:
        return torch.compile(self.network, dynamic=False) if self.is_compiled else self.network

    @cached_property
    def _fp8(self) -> Callable[..., Tensor]:
        network = with_fp8_products(self.network)
        return torch.compile(network, dynamic=False) if self.is_compiled else network

    def _build_network(self) -> MMDiT:
        """Our transformer, with the weights of the model's, whose own is not held beside it."""
        backbone, dtype = self.truth.backbone, self.dtype
        source = self.truth.networks[backbone.denoiser].take(
            lambda name, value: dtype if value.is_floating_point() else value.dtype
        )
        plan = load_place(backbone.network_plan)(source.config, source.state_dict())
        return MMDiT(source.config, plan, self.ops).to(self.dtype)

    @property
    def _decoder_kind(self) -> type[ImageDecoder]:
        return FusedImageDecoder if self.device.type == "cuda" and not self.is_compiled else ImageDecoder

    def _build_half(self, kind: type[ImageDecoder] | type[ImageEncoder]) -> nn.Module | None:
        """A half of the autoencoder over our layers; None where it is of another form."""
        source = self.truth.networks["vae"].read()
        if not has_usual_form(source.config):
            return None
        return place_module(kind(source, self.ops), self.device, self.dtype)

    def _pack_half(self, kind: type[ImageDecoder] | type[ImageEncoder]) -> nn.Module | None:
        half = self._build_half(kind)
        if half is None or self.device.type != "cpu" or self.is_compiled:
            return half
        packed = pack_layers(half)
        return norm_in_place(packed) if isinstance(packed, ImageDecoder) else packed

    @cached_property
    def image_decoder(self) -> nn.Module | None:
        return self._pack_half(self._decoder_kind)

    @cached_property
    def image_encoder(self) -> nn.Module | None:
        return self._pack_half(ImageEncoder)

    def weight_distance(self) -> float:
        """How far a weight of the engine lies from that of its model, as a share of the largest in its tensor."""
        truth = {name: network.state_dict() for name, network in self.held.modules.items()}
        fresh = self._build_network()
        farthest = 0.0
        for name, held in truth.items():
            source = fresh if name == self.truth.backbone.denoiser else self.model.networks[name].module
            expected = {key: value.to("cpu", held[key].dtype) for key, value in source.state_dict().items()}
            placed = {key: value[: len(expected[key])].cpu() if value.ndim else value for key, value in held.items()}
            farthest = max(farthest, largest_distance(placed, expected))
        for kind, name in ((self._decoder_kind, "image_decoder"), (ImageEncoder, "image_encoder")):
            if (half := self.__dict__.get(name)) is not None:
                fresh_half = cast(nn.Module, self._build_half(kind))
                farthest = max(farthest, largest_distance(weights_of(half), weights_of(fresh_half)))
        return farthest

    @engine_call
    def encode_text(self, prompts: Sequence[str]) -> Text:
        return super().encode_text(prompts).cast(torch.float32)

    def _call(
        self, network: Callable[..., Tensor], latents: Tensor, timestep: float, text: Text, *reader: CallReader
    ) -> tuple[Tensor, Tensor]:
        """The output, and the image that the conditional half of it points to, in cells of 8 pixels."""
        narrow, latents = text.to(self.device).cast(self.dtype), latents.to(self.device)
        moment = torch.full((), timestep, device=self.device)
        output = network(latents.to(self.dtype), moment, narrow, *reader).float()
        clean = self.joint.cells(latents - timestep / 1000 * output[-len(latents) :])
        if len(output) > len(latents) and text.guidance is not None:
            output = self.joint.guide(output, text.guidance)
        return output, clean

    def _sizes(self, latents: Tensor) -> tuple[int, int]:
        """What every reader is told: images, and cells of each."""
        return len(latents), self.model.levels[0].side ** 2

    @engine_call
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self._call(self._called, latents, timestep, text)[0]

    @engine_call
    def denoise_in_fp8(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """The output where the products of the blocks are in fp8."""
        return self._call(self._fp8, latents, timestep, text)[0]

    @engine_call
    def denoise_and_capture(  # type: ignore[override]
        self, latents: Tensor, timestep: float, text: Text
    ) -> tuple[Tensor, AnyCapture]:
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, text)
        reader = ProjectingReader(self.projection, *self._sizes(latents), self.ops)
        output, clean = self._call(self.network, latents, timestep, text, reader)
        sums = reader.level_sums(clean)
        for level, side in enumerate(self.projection.sides):
            sums.setdefault(level, torch.zeros(len(latents), 0, side, side, device=self.device))
        return output, ProjectedCapture(tuple(sums[level] for level in sorted(sums)), self.projection.tasks)

    @engine_call
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        reader = RawReader(self.model.levels, *self._sizes(latents))
        output, clean = self._call(self.network, latents, timestep, text, reader)
        return output, reader.capture(clean)

    @engine_call
    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        if class_text.concepts:
            return self._read_concepts(latents, timestep, text, class_text, sums)
        blocks, averages = self.model.defaults.attention.blocks, list[Tensor]()

        def add(block: int, tokens: Tensor, _: Tensor, attention: tuple[Any, ...]) -> None:
            maps = self.ops.attention_shares(*attention, None)  # [B, S, T] of all heads
            averages[:] = [averages[0] + maps] if averages else [maps]

        reader = CallReader(blocks, *self._sizes(latents), add)
        output, _ = self._call(self.network, latents, timestep, text, reader)
        maps = averages[0] / len(blocks)
        return output, AttentionSums(sums.cells, sums.tokens + F.pad(maps, (0, sums.tokens.shape[2] - maps.shape[2])))

    def _read_concepts(
        self, latents: Tensor, timestep: float, text: Text, concepts: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """See backbones/joint_attention.py; image tokens come first here, and concepts last."""
        joined, cells = with_concepts(text, concepts), self.model.levels[0].side ** 2
        if is_whole := joined.mask is None:  # only with a mask are the attentions seen by the reader
            joined = replace(joined, mask=torch.ones(joined.context.shape[:2], dtype=torch.bool))
        last, blocks = cells + joined.context.shape[1], self.model.defaults.attention.concept_blocks
        places = slice(cells), slice(last - joined.concepts, last)
        with ConceptReader(blocks, len(latents), *places, drops_mask=is_whole) as read:
            output, _ = self._call(self.network, latents, timestep, joined)
        return output, AttentionSums(sums.cells, sums.tokens + read.maps)

    @engine_call
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        parts = latents.to(self.device).split(chunk_of(self.model.size, self.device))
        images, is_finite = (torch.cat(values) for values in zip(*map(self._decode_part, parts)))
        return images, is_finite

    def _decode_part(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if self.image_decoder is None:
            return super().decode_and_check(latents)
        return as_images(self.image_decoder(channels_last(self.joint.unscale(latents), self.dtype)))

    @engine_call
    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return encode_in_chunks(self._encode_part, to_device(images, self.device), generators)

    def _encode_part(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        if self.image_encoder is None:
            return super().encode_image(images, generators)
        moments = moments_of(self.image_encoder, images, self.dtype)
        return self.joint.scale(sample_moments(moments, generators))
