"""What the engines over exported graphs have in common: the protocol in terms of stages, whatever runs these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, ProjectedCapture, Text
from datasetdm_fast.engine.backbones.joint_attention import JointReference
from datasetdm_fast.engine.backbones.latent_space import scale
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines import Engine, check_task
from datasetdm_fast.engine.engines.device import trim
from datasetdm_fast.engine.engines.fast.engine import chunk_of, encode_in_chunks, sample_moments
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.manifest import Manifest
from datasetdm_fast.export.onnx.stage_names import RAW, annotate_name, average_name, separate_options
from datasetdm_fast.export.onnx.to_onnx import export_cached, usual_rows
from datasetdm_fast.plugins import load_place
from datasetdm_fast.stages import LEVELS

Tensors = Mapping[str, Tensor]
NOISE = "noise"  # its rows are those of the text
# An opened stage: inputs of each part of a batch -> its outputs, in memory that later calls leave alone.
OpenedGraph = Callable[[Sequence[Tensors]], list[dict[str, Tensor]]]


class GraphEngine(Engine):
    """See engine.Engine; a subclass opens the stages. Weights are read at construction, and graphs written where they
    are missing; each stage is opened when it is first called. What a family does not export, the modules of diffusers
    and transformers compute.

    UNet and autoencoder run in `precision`; text encoder, timesteps, level sums and decoders are fp32 in every mode.
    """

    library: str  # that runs the graphs, as messages call it
    graph_precision: str
    runtime: str  # whose own operators the graphs may use, or "any"
    exports_averages = True  # by a graph of their own, at the first call of denoise_and_average

    def __init__(self, model: Model, decoders: Mapping[str, Decoder] | None, on_message: Callable[[str], None]):
        self.model, self.decoders, self.on_message = model, dict(decoders or {}), on_message
        self.folder, self.manifest = self._export()
        trim()  # what the weights were read into
        self._stages: dict[str, OpenedGraph] = {}
        self.rows = usual_rows(model)

    @functools.cached_property
    def _modules(self) -> TorchEngine:
        return TorchEngine(self.model, {}, device=str(self.device))

    @property
    def _is_joint(self) -> bool:
        return bool(self.model.backbone.network_plan)

    @property
    def _reference(self) -> JointReference:
        """The reference of a transformer of image and text alike."""
        return cast(JointReference, self._modules.reference)

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> OpenedGraph:
        raise NotImplementedError

    def _unet_images(self, batch: int) -> int:
        """Images per call of the UNet or of a decoder."""
        return batch

    def _export(self, **options: Any) -> tuple[Path, Manifest]:
        def on_stage(stage: str) -> None:
            is_first = stage == ("denoise" if self._is_joint else "encode_text")
            if is_first or separate_options(stage):
                self.on_message(f"writing the graphs of {self.model.name} for {self.library}, once")

        precision, runtime = self.graph_precision, self.runtime
        return export_cached(
            self.model, self.decoders, precision=precision, runtime=runtime, on_stage=on_stage, **options
        )

    def _run(self, stage: str, size: int, rows: int = 0, **inputs: Tensor) -> dict[str, Tensor]:
        """The stage's outputs, computed `size` images at a time."""
        return join_parts(self._open_once(stage, rows)(split_batch(inputs, size)), rows or 1)

    def _open_once(self, stage: str, rows: int = 0) -> OpenedGraph:
        """The stage, of a call with so many rows of text for each image; 0 is of none."""
        is_usual = rows in (0, self.rows)
        name = stage if is_usual else f"{stage} {rows}"
        if name not in self._stages:
            options = {} if stage in self.manifest.stages else separate_options(stage)
            options |= {} if is_usual else {"rows": rows, "only": [stage]}
            folder, manifest = self._export(**options) if options else (self.folder, self.manifest)
            self._stages[name] = self._open(folder, manifest, stage)
        return self._stages[name]

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        if "encode_text" not in self.manifest.stages:
            return self._modules.encode_text(prompts)
        names = [info.name for info in self.manifest.stages["encode_text"].inputs]
        tokens = {name: self.model.token_ids(prompts, name.replace("tokens", "tokenizer")) for name in names}
        outputs = self._run("encode_text", len(prompts), **tokens)
        return load_place(str(self.model.backbone.text_network)).after(self.model, prompts, Text(**outputs))

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self._call_unet("denoise", latents, timestep, text)["noise"]

    @torch.inference_mode()
    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, AnyCapture]:
        """The noise and what the loaded decoders make of the activations; without decoders these themselves."""
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, text)
        outputs = self._call_unet("denoise_and_capture", latents, timestep, text)
        unread = [
            torch.zeros(len(latents), 0, level.side, level.side, device=self.device) for level in self.model.levels
        ]
        sums = tuple(outputs.get(f"sums_{name}", none) for name, none in zip(LEVELS, unread))
        slices = {
            task: tuple(slice(*parts.get(name, (0, 0))) for name in LEVELS)
            for task, parts in self.manifest.channels.items()
        }
        return outputs["noise"], ProjectedCapture(sums, slices)

    @torch.inference_mode()
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        """The noise and every captured feature and map as the reference engine gives them."""
        outputs, levels = self._call_unet(RAW, latents, timestep, text), self.model.levels

        def sort_outputs(kind: str, counts: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(
                tuple(outputs[f"{kind}_{name}_{place}"] for place in range(count))
                for name, count in zip(LEVELS, counts)
            )

        return outputs["noise"], Capture(
            sort_outputs("features", [len(level.features) for level in levels]),
            sort_outputs("maps", [len(level.heads) for level in levels]),
        )

    @torch.inference_mode()
    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        if self._is_joint:
            raise Refused(
                f"engine: {self.name} does not average the attention of {self.model.backbone.title}, fast does",
                "Use --engine fast.",
            )
        stage = average_name(*(round(value.shape[1] ** 0.5) for value in (sums.cells, sums.tokens)))
        outputs = self._call_unet(stage, latents, timestep, text, class_context=class_text.context)
        return outputs["noise"], AttentionSums(sums.cells + outputs["cells"], sums.tokens + outputs["tokens"])

    def _call_unet(
        self, stage: str, latents: Tensor, timestep: float, text: Text, **others: Tensor
    ) -> dict[str, Tensor]:
        rows, images = len(text) // len(latents), len(latents)
        assert rows in (1, 2) and len(text) == rows * images, f"the text has {len(text)} rows for {images} images"
        inputs = {"latents": latents, "timestep": self._timestep(float(timestep)), "context": text.context, **others}
        if text.pooled is not None:
            inputs["pooled"] = text.pooled
        if self.model.guidance == "embedded":
            inputs["guidance"] = self._timestep(float(text.guidance or 0))
        if self.model.backbone.pads_text:
            missing = self.model.levels[0].tokens - text.context.shape[1]
            mask = text.context.new_ones(text.context.shape[:2], dtype=torch.bool) if text.mask is None else text.mask
            inputs |= {"context": F.pad(text.context, (0, 0, 0, missing)), "mask": F.pad(mask, (0, missing))}
        outputs = self._run(stage, self._unet_images(images), rows, **inputs)
        if self.model.backbone.guides_itself and rows == 2 and text.guidance is not None:
            outputs[NOISE] = self._reference.guide(outputs[NOISE], text.guidance)
        return outputs

    def _timestep(self, timestep: float) -> Tensor:
        return torch.tensor(timestep)

    @torch.inference_mode()
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        if "decode_image" not in self.manifest.stages:
            parts = [self._modules.decode_and_check(part) for part in latents.split(self._autoencoder_images())]
            images, is_finite = (torch.cat(part) for part in zip(*parts))
            return images, is_finite
        outputs = self._run("decode_image", self._autoencoder_images(), latents=latents)
        return outputs["image"], outputs["is_finite"]

    @torch.inference_mode()
    def encode_image(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:  # [B, C, h, w]
        if "encode_image" not in self.manifest.stages:
            return encode_in_chunks(self._modules.encode_image, images.to(self.device), generators)
        moments = self._run("encode_image", self._autoencoder_images(), image=images)["moments"]
        raw = sample_moments(moments, generators)
        return self._reference.scale(raw) if self._is_joint else scale(self.model.latents, raw)

    def _autoencoder_images(self) -> int:
        return chunk_of(self.model.size, self.device)

    @torch.inference_mode()
    def annotate(self, task: str, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        decoder: Any = self.decoders[task]
        read = decoder.level_sums(capture.of(task), self.model.levels)
        sums = {f"sums_{name}": total for name, total in read.items()}
        words = decoder.check_text(text, capture.batch) if decoder.config.has_text else None
        if words is None or words.ndim == 3:
            return self._call_decoder(task, capture.batch, sums, words)
        outputs = self._call_decoder(task, capture.batch, sums, words[:, None])
        return {name: value[:, 0] for name, value in outputs.items()}

    def _call_decoder(self, task: str, batch: int, sums: Tensors, words: Tensor | None) -> dict[str, Tensor]:
        """The outputs of a decoder, `words` being [B, K, D] where it reads any."""
        inputs = sums if words is None else {**sums, "text": words}
        return self._run(annotate_name(task), self._unet_images(batch), **inputs)


def split_batch(inputs: Tensors, size: int) -> list[Tensors]:
    """The inputs of a stage in parts of at most `size` images; a single number belongs to every part."""
    images = len(next(iter(inputs.values())))
    if images <= size:
        return [inputs]
    halves = {name: value.split(images) for name, value in inputs.items() if value.ndim}  # or one row for each image
    parts = {name: map(torch.cat, zip(*(half.split(size) for half in each))) for name, each in halves.items()}
    whole = {name: value for name, value in inputs.items() if not value.ndim}
    return [whole | dict(zip(parts, part)) for part in zip(*parts.values())]


def join_parts(parts: Sequence[Tensors], rows: int) -> dict[str, Tensor]:
    """The outputs of all parts as one batch, of a call with so many rows of text for each image."""
    if len(parts) == 1:
        return dict(parts[0])
    outputs = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: torch.cat([half for halves in zip(*(value.chunk(rows) for value in values)) for half in halves])
        if name == NOISE
        else torch.cat(values)
        for name, values in outputs.items()
    }
