"""Losses and figures of a training: one JSON object a line, and trackers that it reports to where they are asked for.

Where trackers write or send, and with which account, is decided by their own settings, such as MLFLOW_TRACKING_URI.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing
from datasetdm_fast.untrusted import documents

NAME = "log.jsonl"
MOST_STEPS = 5000  # lines of losses a training writes at most
LARGEST_LOG = 2**28  # bytes


class Tracker(NamedTuple):
    """How a run of a library is told figures by their names, at a `step`, and how it ends."""

    log: Callable[..., Any]
    close: Callable[[], Any]


class Log(AbstractContextManager):
    """Appends to the log of a folder, after it removed the lines of steps after `done`."""

    def __init__(self, folder: Path, done: int, trackers: Sequence[str] = ()):
        self.path, self.began = folder / NAME, time.monotonic()
        lines = storage.read(self.path, LARGEST_LOG).splitlines() if self.path.exists() else []
        before = [line for line in lines if _step(line) <= done]
        storage.publish({self.path: b"".join(line + b"\n" for line in before)})
        with storage.refusing(self.path):
            self._file = storage.syscall("open", open, self.path, "a")
        self._trackers = open_trackers(trackers, folder, done)

    def step(self, step: int, steps: int, loss: float, rate: float) -> None:
        """The loss and the learning rate of a step of `steps`."""
        if step % max(steps // MOST_STEPS, 1) == 0 or step == steps:
            self._put({"step": step, "loss": loss, "rate": rate, "seconds": round(time.monotonic() - self.began, 2)})

    def figure(self, step: int, name: str, value: float) -> None:
        self._put({"step": step, f"held_out_{name}": value})

    def _put(self, values: dict) -> None:
        with storage.refusing(self.path):
            storage.syscall("write", self._file.write, json.dumps(values) + "\n")
            self._file.flush()
        shown = {name: value for name, value in values.items() if name not in ("step", "seconds")}
        for name in list(self._trackers):
            self._tell(name, lambda tracker: tracker.log(shown, step=values["step"]))

    def _tell(self, name: str, call: Callable[[Tracker], Any]) -> None:
        """Calls a tracker; one that fails is left out from then on, as its connection is worth no training."""
        try:
            call(self._trackers[name])
        except Exception as error:  # their libraries raise nearly anything
            del self._trackers[name]
            cause = documents.one_line(f"{type(error).__name__}: {error}")
            print(f"--log {name}: it takes no more figures, {NAME} has them ({cause})", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        with storage.refusing(self.path):
            self._file.close()
        for name in list(self._trackers):
            self._tell(name, lambda tracker: tracker.close())


def _step(line: bytes) -> float:
    """The step of a line, infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


PROJECT = "datasetdm_fast"


def open_tensorboard(folder: Path, done: int) -> Tracker:
    """Event files in the training's folder, without those of steps after `done`."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def open_wandb(folder: Path, done: int) -> Tracker:
    """A run of wandb; a training that resumes goes on with its own, whose name is its folder's."""
    options = {"name": name_run(folder), "id": run_id(folder), "dir": str(folder), "resume": "allow"}
    run: Any = import_module("wandb").init(project=PROJECT, **options)
    return Tracker(run.log, run.finish)


def open_mlflow(folder: Path, done: int) -> Tracker:
    """A run of MLflow in the experiment datasetdm_fast."""
    mlflow: Any = import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=name_run(folder), tags={"folder": run_id(folder)})
    return Tracker(mlflow.log_metrics, mlflow.end_run)


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}


def name_run(folder: Path) -> str:
    return "-".join(folder.resolve().parts[-3:-1])  # DECODER/TASK/training


def run_id(folder: Path) -> str:
    """A name for a training that is the same when it resumes."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose library is missing, before a model is loaded."""
    for name in names:
        if find_spec(name) is None:
            raise Missing(f"--log {name}: {name} is not installed", f"pip install {name}, or drop it from --log.")


def open_trackers(names: Sequence[str], folder: Path, done: int) -> dict[str, Tracker]:
    """The trackers of a training in a folder that has done so many steps; one that cannot begin is named."""
    trackers: dict[str, Tracker] = {}
    for name in names:
        try:
            trackers[name] = TRACKERS[name](folder, done)
        except Exception as error:  # their libraries raise nearly anything without a network or an account
            for tracker in trackers.values():
                tracker.close()
            cause = f"--log {name}: it cannot begin a run ({documents.one_line(f'{type(error).__name__}: {error}')})"
            raise Missing(cause, f"Set {name} up, or drop it from --log; log.jsonl is written in any case.") from error
    return trackers
