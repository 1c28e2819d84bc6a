"""The TensorRT engine: every stage a plan built from its graph, run by whichever TensorRT is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.disk.locks import cache_folder
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine, Tensors
from datasetdm_fast.engine.engines.exported.trt_plan import LoadedPlan, Queue
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.golden import Reference
from datasetdm_fast.export.manifest import NAME, PRECISIONS, Manifest
from datasetdm_fast.export.onnx.to_onnx import export, source_digest
from datasetdm_fast.export.staging import print_line
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.export.tensorrt.plans import Facts, PlanFolder
from datasetdm_fast.export.tensorrt.to_tensorrt import WORDS, Target, call_size, make_order, open_plan


class TrtEngine(GraphEngine):
    """See GraphEngine; plans are built at the first call of a batch size or read from `engines`; one stream."""

    name, library, runtime = "trt", "TensorRT", "any"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        engines: str | Path = "",
        trt_flavour: str = "auto",
        queue: Queue | None = None,
        flavour: flavours.Flavour | None = None,
        on_message: Callable[[str], None] = print_line,
    ):
        self.flavour = flavour or flavours.require_gpu(trt_flavour)
        self.queue = queue or Queue(_resolve_gpu(device))
        self.device, self.precision = self.queue.device, "fp16" if dtype == "auto" else dtype
        if self.precision not in PRECISIONS:
            raise Refused(
                f"dtype: {dtype!r} is none of auto, {', '.join(PRECISIONS)}", "Choose one of these with --dtype."
            )
        with model.built_for_now():
            self.source = source_digest(model, dict(decoders or {}))
        name = f"{self.source[:16]}-{self.precision}-{model.size}"
        self.plan_folder = Path(engines) if engines else cache_folder() / "engines" / name
        super().__init__(model, decoders, on_message)
        self._timesteps: dict[float, Tensor] = {}
        self._prepared: set[int] = set()
        self.golden = Reference(lambda: FastEngine(model, self.decoders, dtype="fp32", device="cpu"))

    def _export(self, **options: Any) -> tuple[Path, Manifest]:
        """The folder of graphs and plans, and its manifest; graphs are exported now where it has none."""
        folder = self.plan_folder.joinpath(*options.get("only", ()))  # few runs need these, so each has its own folder
        if (folder / NAME).is_file():
            manifest = Manifest.read(folder)
            expected = {
                "source": self.source,
                "precision": self.precision,
                "size": self.model.size,
                "runtime": self.runtime,
            }
            differences = [name for name, value in expected.items() if getattr(manifest, name) != value]
            if not differences:
                return folder, manifest
            raise Refused(
                f"{folder}: holds an export with another {', '.join(differences)} than requested",
                "Export this model with these decoders into it again, or name another folder.",
            )
        self.on_message(f"exporting the stages to {folder}")
        return folder, export(self.model, self.decoders, folder, precision=self.precision, **options)

    def _open_once(self, stage: str, rows: int = 0) -> TrtStage:
        opened = super()._open_once(stage, rows)
        assert isinstance(opened, TrtStage)
        return opened

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> TrtStage:
        if stage not in manifest.stages:
            raise Refused(
                f"{folder}: holds no stage {stage}, only {', '.join(manifest.stages)}",
                "Export this model with these decoders into it again, or name another folder.",
            )
        return TrtStage(self, PlanFolder(folder, self.on_message), manifest, stage)

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
        stages = [stage for stage in self.manifest.stages if stage != "encode_image"]
        for place, stage in enumerate(stages, 1):
            plan = self._open_once(stage).plan(batch).plan
            if plan.is_new and batch not in self._prepared:
                self.on_message(f"built {place} of {len(stages)}: {stage}, in {plan.notes['seconds']:.0f} s")
        self._prepared.add(batch)

    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {"device_name": self.queue.gpu}

    def _versions(self) -> dict[str, str]:
        return {"tensorrt": self.flavour.title, "cuda": self.flavour.cuda, "torch": torch.__version__}


class TrtStage:
    """One stage: its plans by batch size, each read or built, and its golden output checked, at the first call."""

    def __init__(self, engine: TrtEngine, folder: PlanFolder, manifest: Manifest, stage: str):
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

    def plan(self, batch: int) -> LoadedPlan:
        """The plan of calls for a batch of that many images."""
        if (batch := self._size(batch)) not in self.plans:
            flavour, queue, golden = self.engine.flavour, self.engine.queue, self.engine.golden

            def runs_here(facts: Facts) -> bool:
                is_listed = queue.capability in facts["capabilities"]
                return is_listed or (not facts["capabilities"] and flavour.serves(queue.capability))

            target = Target(flavour, (queue.capability,), "" if flavour.is_portable else queue.gpu)
            order = make_order(self.stage, self.manifest, target, batch)
            plan = open_plan(self.folder, order, self.manifest, flavour, golden, runs_here)
            loaded = LoadedPlan(plan, self.tensors, flavour, queue)
            loaded.check(self.engine.precision)
            self.plans[batch] = loaded
        return self.plans[batch]


def _resolve_gpu(device: str) -> torch.device:
    place = resolve_device(device)
    if place.type != "cuda":
        if device != "auto":
            raise Refused(
                f"device: the trt engine runs on a GPU, not on {device}", "Use --device cuda, or --engine fast."
            )
        raise Missing(
            f"engine trt: this PyTorch ({torch.__version__}) sees no GPU; {flavours.describe_driver()}",
            "Install a PyTorch built for CUDA.",
        )
    return torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())


def pad_to(part: Tensor, size: int, axis: int = 0) -> Tensor:
    """`part` with its last entry along `axis` repeated up to `size`."""
    short = size - part.shape[axis]
    return torch.cat([part, part.narrow(axis, -1, 1).repeat_interleave(short, axis)], axis) if short else part
