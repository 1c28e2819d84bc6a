"""Labels from attention, which nothing was trained for, against a decoder's labels of the same images: what students
learn from each, with uncertain pixels ignored or filled in, and from their own labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch

from bench.proof.claims import sets
from bench.proof.claims.experiments import Experiments
from bench.proof.claims.rows import spread
from bench.proof.claims.students import Arm, Figures, TestSet
from bench.proof.students import student_data
from bench.proof.students.student import answers
from bench.proof.students.student_data import BACKGROUND, IGNORED, SIDE, StudentData, Vocabulary
from bench.proof.students.worth import gain_of, t95
from bench.report.tables import Row, Table, markdown, text
from bench.runs import prepare
from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import SemanticMap, Trust
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.jobs.run import count_rows
from datasetdm_fast.runs.jobs.writing import write_missing as generate
from datasetdm_fast.runs.run_folder.reader import Run, open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.training.readers.demo import DemoWorld

NAME, TITLE = "training-free", "Training-free"
CLASSES = (BACKGROUND, *world.THINGS)
FIGURE = "mIoU of things"
ARMS = {
    "decoder": "labels of the decoder",
    "ignored": "labels from attention, 255 ignored",
    "filled": "labels from attention, 255 filled in",
    "self": "labels from attention, 255 ignored, then the student's own",
}
LEAST_SHARE, GOAL = 0.5, 0.75  # of what the decoder's labels teach


@dataclass(frozen=True)
class ArmComparison:
    """Two arms: a ratio of their figures, or a difference that is at least 0."""

    title: str
    before: str
    after: str
    least: float = 0.0
    is_ratio: bool = False

    def asked(self) -> str:
        return f"at least {self.least:.0%}, goal {GOAL:.0%}" if self.is_ratio else "at least 0"


COMPARISONS = (
    ArmComparison("attention as a share of the decoder", "decoder", "ignored", LEAST_SHARE, is_ratio=True),
    ArmComparison("255 ignored over 255 filled in", "filled", "ignored"),
    ArmComparison("self-training over none", "ignored", "self"),
)


class ThingScenes(LabelledSource):
    """Rendered scenes in which whatever is no thing is background, as labels from attention have it."""

    classes, thing_classes, tasks = CLASSES, world.THINGS, ("semantic",)

    def __init__(self, scenes: DemoWorld):
        self.scenes = scenes
        super().__init__(scenes.size, len(scenes))

    def load(self, record: int, seed: int | None) -> Labelled:
        item = self.scenes[record]
        return Labelled(item.id, item.image, item.caption, semantic=renumbered(world.CLASSES)[item.semantic])


@dataclass(frozen=True)
class CertainSample(sets.RelabelledSample):
    """A sample whose every pixel counts alike, doubtful or not: all arms learn from the same images."""

    @property
    def trust(self) -> Trust:
        return Trust()


def renumbered(classes: Sequence[str]) -> np.ndarray:  # [256] uint8
    """The numbers of CLASSES for those of other classes; whatever is no thing is background, 255 stays."""
    numbers = np.zeros(256, np.uint8)
    numbers[: len(classes)] = [CLASSES.index(name) if name in world.THINGS else 0 for name in classes]
    numbers[IGNORED] = IGNORED
    return numbers


def learnt_from(run: Run, label: str, vocabulary: Vocabulary) -> StudentData:
    """The images of a run with one of its label maps."""

    def samples() -> Iterator[CertainSample]:
        for sample in run:
            found = sample.label(label)
            numbers = renumbered(found.classes)[found.labels]
            certain = SemanticMap(numbers, np.ones(numbers.shape, np.float32), CLASSES)
            yield CertainSample(sample.id, sample.image, sample.classes, certain)

    return student_data.synthetic(samples(), vocabulary).balanced()


class TrainingFree:
    """The students of every arm and seed."""

    def __init__(self, experiments: Experiments):
        self.experiments, self.scale = experiments, experiments.scale
        self.vocabulary = Vocabulary(CLASSES, world.THINGS, (), world.MAX_DEPTH)
        scenes = sets.scenes(self.scale.first(sets.TEST), self.scale.test, SIDE)
        self.test = TestSet("scenes of things", ThingScenes(scenes))

    def row(self) -> Row:
        """The figures of all arms and the comparisons between them, once every student has been trained."""
        store, seeds, found = self.experiments.store, self.scale.students, {}
        for seed in seeds:
            for arm in self._arms.values():
                store.start(arm, seed, self.test)
        again = [self._again(seed) for seed in seeds]
        for seed, arm in zip(seeds, again):
            store.start(arm, seed, self.test)
        for name in ARMS:
            own = again if name == "self" else [self._arms[name]] * len(seeds)
            values = [figure_of(store.figures(arm, seed, self.test)) for seed, arm in zip(seeds, own)]
            found[name] = {"mean": fmean(values), "spread": spread(values), "seeds": values}
        uncertain = float((self._set("ignored").semantic == IGNORED).float().mean())
        facts = {"images": len(self._set("decoder")), "steps": self.scale.free_steps, "uncertain": uncertain}
        told = {one.title: answered(one, found) for one in COMPARISONS}
        return {"title": TITLE, "figure": FIGURE, "arms": found, "questions": told, **facts}

    @cached_property
    def _arms(self) -> dict[str, Arm]:
        return {name: self._arm(name, self._set(name)) for name in ("decoder", "ignored", "filled")}

    def _arm(self, name: str, data: StudentData) -> Arm:
        return self.experiments.arm(name, (data,), ("semantic",), steps=self.scale.free_steps)

    def _again(self, seed: int) -> Arm:
        """The arm of a student's own labels of the images it learnt from, where theirs were not ignored."""
        data = self._set("ignored")
        student = self.experiments.store.student(self._arms["ignored"], seed, self.test)
        own = np.stack([student_data.voted(one.semantic, CLASSES) for one in answers(student, data.images)])
        labels = torch.where(data.semantic == IGNORED, data.semantic, torch.from_numpy(own))
        return self._arm("self", replace(data, semantic=labels))

    def _set(self, name: str) -> StudentData:
        label = "semantic" if name == "decoder" else ATTENTION
        return self.experiments.once(
            f"{NAME} {name}", lambda: learnt_from(self._run(name == "filled"), label, self.vocabulary)
        )

    def _run(self, is_filled: bool) -> Run:
        """The images with the labels of the decoder and from attention, or again with no pixel uncertain."""
        folder = self.scale.place(self.experiments.folder) / ("attention-filled" if is_filled else "attention")
        given: dict[str, Any] = {"task": (ATTENTION,), "labeller": (ATTENTION,)}
        if is_filled:
            least = sets.DEMO_DEFAULTS.attention.uncertainty
            given |= {"threshold": least, "uncertainty": least}
        else:
            given = {"task": ("semantic", ATTENTION), "labeller": ("decoder", ATTENTION)}
        config = RunConfig(
            number=self.scale.free,
            seed=self.scale.first(sets.POOL_SEED),
            classes=world.THINGS,
            engine="fast",
            out=str(folder),
            quiet=True,
            **sets.SAMPLING,
            **given,
        )
        if (missing := self.scale.free - count_rows(folder)) > 0:
            labels = "labels from attention, no pixel uncertain" if is_filled else "labels of both kinds"
            self.experiments.say(f"{folder}: generating {missing} images with {labels}")
            generate(prepare(config))
        return open_run(folder)


def figure_of(found: Figures) -> float:
    """Mean IoU of the things in points."""
    return 100 * fmean(value for name, value in found["semantic"]["per_class"].items() if name in world.THINGS)


def answered(question: ArmComparison, arms: Mapping[str, Row]) -> Row:
    """A comparison seed by seed with its 95 % interval; it holds where all of the interval does."""
    before, after = arms[question.before]["seeds"], arms[question.after]["seeds"]
    if question.is_ratio:
        shares = [second / first if first else 0.0 for first, second in zip(before, after, strict=True)]
        value, half = fmean(shares), t95(len(shares)) * spread(shares) / len(shares) ** 0.5
    else:
        value, _, half = gain_of(before, after)
    low, high = value - half, value + half
    holds, reason = low >= question.least, ""
    if not holds:
        reason = "less in every case" if high < question.least else "the seeds differ more than the two do"
    return {"value": value, "interval": [low, high], "holds": bool(holds), "reason": reason, "asked": question.asked()}


def cells(row: Row) -> list[Row]:
    """The comparisons as rows of TABLE, with the figures of both sides."""
    found = []
    for one in COMPARISONS:
        told, shown = row["questions"][one.title], "{:.0%}" if one.is_ratio else "{:+.1f}"
        value, low, high = (shown.format(each) for each in (told["value"], *told["interval"]))
        sides = (row["arms"][name] for name in (one.before, one.after))
        before, after = (f"{side['mean']:.1f} ± {side['spread']:.1f}" for side in sides)
        holds = "yes" if told["holds"] else f"no: {told['reason']}"
        found.append({"comparison": one.title, "baseline": before, "compared": after, "required": told["asked"]})
        found[-1] |= {"result (95 %)": f"{value} ({low} to {high})", "holds": holds}
    return found


TABLE = Table(
    {name: text(name) for name in ("comparison", "baseline", "compared", "result (95 %)", "required", "holds")}
)


def section(document: Mapping[str, Any]) -> str:
    """The table with what it was made from, for a page."""
    scale, machine, row = document["setting"], document["machine"], document["rows"][NAME]
    made = f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, commit {machine['commit']}"
    facts = (
        f"{row['images']:,} generated images, the same for all students and none left out; {row['uncertain']:.1%} of "
        f"the cells uncertain; {scale['seeds']} students of each kind at {SIDE} pixels, {row['steps']:,} steps each, "
        f"{scale['test']:,} unseen scenes; {row['figure']}, mean ± deviation over students"
    )
    return f"{made}: {facts}.\n\n{markdown(TABLE.cells(cells(row)))}"
