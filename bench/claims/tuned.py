"""The same question with the best course found for every arm: augmentation and steps are chosen on validation scenes,
in an equal search for each, and the scenes that judge are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from bench.claims import sets
from bench.claims.experiments import Experiments, Pick, Sets, points
from bench.claims.rows import OUTSIDE, spread
from bench.claims.students import Arm, Figures, TestSet
from bench.report.tables import Row, Table, markdown, text
from datasetdm_fast.decoders.folders import DEMO
from datasetdm_fast.evaluation import student_data
from datasetdm_fast.evaluation.student import answers
from datasetdm_fast.evaluation.student_data import SIDE
from datasetdm_fast.evaluation.worth import gain_of, graded
from datasetdm_fast.labels.words import find_classes


@dataclass(frozen=True)
class TunedCourse:
    augmentation: str
    times: int  # the usual number of steps

    def title(self, steps: int) -> str:
        return f"{self.augmentation}, {self.times * steps:,}"


COURSES = (TunedCourse("mild", 1), TunedCourse("strong", 1), TunedCourse("strong", 3))
UNLABELLED = 500_000  # first seed of the real scenes whose labels nobody uses
ARMS = {
    "real": "real",
    "generated": "generated",
    "both": "real + generated",
    "labelled": "real + unlabelled real, labelled by the decoder",
    "many": "ten times real",
}


@dataclass(frozen=True)
class Question:
    """One row: a figure of the students."""

    title: str
    figure: str
    pick: Pick
    less_is_better: bool = False


QUESTIONS = {
    "semantic": Question("Semantic segmentation", "mIoU", points("semantic", "miou")),
    "instance": Question("Instance segmentation", "AP", points("instance", "ap")),
    "depth": Question("Depth", "REL (less is better)", lambda found: found["depth"]["absrel"], less_is_better=True),
    "pose": Question("Pose", "OKS-AP", points("pose", "oks_ap")),
}


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

    def __init__(self, count: int):
        self.source = sets.scenes(UNLABELLED, count, sets.MODEL_SIDE)

    def __getitem__(self, position: int) -> UnlabelledScene:
        item, seed = self.source[position], UNLABELLED + position
        named = find_classes(item.caption, self.source.thing_classes)
        return UnlabelledScene(f"{position:08d}", item.image, item.caption, named, seed)


class TunedArms:
    """Students of every arm, course and seed; each figure of an arm is that of its best course."""

    def __init__(self, experiments: Experiments, arms: Sequence[str]):
        self.experiments, self.names = experiments, arms
        self._validated: dict[tuple[str, TunedCourse, int], Figures] = {}

    def rows(self) -> dict[str, Row]:
        """A row of every question, once every student has been trained."""
        scale, store, test = self.experiments.scale, self.experiments.store, self.experiments.test_set()
        for arm in self._students.values():
            for seed in range(scale.seeds):
                store.start(arm, seed, test)
        return {name: self._row(question) for name, question in QUESTIONS.items()}

    @cached_property
    def _students(self) -> dict[tuple[str, TunedCourse], Arm]:
        steps = self.experiments.scale.steps
        return {
            (name, course): self.experiments.arm(
                name, data, steps=course.times * steps, augmentation=course.augmentation
            )
            for name in self.names
            for data in [self._sets[name]()]
            for course in COURSES
        }

    @property
    def _sets(self) -> Mapping[str, Sets]:
        e, scale = self.experiments, self.experiments.scale

        def real() -> student_data.StudentData:
            return e.real(scale.real)

        def generated() -> student_data.StudentData:
            return e.generated("fast", scale.synthetic)

        return {
            "real": lambda: (real(),),
            "generated": lambda: (generated(),),
            "both": lambda: (real(), generated()),
            "labelled": lambda: (real(), self._labelled()),
            "many": lambda: (e.real(10 * scale.real),),
        }

    def _labelled(self) -> student_data.StudentData:
        """As many unlabelled scenes as there are generated images, with the labels that the same decoders read."""
        e, count = self.experiments, self.experiments.scale.synthetic

        def synthetic() -> student_data.StudentData:
            found = sets.relabelled(UnlabelledScenes(count), range(count), DEMO, sets.unchanged)
            return student_data.synthetic(found, e.vocabulary)

        path = e.folder / "sets" / f"unlabelled-{count}.pt"
        return e.once("unlabelled", lambda: sets.stored(path, e.vocabulary, synthetic).balanced())

    def _validation(self, name: str, course: TunedCourse, seed: int) -> Figures:
        """What a trained student scores on the scenes that choose."""
        key = name, course, seed
        if key not in self._validated:
            e, items = self.experiments, self._chooser.items
            student = e.store.student(self._students[name, course], seed, e.test_set())
            found = answers(student, self._chooser.images)
            self._validated[key] = graded(self._chooser.source, items, found, tuple(QUESTIONS))
        return self._validated[key]

    @cached_property
    def _chooser(self) -> TestSet:
        return TestSet("validation", sets.scenes(sets.VALIDATION, self.experiments.scale.test // 2, SIDE))

    def _row(self, question: Question) -> Row:
        e, seeds = self.experiments, range(self.experiments.scale.seeds)
        cells = {}
        for name in self.names:
            chosen = {
                course: fmean(question.pick(self._validation(name, course, seed)) for seed in seeds)
                for course in COURSES
            }
            best = (min if question.less_is_better else max)(COURSES, key=chosen.get)
            own = [question.pick(e.store.figures(self._students[name, best], seed, e.test_set())) for seed in seeds]
            validation = {course.title(e.scale.steps): value for course, value in chosen.items()}
            cells[name] = {"course": best.title(e.scale.steps), "mean": fmean(own), "spread": spread(own)}
            cells[name] |= {"seeds": own, "validation": validation}
        return {"title": question.title, "figure": question.figure, "arms": cells, **_verdict(question, cells)}


def _verdict(question: Question, cells: Mapping[str, Row]) -> Row:
    """The gain over real images alone, its 95 % interval, and which share of the way to ten times as many it goes."""
    found: Row = {}
    for name in ("both", "labelled"):
        if name in cells and "real" in cells:
            gain, sigma, half = gain_of(cells["real"]["seeds"], cells[name]["seeds"])
            better = -gain if question.less_is_better else gain
            found[name] = {"gain": gain, "interval": [gain - half, gain + half], "holds": better > OUTSIDE * sigma}
            way = cells["many"]["mean"] - cells["real"]["mean"] if "many" in cells else 0.0
            if (way < 0) if question.less_is_better else (way > 0):
                found[name]["closed"] = gain / way
    return {"gains": found}


def _figure(row: Row, value: float) -> str:
    return f"{value:.3f}" if row["figure"].startswith("REL") else f"{value:.1f}"


def _cell(name: str) -> Callable[[Row], str]:
    def told(row: Row) -> str:
        if name not in row["arms"]:
            return "–"
        cell = row["arms"][name]
        return f"{_figure(row, cell['mean'])} ± {_figure(row, cell['spread'])} ({cell['course']})"

    return told


def _gain(row: Row) -> str:
    if "both" not in row["gains"]:
        return "–"
    found = row["gains"]["both"]
    low, high = (_figure(row, value) for value in found["interval"])
    closed = f", closes {found['closed']:.0%}" if "closed" in found else ""
    return f"{_figure(row, found['gain'])} ({low} to {high}){closed}"


def table(rows: Mapping[str, Row]) -> Table:
    """The columns of the arms that there are."""
    arms = [name for name in ARMS if any(name in row["arms"] for row in rows.values())]
    columns = {"holds": lambda row: "yes" if row["gains"].get("both", {}).get("holds") else "no"}
    columns |= {"question": text("title"), "figure": text("figure")}
    columns |= {ARMS[name]: _cell(name) for name in arms}
    return Table(columns | {"gain of generated images (95 %)": _gain})


def section(document: Mapping[str, Any]) -> str:
    """The table with what it was made from, for a page."""
    scale, machine = document["setting"], document["machine"]
    made = f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, commit {machine['commit']}"
    courses = "; ".join(course.title(scale["steps"]) + " steps" for course in COURSES)
    facts = (
        f"{scale['real']} real scenes, {scale['synthetic']:,} generated images; the best of these courses for each arm "
        f"and figure, chosen on {scale['test'] // 2:,} validation scenes: {courses}; {scale['seeds']} students of each "
        f"kind, {scale['test']:,} unseen scenes, mean ± deviation"
    )
    return f"{made}: {facts}.\n\n{markdown(table(document['rows']).cells(list(document['rows'].values())))}"
