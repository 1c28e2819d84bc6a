"""One rehearsal: a scenario on two simulated GPUs, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import _disable_current_modes

from bench.rehearsal import cuda
from bench.rehearsal.kernels import Compilable, NotedLaunch, noted_kernels, watched_forms
from bench.rehearsal.machine import Machine
from bench.rehearsal.operations import Calls, Operations, fake_mode, tensors
from bench.rehearsal.scenarios import SCENARIOS
from bench.rehearsal.timeline import AGAIN, EARLY, FIRST, LOAD, NUMBER, OTHERS, WAIT, Flaw, Operation, Timeline
from datasetdm_fast.data import Batch
from datasetdm_fast.engine.engines import fast
from datasetdm_fast.engine.engines.cuda_graph import StepGraph
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.kernels import choice, launch


class Allowed(NamedTuple):
    """A place where the host may wait for the GPU, and why."""

    reason: str
    waits: tuple[str, ...]  # what they begin with; any other wait there is a finding
    is_once: bool = False  # only for the first batch
    is_shared: bool = False  # other threads' work may be waited for, too
    is_single: bool = False  # not tensor by tensor, with nothing computed between


LABELS = "the labels' own thread waits, on its own stream: the sampler goes on"
ONCE = "it is read, recorded or copied once a run"
COPY, ANSWER = "pageable copy to the GPU", "pageable copy to the host"
STREAM, CHOSEN = "stream", "aten.index"
FLAG, REAL = f"{NUMBER}bool", f"{NUMBER}float32"
RECORDING = Allowed(ONCE, ("the start of a recording",), is_once=True)
STEP = Allowed("once a step, at its end: a loss that is no number ends the training", (REAL,), is_shared=True)
MATCHED = Allowed(
    "queries are assigned to masks on the host, once for all images", (ANSWER,), is_shared=True, is_single=True
)
STORED = Allowed("what was computed goes to the disk", (ANSWER, NUMBER), is_shared=True)
JUDGED = Allowed("between steps labels are compared with the truth", (STREAM, ANSWER), is_shared=True)
CHOICES = Allowed(JUDGED.reason, ("aten.equal", CHOSEN, FLAG), is_shared=True)
EMPTIED = Allowed("memory ran out", ("torch.cuda.empty_cache",), is_shared=True)
JOINED, ASKED = Allowed("tiles are joined on the host", (ANSWER,)), Allowed("latents are the answer", (ANSWER,))
# By thread, file and function.
WAITS = {
    (thread, file if file.startswith(("bench/", "kernels/")) else f"datasetdm_fast/{file}", function): allowed
    for thread, file, function, allowed in (
        ("main", "engine/engines/cuda_graph.py", "__init__", RECORDING),
        ("labels", "engine/engines/cuda_graph.py", "__init__", RECORDING),
        ("main", "engine/sampling/schedule.py", "_walk_numbers", Allowed(ONCE, (COPY,), is_once=True)),
        (
            "calls",
            "engine/loop/driver.py",
            "_report",
            Allowed("the thread that counts calls waits", ("an event",)),
        ),
        (
            "labels",
            "engine/engines/fast/engine.py",
            "_decode_part",
            Allowed("an autoencoder that leaves fp16 retries", (FLAG,)),
        ),
        ("labels", "kernels/transfer.py", "_copy", Allowed(LABELS, (STREAM,))),
        ("labels", "engine/loop/driver.py", "_follow", Allowed(LABELS, (STREAM,))),
        ("labels", "engine/tasks/instance.py", "not_overlapping", Allowed(LABELS, ("aten.equal",))),
        ("labels", "engine/tasks/instance.py", "postprocess", Allowed(LABELS, (CHOSEN, FLAG))),
        ("labels", "engine/tasks/attention.py", "joined_label", JOINED),
        ("main", "engine/loop/diffusing.py", "convert_images", ASKED),
        ("main", "engine/engines/cuda_graph.py", "clear", EMPTIED),
        ("labels", "engine/engines/cuda_graph.py", "clear", EMPTIED),
        ("main", "engine/models/packed.py", "place_module", Allowed(ONCE, (COPY,), is_once=True)),
        ("labels", "engine/models/packed.py", "place_module", Allowed(ONCE, (COPY,), is_once=True)),
        ("figures", "engine/models/packed.py", "place_module", Allowed(ONCE, (COPY,), is_once=True)),
        ("figures", "engine/engines/cuda_graph.py", "__init__", RECORDING),
        ("main", "training/captures/cache.py", "_compute", STORED),
        ("main", "training/losses.py", "match", MATCHED),
        ("main", "training/trainer.py", "_finite", STEP),
        ("main", "bench/proof/students/course.py", "step", STEP),
        ("figures", "training/state.py", "save", STORED),
        (
            "figures",
            "training/state.py",
            "record_evaluation",
            Allowed("the best weights are kept", (ANSWER,), is_shared=True),
        ),
        ("figures", "training/task_training.py", "finish", Allowed("and taken at the end", (COPY,), is_shared=True)),
        ("figures", "engine/decoders/checkpoint.py", "save_decoder", STORED),
        ("figures", "bench/proof/students/arms.py", "_taught", STORED),
        ("figures", "bench/proof/students/course.py", "__init__", Allowed("the next student begins", (COPY,))),
        ("figures", "kernels/transfer.py", "_copy", JUDGED),
        ("figures", "engine/tasks/instance.py", "not_overlapping", CHOICES),
        ("figures", "engine/tasks/instance.py", "postprocess", CHOICES),
        ("figures", "bench/proof/students/networks/class_maps.py", "read_classes", JUDGED),
    )
}


# Calls of the engine that answer with numbers.
ANSWERS = ("encode_text", "denoise", "denoise_and_capture", "denoise_and_capture_raw", "denoise_and_average",
           "encode_image", "annotate")  # fmt: skip


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
    model: str,
    batch: int,
    *,
    batches: int = 3,
    steps: int = 4,
    dtype: str = "auto",
    device: str = "cuda",
    scenario: str = "decoders",
    capability: tuple[int, int] = cuda.CAPABILITY,
) -> Rehearsal:
    """A scenario over some batches, each decoded in two chunks as large ones are; what raises is a finding, too."""
    timeline, samples = Timeline(), 0
    with stage(timeline, capability) as operations:
        machine = Machine(timeline, operations, model, batch, batches, steps, dtype, device)
        try:
            samples = SCENARIOS[scenario](machine)
        except Exception as error:
            timeline.raised(error)
        graphs = {
            key: graph.graph.launches for engine in machine.engines for key, graph in engine._calls.graphs.items()
        }
        timeline.phase = "end"
        timeline.sweep()
    findings = {
        one: count for one, count in timeline.found.items() if one.phase != LOAD or one.rule not in (WAIT, OTHERS)
    }
    waits = {one: count for one, count in findings.items() if one.rule in (WAIT, OTHERS) and reason_of(one)}
    findings = {one: count for one, count in findings.items() if one not in waits}
    return Rehearsal(findings, waits, timeline.launches, graphs, timeline.kernels, timeline.replays, samples)


def reason_of(wait: Flaw) -> str | None:
    """Why the host may wait there."""
    allowed = WAITS.get((wait.thread, wait.place.partition(":")[0], wait.function))
    if allowed is None or (allowed.is_once and wait.phase not in (LOAD, FIRST)):
        return None
    if not wait.what.startswith(allowed.waits) or (wait.rule == OTHERS and not allowed.is_shared):
        return None
    if EARLY in wait.what or (AGAIN in wait.what and allowed.is_single):
        return None
    return allowed.reason


def in_phases(generate: Callable, timeline: Timeline) -> Callable:
    """driver.generate with a phase for each batch that it takes."""

    def phased(batches: Iterable[Batch]) -> Iterator[Batch]:
        for place, batch in enumerate(batches):
            timeline.phase = f"batch {place}"
            yield batch

    return lambda batches, *others, **named: generate(phased(batches), *others, **named)


@contextmanager
def stage(timeline: Timeline, capability: tuple[int, int] = cuda.CAPABILITY) -> Iterator[Operations]:
    """The simulated machine: inside, tensors have no memory, and the GPU's work is noted in `timeline`."""
    operations = Operations(timeline)
    logging.disable(logging.WARNING)
    with ExitStack() as stack:
        for module, name, value in (
            (nn.Module, "_apply", _replaced),
            (fake_tensor, "init_gpu_context", lambda device: None),  # PyTorch 2.11 would start the GPU itself
            (walk, "make_schedule", unobserved(walk.make_schedule)),
            (choice, "form_on", watched_forms(choice.form_on, timeline)),
            (choice, "is_sound", lambda name, form, device, dtype: True),
            (driver, "generate", in_phases(driver.generate, timeline)),
            (StepGraph, "__init__", on_gpu(StepGraph.__init__, timeline)),
            (StepGraph, "__call__", watched(StepGraph.__call__, timeline)),
            *((fast.FastEngine, name, in_fp32(getattr(fast.FastEngine, name), timeline)) for name in ANSWERS),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        for cached in (walk._walk_numbers, launch.names_of):  # what they keep is of one machine
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(mock.patch.dict(fast.CHUNK_PIXELS))
        stack.enter_context(cuda.simulated(timeline, capability))
        timeline.kernels = stack.enter_context(noted_kernels(timeline, lambda: operations.storage))
        stack.enter_context(fake_mode())
        stack.enter_context(operations)
        stack.enter_context(Calls(operations))
        yield operations
    logging.disable(logging.NOTSET)


def on_gpu(record: Callable, timeline: Timeline) -> Callable:
    """StepGraph.__init__, whose inputs have to lie on a GPU, and to be all that it reads beside weights."""
    kept: set[int] = set()  # made while a graph was recorded: what a network computes once and keeps

    def called(graph: StepGraph, run: Callable, inputs: Sequence[Tensor], *others: Any, **named: Any) -> None:
        for place, value in enumerate(inputs):
            if value.device.type == "cpu":
                timeline.find("device", f"input {place} of a graph lies on the host, made at {timeline.made(value)}")
        before = set(timeline.memory)
        record(graph, run, inputs, *others, **named)
        read = {number for one in graph.graph.launches for number in one.reads}
        own = {value.untyped_storage()._cdata for value in graph.inputs}
        kept.update(timeline.memory.keys() - before)
        for number in sorted((read & before) - own - kept):
            if (memory := timeline.memory[number]).phase != LOAD:
                told = f"a graph reads {memory} that are none of its inputs, so every replay sees these, made at"
                timeline.find("stale", f"{told} {memory.made}")
        for place, (value, buffer) in enumerate(zip(inputs, graph.inputs)):
            if buffer.numel() and buffer.untyped_storage()._cdata not in read:
                timeline.find("stale", f"input {place} of a graph is read by nothing that it recorded")
            if buffer.untyped_storage()._cdata == value.untyped_storage()._cdata:
                timeline.find("stale", f"input {place} of a graph is its caller's own tensor, which calls write over")

    return called


def in_fp32(call: Callable, timeline: Timeline) -> Callable:
    """A call of the engine, whose answers are in fp32 whatever it computes in."""

    def called(engine: fast.FastEngine, *arguments: Any, **named: Any) -> Any:
        answer = call(engine, *arguments, **named)
        parts = answer if isinstance(answer, tuple) else (answer,)
        for value in tensors([vars(part) if is_dataclass(part) else part for part in parts]):
            if value.is_floating_point() and value.dtype != torch.float32:
                told = f"{call.__name__} answers in {value.dtype}, expected fp32, made at {timeline.made(value)}"
                timeline.find("dtype", told)
        return answer

    return called


def watched(replay: Callable, timeline: Timeline) -> Callable:
    """StepGraph.__call__, after which its buffers have to hold what it was given, and its answers what it computed."""

    def called(graph: StepGraph, *values: Tensor) -> tuple[Tensor, ...]:
        answers = replay(graph, *values)
        timeline.seen(values, graph.inputs)
        timeline.answered(graph.inputs, graph.outputs, answers)
        return answers

    return called


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
