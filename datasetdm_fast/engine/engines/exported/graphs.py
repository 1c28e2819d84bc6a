"""What the engines over exported graphs have in common: the protocol in terms of stages, whatever runs these."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datasetdm_fast.data import AttentionSums, Capture, ProjectedCapture
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.fast import FastEngine, drawn
from datasetdm_fast.engine.engines.memory import BATCH, suggested
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.onnx.to_onnx import RAW, annotate_name, average_name
from datasetdm_fast.kernels import pyramid
from datasetdm_fast.stages import LEVELS


class GraphEngine:
    """See engines.Engine; a subclass says how the UNet's stages, those of images and those of decoders are run.

    UNet and autoencoder run in `precision`; text encoder, timesteps, level sums and decoders are fp32 in every mode.
    """

    model: Model
    decoders: Mapping[str, Decoder]
    device: torch.device
    precision: str
    adjustments: Mapping[str, int] = {}
    exports_averages = True  # by a graph of their own, at the first call of denoise_and_average

    def _call_unet(
        self, stage: str, latents: Tensor, timestep: float, context: Tensor, **others: Tensor
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _call_autoencoder(self, stage: str, name: str, values: Tensor) -> dict[str, Tensor]:
        """The stage with one input, `name`, in parts that fit."""
        raise NotImplementedError

    def _call_decoder(
        self, stage: str, batch: int, sums: Mapping[str, Tensor], words: Tensor | None
    ) -> dict[str, Tensor]:
        """The stage of a decoder, `words` being [B, K, D] where it reads any."""
        raise NotImplementedError

    def _channels(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """See Manifest.channels."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode_classes(self, words: Sequence[str]) -> Tensor:  # [K, D]
        return self.encode_text(words).mean(1)

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:  # [2B, 4, h, w]
        return self._call_unet("denoise", latents, timestep, context)["noise"]

    @torch.inference_mode()
    def denoise_and_capture(
        self, latents: Tensor, timestep: float, context: Tensor
    ) -> tuple[Tensor, ProjectedCapture | Capture]:
        """The noise and what the loaded decoders make of the activations; without decoders these themselves."""
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, context)
        found = self._call_unet("denoise_and_capture", latents, timestep, context)
        unread = [
            torch.zeros(len(latents), 0, level.side, level.side, device=self.device) for level in self.model.levels
        ]
        return found["noise"], ProjectedCapture(
            tuple(found.get(f"sums_{name}", none) for name, none in zip(LEVELS, unread)), self._slices
        )

    @functools.cached_property
    def _slices(self) -> dict[str, tuple[slice, ...]]:
        """Task -> per level, its own channels of the sums."""
        return {task: tuple(slice(*own.get(name, (0, 0))) for name in LEVELS) for task, own in self._channels().items()}

    @torch.inference_mode()
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        """The noise and every captured feature and map as the reference engine gives them."""
        found, levels = self._call_unet(RAW, latents, timestep, context), self.model.levels

        def ordered(kind: str, counts: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(
                tuple(found[f"{kind}_{name}_{place}"] for place in range(count)) for name, count in zip(LEVELS, counts)
            )

        return found["noise"], Capture(
            ordered("features", [len(one.features) for one in levels]),
            ordered("maps", [len(one.heads) for one in levels]),
        )

    @torch.inference_mode()
    def denoise_and_average(
        self, latents: Tensor, timestep: float, context: Tensor, class_context: Tensor, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        stage = average_name(*(round(one.shape[1] ** 0.5) for one in (sums.cells, sums.tokens)))
        found = self._call_unet(stage, latents, timestep, context, class_context=class_context)
        return found["noise"], AttentionSums(sums.cells + found["cells"], sums.tokens + found["tokens"])

    def decode_image(self, latents: Tensor) -> Tensor:  # [B, H, W, 3] uint8
        return self.decode_and_check(latents)[0]

    @torch.inference_mode()
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        found = self._call_autoencoder("decode_image", "latents", latents)
        return found["image"], found["is_finite"]

    @torch.inference_mode()
    def encode_image(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:  # [B, 4, h, w]
        return (
            drawn(self._call_autoencoder("encode_image", "image", images)["moments"], generators)
            * self.model.networks["vae"].config.scaling_factor
        )

    @torch.inference_mode()
    def annotate(self, task: str, capture: ProjectedCapture | Capture, text: Tensor | None = None) -> dict[str, Tensor]:
        sums, stage = self._sums(task, capture), annotate_name(task)
        config = self.decoders[task].config
        if not config.has_text:
            return self._call_decoder(stage, capture.batch, sums, None)
        width = config.text_width
        if text is None or text.ndim not in (2, 3) or text.shape[0] != capture.batch or text.shape[-1] != width:
            given = "nothing" if text is None else f"shape {list(text.shape)}"
            raise Refused(
                f"open-vocabulary decoder: text is {given}, expected class embeddings [{capture.batch}, {width}] or "
                f"[{capture.batch}, K, {width}]",
                "Pass the text encoder's embeddings of the class words as text.",
            )
        if text.ndim == 3:
            return self._call_decoder(stage, capture.batch, sums, text)
        return {
            name: value[:, 0] for name, value in self._call_decoder(stage, capture.batch, sums, text[:, None]).items()
        }

    def _sums(self, task: str, capture: ProjectedCapture | Capture) -> dict[str, Tensor]:
        """What the task's decoder reads, by the names of its stage."""
        if task not in self.decoders:
            loaded = ", ".join(self.decoders) or "none"
            raise Missing(
                f"task: no decoder for {task!r} was loaded, there are {loaded}",
                "Name a folder with that decoder: --decoder DIR",
            )
        if isinstance(capture, ProjectedCapture):
            return {f"sums_{name}": total for name, total in zip(LEVELS, capture.of(task).sums) if total.shape[1]}
        weights = self.decoders[task].projections()
        return {
            f"sums_{level.name}": pyramid.plain(features, maps, weights[level.name].to(self.device), level.side)
            for level, features, maps in zip(self.model.levels, capture.features, capture.maps)
            if level.name in weights
        }

    def suggested_batch(self) -> int:
        return BATCH if self.device.type == "cuda" else suggested(self.model.size // 8, self.device)

    def fp32_fallback(self) -> FastEngine | None:
        return None if self.precision == "fp32" else self._wide

    @functools.cached_property
    def _wide(self) -> FastEngine:
        return FastEngine(self.model, self.decoders, dtype="fp32", device=str(self.device))
