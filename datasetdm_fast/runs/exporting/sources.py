"""Run folders that are converted: which of their samples, labels and splits an export takes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from datasetdm_fast.engine.labels import LABEL_KINDS, task_of_label
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.run_folder.corrections import Correction, read_corrections
from datasetdm_fast.runs.run_folder.document import to_see_damage
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.selections import Split, check_filtered, parse_part, read_split

PARTS = ("files", "labels")  # of a row that an export needs
TASKS = {  # of an export -> those of a run that it may be made of, in order of preference
    "semantic": ("semantic", "attention", "open-vocabulary"),
    "instance": ("instance",),
    "depth": ("depth",),
    "pose": ("pose",),
}
TRAIN = "train"  # the split of samples of a run without a split


@dataclass(frozen=True)
class ExportSource:
    """A run folder and the samples of it that are converted."""

    run: Run
    labels: Mapping[str, str]  # task of the export -> label of the run
    chosen: Collection[int] | None  # indices, None = all
    split: Split | None
    corrections: Mapping[int, Correction]  # index -> what a reviewer corrected

    def take_part(self, part: str) -> Self:
        """The k-th of n parts of the samples, k/n; each sample is in one of them."""
        (k, n), count = parse_part(part), len(self.run)
        return replace(self, run=self.run[count * (k - 1) // n : count * k // n])

    def split_of(self, row: Row) -> str:
        """The part of the data set that a sample belongs to."""
        return self.split.part_of(self.run.path, row) if self.split else TRAIN

    def rows(self) -> Iterator[Row]:
        """The rows of the samples as they are stored; a damaged ledger is a failed check."""
        try:
            for row in self.run.rows(PARTS):
                if self.chosen is None or row.request.index in self.chosen:
                    yield row
        except Refused as error:
            raise damage_of(self.run.shards.place.name if self.run.shards else self.run.path, error.cause) from error


def damage_of(run: str | Path, cause: str) -> GateFailed:
    """The failed check of a run whose files or rows cannot be read."""
    return GateFailed(cause if str(run) in cause else f"{run}: {cause}", to_see_damage(run))


def open_source(
    place: str | Path, *, tasks: Sequence[str] = (), only_kept: bool = False, chosen: Collection[int] | None = None
) -> ExportSource:
    """A run and the labels to take, by default the first of each kind; `chosen` are indices, None = all."""
    run = Run(place, kept=only_kept)
    path = run.path
    if only_kept:
        check_filtered(path)
    return ExportSource(run, choose_labels(run, tasks), chosen, read_split(path), read_corrections(path))


def labels_by_task(labels: Sequence[str]) -> dict[str, list[str]]:
    """The labels that each task of an export may be made of, in order of preference. One of another package counts as
    what it is stored as and, for formats of that package, under its own name.
    """
    by_task = {
        task: [label for kind in kinds for label in labels if task_of_label(label) == kind]
        for task, kinds in TASKS.items()
    }
    for label in labels:
        if (other := task_of_label(label)) in LABEL_KINDS.others:
            stored = [task for task in TASKS if isinstance(LABEL_KINDS[other], type(LABEL_KINDS[task]))]
            for task in (*stored, other):
                by_task.setdefault(task, []).append(label)
    return {task: names for task, names in by_task.items() if names}


def choose_labels(run: Run, requested: Sequence[str]) -> dict[str, str]:
    """The label of a run for each task of an export, from the requested ones or from all of them."""
    if absent := [label for label in requested if label not in run.tasks]:
        raise Refused(f"--task {absent[0]}: {run.path} has no such labels", f"It has {', '.join(run.tasks)}.")
    chosen = {}
    for task, labels in labels_by_task(requested or run.tasks).items():
        if len(labels) > 1 and requested:
            raise Refused(
                f"--task: {labels[0]} and {labels[1]} cannot both be exported: a format has one place for such a label",
                "Name one of them.",
            )
        chosen[task] = labels[0]
    return chosen
