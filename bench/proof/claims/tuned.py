"""The same question with the best course found for every arm: augmentation, learning rate and number of steps are
chosen on validation scenes, in an equal search for each; what the scenes that judge say of others is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from bench.proof.claims import sets
from bench.proof.claims.experiments import TASKS, Experiments, Sets
from bench.proof.claims.rows import OUTSIDE, spread
from bench.proof.claims.search import QUESTIONS, Looking, Question, SearchedStudent, SearchedStudents, StudentLooks
from bench.proof.claims.students import TestSet
from bench.proof.students import student_data
from bench.proof.students.student import answers
from bench.proof.students.student_data import SIDE
from bench.proof.students.worth import gain_of
from bench.report.tables import Row
from datasetdm_fast.engine.decoders.config import DEMO
from datasetdm_fast.engine.labels.class_tables import find_classes

AUGMENTATIONS = ("strong", "mild", "none")
USUAL_RATE, OTHER_RATES = 3e-3, (1e-3,)
CHOSEN_TOGETHER = ("semantic", "instance", "pose", "long-tail"), ("depth",)  # zoom and moves hide how far things are
LONGEST = 3  # times the usual steps
PATIENCE = 2  # looks, of which there are two in the usual steps
QUEUED = 1  # students started before a process is free
UNLABELLED = 500_000  # first seed of the real scenes whose labels nobody uses
ARMS = {  # in the order in which they are taught
    "real": "real",
    "many": "ten times real",
    "both": "real + generated",
    "labelled": "real + unlabelled real, labelled by the decoder",
    "self": "real + unlabelled real, labelled by the student of real",
    "generated": "generated",
}


@dataclass(frozen=True)
class TunedCourse:
    """How the students of an arm are taught; for how many steps their looks decide."""

    augmentation: str
    rate: float

    @property
    def title(self) -> str:
        return f"{self.augmentation}, {self.rate:g}"


FIRST_COURSES = tuple(TunedCourse(augmentation, USUAL_RATE) for augmentation in AUGMENTATIONS)


@dataclass(frozen=True)
class UnlabelledScene:
    """A rendered scene as a generated sample is read: the image and its caption."""

    id: str
    image: Any
    prompt: str
    classes: tuple[str, ...]
    seed: int


class UnlabelledScenes:
    """Rendered scenes whose labels are not looked at."""

    def __init__(self, first: int, count: int, size: int):
        self.source = sets.scenes(first, count, size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> UnlabelledScene:
        item, seed = self.source[position], self.source.first + position
        named = find_classes(item.caption, self.source.thing_classes)
        return UnlabelledScene(f"{position:08d}", item.image, item.caption, named, seed)


class TunedArms:
    """Students of every arm: each augmentation once and the best of them with every seed, to a plateau; the best at
    every rate for the usual steps.
    """

    def __init__(self, experiments: Experiments, arms: Sequence[str], count: int):
        self.experiments, self.count = experiments, count
        scale = experiments.scale
        self.is_usual = count == scale.real
        self.names = list(arms)
        self.chooser = TestSet("validation", sets.scenes(scale.first(sets.VALIDATION), scale.test * 2 // 5, SIDE))
        self.students = SearchedStudents(experiments.store, self.chooser, experiments.test_set())
        self._students: dict[tuple[str, TunedCourse, int | None], SearchedStudent] = {}

    # Training ---------------------------------------------------------------------------------------------------------
    def train(self) -> Iterator[None]:
        """Trains every student that is not there yet, and comes back whenever one is done."""
        while True:
            running = self.students.running()
            if len(running) < self.experiments.processes + QUEUED and (found := next(self._ready(self.names), None)):
                self.students.start(found)
            elif running:
                wait(running, return_when=FIRST_COMPLETED)
                yield
            else:
                return

    def _ready(self, names: Sequence[str]) -> Iterator[SearchedStudent]:
        """Students that may be started, the most urgent first: those of most figures, and the first of every arm."""
        for group in CHOSEN_TOGETHER:
            for seed in range(self.experiments.scale.seeds):
                for name in names:
                    for student in self._needed(name, group, seed):
                        if not self.students.is_started(student) and not self.students.looks(student):
                            yield student

    def _needed(self, name: str, group: Sequence[str], seed: int) -> list[SearchedStudent]:
        """What the figures of a student ask for, as far as it is known."""
        if name == "self" and not self._teachers():
            return [student for one in CHOSEN_TOGETHER for student in self._needed("real", one, 0)]
        best = self.best(name, group)
        found = [self._student(name, course, 0) for course in FIRST_COURSES]
        found += [self._student(name, course) for course in self.rates(name, group)]
        return [*found, self._student(name, best, seed)] if best else found

    def _teachers(self) -> dict[str, SearchedStudent]:
        """The first student of real by task, once all are there."""
        best = {task: self.best("real", group) for group in CHOSEN_TOGETHER for task in TASKS if task in group}
        is_there = all(self._looks("real", course, 0) for course in best.values())
        return {task: self._student("real", course, 0) for task, course in best.items()} if is_there else {}

    def look_for_students(self) -> None:
        """Makes the images and labels of every arm that has students, so that rows have these."""
        there = self.students.arms()
        for _ in self._ready([name for name in self.names if self._arm_name(name) in there]):
            pass

    def _begun(self) -> list[str]:
        return [name for name in self.names if any(key[0] == name for key in self._students)]

    # The search -------------------------------------------------------------------------------------------------------
    def rates(self, name: str, group: Sequence[str]) -> tuple[TunedCourse, ...]:
        """The best augmentation at every rate, once it is known: the first student of each was taught to a plateau, as
        strong augmentation is slow at first.
        """
        best = self._best({course: self._looks(name, course, 0) for course in FIRST_COURSES}, group)
        return tuple(TunedCourse(best.augmentation, rate) for rate in (USUAL_RATE, *OTHER_RATES)) if best else ()

    def best(self, name: str, group: Sequence[str]) -> TunedCourse | None:
        """The best course of an arm by its mean rank in some figures, None while the search goes on."""
        return self._best({course: self._looks(name, course) for course in self.rates(name, group)}, group)

    def _best(self, looks: Mapping[TunedCourse, StudentLooks | None], group: Sequence[str]) -> TunedCourse | None:
        if not looks or not all(looks.values()):
            return None
        ranks = dict.fromkeys(looks, 0)
        for question in (QUESTIONS[key] for key in group):
            figures = {course: one.figures[question.best(one.figures)] for course, one in looks.items()}
            ordered = sorted(
                looks, key=lambda course: question.pick(figures[course]), reverse=not question.less_is_better
            )
            ranks = {course: ranks[course] + ordered.index(course) for course in looks}
        return min(looks, key=ranks.get)

    def _looks(self, name: str, course: TunedCourse | None, seed: int | None = None) -> StudentLooks | None:
        return course and self.students.looks(self._student(name, course, seed))

    @property
    def _short(self) -> int:
        return self.experiments.scale.steps

    def _student(self, name: str, course: TunedCourse, seed: int | None = None) -> SearchedStudent:
        """A student that compares rates, or with a seed one that goes on to a plateau and is judged."""
        if (key := (name, course, seed)) not in self._students:
            is_judged = seed is not None
            facts = {"steps": self._short * (LONGEST if is_judged else 1)}
            facts |= {"augmentation": course.augmentation, "rate": course.rate}
            looking = Looking(max(self._short // 2, 1) if is_judged else self._short, PATIENCE)
            arm = self.experiments.arm(self._arm_name(name), self._sets[name](), **facts)
            self._students[key] = SearchedStudent(arm, self.experiments.scale.students[seed or 0], looking, is_judged)
        return self._students[key]

    # Arms -------------------------------------------------------------------------------------------------------------
    def _arm_name(self, name: str) -> str:
        return name if self.is_usual else f"{name}-{self.count}"

    @property
    def _sets(self) -> Mapping[str, Sets]:
        e = self.experiments

        def real() -> student_data.StudentData:
            return e.real(self.count)

        def generated() -> student_data.StudentData:
            if self.is_usual:
                return e.generated("fast", e.scale.synthetic)
            return e.relabelled("is_any", self.count, TASKS)

        return {
            "real": lambda: (real(),),
            "generated": lambda: (generated(),),
            "both": lambda: (real(), generated()),
            "labelled": lambda: (real(), self._labelled()),
            "self": lambda: (real(), self._self_labelled()),
            "many": lambda: (e.real(10 * self.count),),
        }

    def _labelled(self) -> student_data.StudentData:
        """As many unlabelled scenes as there are generated images, with the labels that the same decoders read."""
        e, scale = self.experiments, self.experiments.scale

        def synthetic() -> student_data.StudentData:
            scenes = self._unlabelled(sets.MODEL_SIDE)
            decoders = DEMO if self.is_usual else e.labeller("is_any", self.count, TASKS)()
            samples = sets.relabelled(scenes, range(scale.synthetic), decoders, sets.unchanged)
            return student_data.synthetic(samples, e.vocabulary)

        name = f"unlabelled-{scale.synthetic}"
        if not self.is_usual:
            name += f"-by-{self.count}-{scale.labeller_steps}-{scale.labeller_draws}"
        path = scale.place(e.folder) / "sets" / f"{name}.pt"
        return e.once(name, lambda: sets.stored(path, e.vocabulary, synthetic).balanced())

    def _unlabelled(self, size: int) -> UnlabelledScenes:
        scale = self.experiments.scale
        return UnlabelledScenes(scale.first(UNLABELLED), scale.synthetic, size)

    def _self_labelled(self) -> student_data.StudentData:
        """The same scenes with the labels of the best students of the real arm, one for each task."""

        def samples() -> Iterator[sets.RelabelledSample]:
            scenes = list(self._unlabelled(SIDE))
            images = torch.stack([torch.from_numpy(scene.image) for scene in scenes])
            found = {}
            for task, teacher in self._teachers().items():
                student = self.students.restored(teacher, QUESTIONS[task])
                found[task] = [getattr(one, task) for one in answers(student, images)]
            for scene, semantic, instances, depth, joints in zip(scenes, *(found[task] for task in TASKS)):
                yield sets.RelabelledSample(scene.id, scene.image, scene.classes, semantic, instances, depth, joints)

        e = self.experiments
        return e.once(f"self-labelled {self.count}", lambda: student_data.synthetic(samples(), e.vocabulary).balanced())

    # Rows -------------------------------------------------------------------------------------------------------------
    def rows(self) -> dict[str, Row]:
        """A row of every question, from the students that are there."""
        found = {key: self._row(key) for key in QUESTIONS}
        return {key if self.is_usual else f"{key}-{self.count}": row for key, row in found.items() if row["arms"]}

    def tried(self) -> list[Row]:
        """What every student scored on the validation scenes at each look."""
        found = []
        for name in self._begun():
            chosen = {self.best(name, group) for group in CHOSEN_TOGETHER}
            for course, seed in self._known(name):
                if looks := self._looks(name, course, seed):
                    told = {
                        step: {key: question.pick(figures) for key, question in QUESTIONS.items()}
                        for step, figures in looks.figures.items()
                    }
                    facts = {"real": self.count, "arm": name, "course": course.title}
                    facts["seed"] = self.experiments.scale.students[seed or 0]
                    facts |= {
                        "is_chosen": seed is not None and course in chosen,
                        "cpu_seconds": looks.cpu_seconds,
                        "looks": told,
                    }
                    found.append(facts)
        return found

    def _known(self, name: str) -> list[tuple[TunedCourse, int | None]]:
        """The students of an arm of which it is known that they are needed: course, and seed of a chosen one."""
        found: dict[tuple[TunedCourse, int | None], None] = {(course, 0): None for course in FIRST_COURSES}
        for group in CHOSEN_TOGETHER:
            found |= {(course, None): None for course in self.rates(name, group)}
        for group in CHOSEN_TOGETHER:
            best = self.best(name, group)
            found |= {(best, seed): None for seed in range(self.experiments.scale.seeds) if best}
        return list(found)

    def missing(self) -> int:
        """How many students are not there yet, as far as it is known which are needed."""
        known = {name: self._known(name) for name in self._begun()}
        unknown = len(self.names) - len(known) + sum(not self.best(name, CHOSEN_TOGETHER[0]) for name in known)
        each = len(OTHER_RATES) + self.experiments.scale.seeds  # the usual rate, too, but no first seed: that is known
        there = sum(bool(self._looks(name, *one)) for name, found in known.items() for one in found)
        first = len(FIRST_COURSES) * (len(self.names) - len(known))
        return sum(map(len, known.values())) - there + unknown * each + first

    def _row(self, key: str) -> Row:
        question, cells = QUESTIONS[key], {}
        for name in self._begun():
            if cell := self._cell(name, key):
                cells[name] = cell
        title = question.title if self.is_usual else f"{question.title}, {self.count} real"
        return {"title": title, "figure": question.figure, "arms": cells, **_verdict(question, cells)}

    def _cell(self, name: str, key: str) -> Row | None:
        question, group = QUESTIONS[key], next(group for group in CHOSEN_TOGETHER if key in group)
        course, own, steps = self.best(name, group), [], []
        for seed in range(self.experiments.scale.seeds):
            if not (looks := self._looks(name, course, seed)):
                break
            steps.append(question.best(looks.figures))
            own.append(question.pick(looks.judged[steps[-1]]))
        if not own:
            return None
        found = {"course": course.title, "steps": steps, "mean": fmean(own), "seeds": own}
        return found | {"spread": spread(own) if len(own) > 1 else None}


def _verdict(question: Question, cells: Mapping[str, Row]) -> Row:
    """The gain over real images alone, its 95 % interval, and which share of the way to ten times as many it goes; each
    over the seeds that all of its arms have.
    """
    found: Row = {}
    for name in ("generated", "both", "labelled", "self"):
        if name in cells and "real" in cells:
            own, real = _shared(cells, name, "real")
            gain, sigma, half = gain_of(real, own)
            count = len(own)
            better = -gain if question.less_is_better else gain
            found[name] = {"gain": gain, "better": better, "students": count, "holds": better > OUTSIDE * sigma}
            if count > 1:
                found[name] |= {"sigma": sigma, "interval": [gain - half, gain + half]}
            if "many" in cells:
                own, real, many = _shared(cells, name, "real", "many")
                way = fmean(many) - fmean(real)
                if (way < 0) if question.less_is_better else (way > 0):
                    found[name]["closed"] = gain_of(real, own)[0] / way
    return {"gains": found}


def _shared(cells: Mapping[str, Row], *names: str) -> list[list[float]]:
    """The figures of some arms for the seeds that all of them have."""
    count = min(len(cells[name]["seeds"]) for name in names)
    return [cells[name]["seeds"][:count] for name in names]
