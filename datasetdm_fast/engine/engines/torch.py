"""The reference engine: diffusers and transformers modules as they come, fp32, eager, never optimised."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import diffusers
import torch
import transformers
from torch import Tensor, nn

from datasetdm_fast.config import CACHED
from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, Text
from datasetdm_fast.engine.backbones import BackboneReference
from datasetdm_fast.engine.engines import Engine, check_task
from datasetdm_fast.engine.engines.device import engine_call, resolve_device
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.plugins import load_place


def _check_capture(model: Model, capture: Capture) -> None:
    """Names another package whose reference does not capture what the levels of its record say."""
    for level, features, maps in zip(model.levels, capture.features, capture.maps, strict=True):
        expected = [(level.halves * channels, level.side, level.side) for channels in level.features]
        expected += [(heads, level.side**2, level.tokens) for heads in level.heads]
        if (shapes := [tuple(x.shape[1:]) for x in (*features, *maps)]) != expected:
            raise Missing(
                f"backbones: {model.backbone.title} of the package {model.backbone.package} captures {shapes} as level "
                f"{level.name}, and the levels of its record say {expected}",
                "Update that package, or remove it.",
            )


class TorchEngine(Engine):
    """See engine.Engine; a family is computed by its BackboneReference, decoders in the mode they were loaded in.

    `model` and `decoders` are moved to the device in place. Results are inference tensors: clone to train on them.
    """

    name, precision = "torch", "fp32"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, nn.Module] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
    ):
        if dtype not in ("auto", "fp32"):
            raise Refused(
                f"dtype: the torch engine is the fp32 reference and cannot run in {dtype}",
                "Use --dtype fp32, or another engine.",
            )
        self.model, self.device = model, resolve_device(device)
        self.decoders = {task: decoder.to(self.device) for task, decoder in (decoders or {}).items()}
        self.speeds = (CACHED,) if model.backbone.has_deep_features else ()
        for network in model.networks.values():
            network.place(self.device)
            if self.device.type != "cpu":  # on a CPU they are built when they are first needed
                network.module  # noqa: B018

    @cached_property
    def reference(self) -> BackboneReference:
        """Reads the weights of the model when it is first asked for."""
        return load_place(self.model.backbone.reference)(self.model)

    @engine_call
    def encode_text(self, prompts: Sequence[str]) -> Text:
        return self.reference.encode(prompts)

    @engine_call
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self.reference.predict(latents, timestep, text)

    @engine_call
    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        with self.reference.capturing() as captures:
            output = self.reference.predict(latents, timestep, text)
        if self.model.backbone.package:
            _check_capture(self.model, captures[0])
        return output, captures[0]

    denoise_and_capture_raw = denoise_and_capture

    @engine_call
    def denoise_and_keep(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Tensor]:
        return self.reference.predict_and_keep(latents, timestep, text)

    @engine_call
    def denoise_from(self, deep: Tensor, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self.reference.predict_from(deep, latents, timestep, text)

    @engine_call
    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        return self.reference.predict_and_average(latents, timestep, text, class_text, sums)

    @engine_call
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        decoded = self.reference.decode(latents).float()  # of an autoencoder in bf16, 8 bits are too few for a shade
        # rounded down, as DatasetDM does; diffusers rounds to the nearest
        images = ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)
        return images, decoded.isfinite().flatten(1).all(1)

    @engine_call
    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.reference.encode_image(pixels, generators)

    @engine_call
    def annotate(self, task: str, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        return self.decoders[task](capture.of(task), text)

    def _versions(self) -> dict[str, str]:
        return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
