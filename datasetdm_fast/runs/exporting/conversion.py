"""Samples of a run become an export: one pass over them, then the files that they share."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.cores import in_threads
from datasetdm_fast.errors import Missing, Refused, Unanswered
from datasetdm_fast.messages import count_noun
from datasetdm_fast.plugins import load_place
from datasetdm_fast.runs.exporting import export_folder
from datasetdm_fast.runs.exporting.classes import collect_classes, parse_renaming
from datasetdm_fast.runs.exporting.export_folder import ExportFolder, StoredExport, done_row
from datasetdm_fast.runs.exporting.format import (
    AllSamples,
    Content,
    Entry,
    ExportPlan,
    Files,
    Format,
    Linked,
    SampleView,
)
from datasetdm_fast.runs.exporting.settings import LayoutSettings, PictureSettings
from datasetdm_fast.runs.exporting.sources import TRAIN, ExportSource, damage_of
from datasetdm_fast.runs.run_folder.ledger import canonical
from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__


def convert_by_package(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    def convert() -> tuple[Files, Entry]:
        files, entry = format.convert_sample(view, plan)
        for path, content in files.items():
            documents.check_inside(path)
            if not isinstance(content, bytes | Linked):
                raise TypeError(f"{path}: a {type(content).__name__}, expected bytes or a Linked")
        json.dumps(entry)
        return files, entry

    return EXPORT_FORMATS.guard(name, convert, f"fails on sample {view.stored.id}")


def shared_files(name: str, format: Format, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
    """The files of all samples together, in chunks that are made on reading."""

    def list_files() -> dict[str, Iterable[bytes]]:
        files = dict(format.shared_files(plan, samples))
        return {documents.check_inside(path): _read_chunks(name, path, content) for path, content in files.items()}

    return EXPORT_FORMATS.guard(name, list_files, "fails on the files of all samples")


def _read_chunks(name: str, path: str, content: bytes | Iterable[bytes]) -> Iterator[bytes]:
    failure, end = f"fails on its file {path}", object()
    chunks = EXPORT_FORMATS.guard(name, lambda: iter([content] if isinstance(content, bytes) else content), failure)
    while (chunk := EXPORT_FORMATS.guard(name, lambda: next(chunks, end), failure)) is not end:
        if not isinstance(chunk, bytes):
            error = TypeError(f"a chunk is a {type(chunk).__name__}, expected bytes")
            raise EXPORT_FORMATS.failure(name, error, failure)
        yield chunk


BLOCK = 32  # samples published and committed together
PICTURES, LAYOUT = PictureSettings(), LayoutSettings()
USUAL_SPLITS = (TRAIN, "val", "test")  # in their order; splits of other names follow


@dataclass(frozen=True)
class ExportResult:
    samples: int
    files: int
    made: int  # samples that this call converted
    is_complete: bool


def open_format(name: str) -> Format:
    """The format of a name, of ours or of another package."""
    entry = EXPORT_FORMATS[name]
    format: Format = load_place(entry)() if isinstance(entry, str) else EXPORT_FORMATS.check_type(name, entry, Format)
    if any(isinstance(group, str) for group in format.needs):
        error = TypeError(f"needs is {format.needs!r}, expected groups of tasks such as (('semantic',), ('depth',))")
        raise EXPORT_FORMATS.failure(name, error, "does not load")
    return format


class Conversion:
    """An export that has been checked and has written nothing yet; `identity` are the settings in its export.json."""

    def __init__(
        self,
        source: ExportSource,
        formats: Sequence[str],
        folder: Path,
        identity: Mapping[str, Any],
        *,
        renaming: Sequence[str] = (),
        pictures: PictureSettings = PICTURES,
        layout: LayoutSettings = LAYOUT,
        is_copied: bool = False,
        store: ShardBucket | None = None,
    ):
        """`folder` is where the export lies, or what a process needs of its own while it makes one in a `store`."""
        self.source, self.folder, self.store, self.is_copied = source, folder, store, is_copied
        self.formats: dict[str, Format] = {name: open_format(name) for name in formats}
        document, renamed = source.run.document, parse_renaming(renaming)
        classes = collect_classes(document, source.labels, renamed)
        self.splits, digest = self._read_samples()
        whole = hashlib.sha256(canonical([digest, identity]).encode()).hexdigest()
        chosen = {"splits": self.splits, "pictures": pictures, "layout": layout, "digest": whole}
        self.plan = ExportPlan.of(document, source.labels, classes, renamed, **chosen)
        for name, format in self.formats.items():
            format.check(name, self.plan)
        licences = {document["model"]["licence"], *(entry["licence"] for entry in document["decoders"].values())}
        self.description = {  # of export.json
            "format": export_folder.FORMAT,
            "versions": {"datasetdm_fast": __version__},
            "settings": identity,
            "runs": [{"name": source.run.path.resolve().name, "samples": self.samples, "sha256": digest}],
            "samples": self.samples,
            "splits": self.splits,
            "classes": list(classes.names),
            "licences": sorted(licences),
        }
        self.is_complete = export_folder.check_target(folder, self.description)
        self.limits: list[str] = []  # what a user should know of the files that `run` has written

    def _read_samples(self) -> tuple[dict[str, int], str]:
        """The number of samples in each split, and the digest of all samples."""
        source, counts, digest = self.source, Counter[str](), hashlib.sha256()
        self.corrected = 0
        for row in source.rows():
            split, files = source.split_of(row), {role: file.stored.sha256 for role, file in row.files.items()}
            identity = [row.request.index, row.request.prompt, files, row.labels]
            if correction := source.corrections.get(row.request.index):
                self.corrected += 1
                identity[3] = correction.correct_row(row, source.run.document["labels"]).labels
                identity += [correction.ignored] if correction.ignored else []
            try:
                digest.update(canonical(identity if source.split is None else [*identity, split]).encode())
            except ValueError as error:
                text = f"sample {row.request.id} is damaged (its labels hold NaN or an infinite number)"
                raise damage_of(source.run.path, text) from error
            counts[split] += 1
        if not counts:
            raise Refused(
                f"{source.run.path}: no sample to convert",
                "Name a run folder with samples, let more pass --kept and --where, or restore dropped ones.",
            )
        order = dict.fromkeys((*USUAL_SPLITS, *sorted(counts)))
        return {name: counts[name] for name in order if name in counts}, digest.hexdigest()

    @property
    def samples(self) -> int:
        return sum(self.splits.values())

    def notes(self) -> Iterator[str]:
        """What a user should know of the run and the formats before the samples are converted."""
        run = self.source.run
        if self.corrected:
            yield f"{run.path}: corrections of {count_noun(self.corrected, 'sample')} are applied"
        if not run.is_complete:
            yield f"{run.path}: not finished; converted so far: {count_noun(len(run), 'sample')}"
        for name, format in self.formats.items():
            if unknown := format.unknown_classes(self.plan):
                yield f"{name}: none of its classes are {', '.join(unknown)}, which --classes can rename"

    def run(
        self,
        threads: int,
        on_commit: Callable[[int], None] = lambda count: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> ExportResult:
        """Converts the samples that are missing, then writes the files that all of them share."""
        if self.is_complete:
            export_folder.remove_work(self.folder)
            return ExportResult(self.samples, export_folder.count_files(self.folder), 0, True)
        made = 0
        with self._open() as opened:
            done = opened.numbers()
            views = (self._view(self.source.run.sample_of(row)) for row in self.source.rows())
            missing = (view for view in views if view.number not in done)
            for rows in in_threads(partial(self._write, opened), missing, BLOCK, threads, is_stopping):
                opened.commit(rows)
                made += len(rows)
                on_commit(len(rows))
            for name, format in self.formats.items():
                self._write_shared(opened, name, format, is_stopping)
            if is_stopping():
                return ExportResult(self.samples, 0, made, False)
            return ExportResult(self.samples, opened.complete(), made, True)

    def _open(self) -> ExportFolder:
        if self.store is None:
            return ExportFolder(self.folder, self.description, is_copied=self.is_copied)
        return StoredExport(self.folder, self.description, self.store)

    def _write_shared(self, opened: ExportFolder, name: str, format: Format, is_stopping: Callable[[], bool]) -> None:
        if is_stopping():
            return
        samples = AllSamples(partial(opened.entries, name), lambda *places: map(self.view, opened.numbers_of(*places)))
        files = shared_files(name, format, self.plan, samples)
        paths = [f"{name}/{path}" for path in files]
        if name in EXPORT_FORMATS.others and (path := opened.find_repeated(paths)):
            raise Missing(
                f"writers: {name!r} of the package {EXPORT_FORMATS.package(name)} writes {path} more than once",
                f"Update that package, or remove it, and delete {self.folder}.",
            )
        for path, chunks in files.items():
            if not is_stopping():
                opened.share(f"{name}/{path}", chunks)
        self.limits += format.find_limits(self.plan, samples)

    def view(self, number: int) -> SampleView:
        return self._view(self.source.run[f"{number:08d}"])

    def _view(self, stored: StoredSample) -> SampleView:
        correction = self.source.corrections.get(stored.row.request.index)
        return SampleView(stored, self.source.split_of(stored.row), self.plan, correction)

    def _write(self, opened: ExportFolder, block: Sequence[SampleView]) -> list[tuple[Any, ...]]:
        contents: list[dict[str, Content]] = []
        entries: list[dict[str, Entry]] = []
        for view in block:
            contents.append({})
            entries.append({})
            for name, format in self.formats.items():
                convert = convert_by_package if name in EXPORT_FORMATS.others else _convert_sample
                files, entries[-1][name] = convert(name, format, view, self.plan)
                contents[-1] |= {f"{name}/{path}": content for path, content in files.items()}
        stored = opened.publish({name: content for files in contents for name, content in files.items()})
        return [
            done_row(view.number, view.split, of_view, {name: stored[name] for name in files})
            for view, files, of_view in zip(block, contents, entries)
        ]

    def close(self) -> None:
        self.source.run.close()


def _convert_sample(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    """The files and the entry of a sample in a format of ours; a label that cannot be read is a failed check."""
    try:
        return format.convert_sample(view, plan)
    except Unanswered:
        raise
    except (Refused, Missing, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        cause = error.cause if isinstance(error, (Refused, Missing)) else f"{type(error).__name__}: {error}"
        text = f"sample {view.stored.id} is damaged ({documents.one_line(cause)})"
        raise damage_of(view.stored.run, text) from error
