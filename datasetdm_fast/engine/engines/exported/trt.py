"""The TensorRT engine: every stage a plan built from its graph, run by whichever TensorRT is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine, Tensors
from datasetdm_fast.engine.engines.exported.trt_plan import WORDS, LoadedPlan, Queue, dynamic_shapes
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import PRECISIONS, Manifest
from datasetdm_fast.export.staging import fill_alone, print_line
from datasetdm_fast.export.tensorrt import plan_builder
from datasetdm_fast.export.tensorrt.flavours import Flavour, describe_driver, require_gpu

TEXTS = 8  # prompts or words per call of the text encoder
PIXELS = 8 * 512 * 512  # of the images per call of the autoencoder; its full-size activations dwarf the UNet's


class TrtEngine(GraphEngine):
    """See GraphEngine; plans lie beside their graphs in the cache, and are built for this GPU and one batch size; one
    stream.
    """

    name, library, runtime = "trt", "TensorRT", "any"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        queue: Queue | None = None,
        flavour: Flavour | None = None,
        on_message: Callable[[str], None] = print_line,
    ):
        self.flavour, self.queue = flavour or require_gpu(), queue or Queue(_resolve_gpu(device))
        self.device, self.precision = self.queue.device, "fp16" if dtype == "auto" else dtype
        if self.precision not in PRECISIONS:
            raise Refused(
                f"dtype: {dtype!r} is none of auto, {', '.join(PRECISIONS)}", "Choose one of these with --dtype."
            )
        self.graph_precision = self.precision
        super().__init__(model, decoders, on_message)
        self._timesteps: dict[float, Tensor] = {}

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> TrtStage:
        return TrtStage(self, folder, manifest, stage)

    def _run(self, stage: str, size: int, rows: int = 0, **inputs: Tensor) -> dict[str, Tensor]:
        return super()._run(stage, call_size(stage, self.model.size, size), rows, **inputs)

    def _timestep(self, timestep: float) -> Tensor:
        if timestep not in self._timesteps:  # on the device already: a copy from the host would make the loop wait
            self._timesteps[timestep] = torch.tensor(timestep, device=self.device)
        return self._timesteps[timestep]

    def _call_decoder(self, task: str, batch: int, sums: Tensors, words: Tensor | None) -> dict[str, Tensor]:
        call = super()._call_decoder
        if words is None:
            return call(task, batch, sums, None)
        parts = [call(task, batch, sums, pad_to(part, WORDS, 1)) for part in words.split(WORDS, 1)]
        return {name: torch.cat([part[name] for part in parts], 1)[:, : words.shape[1]] for name in parts[0]}

    @torch.inference_mode()
    def prepare(self, batch: int) -> None:
        """Builds and loads the plans that images from prompts need: a build takes minutes, and chooses kernels by their
        time, which calls of other threads would disturb.
        """
        stages = {name: cast(TrtStage, self._open_once(name)) for name in self.manifest.stages}
        needed = {name: stage for name, stage in stages.items() if name != "encode_image"}
        missing = [name for name, stage in needed.items() if not stage.path(batch).exists()]
        for name, stage in needed.items():
            if name in missing:
                self.on_message(f"plan {missing.index(name) + 1} of {len(missing)}:")
            stage.plan(batch)

    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {"device_name": self.queue.gpu}

    def _versions(self) -> dict[str, str]:
        return {"tensorrt": self.flavour.title, "torch": torch.__version__}


class TrtStage:
    """One stage: its plans by batch size, each read or built at the first call."""

    def __init__(self, engine: TrtEngine, folder: Path, manifest: Manifest, stage: str):
        self.engine, self.folder, self.manifest, self.stage = engine, folder, manifest, stage
        self.tensors = manifest.stages[stage]
        self.plans: dict[int, LoadedPlan] = {}

    def __call__(self, parts: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        """The outputs of every part; a part that is smaller than the plan's batch is filled with its last entry."""
        outputs = []
        for inputs in parts:
            count = len(next(iter(inputs.values())))
            size = self._size(len(next(iter(parts[0].values()))))
            padded = {name: pad_to(value, size) for name, value in inputs.items()} if count < size else inputs
            result = self.plan(size)(padded)
            outputs.append({name: value[:count] for name, value in result.items()} if count < size else result)
        return outputs

    def _size(self, batch: int) -> int:
        return call_size(self.stage, self.manifest.size, batch)

    def path(self, batch: int) -> Path:
        """The file of the plan for a batch, named by all that decides its bytes and whether it runs here."""
        queue, batch = self.engine.queue, self._size(batch)
        facts = [self.manifest.files[name].sha256 for name in self.tensors.files]
        facts += [self.engine.flavour.title, queue.gpu, queue.capability]
        key = hashlib.sha256(json.dumps([*facts, batch]).encode()).hexdigest()[:16]
        return self.folder / f"{self.stage}-{key}.plan"

    def plan(self, batch: int) -> LoadedPlan:
        """The plan of calls for a batch of that many images."""
        if (batch := self._size(batch)) not in self.plans:
            path = self.path(batch)
            with fill_alone(self.folder):  # one process builds for all that wait
                if not path.exists():
                    engine = self.engine
                    target = engine.flavour, engine.queue.capability, engine.on_message
                    build_stage(path, self.manifest, self.stage, batch, *target)
            self.plans[batch] = LoadedPlan(path, self.tensors, batch, self.engine.flavour, self.engine.queue)
        return self.plans[batch]


def build_stage(
    path: Path,
    manifest: Manifest,
    stage: str,
    batch: int,
    flavour: Flavour,
    capability: str,
    on_message: Callable[[str], None],
) -> None:
    """Builds the plan of a stage from its graph, which lies beside it, for calls of a batch of that many images."""
    size = call_size(stage, manifest.size, batch)
    on_message(f"building {stage} for batch {size}, which takes minutes")
    graph, part = manifest.graph(path.parent, stage), storage.part_of(path)
    shapes = dynamic_shapes(manifest.stages[stage], size)
    try:
        plan_builder.build_plan(graph, part, shapes, flavour, capability)
        storage.move(part, path)
    finally:
        storage.forget(part)


def call_size(stage: str, size: int, batch: int) -> int:
    """How many of a batch a stage takes in one call."""
    if stage == "encode_text":
        return TEXTS
    return min(batch, max(PIXELS // size**2, 1)) if stage in ("decode_image", "encode_image") else batch


def _resolve_gpu(device: str) -> torch.device:
    place = resolve_device(device)
    if place.type != "cuda":
        if device != "auto":
            raise Refused(
                f"device: the trt engine runs on a GPU, not on {device}", "Use --device cuda, or --engine fast."
            )
        raise Missing(
            f"engine trt: this PyTorch ({torch.__version__}) sees no GPU; {describe_driver()}",
            "Install a PyTorch built for CUDA.",
        )
    return torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())


def pad_to(part: Tensor, size: int, axis: int = 0) -> Tensor:
    """`part` with its last entry along `axis` repeated up to `size`."""
    short = size - part.shape[axis]
    return torch.cat([part, part.narrow(axis, -1, 1).repeat_interleave(short, axis)], axis) if short else part
