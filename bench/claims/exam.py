"""What students score: taught once, examined once, the figures kept in a file under the digest of all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from datasetdm_fast import student as students
from datasetdm_fast.metrics import METRICS
from datasetdm_fast.readers.labelled import Labelled, Source
from datasetdm_fast.student import Course, Student
from datasetdm_fast.student_data import Lessons

TENSORS = ("images", "semantic", "instance", "depth", "joints", "weights")
FIGURES = {"semantic": "miou", "instance": "ap", "depth": "absrel", "pose": "oks_ap"}


@dataclass(frozen=True)
class Exam:
    """Unseen labelled images, read once."""

    name: str
    source: Source
    items: tuple[Labelled, ...]

    @classmethod
    def of(cls, name: str, source: Source) -> Exam:
        return cls(name, source, tuple(source))

    @property
    def images(self) -> torch.Tensor:
        return torch.stack([torch.from_numpy(item.image) for item in self.items])

    def digest(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One way to teach a student."""

    name: str
    sets: tuple[Lessons, ...]
    course: Course
    tasks: tuple[str, ...]

    def digest(self, seed: int, exam: Exam) -> str:
        """Of everything that decides the figures, the student's own code among it."""
        found = hashlib.sha256(json.dumps([asdict(self.course), self.tasks, seed, exam.digest(), students.has_bf16()]).encode())
        found.update(Path(students.__file__).read_bytes())
        for lessons in self.sets:
            for name in TENSORS:
                found.update(getattr(lessons, name).numpy().tobytes())
        return found.hexdigest()[:32]


def figures(student: Student, exam: Exam, tasks: Sequence[str]) -> dict[str, dict]:
    """Every figure of every task over the exam's images."""
    meters = {task: METRICS[task](exam.source) for task in tasks}
    for truth, answer in zip(exam.items, students.answers(student, exam.images)):
        for task, meter in meters.items():
            meter.add(truth, getattr(answer, task))
    return {task: meter.result() for task, meter in meters.items()}


class Record:
    """The folder in which figures and students are kept."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.taught = self.found = 0
        folder.mkdir(parents=True, exist_ok=True)

    def figures(self, arm: Arm, seed: int, exam: Exam) -> dict[str, dict]:
        """The figures of a student taught now, or of the same one taught before."""
        path = self.folder / f"{arm.digest(seed, exam)}.json"
        if path.exists():
            self.found += 1
            return json.loads(path.read_text(encoding="utf-8"))["figures"]
        begin = time.process_time()
        student = students.teach(arm.sets, arm.course, seed, arm.tasks)
        taught = time.process_time() - begin
        result = figures(student, exam, arm.tasks)
        self.taught += 1
        torch.save(student.state_dict(), path.with_suffix(".pt"))
        facts = {"arm": arm.name, "seed": seed, "exam": exam.name, "steps": arm.course.steps, "images": [len(one) for one in arm.sets]}
        self._write(path, {**facts, "cpu_seconds": round(taught, 1), "figures": result})
        shown = ", ".join(f"{task} {result[task][FIGURES[task]]:.3f}" for task in arm.tasks)
        self.say(f"{arm.name}, seed {seed}: {shown} ({taught:.0f} s of CPU)")
        return result

    def student(self, arm: Arm, seed: int, exam: Exam) -> Student:
        """The student whose figures are kept."""
        self.figures(arm, seed, exam)
        student = Student(arm.sets[0].vocabulary, arm.course.size)
        student.load_state_dict(torch.load(self.folder / f"{arm.digest(seed, exam)}.pt", weights_only=True))
        return student.eval().requires_grad_(False)

    def _write(self, path: Path, document: dict) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(document), encoding="utf-8")
        os.replace(part, path)
