"""Samples of runs become an export: one pass over them, then the files that they share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.blocks import in_threads
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.errors import GateFailed, Missing, Refused, quote
from datasetdm_fast.plugins import load_place
from datasetdm_fast.runs.exporting import other_packages, target
from datasetdm_fast.runs.exporting.classes import PERSON, Renaming, united
from datasetdm_fast.runs.exporting.format import Content, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.settings import ExportSettings
from datasetdm_fast.runs.exporting.view import RunView, SampleView
from datasetdm_fast.runs.run_folder.document import EXPORTS, table_of, to_see_damage
from datasetdm_fast.runs.run_folder.kept import read_kept
from datasetdm_fast.runs.run_folder.ledger import Row, canonical
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.split import origins, part_of, read_split
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__

BLOCK = 32  # samples published and committed together
PARTS = ("files", "labels")  # of a row that an export needs
TASKS = {  # of an export -> those of a run that it may be made of, the first that is there
    "semantic": ("semantic", "attention", "open-vocabulary"),
    "instance": ("instance",),
    "depth": ("depth",),
    "pose": ("pose",),
}
TRAIN = "train"  # the split of samples that nobody split


@dataclass(frozen=True)
class ExportSource:
    """A run folder and those of its samples that are wanted."""

    run: Run
    labels: Mapping[str, str]  # task of the export -> label of the run
    chosen: frozenset[int] | None  # indices, None = all
    split: Mapping[int, str] | None  # index -> part of the data set

    def part_of(self, row: Row) -> str:
        """The part of a sample."""
        return TRAIN if self.split is None else part_of(self.run.path, self.split, row)

    def rows(self) -> Iterator[Row]:
        for row in self.run.rows(PARTS):
            if self.chosen is None or row.request.index in self.chosen:
                yield row


@dataclass(frozen=True)
class ExportResult:
    samples: int
    files: int
    made: int  # samples that this call converted
    is_complete: bool


def open_source(place: str | Path, settings: ExportSettings, chosen: frozenset[int] | None = None) -> ExportSource:
    """A run folder, or one in an object store, of which a copy is made, for conversion; `chosen` are the indices of
    samples that a condition lets through.
    """
    run = Run(place, kept=settings.kept)
    path = run.path = run.copies.whole() if run.copies else run.path
    if settings.kept and read_kept(path) is None:
        raise Refused(
            f"--kept: {path} has not been filtered",
            f"Drop it, or filter first with: python -m datasetdm_fast.filter {quote(path)} --where CONDITION",
        )
    split = read_split(path)
    return ExportSource(run, chosen_labels(run, settings.task), chosen, split and split.names())


def check_formats(names: Sequence[str], labels: Sequence[str]) -> None:
    """Refuses formats that a run with these labels could not be converted to."""
    tasks = labels_by_task(labels)
    for name in names:
        _format(name).check_tasks(f"--format {name}", tasks)


def check_not_exported(path: Path) -> None:
    """Refuses a run that lacks samples and holds an export of those it has, which is never overwritten."""
    if storage.is_there(path / EXPORTS / target.DOCUMENT):
        raise Refused(
            f"--format: {path / EXPORTS} holds an export of the samples that the run has had so far",
            "Delete that folder, or drop --format and convert the finished run with another --out.",
        )


def export_run(path: Path, names: Sequence[str], threads: int) -> ExportResult:
    """Converts a finished run to formats, into the exports in it."""
    settings = ExportSettings(runs=(str(path),), to=tuple(names))
    conversion = Conversion([open_source(path, settings)], settings, path / EXPORTS)
    try:
        return conversion.run(threads)
    finally:
        conversion.close()


def labels_by_task(labels: Sequence[str]) -> dict[str, list[str]]:
    """The labels that each task of an export may be made of, the first choice first. One of another package counts as
    what it is stored as and, for formats of that package, under its own name.
    """
    found = {
        task: [name for own in kinds for name in labels if task_of_label(name) == own] for task, kinds in TASKS.items()
    }
    for name in labels:
        if (other := task_of_label(name)) in LABEL_KINDS.others:
            stored = [task for task in TASKS if isinstance(LABEL_KINDS[other], type(LABEL_KINDS[task]))]
            for task in (*stored, other):
                found.setdefault(task, []).append(name)
    return {task: names for task, names in found.items() if names}


def chosen_labels(run: Run, wanted: Sequence[str]) -> dict[str, str]:
    """The label of a run for each task of an export, from all of them or those that are wanted."""
    if absent := [name for name in wanted if name not in run.tasks]:
        raise Refused(f"--task {absent[0]}: {run.path} has no such labels", f"It has {', '.join(run.tasks)}.")
    found = {}
    for task, known in labels_by_task(wanted or run.tasks).items():
        if len(known) > 1 and wanted:
            raise Refused(
                f"--task: {known[0]} and {known[1]} cannot both be exported: a format has one place for such a label",
                "Name one of them.",
            )
        found[task] = known[0]
    return found


class Conversion:
    """An export that has been checked and has written nothing yet."""

    def __init__(self, sources: Sequence[ExportSource], settings: ExportSettings, folder: Path):
        self.sources, self.settings, self.folder = sources, settings, folder
        self.formats: dict[str, Format] = {name: _format(name) for name in settings.to}
        first = sources[0]
        for other in sources[1:]:
            if apart := set(first.labels) ^ set(other.labels):
                raise Refused(
                    f"{other.run.path}: only one of it and {first.run.path} has labels for {', '.join(sorted(apart))}",
                    "Name the labels that both have with --task.",
                )
        self.renamed = Renaming.parse(settings.classes)
        classes = united([(source.run.document, source.labels) for source in sources], self.renamed)
        self.views = [RunView.of(each.run.document, each.labels, classes, self.renamed) for each in sources]
        self._identify()
        self.plan = ExportPlan(classes, self.splits, frozenset(first.labels), **self._tables(), settings=settings)
        for name, format in self.formats.items():
            format.check(name, self.plan)
        self.is_complete = target.check_target(folder, self.described)

    def _tables(self) -> dict[str, Any]:
        """Joints, limbs and the farthest depth of all runs."""
        tables = [
            {task: source.run.document["labels"][label] for task, label in source.labels.items()}
            for source in self.sources
        ]
        people = [table["pose"] for table in tables if "pose" in table]
        for source, table in zip(self.sources, people):
            if table["joints"] != people[0]["joints"]:
                raise Refused(
                    f"{source.run.path}: its joints are not those of {self.sources[0].run.path}",
                    "Convert them separately, or leave pose out with --task.",
                )
        person = self.renamed(PERSON)
        return {
            "people": (person,) if people and person else (),
            "joints": tuple(people[0]["joints"]) if people else (),
            "limbs": tuple((int(a), int(b)) for a, b in people[0]["limbs"]) if people else (),
            "max_depth": max((float(table["depth"]["max_depth"]) for table in tables if "depth" in table), default=0.0),
        }

    def _identify(self) -> None:
        """Counts the samples, and notes what they are."""
        counts: Counter[str] = Counter()
        parts: dict[str, str] = {}  # what samples were made of -> the part it is in
        is_split = len(self.sources) > 1 and any(source.split for source in self.sources)
        self.runs, self.offsets, offset = [], [], 0
        for source in self.sources:
            found, count, last = hashlib.sha256(), 0, -1
            for row in self._guarded(source, source.rows()):
                files = {role: stored.sha256 for role, (_, stored) in row.files.items()}
                part = source.part_of(row)
                told = [row.request.index, row.request.prompt, files, row.labels]
                found.update(canonical(told if source.split is None else [*told, part]).encode())
                counts[part] += 1
                for name in origins(source.run.document, row) if is_split else ():
                    if parts.setdefault(name, part) != part:
                        raise Refused(
                            f"{source.run.path}: sample {row.request.id} is for {part}, and one made of the same "
                            f"picture for {parts[name]}",
                            "Merge the runs, then split the result.",
                        )
                count, last = count + 1, row.request.index
            self.runs.append({"name": source.run.path.resolve().name, "samples": count, "sha256": found.hexdigest()})
            self.offsets.append(offset)
            offset += last + 1
        if not counts:
            raise Refused(
                f"{self.sources[0].run.path}: no sample to convert",
                "Name a run folder with samples, let more pass --kept and --where, or restore dropped ones.",
            )
        self.splits = {name: counts[name] for name in sorted(counts, key=_split_order)}

    @property
    def samples(self) -> int:
        return sum(self.splits.values())

    @property
    def unsplit(self) -> list[Path]:
        """The runs that are not split, where others are."""
        is_split = any(source.split is not None for source in self.sources)
        return [source.run.path for source in self.sources if is_split and source.split is None]

    @property
    def described(self) -> dict[str, Any]:
        """What export.json says."""
        documents = [source.run.document for source in self.sources]
        licences = {document["model"]["licence"] for document in documents}
        licences |= {entry["licence"] for document in documents for entry in document["decoders"].values()}
        return {
            "format": target.FORMAT,
            "versions": {"datasetdm_fast": __version__},
            "settings": self.settings.described(),
            "runs": self.runs,
            "samples": self.samples,
            "splits": self.splits,
            "classes": list(self.plan.classes.names),
            "licences": sorted(licences),
        }

    def run(
        self,
        threads: int,
        on_commit: Callable[[int], None] = lambda count: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> ExportResult:
        """Converts what is not there yet."""
        if self.is_complete:
            target.forget_work(self.folder)
            return ExportResult(self.samples, target.counted(self.folder), 0, True)
        made = 0
        with target.ExportFolder(self.folder, self.described, is_copied=self.settings.copy) as opened:
            there = opened.numbers()
            wanted = (view for view in self._views() if view.number not in there)
            for rows in in_threads(partial(self._write, opened), wanted, BLOCK, threads, is_stopping):
                opened.commit(rows)
                made += len(rows)
                on_commit(len(rows))
            if is_stopping():
                return ExportResult(self.samples, 0, made, False)
            for name, format in self.formats.items():
                samples = _Done(self, opened, name)
                if name in EXPORT_FORMATS.others:
                    found = other_packages.shared(name, format, self.plan, samples)
                    if twice := opened.written_twice(f"{name}/{path}" for path in found):
                        raise other_packages.overwriting(name, twice, self.folder)
                else:
                    found = format.shared(self.plan, samples)
                for path, chunks in found.items():
                    opened.share(f"{name}/{path}", chunks)
            return ExportResult(self.samples, opened.complete(), made, True)

    def _views(self) -> Iterator[SampleView]:
        for source, view, offset in zip(self.sources, self.views, self.offsets):
            run, table = source.run, table_of(source.run.document)
            for row in self._guarded(source, source.rows()):
                stored = StoredSample(row, run.path, run.document, run.copies, table)
                yield SampleView(stored, offset + row.request.index, source.part_of(row), view, self.settings)

    def view(self, number: int) -> SampleView:
        """The sample of a number."""
        place = max(k for k, offset in enumerate(self.offsets) if offset <= number)
        source, index = self.sources[place], number - self.offsets[place]
        stored = source.run[f"{index:08d}"]
        return SampleView(stored, number, source.part_of(stored.row), self.views[place], self.settings)

    def _guarded(self, source: ExportSource, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows; a damaged ledger is a failed check."""
        try:
            yield from rows
        except Refused as error:
            path, copies = str(source.run.path), source.run.copies
            name = copies.store.url if copies else path  # rather than a copy that is deleted at the end
            raise _damaged(name, error.cause.replace(path, name)) from error

    def _write(
        self, opened: target.ExportFolder, block: Sequence[SampleView]
    ) -> list[tuple[int, str, dict[str, Entry], dict[str, StoredFile]]]:
        made = [(view, *self._made(view)) for view in block]
        stored = opened.publish({name: content for _, files, _ in made for name, content in files.items()})
        return [
            (view.number, view.split, entries, {name: stored[name] for name in files}) for view, files, entries in made
        ]

    def _made(self, view: SampleView) -> tuple[dict[str, Content], dict[str, Entry]]:
        """The files and entries of a sample."""
        files: dict[str, Content] = {}
        entries: dict[str, Entry] = {}
        for name, format in self.formats.items():
            make = other_packages.converted if name in EXPORT_FORMATS.others else _converted
            found, entries[name] = make(name, format, view, self.plan)
            files |= {f"{name}/{path}": content for path, content in found.items()}
        return files, entries

    def close(self) -> None:
        with ExitStack() as closing:
            for source in self.sources:
                closing.callback(source.run.close)


@dataclass(frozen=True)
class _Done:
    """The samples of a conversion for one of its formats."""

    conversion: Conversion
    opened: target.ExportFolder
    format: str

    def entries(self, split: str) -> Iterator[Entry]:
        return self.opened.entries(self.format, split)

    def views(self, split: str, first: int, stop: int) -> Iterator[SampleView]:
        return map(self.conversion.view, self.opened.numbers_of(split, first, stop))


def _converted(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    """The files and the entry of a sample in a format of ours; a label that cannot be read is a failed check."""
    try:
        return format.converted(view, plan)
    except (Refused, Missing, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        cause = error.cause if isinstance(error, (Refused, Missing)) else f"{type(error).__name__}: {error}"
        said = f"sample {view.stored.id} is damaged ({documents.one_line(cause)})"
        raise _damaged(view.stored.run, said) from error


def _format(name: str) -> Format:
    found = EXPORT_FORMATS[name]
    return load_place(found) if isinstance(found, str) else other_packages.checked(name, found)


def _split_order(name: str) -> tuple[int, str]:
    """The usual names in their usual order, others after them."""
    usual = (TRAIN, "val", "test")
    return usual.index(name) if name in usual else len(usual), name


def _damaged(run: str | Path, cause: str) -> GateFailed:
    return GateFailed(cause if str(run) in cause else f"{run}: {cause}", to_see_damage(run))
