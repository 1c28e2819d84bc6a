"""TensorRT plans of exported stages: shapes, orders, and the builds, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.manifest import Manifest, StageFile
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.export.tensorrt.flavours import MODULES, Flavour
from datasetdm_fast.export.tensorrt.plans import Facts, PlanFile, PlanFolder, PlanOrder

if TYPE_CHECKING:
    from datasetdm_fast.engine.decoders.trunk import Decoder
    from datasetdm_fast.engine.loading.model import Model

TEXTS = 8  # prompts or words per call of the text encoder
WORDS = 4  # class words per call of the open-vocabulary decoder
PIXELS = 8 * 512 * 512  # of the images per call of the autoencoder; its full-size activations dwarf the UNet's
LARGEST_BATCH = 256

Golden = Callable[[str], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Target:
    """What plans are to be built for."""

    flavour: Flavour
    batches: tuple[int, ...]
    capabilities: tuple[str, ...] = ()
    gpu: str = ""  # name of this machine's GPU, where the flavour binds plans to it

    @property
    def description(self) -> str:
        gpus = ", ".join(self.capabilities) or "every GPU"
        return f"TensorRT plans for {gpus}, batches {', '.join(map(str, self.batches))}"


def find_target(name: str, capabilities: Sequence[str], batches: Sequence[str]) -> Target:
    """What the installed TensorRT of that name is to build for; refuses what it cannot."""
    flavour = flavours.find_flavour(name, f"--to {name}")
    sizes = check_batches(batches)
    served = flavours.check_capabilities(flavour, capabilities, flavours.gpu_capabilities())
    if flavour.is_portable:
        return Target(flavour, sizes, served)
    import torch

    return Target(flavour, sizes, served, torch.cuda.get_device_name())


def check_batches(batches: Sequence[str | int]) -> tuple[int, ...]:
    """Batch sizes in rising order, each once."""
    for batch in batches or [""]:
        if not str(batch).isdecimal() or not 1 <= int(batch) <= LARGEST_BATCH:
            raise Refused(
                f"--batch {batch}: expected numbers from 1 to {LARGEST_BATCH}, comma-separated",
                "For example --batch 1,8,16.",
            )
    return tuple(sorted(set(map(int, batches))))


def call_size(stage: str, size: int, batch: int) -> int:
    """How many of a batch a stage takes in one call."""
    if stage == "encode_text":
        return TEXTS
    return min(batch, max(PIXELS // size**2, 1)) if stage in ("decode_image", "encode_image") else batch


def resolve_shape(shape: Sequence[str | int], batch: int) -> tuple[int, ...]:
    """A shape of the manifest in numbers."""
    letters = {"B": batch, "2B": 2 * batch, "K": WORDS}
    return tuple(letters[axis] if isinstance(axis, str) else axis for axis in shape)


def profiles(
    stage: str, tensors: StageFile, size: int, batches: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The shape of every input whose shape a call decides, per optimisation profile: one fixed shape to choose kernels
    for.
    """
    dynamic = [info for info in tensors.inputs if any(isinstance(axis, str) for axis in info.shape)]
    counts = sorted({call_size(stage, size, batch) for batch in batches})
    return tuple({info.name: resolve_shape(info.shape, count) for info in dynamic} for count in counts)


def make_order(stage: str, manifest: Manifest, target: Target) -> PlanOrder:
    """The plan of one stage."""
    tensors = manifest.stages[stage]
    digests = [manifest.files[name].sha256 for name in tensors.files]
    return PlanOrder(
        stage=stage,
        source=manifest.source,
        graph=hashlib.sha256("".join(digests).encode()).hexdigest(),
        profiles=profiles(stage, tensors, manifest.size, target.batches),
        precision=manifest.precision,
        flavour=target.flavour.name,
        version=target.flavour.version,
        cuda=target.flavour.cuda,
        capabilities=target.capabilities,
        gpu=target.gpu,
    )


def build_plans(
    model: Model,
    decoders: Mapping[str, Decoder],
    folder: Path,
    manifest: Manifest,
    target: Target,
    *,
    is_quiet: bool = False,
) -> Iterator[dict[str, Any]]:
    """Builds the plan of every stage in the folder, or finds it there; a row about each."""
    from datasetdm_fast.engine.engines.fast import FastEngine
    from datasetdm_fast.export.golden import Reference

    golden = Reference(lambda: FastEngine(model, decoders, dtype="fp32", device="cpu"))
    opened = PlanFolder(folder)
    for stage in manifest.stages:
        plan = open_plan(opened, stage, manifest, target, golden, is_quiet=is_quiet)
        yield {
            "stage": stage,
            "file": plan.path.name,
            "bytes": len(plan.content),
            "built": plan.is_new,
            **plan.notes,
        }


def describe_row(row: Mapping[str, Any]) -> str:
    """A built plan as one line."""
    layers = f"{row['layers']} layers, {row['fused_attentions']} fused attentions"
    built = "built" if row["built"] else "exists, built"
    return f"{row['stage']:<26}{row['bytes'] / 1e6:9.1f} MB   {layers}, {built} in {row['seconds']:.1f} s"


def open_plan(
    opened: PlanFolder,
    stage: str,
    manifest: Manifest,
    target: Target,
    golden: Golden,
    *,
    accepts: Callable[[Facts], bool] = lambda facts: False,
    is_quiet: bool = False,
) -> PlanFile:
    """The plan of one stage; `accepts` decides about plans for other shapes or more GPUs by their facts."""
    order = make_order(stage, manifest, target)

    def build(part: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
        for name in manifest.stages[stage].files:  # else its plan would carry the wrong name
            if storage.sha256_of(opened.folder / name) != manifest.files[name].sha256:
                raise Refused(
                    f"{opened.folder / name}: the graph is not the one that its manifest describes",
                    "Export the model again.",
                )
        graph, expected = manifest.graph(opened.folder, stage), golden(stage)
        return run_builder(graph, order, part, target.flavour, is_quiet), expected

    return opened.open_or_build(order, build, accepts)


def run_builder(graph: Path, order: PlanOrder, part: Path, flavour: Flavour, is_quiet: bool = False) -> dict[str, Any]:
    """Layers, fused attentions and seconds of the plan written to `part`; refuses what TensorRT refuses."""
    from tqdm import tqdm

    job = {
        "module": MODULES[flavour.name],
        "graph": str(graph),
        "plan": str(part),
        "profiles": order.facts()["profiles"],
        "capabilities": list(order.capabilities) if flavour.is_portable else [],
    }
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "datasetdm_fast.export.tensorrt.plan_builder", str(writer)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writer]
    )
    os.close(writer)
    assert child.stdin
    event: dict[str, Any] = {}
    # a bar on a terminal, nothing elsewhere
    bar = tqdm(total=100, unit="%", desc=f"building {order.stage}", disable=True if is_quiet else None, leave=False)
    try:
        with suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(json.dumps(job).encode())
        with bar, open(reader, encoding="utf-8") as events:
            for line in events:
                event = json.loads(line)
                bar.update(max(round(100 * event.get("share", 0)) - bar.n, 0))
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    if "result" in event:
        notes: dict[str, Any] = event["result"]
        return notes
    ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    reason = event.get("refusal") or f"its builder ended {ending}"
    raise Refused(
        f"{order.stage}: {flavour.title} gives no plan: {reason}",
        "The graph stays usable with --engine ort; another --precision may build.",
    )
