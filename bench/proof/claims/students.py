"""What students score: each is trained once and tested once, and its figures are stored under the digest of all that
decides them.
"""

import hashlib
import inspect
import json
import multiprocessing
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from bench.machine.processes import begin, kill_all
from bench.proof.students.student import Student, StudentSchedule, answers, has_bf16, teach
from bench.proof.students.student_data import StudentData, digest_of_items
from bench.proof.students.student_views import mild
from bench.proof.students.worth import FIGURES, graded
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.training.evaluation.meter import Meter

TENSORS = ("images", "semantic", "instance", "depth", "joints", "weights")
Figures = dict[str, dict]  # of each task


@dataclass(frozen=True)
class TestSet:
    """Unseen labelled images, read when they are first used, by each process for itself."""

    __test__ = False
    name: str
    source: LabelledSource

    def __reduce__(self):
        return TestSet, (self.name, self.source)

    @cached_property
    def items(self) -> tuple[Labelled, ...]:
        return tuple(self.source)

    @cached_property
    def images(self) -> torch.Tensor:
        return torch.stack([torch.from_numpy(item.image) for item in self.items])

    @cached_property
    def digest(self) -> str:
        return digest_of_items(self.items)


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    name: str
    sets: tuple[StudentData, ...]
    schedule: StudentSchedule
    tasks: tuple[str, ...]

    def digest(self, seed: int, test: TestSet) -> str:
        """Of everything that decides the figures, the code of the student, its views and the metrics among it."""
        decided = [asdict(self.schedule), self.tasks, seed, test.digest, has_bf16()]
        found = hashlib.sha256(json.dumps(decided).encode())
        code = [Path(inspect.getfile(part)) for part in (Student, mild, graded)]
        for path in (*code, *sorted(Path(inspect.getfile(Meter)).parent.glob("*.py"))):
            found.update(path.read_bytes())
        for data in self.sets:
            for name in TENSORS:
                found.update(getattr(data, name).numpy().tobytes())
        return found.hexdigest()[:32]


unpacked = lru_cache(8)(pickle.loads)


def train_and_test(arm: Arm, sets: Sequence[bytes], seed: int, test: bytes, path: Path) -> tuple[Figures, float]:
    """The figures of a student and the CPU seconds of its training; student and figures are stored beside `path`. What
    is large comes pickled and is unpacked once.
    """
    arm, test = replace(arm, sets=tuple(map(unpacked, sets))), unpacked(test)
    begin = time.process_time()
    student = teach(arm.sets, arm.schedule, seed, arm.tasks)
    seconds = time.process_time() - begin
    figures = graded(test.source, test.items, answers(student, test.images), arm.tasks)
    torch.save(student.state_dict(), path.with_suffix(".pt"))
    facts = {"arm": arm.name, "seed": seed, "exam": test.name, "steps": arm.schedule.steps}
    facts |= {"images": [len(data) for data in arm.sets], "cpu_seconds": round(seconds, 1), "figures": figures}
    storage.publish({path: json.dumps(facts).encode()})
    return figures, seconds


def _begin_process() -> None:
    begin()
    torch.set_num_threads(1)


class StudentStore:
    """The folder of figures and students; students are trained side by side in processes of their own."""

    def __init__(self, folder: Path, say: Callable[[str], None], processes: int = 1):
        self.folder, self.say = folder, say
        self.trained = self.found = 0
        self._started: dict[Path, Future] = {}
        self._pickled: dict[int, tuple[object, bytes]] = {}
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_process)
        self.submit = self._pool.submit
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, arm: Arm, seed: int, test: TestSet) -> Path:
        """Starts the training of a student, unless the same one was trained before; where its figures will be."""
        path = self.folder / f"{arm.digest(seed, test)}.json"
        if path not in self._started and not path.exists():
            sets = [self.pickle(data) for data in arm.sets]
            bare, packed = replace(arm, sets=()), self.pickle(test)
            future = self._started[path] = self.submit(train_and_test, bare, sets, seed, packed, path)
            future.add_done_callback(lambda done: self._on_trained(arm, seed, done))
        return path

    def pickle(self, thing: object) -> bytes:
        """The same bytes for every student that a thing is sent to."""
        if id(thing) not in self._pickled:
            self._pickled[id(thing)] = thing, pickle.dumps(thing)
        return self._pickled[id(thing)][1]

    def _on_trained(self, arm: Arm, seed: int, done: Future) -> None:
        if done.cancelled() or done.exception():
            return
        figures, seconds = done.result()
        self.trained += 1
        shown = ", ".join(f"{task} {figures[task][FIGURES[task]]:.3f}" for task in arm.tasks)
        self.say(f"{arm.name}, seed {seed}: {shown} ({seconds:.0f} s of CPU)")

    def figures(self, arm: Arm, seed: int, test: TestSet) -> Figures:
        """The figures of a student trained now, or of the same one trained before."""
        path = self.start(arm, seed, test)
        if path in self._started:
            return self._started[path].result()[0]
        self.found += 1
        return json.loads(path.read_text(encoding="utf-8"))["figures"]

    def student(self, arm: Arm, seed: int, test: TestSet) -> Student:
        """The student whose figures are stored."""
        self.figures(arm, seed, test)
        student = Student(arm.sets[0].vocabulary, arm.schedule.size)
        student.load_state_dict(torch.load(self.folder / f"{arm.digest(seed, test)}.pt", weights_only=True))
        return student.eval().requires_grad_(False)

    def close(self, is_waiting: bool) -> None:
        """Ends the processes, after what they are at or in the middle of it."""
        if not is_waiting:
            kill_all()
        self._pool.shutdown(cancel_futures=True)
