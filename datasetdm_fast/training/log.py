"""Losses and figures of a training: one JSON object a line, and what trackers are told."""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.training.trackers import Tracker, open_trackers

NAME = "log.jsonl"
MOST_STEPS = 5000  # lines of losses a training writes at most
LARGEST_LOG = 2**28  # bytes


class Log(AbstractContextManager):
    """Appends to the log of a folder, after it removed the lines of steps after `done`."""

    def __init__(self, folder: Path, done: int, trackers: Sequence[str] = ()):
        self.path, self.began = folder / NAME, time.monotonic()
        lines = storage.read(self.path, LARGEST_LOG).splitlines() if self.path.exists() else []
        before = [line for line in lines if _step(line) <= done]
        storage.publish({self.path: b"".join(line + b"\n" for line in before)})
        with storage.refusing(self.path):
            self._file = storage.syscall("open", open, self.path, "a")
        self._trackers: list[Tracker] = open_trackers(trackers, folder, done)

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
        for tracker in self._trackers:
            shown = {name: value for name, value in values.items() if name not in ("step", "seconds")}
            tracker.log(shown, step=values["step"])

    def __exit__(self, *_: object) -> None:
        with storage.refusing(self.path):
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _step(line: bytes) -> float:
    """The step of a line, infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
