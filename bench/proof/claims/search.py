"""Students that look at validation scenes while they learn, end where these no longer improve, and are judged with the
weights of their best looks.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.proof.claims import sets
from bench.proof.claims.experiments import Pick, miou_over, points
from bench.proof.claims.students import Arm, Figures, StudentStore, TestSet, unpacked
from bench.proof.students.student import Student, answers, taught_by_step
from bench.proof.students.worth import graded
from datasetdm_fast.disk import storage

AVERAGED_EVERY = 10  # steps
AVERAGED_SHARE = 0.02  # of the newest weights in their running mean: some 500 steps
IMPROVING = {"semantic": "miou", "instance": "ap", "depth": "delta_1.25", "pose": "oks_ap"}  # more is better in all


@dataclass(frozen=True)
class Question:
    """One row: a figure of the students."""

    title: str
    figure: str
    pick: Pick
    less_is_better: bool = False

    def best(self, looks: Mapping[int, Figures]) -> int:
        """The step whose look was best, of equal ones the first."""
        return (min if self.less_is_better else max)(looks, key=lambda step: self.pick(looks[step]))


QUESTIONS = {
    "semantic": Question("Semantic segmentation", "mIoU", points("semantic", "miou")),
    "instance": Question("Instance segmentation", "AP", points("instance", "ap")),
    "depth": Question("Depth", "REL (less is better)", lambda found: found["depth"]["absrel"], less_is_better=True),
    "pose": Question("Pose", "OKS-AP", points("pose", "oks_ap")),
    "long-tail": Question("Long tail", "mIoU of the rare classes", lambda found: miou_over(found, sets.RARE)),
}


@dataclass(frozen=True)
class Looking:
    """How often a student that learns is shown validation scenes, and when it ends."""

    every: int  # steps
    patience: int  # looks without a better mean of IMPROVING


@dataclass(frozen=True)
class SearchedStudent:
    """A student to be trained; one that is to be judged is shown the scenes that judge."""

    arm: Arm
    seed: int
    looking: Looking
    is_judged: bool


@dataclass(frozen=True)
class StudentLooks:
    """What a student scored on the validation scenes at each look, and with the best of these on those that judge."""

    figures: Mapping[int, Figures]
    judged: Mapping[int, Figures]
    cpu_seconds: float


class AveragedStudent:
    """A student with the running mean of another's weights."""

    def __init__(self, student: Student):
        self.student = deepcopy(student).eval().requires_grad_(False)
        self.updates = 0

    def update(self, student: Student) -> None:
        self.updates += 1
        share = max(AVERAGED_SHARE, 1 / (1 + self.updates / 4))  # the mean begins short
        for own, new in zip(self.student.state_dict().values(), student.state_dict().values()):
            if own.is_floating_point():
                own.lerp_(new, share)


def improving(figures: Figures) -> float:
    return sum(figures[task][name] for task, name in IMPROVING.items())


def learn_and_look(bare: SearchedStudent, data: Sequence[bytes], chooser: bytes, test: bytes, path: Path) -> float:
    """Trains a student until its looks no longer improve, and judges it: figures are stored at `path`, and the weights
    of its best looks beside it. The CPU seconds that it took.
    """
    arm, looking = replace(bare.arm, sets=tuple(map(unpacked, data))), bare.looking
    looks, weights, averaged, begin = {}, {}, None, time.process_time()
    for step, taught in enumerate(taught_by_step(arm.sets, arm.schedule, bare.seed, arm.tasks), 1):
        averaged = averaged or AveragedStudent(taught.student)
        if step % AVERAGED_EVERY == 0:
            averaged.update(taught.student)
        if step % looking.every == 0:
            looks[step] = shown(averaged.student, unpacked(chooser))
            weights[step] = deepcopy(averaged.student.state_dict())
            best = {question.best(looks) for question in QUESTIONS.values()}
            weights = {one: weights[one] for one in weights if one in best}
            if step - max(looks, key=lambda one: improving(looks[one])) >= looking.patience * looking.every:
                break
    judged = {}
    for step in weights if bare.is_judged else ():
        averaged.student.load_state_dict(weights[step])
        judged[step] = shown(averaged.student, unpacked(test))
    stored, seconds = io.BytesIO(), round(time.process_time() - begin, 1)
    torch.save(weights, stored)
    facts = {"arm": arm.name, "seed": bare.seed, "cpu_seconds": seconds, "figures": looks, "judged": judged}
    storage.publish({path.with_suffix(".pt"): stored.getvalue(), path: json.dumps(facts).encode()})
    return seconds


def shown(student: Student, scenes: TestSet) -> Figures:
    """What a student scores on some scenes."""
    return graded(scenes.source, scenes.items, answers(student, scenes.images), tuple(IMPROVING))


class SearchedStudents:
    """The students of a search, each trained once, side by side in the processes of a store."""

    def __init__(self, store: StudentStore, chooser: TestSet, test: TestSet):
        self.store, self.chooser, self.test = store, chooser, test
        self._started: dict[Path, Future] = {}
        self._paths: dict[SearchedStudent, Path] = {}
        self._looks: dict[Path, StudentLooks] = {}

    def arms(self) -> set[str]:
        """The names of the arms that have students."""
        return {json.loads(path.read_text(encoding="utf-8"))["arm"] for path in self.store.folder.glob("*.json")}

    def running(self) -> list[Future]:
        return [future for future in self._started.values() if not future.done()]

    def is_started(self, student: SearchedStudent) -> bool:
        return self._path(student) in self._started

    def start(self, student: SearchedStudent) -> None:
        path, bare = self._path(student), replace(student, arm=replace(student.arm, sets=()))
        packed = self.store.pickle(self.chooser), self.store.pickle(self.test)
        data = [self.store.pickle(one) for one in student.arm.sets]
        future = self._started[path] = self.store.submit(learn_and_look, bare, data, *packed, path)
        future.add_done_callback(lambda done: self._on_done(student, done))

    def _on_done(self, student: SearchedStudent, done: Future) -> None:
        if not done.cancelled() and not done.exception():
            course, found = student.arm.schedule, self.looks(student)
            best = found.figures[QUESTIONS["semantic"].best(found.figures)]
            shown = ", ".join(f"{task} {best[task][name]:.3f}" for task, name in IMPROVING.items())
            facts = f"{course.augmentation}, {course.rate:g}, {max(found.figures):,} of {course.steps:,} steps"
            self.store.say(f"{student.arm.name}, seed {student.seed}, {facts}: {shown} ({done.result():.0f} s of CPU)")

    def looks(self, student: SearchedStudent) -> StudentLooks | None:
        """The looks of a student that is trained, None where it is not yet."""
        path = self._path(student)
        if path not in self._looks:
            if not path.exists():
                if path in self._started and self._started[path].done():
                    self._started[path].result()  # raises what ended it
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
            figures, judged = ({int(step): one for step, one in found[key].items()} for key in ("figures", "judged"))
            self._looks[path] = StudentLooks(figures, judged, found["cpu_seconds"])
        return self._looks[path]

    def restored(self, student: SearchedStudent, question: Question) -> Student:
        """A trained student with the weights of the look that was best by a figure."""
        found = Student(student.arm.sets[0].vocabulary, student.arm.schedule.size)
        weights = torch.load(self._path(student).with_suffix(".pt"), weights_only=True)
        found.load_state_dict(weights[question.best(self.looks(student).figures)])
        return found.eval().requires_grad_(False)

    def _path(self, student: SearchedStudent) -> Path:
        """Where the figures of a student will be: under a digest of all that decides them."""
        if student not in self._paths:
            shown = asdict(student.looking), self.test.digest * student.is_judged
            decided = student.arm.digest(student.seed, self.chooser), shown, AVERAGED_EVERY, AVERAGED_SHARE, IMPROVING
            found = hashlib.sha256(json.dumps(decided).encode())
            self._paths[student] = self.store.folder / f"{found.hexdigest()[:32]}.json"
        return self._paths[student]
