"""Samples of runs become an export: one pass over them, then the files that they share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.disk.blocks import in_threads
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.plugins import load_place
from datasetdm_fast.runs.exporting import export_folder, plugin_formats
from datasetdm_fast.runs.exporting.classes import PERSON, Renaming, join_classes
from datasetdm_fast.runs.exporting.export_folder import DoneSample, ExportFolder
from datasetdm_fast.runs.exporting.format import AllSamples, Content, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.settings import LayoutSettings, PictureSettings
from datasetdm_fast.runs.exporting.sources import TRAIN, ExportSource, damage_of
from datasetdm_fast.runs.exporting.view import RunView, SampleView
from datasetdm_fast.runs.run_folder.document import table_of
from datasetdm_fast.runs.run_folder.ledger import canonical
from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.runs.run_folder.split import origins
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__

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
    return load_place(entry) if isinstance(entry, str) else plugin_formats.check_format(name, entry)


class Conversion:
    """An export that has been checked and has written nothing yet; `identity` are the settings in its export.json."""

    def __init__(
        self,
        sources: Sequence[ExportSource],
        formats: Sequence[str],
        folder: Path,
        identity: Mapping[str, Any],
        *,
        renaming: Sequence[str] = (),
        pictures: PictureSettings = PICTURES,
        layout: LayoutSettings = LAYOUT,
        is_copied: bool = False,
    ):
        self.sources, self.folder, self.is_copied = sources, folder, is_copied
        self.formats: dict[str, Format] = {name: open_format(name) for name in formats}
        first = sources[0]
        for other in sources[1:]:
            if apart := set(first.labels) ^ set(other.labels):
                raise Refused(
                    f"{other.run.path}: only one of it and {first.run.path} has labels for {', '.join(sorted(apart))}",
                    "Name the labels that both have with --task.",
                )
        renamed = Renaming.parse(renaming)
        classes = join_classes([(source.run.document, source.labels) for source in sources], renamed)
        self.views = [RunView.of(each.run.document, each.labels, classes, renamed) for each in sources]
        self._read_samples()
        tasks, tables = frozenset(first.labels), self._merge_tables(renamed(PERSON))
        self.plan = ExportPlan(classes, self.splits, tasks, **tables, pictures=pictures, layout=layout)
        for name, format in self.formats.items():
            format.check(name, self.plan)
        run_documents = [source.run.document for source in sources]
        licences = {document["model"]["licence"] for document in run_documents}
        licences |= {entry["licence"] for document in run_documents for entry in document["decoders"].values()}
        self.description = {  # of export.json
            "format": export_folder.FORMAT,
            "versions": {"datasetdm_fast": __version__},
            "settings": identity,
            "runs": self.runs,
            "samples": self.samples,
            "splits": self.splits,
            "classes": list(classes.names),
            "licences": sorted(licences),
        }
        self.is_complete = export_folder.check_target(folder, self.description)

    def _merge_tables(self, person: str) -> dict[str, Any]:
        """Joints, limbs and the farthest depth of all runs."""
        people, depths = [], [0.0]
        for source in self.sources:
            tables = {task: source.run.document["labels"][label] for task, label in source.labels.items()}
            depths += [float(tables["depth"]["max_depth"])] if "depth" in tables else []
            people += [tables["pose"]] if "pose" in tables else []
            if people and people[-1]["joints"] != people[0]["joints"]:
                raise Refused(
                    f"{source.run.path}: its joints are not those of {self.sources[0].run.path}",
                    "Convert them separately, or leave pose out with --task.",
                )
        return {
            "people": (person,) if people and person else (),
            "joints": tuple(people[0]["joints"]) if people else (),
            "limbs": tuple((int(a), int(b)) for a, b in people[0]["limbs"]) if people else (),
            "max_depth": max(depths),
        }

    def _read_samples(self) -> None:
        """Counts the samples of each split, numbers them and takes their digest; refuses samples of one picture in
        several splits.
        """
        counts: Counter[str] = Counter()
        splits: dict[str, str] = {}  # origin of samples -> split
        is_split = len(self.sources) > 1 and any(source.splits for source in self.sources)
        self.runs, self.offsets, offset = [], [], 0
        for source in self.sources:
            digest, count, last = hashlib.sha256(), 0, -1
            for row in source.rows():
                split, files = source.split_of(row), {role: stored.sha256 for role, (_, stored) in row.files.items()}
                identity = [row.request.index, row.request.prompt, files, row.labels]
                correction = source.corrections.get(row.request.index)
                identity += [correction.ignored] if correction and correction.ignored else []
                try:
                    digest.update(canonical(identity if source.splits is None else [*identity, split]).encode())
                except ValueError as error:
                    text = f"sample {row.request.id} is damaged (its labels hold NaN or an infinite number)"
                    raise damage_of(source.run.path, text) from error
                counts[split] += 1
                for name in origins(source.run.document, row) if is_split else ():
                    if splits.setdefault(name, split) != split:
                        raise Refused(
                            f"{source.run.path}: sample {row.request.id} is for {split}, and one made of the same "
                            f"picture for {splits[name]}",
                            "Merge the runs, then split the result.",
                        )
                count, last = count + 1, row.request.index
            self.runs.append({"name": source.run.path.resolve().name, "samples": count, "sha256": digest.hexdigest()})
            self.offsets.append(offset)
            offset += last + 1
        if not counts:
            raise Refused(
                f"{self.sources[0].run.path}: no sample to convert",
                "Name a run folder with samples, let more pass --kept and --where, or restore dropped ones.",
            )
        order = dict.fromkeys((*USUAL_SPLITS, *sorted(counts)))
        self.splits = {name: counts[name] for name in order if name in counts}

    @property
    def samples(self) -> int:
        return sum(self.splits.values())

    def notes(self) -> Iterator[str]:
        """What a user should know of the runs and formats before their samples are converted."""
        for source in self.sources:
            if source.corrections:
                yield f"{source.run.path}: corrections of {count_noun(len(source.corrections), 'sample')} are applied"
            if not source.run.is_complete:
                yield f"{source.run.path}: not finished; converted so far: {len(source.run)} samples"
            if source.splits is None and any(other.splits is not None for other in self.sources):
                yield f"{source.run.path}: not split as the other runs are, so that all of its samples are in train"
        for name, format in self.formats.items():
            if unknown := format.unknown_classes(self.plan):
                yield f"{name}: it has no class {', '.join(unknown)}, which --classes can rename"

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
        with ExportFolder(self.folder, self.description, is_copied=self.is_copied) as opened:
            done = opened.numbers()
            missing = (view for view in self._views() if view.number not in done)
            for rows in in_threads(partial(self._write, opened), missing, BLOCK, threads, is_stopping):
                opened.commit(rows)
                made += len(rows)
                on_commit(len(rows))
            if is_stopping():
                return ExportResult(self.samples, 0, made, False)
            for name, format in self.formats.items():
                self._write_shared(opened, name, format)
            return ExportResult(self.samples, opened.complete(), made, True)

    def _write_shared(self, opened: ExportFolder, name: str, format: Format) -> None:
        samples = AllSamples(partial(opened.entries, name), lambda *places: map(self.view, opened.numbers_of(*places)))
        if name in EXPORT_FORMATS.others:
            files = plugin_formats.shared_files(name, format, self.plan, samples)
            if path := opened.find_repeated(f"{name}/{path}" for path in files):
                raise Missing(
                    f"writers: {name!r} of the package {EXPORT_FORMATS.package(name)} writes {path} more than once",
                    f"Update that package, or remove it, and delete {self.folder}.",
                )
        else:
            files = format.shared_files(self.plan, samples)
        for path, chunks in files.items():
            opened.share(f"{name}/{path}", chunks)

    def _views(self) -> Iterator[SampleView]:
        for source, view, offset in zip(self.sources, self.views, self.offsets):
            run, table = source.run, table_of(source.run.document)
            for row in source.rows():
                stored = StoredSample(row, run.path, run.document, run.copies, table)
                number, correction = offset + row.request.index, source.corrections.get(row.request.index)
                yield SampleView(stored, number, source.split_of(row), view, self.plan.pictures, correction)

    def view(self, number: int) -> SampleView:
        """The sample of a number."""
        place = max(k for k, offset in enumerate(self.offsets) if offset <= number)
        source = self.sources[place]
        stored = source.run[f"{number - self.offsets[place]:08d}"]
        stored = replace(stored, row=source.correct(stored.row))
        options = self.views[place], self.plan.pictures, source.corrections.get(stored.row.request.index)
        return SampleView(stored, number, source.split_of(stored.row), *options)

    def _write(self, opened: ExportFolder, block: Sequence[SampleView]) -> list[DoneSample]:
        contents: list[dict[str, Content]] = []
        entries: list[dict[str, Entry]] = []
        for view in block:
            contents.append({})
            entries.append({})
            for name, format in self.formats.items():
                convert = plugin_formats.convert_sample if name in EXPORT_FORMATS.others else _convert_sample
                files, entries[-1][name] = convert(name, format, view, self.plan)
                contents[-1] |= {f"{name}/{path}": content for path, content in files.items()}
        stored = opened.publish({name: content for files in contents for name, content in files.items()})
        return [
            DoneSample(view.number, view.split, of_view, {name: stored[name] for name in files})
            for view, files, of_view in zip(block, contents, entries)
        ]

    def close(self) -> None:
        with ExitStack() as closing:
            for source in self.sources:
                closing.callback(source.run.close)


def _convert_sample(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    """The files and the entry of a sample in a format of ours; a label that cannot be read is a failed check."""
    try:
        return format.convert_sample(view, plan)
    except (Refused, Missing, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        cause = error.cause if isinstance(error, (Refused, Missing)) else f"{type(error).__name__}: {error}"
        text = f"sample {view.stored.id} is damaged ({documents.one_line(cause)})"
        raise damage_of(view.stored.run, text) from error
