"""TensorRT plans of exported stages: shapes, orders, and the builds, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import Manifest, StageFile
from datasetdm_fast.export.tensorrt import sealed
from datasetdm_fast.export.tensorrt.flavours import MODULES, Flavour
from datasetdm_fast.export.tensorrt.plan_builder import FLAGS
from datasetdm_fast.export.tensorrt.plans import PlanFile, PlanFolder, PlanOrder, lock, say

SECONDS_PER_LINE = 10.0  # seconds between two lines of progress where there is no terminal
TEXTS = 8  # prompts or words the text encoder takes at once
WORDS = 4  # class words the open-vocabulary decoder takes at once
PIXELS = 8 * 512 * 512  # images the autoencoder takes at once; its full-size activations dwarf the UNet's
LARGEST_BATCH = 256
SPACE = 2.5  # bytes of disk a build needs, per byte of the stage's weights: the plan, and its copy being sealed

Golden = Callable[[str], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Target:
    """What plans are to be built for."""

    flavour: Flavour
    batches: tuple[int, ...]
    capabilities: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    gpu: str = ""  # name of this machine's GPU, where the flavour binds plans to it


def check_batches(batches: Sequence[str | int]) -> tuple[int, ...]:
    """Batch sizes in rising order, each once."""
    example = "For example --batch 1,8,16."
    for batch in batches:
        if not str(batch).isdecimal() or not 1 <= int(batch) <= LARGEST_BATCH:
            raise Refused(f"--batch {batch}: expected numbers from 1 to {LARGEST_BATCH}, comma-separated", example)
    if not batches:
        raise Refused("--batch: names no batch size", example)
    return tuple(sorted(set(map(int, batches))))


def check_flags(flavour: Flavour, flags: Sequence[str], gpus: Sequence[str]) -> tuple[str, ...]:
    """Builder flags this flavour offers, here."""
    for flag in flags:
        if not hasattr(flavour.module.BuilderFlag, FLAGS[flag]):
            raise Refused(f"--{flag}: {flavour.title} does not offer it", f"Drop --{flag}.")
        if flag == "refit" and not gpus:
            raise Refused(
                f"--refit: {flavour.title} builds refittable plans only where there is a GPU",
                "Drop --refit, or build on a machine with a GPU.",
            )
    return tuple(sorted(set(flags)))


# Shapes ---------------------------------------------------------------------------------------------------------------
def sizes(stage: str, size: int, batches: Sequence[int]) -> tuple[int, ...]:
    """The B of each optimisation profile of a stage, rising; each has one fixed shape to choose kernels for."""
    return tuple(sorted({at_once(stage, size, batch) for batch in batches}))


def at_once(stage: str, size: int, batch: int) -> int:
    """How many of a batch a stage takes in one call."""
    if stage == "encode_text":
        return TEXTS
    return min(batch, max(PIXELS // size**2, 1)) if stage in ("decode_image", "encode_image") else batch


def resolved(shape: Sequence[str | int], batch: int) -> tuple[int, ...]:
    """A shape of the manifest in numbers."""
    letters = {"B": batch, "2B": 2 * batch, "K": WORDS}
    return tuple(letters[axis] if isinstance(axis, str) else axis for axis in shape)


def profiles(
    stage: str, tensors: StageFile, size: int, batches: Sequence[int]
) -> tuple[dict[str, tuple[tuple[int, ...], ...]], ...]:
    """Least, usual and largest shape of every input whose shape a call decides, per optimisation profile."""
    moving = [one for one in tensors.inputs if any(isinstance(axis, str) for axis in one.shape)]
    counts = sizes(stage, size, batches)
    return tuple({one.name: (resolved(one.shape, batch),) * 3 for one in moving} for batch in counts)


# Orders and builds ----------------------------------------------------------------------------------------------------
def make_order(stage: str, manifest: Manifest, target: Target) -> PlanOrder:
    """The plan of one stage."""
    tensors = manifest.stages[stage]
    files = [manifest.files[name].sha256 for name in (tensors.file, tensors.data) if name]
    return PlanOrder(
        stage=stage,
        source=manifest.source,
        graph=hashlib.sha256("".join(files).encode()).hexdigest(),
        profiles=profiles(stage, tensors, manifest.size, target.batches),
        precision=manifest.precision,
        flavour=target.flavour.name,
        version=target.flavour.version,
        cuda=target.flavour.cuda,
        capabilities=target.capabilities,
        flags=target.flags,
        gpu=target.gpu,
    )


def open_plan(
    opened: PlanFolder,
    stage: str,
    manifest: Manifest,
    target: Target,
    golden: Golden,
    *,
    accepts: Callable[[Mapping[str, Any]], bool] = lambda facts: False,
    is_quiet: bool = False,
) -> PlanFile:
    """The plan of one stage; `accepts` judges the facts of plans for other shapes or more GPUs."""
    order, tensors = make_order(stage, manifest, target), manifest.stages[stage]

    def build(part: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
        weights = sum(manifest.files[name].size for name in (tensors.file, tensors.data) if name)
        _check_space(opened.folder, weights)
        graph = _checked_graph(opened.folder, manifest, stage)
        expected = golden(stage)
        with _timings(opened, target) as timings:
            return run_builder(graph, order, part, target.flavour, timings, is_quiet), expected

    return opened.open_or_build(order, build, accepts)


def _check_space(folder: Path, weights: int) -> None:
    free, needed = storage.free_bytes(folder), int(SPACE * weights) + (64 << 20)
    if free < needed:
        raise Missing(
            f"{folder}: a plan needs about {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
            "Free some space, or choose another folder.",
        )


def _checked_graph(folder: Path, manifest: Manifest, stage: str) -> Path:
    """The graph of a stage; refuses one that is not the one the manifest tells of: its plan would carry the wrong
    name.
    """
    for name in (manifest.stages[stage].file, manifest.stages[stage].data):
        if name and storage.sha256_of(folder / name) != manifest.files[name].sha256:
            raise Refused(
                f"{folder / name}: the graph is not the one that its manifest describes", "Export the model again."
            )
    return manifest.graph(folder, stage)


@contextmanager
def _timings(opened: PlanFolder, target: Target) -> Iterator[Path | None]:
    """Within the block a file with the timings of earlier builds, where the flavour builds by timing; else None."""
    if target.flavour.is_portable:  # TensorRT-RTX times nothing, and would ask for a GPU at the sight of a timing cache
        yield None
        return
    version = target.flavour.version
    stored = opened.folder / f"timings-{version}-{'-'.join(target.capabilities)}.sealed"
    facts = {"kind": "timings", "version": version, "gpu": target.gpu}
    content, part = b"", stored.with_name(f".{stored.name}.{os.getpid()}.part")
    with suppress(FileNotFoundError, sealed.Unusable):
        _, content = sealed.read(stored, opened.key, facts)
    try:
        part.write_bytes(content)
        yield part
        with lock(stored.with_suffix(".lock"), lambda: None):
            sealed.write(stored, facts, part.read_bytes(), opened.key)
    finally:
        part.unlink(missing_ok=True)


def run_builder(
    graph: Path, order: PlanOrder, part: Path, flavour: Flavour, timings: Path | None = None, is_quiet: bool = False
) -> dict[str, Any]:
    """Layers, fused attentions and seconds of the plan written to `part`; refuses what TensorRT refuses."""
    job = {
        "module": MODULES[flavour.name],
        "graph": str(graph),
        "plan": str(part),
        "profiles": order.facts()["profiles"],
        "capabilities": list(order.capabilities) if flavour.is_portable else [],
        "flags": list(order.flags),
        "timings": str(timings) if timings else "",
    }
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "datasetdm_fast.export.tensorrt.plan_builder", str(writer)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writer]
    )
    os.close(writer)
    answer: dict[str, Any] = {}
    try:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(json.dumps(job).encode())
        with open(reader, encoding="utf-8") as events, BuildProgress(order.stage, is_quiet) as progress:
            for line in events:
                event = json.loads(line)
                if "at" in event:
                    progress.tell(event["at"], event["phase"])
                else:
                    answer = event
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    if "result" in answer:
        return answer["result"]
    ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    reason = answer.get("refused") or f"its builder ended {ending}"
    raise Refused(
        f"{order.stage}: {flavour.title} gives no plan: {reason}",
        "The graph stays usable with --engine ort; another --precision may build.",
    )


class BuildProgress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, stage: str, is_quiet: bool):
        self.stage, self.is_quiet, self.bar = stage, is_quiet, None
        self.begin = self.told = time.monotonic()
        if not is_quiet and sys.stderr.isatty():
            from tqdm import tqdm

            shape = "{l_bar}{bar}| {elapsed} {postfix}"
            self.bar = tqdm(total=100, unit="%", desc=f"building {stage}", file=sys.stderr, bar_format=shape)

    def tell(self, share: float, phase: str) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(phase, refresh=False)
            self.bar.update(max(round(100 * share) - self.bar.n, 0))
        elif not self.is_quiet and now - self.told >= SECONDS_PER_LINE:
            self.told = now
            say(f"building {self.stage}: {share:.0%}, {phase.lower()}, {now - self.begin:.0f} s")

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
