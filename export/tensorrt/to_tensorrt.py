"""TensorRT plans of exported stages: shapes, orders, and the builds, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.manifest import Manifest
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.export.tensorrt.flavours import MODULES, Flavour
from datasetdm_fast.export.tensorrt.plans import Facts, PlanFile, PlanFolder, PlanOrder

TEXTS = 8  # prompts or words per call of the text encoder
WORDS = 4  # class words per call of the open-vocabulary decoder
PIXELS = 8 * 512 * 512  # of the images per call of the autoencoder; its full-size activations dwarf the UNet's
LARGEST_BATCH = 256

Golden = Callable[[str], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Target:
    """What plans are to be built for."""

    flavour: Flavour
    capabilities: tuple[str, ...] = ()
    gpu: str = ""  # name of this machine's GPU, where the flavour binds plans to it


def find_target(name: str, capabilities: Sequence[str]) -> Target:
    """What the installed TensorRT of that name is to build for; refuses what it cannot."""
    flavour = flavours.find_flavour(name, f"--to {name}")
    supported = flavours.check_capabilities(flavour, capabilities, flavours.gpu_capabilities())
    if flavour.is_portable:
        return Target(flavour, supported)
    import torch

    return Target(flavour, supported, torch.cuda.get_device_name())


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


def make_order(stage: str, manifest: Manifest, target: Target, batch: int) -> PlanOrder:
    """The plan of one stage for one batch size."""
    tensors, count = manifest.stages[stage], call_size(stage, manifest.size, batch)
    dynamic = [info for info in tensors.inputs if any(isinstance(axis, str) for axis in info.shape)]
    digests = [manifest.files[name].sha256 for name in tensors.files]
    return PlanOrder(
        stage=stage,
        batch=count,
        source=manifest.source,
        graph=hashlib.sha256("".join(digests).encode()).hexdigest(),
        shapes={info.name: resolve_shape(info.shape, count) for info in dynamic},
        precision=manifest.precision,
        flavour=target.flavour.name,
        version=target.flavour.version,
        cuda=target.flavour.cuda,
        capabilities=target.capabilities,
        gpu=target.gpu,
    )


def build_plans(
    folder: Path,
    manifest: Manifest,
    target: Target,
    batches: Sequence[int],
    golden: Golden,
    on_message: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Builds the plans of every stage in the folder, as far as they are missing; a row about each."""
    opened, rows = PlanFolder(folder, on_message), []
    for stage in manifest.stages:
        for batch in sorted({call_size(stage, manifest.size, batch) for batch in batches}):
            plan = open_plan(opened, make_order(stage, manifest, target, batch), manifest, target.flavour, golden)
            row = {"stage": stage, "batch": batch, "file": plan.path.name, "bytes": len(plan.content)}
            rows.append(row | {"built": plan.is_new, **plan.notes})
            on_message(describe_row(rows[-1]))
    return rows


def describe_row(row: Mapping[str, Any]) -> str:
    """A built plan as one line."""
    layers = f"{row['layers']} layers, {row['fused_attentions']} fused attentions"
    built = "built" if row["built"] else "exists, built"
    name = f"{row['stage']}, batch {row['batch']}"
    return f"{name:<36}{row['bytes'] / 1e6:9.1f} MB   {layers}, {built} in {row['seconds']:.1f} s"


def open_plan(
    opened: PlanFolder,
    order: PlanOrder,
    manifest: Manifest,
    flavour: Flavour,
    golden: Golden,
    accepts: Callable[[Facts], bool] = lambda facts: False,
) -> PlanFile:
    """The plan of an order; `accepts` decides about plans for more GPUs by their facts."""

    def build(part: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
        for name in manifest.stages[order.stage].files:  # else its plan would carry the wrong name
            if storage.sha256_of(opened.folder / name) != manifest.files[name].sha256:
                raise Refused(
                    f"{opened.folder / name}: the graph is not the one that its manifest describes",
                    "Export the model again.",
                )
        graph, expected = manifest.graph(opened.folder, order.stage), golden(order.stage)
        opened.on_message(f"building {order.stage} for batch {order.batch}")
        return run_builder(graph, order, part, flavour), expected

    return opened.open_or_build(order, build, accepts)


LONGEST_REASON = 1000  # bytes of what a builder that failed wrote last
LONGEST_BUILD = 3600  # seconds for one plan; the largest known, a UNet of Stable Diffusion, takes minutes


def run_builder(graph: Path, order: PlanOrder, part: Path, flavour: Flavour) -> dict[str, Any]:
    """Layers, fused attentions and seconds of the plan written to `part`; refuses what TensorRT refuses."""
    job = {"module": MODULES[flavour.name], "graph": str(graph), "plan": str(part), "shapes": order.facts()["shapes"]}
    job["capabilities"] = list(order.capabilities) if flavour.is_portable else []
    command = [sys.executable, "-m", "datasetdm_fast.export.tensorrt.plan_builder"]
    try:
        process = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=LONGEST_BUILD)
    except subprocess.TimeoutExpired:
        raise Refused(
            f"{order.stage}: {flavour.title} gave no plan within {LONGEST_BUILD / 60:g} minutes",
            "Build on a machine with nothing else running, or use --engine fast.",
        ) from None
    code = process.returncode
    ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    words = " ".join(process.stderr[-LONGEST_REASON:].decode(errors="replace").split())
    result: dict[str, Any] = {"refusal": f"its builder ended {ending}" + (f", saying: {words}" if words else "")}
    if code == 0:
        result = json.loads(process.stdout.splitlines()[-1])
    if "refusal" in result:
        raise Refused(
            f"{order.stage}: {flavour.title} gives no plan: {result['refusal']}",
            "The graph stays usable with --engine ort; another --precision may build.",
        )
    return result
