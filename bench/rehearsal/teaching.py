"""Scenarios of teaching: decoders of every loss, their figures, and students."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bench.proof.students import arms, course
from bench.proof.students.examples import Examples, shared_vocabulary
from bench.proof.students.networks import open_network
from bench.rehearsal.machine import Machine
from bench.rehearsal.timeline import BETWEEN, FIRST, LOAD
from datasetdm_fast import train
from datasetdm_fast.engine.decoders import checkpoint as decoders
from datasetdm_fast.training import checkpoint as states
from datasetdm_fast.training import splits
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.evaluation.measure import measure
from datasetdm_fast.training.evaluation.settings import ScoreSettings
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.settings import TrainConfig
from datasetdm_fast.training.task_training import run_training
from datasetdm_fast.training.trainer import DTYPES, Trainer

IMAGES = 10  # of which one is held out
FIGURES = "figures"  # what the main thread does between steps
ALL = "demo:{}@1000"  # images with every kind of truth
STUDENT, SEEDS = "segformer", 2
STUDENT_SIDE = 64  # pixels


def training(machine: Machine) -> int:
    """Decoders with and without queries, from captures on the disk; stopped after the first step, and resumed."""
    return taught(machine, ("semantic", "depth"), is_stopped=True)


def losses(machine: Machine) -> int:
    """Decoders of the other losses: things, one word of several, heatmaps of joints."""
    return taught(machine, ("instance", "open-vocabulary", "pose"))


def bins(machine: Machine) -> int:
    """A decoder that answers with a row and a column of each joint."""
    return taught(machine, ("pose",), pose_head="simcc")


def recomputed(machine: Machine) -> int:
    """Captures made anew at every step, and losses in fp16, whose gradients are scaled, unless another is asked for."""
    return taught(machine, ("depth",), cache="off", **({"dtype": "fp16"} if machine.dtype == "auto" else {}))


def evaluation(machine: Machine) -> int:
    """Figures of decoders on labelled images."""
    labels = ("depth", "open-vocabulary")
    engine, found = machine.engine(*labels), 0
    machine.timeline.thread.work = FIGURES

    def moved(count: int, total: int) -> None:
        nonlocal found
        found, machine.timeline.phase = count, f"batch {count // machine.batch}"

    machine.timeline.phase = FIRST
    source = open_data(ALL.format(machine.batch * machine.batches), engine.model.size)
    measure(engine, source, labels, ScoreSettings(batch_size=machine.batch), moved)
    return found


def students(machine: Machine) -> int:
    """Students of a network of transformers, taught by labelled images and scored on others."""
    step = course.NetworkTraining.step

    def phased(student: course.NetworkTraining) -> float:
        with a_step(machine, student.done):
            return step(student)

    machine.timeline.phase, machine.operations.has_dropout = LOAD, True
    machine.operations.taught = dtype = torch.bfloat16
    machine.uses(machine.device)
    network, source = open_network(STUDENT), open_data(ALL.format(4), STUDENT_SIDE)
    vocabulary = shared_vocabulary(source)
    own = Examples(source, vocabulary, network.task)
    with (
        files_of_zeros(machine),
        mock.patch.object(course.NetworkTraining, "step", phased),
        tempfile.TemporaryDirectory() as folder,
    ):
        experiment = arms.Experiment(
            STUDENT, network, vocabulary, {"real": own}, own,
            course.Course(steps=machine.batches, batch_size=machine.batch), Path(folder), next(iter(network.sizes)),
            seeds=SEEDS, device=torch.device(machine.device), dtype=dtype,
        )  # fmt: skip
        arms.compare(experiment, ("real",))
    return SEEDS * machine.batches


def taught(machine: Machine, tasks: Sequence[str], *, is_stopped: bool = False, **choices: Any) -> int:
    """Steps that the trainings of these tasks came to, as the command train runs them."""
    timeline, found = machine.timeline, 0
    with tempfile.TemporaryDirectory() as place, in_phases(machine):
        folder, timeline.phase = Path(place), LOAD
        given = {"dtype": "fp32" if machine.dtype == "tf32" else machine.dtype, "device": machine.device, **choices}
        config = TrainConfig(
            data=ALL.format(IMAGES), model=machine.model, task=tuple(tasks), out=place, draws=1, checks=1,
            augment="none", steps=machine.batches, batch_size=machine.batch, cache_dir=str(folder / "captures"),
            quiet=True, **given,
        )  # fmt: skip
        machine.uses(given["device"])
        machine.operations.judge("auto")  # which the engine of a training is
        machine.operations.is_exact = given["dtype"] == "fp32"
        machine.operations.taught = DTYPES.get(given["dtype"], torch.bfloat16)
        opened = train.open_workflow(config).session
        machine.engines.append(opened.engine)
        for task in tasks:
            timeline.phase, timeline.thread.work = FIRST, ""
            begun = opened.open_training(folder / task, opened.plan(task), config.task_settings(), lambda: False)
            timeline.phase = LOAD
            if is_stopped and run_training(begun, is_stopping=iter((False, True)).__next__) is None:
                timeline.phase = LOAD
            found += run_training(begun)["steps"]
    return found


@contextmanager
def in_phases(machine: Machine) -> Iterator[None]:
    """Each image whose captures are made and each step of a training a phase; one held-out image is enough to choose
    weights by.
    """
    step, make = Trainer.step, cache._compute

    def phased(trainer: Trainer) -> float:
        with a_step(machine, trainer.state.step):
            return step(trainer)

    def made(*arguments: Any, **named: Any) -> np.ndarray:
        rows = make(*arguments, **named)
        machine.timeline.phase = "captures"
        return rows

    with files_of_zeros(machine), ExitStack() as stack:
        for module, name, value in (
            (Trainer, "step", phased), (cache, "_compute", made), (splits, "ENOUGH_IMAGES", 1),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def a_step(machine: Machine, number: int) -> Iterator[None]:
    """A phase, after which figures are computed and files are written."""
    thread = machine.timeline.thread
    machine.timeline.phase, thread.work = f"batch {number}", ""
    with machine.timeline.a_step():
        yield
    machine.timeline.phase, thread.work = BETWEEN, FIGURES


@contextmanager
def files_of_zeros(machine: Machine) -> Iterator[None]:
    """Gradients on the simulated machine, and files of tensors that have no memory."""
    backward = Tensor.backward

    def simulated(loss: Tensor, *others: Any, **named: Any) -> None:
        with machine.operations.backward(loss.device):
            backward(loss, *others, **named)

    def zeros(tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> bytes:
        for value in tensors.values():
            machine.timeline.read_by_host(value)
        with _disable_current_modes():
            return save({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in tensors.items()}, told)

    read = states.read

    def without_memory(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        with _disable_current_modes():
            found = read(folder)
        return found and ({name: value.clone() for name, value in found[0].items()}, found[1])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "backward", simulated))
        stack.enter_context(mock.patch.object(states, "read", without_memory))
        for module in (states, decoders, arms):
            stack.enter_context(mock.patch.object(module, "save", zeros))
        yield


SCENARIOS: Mapping[str, Callable[[Machine], int]] = {
    "training": training,
    "losses": losses,
    "bins": bins,
    "recomputed": recomputed,
    "evaluation": evaluation,
    "students": students,
}
