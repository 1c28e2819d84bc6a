"""What students score: taught once, examined once, the figures kept in a file under the digest of all that decides
them.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from datasetdm_fast.evaluation.metrics import METRICS
from datasetdm_fast.evaluation.student import Student, StudentSchedule, answers, has_bf16, teach
from datasetdm_fast.evaluation.student_data import StudentData
from datasetdm_fast.truth.labelled import Labelled, LabelledSource

TENSORS = ("images", "semantic", "instance", "depth", "joints", "weights")


@dataclass(frozen=True)
class Exam:
    """Unseen labelled images, read when they are first asked for, by each process for itself."""

    name: str
    source: LabelledSource

    def __reduce__(self):
        return Exam, (self.name, self.source)

    @cached_property
    def items(self) -> tuple[Labelled, ...]:
        return tuple(self.source)

    @cached_property
    def images(self) -> torch.Tensor:
        return torch.stack([torch.from_numpy(item.image) for item in self.items])

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One way to teach a student."""

    name: str
    sets: tuple[StudentData, ...]
    course: StudentSchedule
    tasks: tuple[str, ...]

    def digest(self, seed: int, exam: Exam) -> str:
        """Of everything that decides the figures, the student's own code among it."""
        found = hashlib.sha256(json.dumps([asdict(self.course), self.tasks, seed, exam.digest, has_bf16()]).encode())
        found.update(Path(inspect.getfile(Student)).read_bytes())
        for lessons in self.sets:
            for name in TENSORS:
                found.update(getattr(lessons, name).numpy().tobytes())
        return found.hexdigest()[:32]


def figures(student: Student, exam: Exam, tasks: Sequence[str]) -> dict[str, dict]:
    """Every figure of every task over the exam's images."""
    meters = {task: METRICS[task](exam.source) for task in tasks}
    for truth, answer in zip(exam.items, answers(student, exam.images)):
        for task, meter in meters.items():
            meter.add(truth, getattr(answer, task))
    return {task: meter.result() for task, meter in meters.items()}


@dataclass(frozen=True)
class Finished:
    """What a student's teaching left."""

    figures: dict[str, dict]
    cpu_seconds: float


_unpacked = lru_cache(8)(pickle.loads)


def examined(arm: Arm, sets: Sequence[bytes], seed: int, exam: bytes, path: Path) -> Finished:
    """Teaches a student, examines it and keeps both beside `path`; what is large or dear comes packed and is unpacked
    once.
    """
    arm, exam = replace(arm, sets=tuple(map(_unpacked, sets))), _unpacked(exam)
    begin = time.process_time()
    student = teach(arm.sets, arm.course, seed, arm.tasks)
    taught = time.process_time() - begin
    result = figures(student, exam, arm.tasks)
    torch.save(student.state_dict(), path.with_suffix(".pt"))
    facts = {
        "arm": arm.name,
        "seed": seed,
        "exam": exam.name,
        "steps": arm.course.steps,
        "images": [len(one) for one in arm.sets],
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps({**facts, "cpu_seconds": round(taught, 1), "figures": result}), encoding="utf-8")
    os.replace(part, path)
    return Finished(result, taught)


def _arrive() -> None:
    """A process that teaches: one thread, and it ends with its parent, who alone hears Ctrl-C."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class Record:
    """The folder in which figures and students are kept; students are taught side by side in processes of their own."""

    def __init__(self, folder: Path, say: Callable[[str], None], processes: int = 1):
        self.folder, self.say = folder, say
        self.taught = self.found = 0
        self._asked: dict[Path, Future] = {}
        self._packed: dict[int, tuple[object, bytes]] = {}
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _arrive)
        folder.mkdir(parents=True, exist_ok=True)

    def submit(self, call: Callable[..., Any], *given: Any) -> Future:
        """The call in one of the processes."""
        return self._pool.submit(call, *given)

    def ask(self, arm: Arm, seed: int, exam: Exam) -> Path:
        """Has a student taught, unless the same one was before; where its figures will be."""
        path = self.folder / f"{arm.digest(seed, exam)}.json"
        if path not in self._asked and not path.exists():
            sets = [self._pack(lessons) for lessons in arm.sets]
            future = self._asked[path] = self._pool.submit(
                examined, replace(arm, sets=()), sets, seed, self._pack(exam), path
            )
            future.add_done_callback(lambda done: self._told(arm, seed, done))
        return path

    def _pack(self, thing: object) -> bytes:
        """The same bytes for every student that a thing is sent to."""
        if id(thing) not in self._packed:
            self._packed[id(thing)] = thing, pickle.dumps(thing)
        return self._packed[id(thing)][1]

    def _told(self, arm: Arm, seed: int, done: Future) -> None:
        if done.cancelled() or done.exception():
            return
        finished = done.result()
        self.taught += 1
        shown = ", ".join(f"{task} {finished.figures[task][METRICS[task].student_figure]:.3f}" for task in arm.tasks)
        self.say(f"{arm.name}, seed {seed}: {shown} ({finished.cpu_seconds:.0f} s of CPU)")

    def figures(self, arm: Arm, seed: int, exam: Exam) -> dict[str, dict]:
        """The figures of a student taught now, or of the same one taught before."""
        path = self.ask(arm, seed, exam)
        if path in self._asked:
            return self._asked[path].result().figures
        self.found += 1
        return json.loads(path.read_text(encoding="utf-8"))["figures"]

    def student(self, arm: Arm, seed: int, exam: Exam) -> Student:
        """The student whose figures are kept."""
        self.figures(arm, seed, exam)
        student = Student(arm.sets[0].vocabulary, arm.course.size)
        student.load_state_dict(torch.load(self.folder / f"{arm.digest(seed, exam)}.pt", weights_only=True))
        return student.eval().requires_grad_(False)

    def close(self, is_waiting: bool) -> None:
        """Ends the processes, after what they are at or in the middle of it."""
        if not is_waiting:
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown(cancel_futures=True)
