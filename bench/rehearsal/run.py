"""One rehearsal: model, engine and `generate` on two simulated GPUs, and what came of it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from bench.rehearsal import cuda
from bench.rehearsal.kernels import Compilable, NotedLaunch, noted_kernels
from bench.rehearsal.operations import Calls, Operations, fake_mode
from bench.rehearsal.timeline import LOAD, WAIT, Flaw, Operation, Timeline
from bench.setting import PROFILE, TASKS
from datasetdm_fast import sampling
from datasetdm_fast.data import Batch, Request, Sample
from datasetdm_fast.decoders.checkpoint import for_inference
from datasetdm_fast.decoders.seeded import untrained_decoders
from datasetdm_fast.engines import fast
from datasetdm_fast.generation import driver
from datasetdm_fast.generation.recipe import make_recipe
from datasetdm_fast.kernels import choice, launch
from datasetdm_fast.loading import PRESETS
from datasetdm_fast.sampling import walk
from datasetdm_fast.tasks.to_host import to_host

PROMPT = "a photo of a red car and a dog"

FIRST = "batch 0"
LABELS = "the labels' own thread waits, on its own stream: the sampler goes on"

ONCE = ("datasetdm_fast/engines/cuda_graph.py", "datasetdm_fast/sampling/walk.py")  # only for the first batch

# Where the host may wait for the GPU, by thread, file and function, and why; any other wait is a finding.
WAITS = {
    ("main", "datasetdm_fast/engines/cuda_graph.py", "__init__"): "a call of a new shape is recorded once a run",
    ("labels", "datasetdm_fast/engines/cuda_graph.py", "__init__"): "a decoder's call is recorded once a run",
    ("main", "datasetdm_fast/sampling/walk.py", "_walk_numbers"): "the numbers of a schedule are copied once a run",
    (
        "calls",
        "datasetdm_fast/generation/overlap.py",
        "_finished",
    ): "the thread that counts calls waits for them",
    ("labels", "datasetdm_fast/engines/fast.py", "_decoded"): "an autoencoder that leaves fp16 is run again in fp32",
    ("labels", "datasetdm_fast/tasks/to_host.py", "_copied"): LABELS,
    ("labels", "datasetdm_fast/generation/overlap.py", "_follow"): LABELS,
    ("labels", "datasetdm_fast/tasks/instance.py", "not_overlapping"): LABELS,
    ("labels", "datasetdm_fast/tasks/instance.py", "postprocess"): LABELS,
    ("labels", "datasetdm_fast/tasks/instance.py", "<genexpr>"): LABELS,
    ("labels", "datasetdm_fast/tasks/pose.py", "summit"): LABELS,
}


@dataclass(frozen=True)
class Rehearsal:
    """What a run launched, and what is wrong with it."""

    findings: dict[Flaw, int]  # with how often each occurred
    waits: dict[Flaw, int]  # that are allowed
    launches: list[Operation]
    graphs: dict[tuple, list[Operation]]
    kernels: dict[Compilable, NotedLaunch]
    replays: int
    samples: int


def rehearse(
    model: str, batch: int, *, batches: int = 3, steps: int = 4, dtype: str = "auto", device: str = "cuda"
) -> Rehearsal:
    """`generate` over some batches, each decoded in two chunks as large ones are; what raises is a finding, too."""
    timeline, graphs, samples = Timeline(), {}, 0
    with stage(timeline) as operations:
        try:
            engine = open_engine(model, dtype, device)
            operations.storage, operations.is_exact = {engine.dtype, engine.label_dtype}, engine.precision == "fp32"
            chosen = make_recipe(engine, TASKS, steps=steps, profile=PROFILE)
            chunk = -(-batch // 2) * engine.model.size**2
            with mock.patch.dict(fast.CHUNK_PIXELS, cuda=chunk):
                for _, results in driver.generate(requests(timeline, batch, batches), engine, chosen):
                    samples += sum(isinstance(result, Sample) for result in results)
            graphs = {key: graph.graph.launches for key, graph in engine._graphs.items()}
        except Exception as error:
            timeline.raised(error)
        timeline.phase = "end"
        timeline.sweep()
    findings = {one: count for one, count in timeline.found.items() if one.phase != LOAD or one.rule != WAIT}
    waits = {one: count for one, count in findings.items() if one.rule == WAIT and reason_of(one)}
    findings = {one: count for one, count in findings.items() if one not in waits}
    return Rehearsal(findings, waits, timeline.launches, graphs, timeline.kernels, timeline.replays, samples)


def reason_of(wait: Flaw) -> str | None:
    """Why the host may wait there."""
    file = wait.place.partition(":")[0]
    if file in ONCE and wait.phase not in (LOAD, FIRST):
        return None
    return WAITS.get((wait.thread, file, wait.function))


def open_engine(model: str, dtype: str, device: str) -> fast.FastEngine:
    """The fast engine over a preset, with decoders of upstream's form."""
    loaded = PRESETS[model](0)
    decoders = {
        task: for_inference(one, strict=False)
        for task, one in untrained_decoders(loaded.levels, loaded.networks["text_encoder"].config.hidden_size).items()
    }
    return fast.FastEngine(loaded, decoders, dtype=dtype, device=device)


def requests(timeline: Timeline, size: int, count: int) -> Iterator[Batch]:
    for place in range(count):
        timeline.phase = f"batch {place}"
        yield Batch(place, tuple(Request(place * size + k, PROMPT, k) for k in range(size)))


@contextmanager
def stage(timeline: Timeline) -> Iterator[Operations]:
    """The simulated machine: inside, tensors have no memory, and the GPU's work is noted in `timeline`."""
    operations, calls = Operations(timeline), Calls(timeline)
    logging.disable(logging.WARNING)
    with ExitStack() as stack:
        for module, name, value in (
            (nn.Module, "_apply", _replaced),
            (sampling, "make_schedule", unobserved(sampling.make_schedule)),
            (sys.modules[to_host.__module__], "_own", threading.local()),
            (choice, "is_sound", lambda name, form, device, dtype: True),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        for cached in (walk._walk_numbers, launch.names_of):  # what they keep is of one machine
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(cuda.simulated(timeline))
        timeline.kernels = stack.enter_context(noted_kernels(timeline, lambda: operations.storage))
        stack.enter_context(fake_mode())
        stack.enter_context(operations)
        stack.enter_context(calls)
        yield operations
    logging.disable(logging.NOTSET)


def unobserved(function: Callable) -> Callable:
    """The function on real numbers."""

    def called(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **named)

    return called


def _replaced(module: nn.Module, change, recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters; the tensors of a rehearsal cannot be exchanged in place."""
    for child in module.children():
        child._apply(change)
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = nn.Parameter(change(value.detach()), requires_grad=value.requires_grad)
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = change(value)
    return module
