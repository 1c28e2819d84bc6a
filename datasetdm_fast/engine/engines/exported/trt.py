"""The TensorRT engine: every stage a plan built from its graph, run by whichever TensorRT is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine
from datasetdm_fast.engine.engines.exported.trt_plan import LoadedPlan, Queue
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.golden import Reference
from datasetdm_fast.export.manifest import PRECISIONS, Manifest
from datasetdm_fast.export.onnx.to_onnx import export, exported_apart, source_digest
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.export.tensorrt.plans import PlanFolder, cached_plans, say
from datasetdm_fast.export.tensorrt.to_tensorrt import WORDS, Target, at_once, open_plan

PORTABLE_FROM = 80  # a plan for no GPU in particular serves these capabilities and later ones


class TrtEngine(GraphEngine):
    """See GraphEngine; plans are built at the first call of a batch size or read from `engines`; one stream."""

    name = "trt"

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
        found: flavours.Flavour | None = None,
        tell: Callable[[str], None] = say,
    ):
        self.flavour = found or flavours.require_gpu(trt_flavour)
        self.queue = queue or Queue(_gpu(device))
        self.model, self.decoders, self.device, self.tell = model, dict(decoders or {}), self.queue.device, tell
        self.precision = "fp16" if dtype == "auto" else dtype
        if self.precision not in (*PRECISIONS, "fp8"):
            raise Refused(
                f"dtype: {dtype!r} is none of auto, {', '.join(PRECISIONS)}, fp8", "Choose one of these with --dtype."
            )
        with model.built_for_now():
            self.source = source_digest(model, self.decoders)
        self.folder = Path(engines) if engines else cached_plans() / f"{self.source[:16]}-{self.precision}-{model.size}"
        self.is_given = bool(engines)
        self._golden = Reference(lambda: FastEngine(model, self.decoders, dtype="fp32", device="cpu"))
        self._loaded: dict[str, list[LoadedPlan]] = {}

    # Stages

    def _manifest(self, stage: str) -> tuple[Path, Manifest]:
        """The folder that holds a stage's graph, and what lies there; a graph that is in none is exported now."""
        there = self._read(self.folder)
        if there and stage in there.stages and self._is_ours(there):
            return self.folder, there
        if apart := exported_apart(stage):  # few runs need it, so it has a folder of its own
            folder = self.folder / stage
            there = self._read(folder)
            if there and self._is_ours(there, "fp16" if self.precision == "fp8" else self.precision):
                return folder, there
            self.tell(f"exporting {stage} to {folder}")
            # parity is what the one is for, and no calibration saw the other
            precision = "fp16" if self.precision == "fp8" else self.precision
            return folder, export(self.model, self.decoders, folder, precision=precision, **apart)
        if self.precision == "fp8" and not (there and there.precision == "fp8"):
            cause = "dtype: fp8 is calibrated on your prompts first, and " + (
                f"{self.folder} holds {there.precision}" if there else "no folder was given"
            )
            raise Missing(
                cause,
                "Run `python -m datasetdm_fast.export --precision fp8 --prompts FILE --out ENGINES`, then add "
                "--engines ENGINES.",
            )
        if there and self.is_given:
            cause = f"{self.folder}: holds other stages than requested ({self._difference(there, stage)})"
            raise Refused(cause, "Export this model with these decoders into it again, or name another folder.")
        self.tell(f"exporting the stages to {self.folder}")
        return self.folder, export(self.model, self.decoders, self.folder, precision=self.precision)

    def _read(self, folder: Path) -> Manifest | None:
        try:
            return Manifest.read(folder)
        except Missing:
            return None

    def _is_ours(self, manifest: Manifest, precision: str = "") -> bool:
        wanted = (self.source, precision or self.precision, self.model.size, "any")
        return (manifest.source, manifest.precision, manifest.size, manifest.runtime) == wanted

    def _difference(self, manifest: Manifest, stage: str) -> str:
        ours = {
            "model and decoders": self.source[:12],
            "precision": self.precision,
            "size": self.model.size,
            "runtime": "any",
        }
        theirs = {
            "model and decoders": manifest.source[:12],
            "precision": manifest.precision,
            "size": manifest.size,
            "runtime": manifest.runtime,
        }
        told = [f"{name} {theirs[name]}, expected {ours[name]}" for name in ours if ours[name] != theirs[name]]
        return "; ".join(told) or f"{stage} is not among them"

    def _plan(self, stage: str, batch: int) -> LoadedPlan:
        """The loaded plan of a stage for that many: read or built, and its golden output checked, at the first call."""
        for loaded in self._loaded.get(stage, ()):
            if batch in loaded.batches:
                return loaded
        folder, manifest = self._manifest(stage)
        opened = PlanFolder(folder, self.tell)

        def serves(facts: Mapping[str, Any]) -> bool:
            tensors = manifest.stages[stage].inputs
            leading = next(one.name for one in tensors if one.shape[:1] == ("B",))
            return self._runs_here(facts["capabilities"]) and any(
                shapes[leading][0][0] == batch for shapes in facts["profiles"]
            )

        plan = open_plan(opened, stage, manifest, self._target(batch), self._golden, accepts=serves)
        loaded = LoadedPlan(plan, manifest.stages[stage], self.flavour, self.queue, opened.key)
        # Of a model in eight bits the UNet call alone has them.
        loaded.check("fp16" if self.precision == "fp8" and stage != "denoise" else self.precision)
        self._loaded.setdefault(stage, []).append(loaded)
        return loaded

    def _target(self, batch: int) -> Target:
        is_known = not self.flavour.is_portable or self.queue.capability in self.flavour.capabilities
        return Target(
            self.flavour,
            (batch,),
            (self.queue.capability,) if is_known else (),
            gpu="" if self.flavour.is_portable else self.queue.gpu,
        )

    def _runs_here(self, capabilities: Sequence[str]) -> bool:
        return self.queue.capability in capabilities or (
            not capabilities and int(self.queue.capability.removeprefix("sm")) >= PORTABLE_FROM
        )

    def _call(self, stage: str, batch: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._plan(stage, batch)(batch, inputs)

    def _in_parts(self, stage: str, name: str, values: Tensor) -> dict[str, Tensor]:
        """A stage with one input, which takes a few at once: the last part is filled up with its last one."""
        size = at_once(stage, self.model.size, len(values))
        parts = [self._call(stage, size, {name: _filled(part, size)}) for part in values.split(size)]
        return {key: torch.cat([part[key] for part in parts])[: len(values)] for key in parts[0]}

    # The protocol

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:  # [B, T, D]
        return self._in_parts("encode_text", "tokens", self.model.token_ids(prompts).to(self.device))["context"]

    def _call_unet(
        self, stage: str, latents: Tensor, timestep: float, context: Tensor, **others: Tensor
    ) -> dict[str, Tensor]:
        inputs = {"latents": latents, "timestep": self._timestep(float(timestep)), "context": context, **others}
        return self._call(stage, len(latents), inputs)

    def _call_autoencoder(self, stage: str, name: str, values: Tensor) -> dict[str, Tensor]:
        return self._in_parts(stage, name, values.to(self.device))

    def _channels(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        return self._manifest("denoise_and_capture")[1].channels

    @functools.cached_property
    def _timestep(self) -> Callable[[float], Tensor]:
        # On the device already: a copy from the host would make the loop wait.
        return functools.lru_cache(2048)(
            lambda timestep: torch.tensor(timestep, dtype=torch.float32, device=self.device)
        )

    def _call_decoder(
        self, stage: str, batch: int, sums: Mapping[str, Tensor], words: Tensor | None
    ) -> dict[str, Tensor]:
        if words is None:
            return self._call(stage, batch, sums)
        parts = [self._call(stage, batch, {**sums, "text": _filled(part, WORDS, 1)}) for part in words.split(WORDS, 1)]
        return {name: torch.cat([part[name] for part in parts], 1)[:, : words.shape[1]] for name in parts[0]}

    def fingerprint(self) -> dict[str, str]:
        return {
            "engine": self.name,
            "device": str(self.device),
            "device_name": self.queue.gpu,
            "dtype": self.precision,
            "tensorrt": self.flavour.title,
            "cuda": self.flavour.cuda,
            "torch": torch.__version__,
        }


def _gpu(device: str) -> torch.device:
    found = resolve_device(device)
    if found.type != "cuda":
        if device != "auto":
            raise Refused(
                f"device: the trt engine runs on a GPU, not on {device}", "Use --device cuda, or --engine fast."
            )
        raise Missing(
            f"engine trt: this PyTorch ({torch.__version__}) sees no GPU; {flavours.driver()}",
            "Install a PyTorch built for CUDA.",
        )
    return torch.device("cuda", found.index if found.index is not None else torch.cuda.current_device())


def _filled(part: Tensor, size: int, axis: int = 0) -> Tensor:
    """`part` with its last entry along `axis` repeated up to `size`."""
    short = size - part.shape[axis]
    return torch.cat([part, part.narrow(axis, -1, 1).repeat_interleave(short, axis)], axis) if short else part
