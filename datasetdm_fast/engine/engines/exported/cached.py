"""What the engines over graphs of the cache have in common: export once, open each stage when it is first called, and
batches in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine
from datasetdm_fast.engine.engines.fast import CHUNK_PIXELS
from datasetdm_fast.engine.engines.memory import trim
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.export.manifest import Manifest, StageFile
from datasetdm_fast.export.onnx.to_onnx import cached, exported_apart
from datasetdm_fast.export.staging import say

Tensors = Mapping[str, Tensor]


class OpenedGraph(Protocol):
    """An opened graph."""

    def __call__(self, parts: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        """The outputs for the inputs of each part of a batch, in memory that later calls leave alone."""


class CachedEngine(GraphEngine):
    """See GraphEngine; weights are read at construction, and graphs written to the cache where they are not there."""

    library: str  # that runs the graphs, as messages call it
    stored: str  # precision of the exported graphs
    runtime: str  # whose own operators they may use, or "any"

    def __init__(self, model: Model, decoders: Mapping[str, Decoder] | None, tell: Callable[[str], None] = say):
        self.model, self.decoders, self.tell = model, dict(decoders or {}), tell
        self.folder, self.manifest = self._export()
        trim()  # what the weights were read into
        self._stages: dict[str, OpenedGraph] = {}

    def _open(self, path: Path, name: str, file: StageFile) -> OpenedGraph:
        raise NotImplementedError

    def _images_at_once(self, batch: int) -> int:
        """Images that one call of the UNet or of a decoder is given."""
        raise NotImplementedError

    def _export(self, **which) -> tuple[Path, Manifest]:
        def told(stage: str) -> None:
            if stage == "encode_text" or exported_apart(stage):
                self.tell(f"writing the graphs of {self.model.name} for {self.library}, once")

        return cached(self.model, self.decoders, precision=self.stored, runtime=self.runtime, told=told, **which)

    def _run(self, name: str, size: int, **inputs: Tensor) -> dict[str, Tensor]:
        """The stage's outputs, `size` images at once."""
        if name not in self._stages:
            apart = exported_apart(name)
            folder, manifest = self._export(**apart) if apart else (self.folder, self.manifest)
            self._stages[name] = self._open(manifest.graph(folder, name), name, manifest.stages[name])
        return joined(self._stages[name](split(inputs, size)))

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:  # [B, T, D]
        return self._run("encode_text", len(prompts), tokens=self.model.token_ids(prompts))["context"]

    def _call_unet(
        self, stage: str, latents: Tensor, timestep: float, context: Tensor, **others: Tensor
    ) -> dict[str, Tensor]:
        assert len(context) == 2 * len(latents), f"context has {len(context)} rows for {len(latents)} images"
        size = self._images_at_once(len(latents))
        moment = torch.tensor(float(timestep))
        return self._run(stage, size, latents=latents, timestep=moment, context=context, **others)

    def _call_autoencoder(self, stage: str, name: str, values: Tensor) -> dict[str, Tensor]:
        return self._run(stage, max(CHUNK_PIXELS[self.device.type] // self.model.size**2, 1), **{name: values})

    def _channels(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        return self.manifest.channels

    def _call_decoder(self, stage: str, batch: int, sums: Tensors, words: Tensor | None) -> dict[str, Tensor]:
        return self._run(stage, self._images_at_once(batch), **sums, **({} if words is None else {"text": words}))


CONTEXT = "context"  # its rows are those of both halves of classifier-free guidance
NOISE = "noise"


def split(inputs: Tensors, size: int) -> list[Tensors]:
    """The inputs of a stage in parts of at most `size` images; a single number belongs to every part."""
    first = next(iter(inputs.values()))
    if len(first) <= size:
        return [inputs]
    parts = {
        name: _halved(value, size) if name == CONTEXT else value.split(size)
        for name, value in inputs.items()
        if value.ndim
    }
    whole = {name: value for name, value in inputs.items() if not value.ndim}
    return [whole | dict(zip(parts, part)) for part in zip(*parts.values())]


def joined(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    """The outputs of all parts as one batch."""
    if len(parts) == 1:
        return dict(parts[0])
    found = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: torch.cat([half for halves in zip(*(value.chunk(2) for value in values)) for half in halves])
        if name == NOISE
        else torch.cat(values)
        for name, values in found.items()
    }


def _halved(context: Tensor, size: int) -> list[Tensor]:
    return [torch.cat(halves) for halves in zip(*(half.split(size) for half in context.chunk(2)))]
