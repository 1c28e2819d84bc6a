"""Runs become one: every sample once, numbered anew, with what it was made of; no byte of its files changes."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.engine.labels.numbering import check_numbers
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.compositions.source import begun, check_filter, decisive, digests_of
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import FORMAT, check_same, damaged, engines_of, read_document, sides
from datasetdm_fast.runs.run_folder.folder import RunFolder, into, publish_samples
from datasetdm_fast.runs.run_folder.kept import KEPT
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.object_store import refuse_stored
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.remaking import check_given, remakable
from datasetdm_fast.runs.run_folder.seal import is_sealed
from datasetdm_fast.runs.run_folder.split import origins
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import LARGEST_IMAGE_FILE
from datasetdm_fast.version import __version__

BLOCK = 32  # samples written and committed together
LISTS = ("classes", "numbers", "colours")  # of a label's table, which that of another run may continue
OWN = ("size",)  # of a label's table: the sides of its pictures, which every row tells

# of the run.json of a part, what that of all repeats
TOLD = ("config", "sampling", "model", "decoders", "engine", "mixed", "composition")
MOST_SIDES = 6  # sizes of images that a reader is told one by one


@dataclass(frozen=True)
class Part:
    """A finished run that becomes part of another."""

    path: Path
    run: Run
    kept_digest: str

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the files that tell every sample of the run with its labels."""
        return digests_of(self.path, self.run.document)


def open_part(path: Path, *, only_kept: bool) -> Part:
    """A run folder to be merged."""
    run = Run(path, kept=only_kept)
    refuse_stored(path)
    if not run.is_complete or not is_sealed(path):
        raise Refused(f"{path}: the run is not finished", "Run the command that made it again: it resumes.")
    kept = storage.sha256_of(path / KEPT) if only_kept else ""
    if only_kept and not kept:
        raise Refused(
            f"--kept: {path} has not been filtered",
            f"Drop it, or filter first with: python -m datasetdm_fast.filter {quote(path)} --where CONDITION",
        )
    return Part(path, run, kept)


class Merging:
    """A merged run that has been checked and has written nothing yet."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        first = parts[0].run.document
        for part in parts[1:]:
            other = part.run.document
            for name in ("task", "image_format"):
                if sorted(other["config"][name]) != sorted(first["config"][name]):
                    raise Refused(
                        f"{part.path}: its {name} is {_told(other['config'][name])}, that of {parts[0].path} is "
                        f"{_told(first['config'][name])}",
                        "Give both runs to convert instead: it makes one export of them.",
                    )
        self.labels = {task: self._table(task) for task in first["config"]["task"]}
        self.classes = max((part.run.document.get("classes", []) for part in parts), key=len)
        try:
            check_numbers(self.classes or None, self.labels)
        except ValueError as error:
            raise Refused(
                f"{parts[0].path} and the others: their labels number the classes differently ({error})",
                "Give the runs to convert instead: it matches classes by name.",
            ) from error
        self.places, self.sides, self.duplicates = self._places()

    def _table(self, task: str) -> dict[str, Any]:
        """What run.json says of a label in all runs; lists of classes may continue one another."""
        table = dict(self.parts[0].run.document["labels"][task])
        for part in self.parts[1:]:
            other = part.run.document["labels"][task]
            for name in sorted(set(table) | set(other) - set(OWN)):
                ours, theirs = table.get(name), other.get(name)
                if name in LISTS and ours is not None and theirs is not None:
                    apart = next((k for k, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
                    if apart is None:
                        table[name] = max(ours, theirs, key=len)
                        continue
                    ours, theirs = ours[apart], theirs[apart]
                if ours != theirs and name not in OWN:
                    raise Refused(
                        f"{part.path}: {task}.{name} has {documents.quoted(theirs)} where {self.parts[0].path} has "
                        f"{documents.quoted(ours)}",
                        "Give both runs to convert instead: it matches classes by name.",
                    )
        return table

    def _places(self) -> tuple[list[tuple[int, int]], set[tuple[int, int]], int]:
        """Run and index of every sample, in order, the sides of their images, and how many were left out as their image
        was there before.
        """
        found, shapes, seen, left_out = [], set(), set(), 0
        for k, part in enumerate(self.parts):
            for row in part.run.rows(("files",)):
                digest = bytes.fromhex(row.files["image"][1].sha256)
                if digest in seen:
                    left_out += 1
                else:
                    seen.add(digest)
                    shapes.add(sides(part.run.document, row.recipe))
                    found.append((k, row.request.index))
        if not found:
            raise Refused(f"{self.parts[0].path}: holds no sample", "Name run folders with samples.")
        return found, shapes, left_out

    @cached_property
    def document(self) -> dict[str, Any]:
        """The content of run.json."""
        runs = [part.run.document for part in self.parts]
        names = [part.path.resolve().name for part in self.parts]
        first, sizes = runs[0], {run["sampling"]["size"] for run in runs}
        words = dict.fromkeys(word for run in runs for word in run["plan"].get("words", ()))
        digests = {f"{k}/{name}": digest for k, part in enumerate(self.parts) for name, digest in part.digests.items()}
        return {
            "format": FORMAT,
            "command": "merge",
            "versions": {"datasetdm_fast": __version__},
            "config": {
                **{name: first["config"][name] for name in ("task", "image_format", "sampler", "seed")},
                "number": len(self.places),
                "kept": [part.kept_digest for part in self.parts],
            },
            "plan": {"number": len(self.places), "batch_size": 1, "words": list(words), "seeds": "of their runs"},
            "sampling": {**first["sampling"], "size": max(sizes)},
            "model": self._models(),
            "decoders": {task: self._decoders(task) for task in first["decoders"]},
            "engine": self._engine(),
            "labels": self.labels,
            **({"classes": self.classes} if self.classes else {}),
            **self._class_table(),
            **self._packages(),
            "composition": {
                "told": f"Merged from the runs {', '.join(names)}",
                "sides": self._sides_in_words(),
                "source": {
                    "path": str(self.parts[0].path),
                    "paths": [str(part.path) for part in self.parts],
                    "digests": digests,
                    "runs": [{name: run[name] for name in TOLD if name in run} for run in runs],
                },
            },
        }

    def _sides_in_words(self) -> str:
        """Width and height of the images of all runs, for a reader."""
        if len(self.sides) > MOST_SIDES:
            return f"{len(self.sides)} sizes"
        return " or ".join(f"{width} × {height}" for height, width in sorted(self.sides)) + " pixels"

    def _class_table(self) -> dict[str, Any]:
        """The user's own class words, where all runs were made with the same."""
        tables = [part.run.document.get("class_table") for part in self.parts]
        return {"class_table": tables[0]} if tables[0] and all(table == tables[0] for table in tables) else {}

    def _packages(self) -> dict[str, Any]:
        """Packages of labels, as the first run that tells of them does."""
        told = [part.run.document["packages"] for part in self.parts if "packages" in part.run.document]
        return {"packages": told[0]} if told else {}

    def _models(self) -> dict[str, Any]:
        models = [part.run.document["model"] for part in self.parts]
        if all(model == models[0] for model in models):
            return models[0]
        joined = {name: _joined(model[name] for model in models) for name in ("name", "source", "licence")}
        return {
            **joined,
            "digests": {f"{k}/{n}": d for k, model in enumerate(models) for n, d in model["digests"].items()},
        }

    def _engine(self) -> dict[str, Any]:
        engines = [engine for part in self.parts for engine in engines_of(part.run.document)]
        if all(engine == engines[0] for engine in engines):
            return dict(engines[0])
        return {"engine": _joined(engine.get("engine", "") for engine in engines)}

    def _decoders(self, task: str) -> dict[str, Any]:
        entries = [part.run.document["decoders"].get(task, {"digest": "", "licence": "none"}) for part in self.parts]
        if all(entry == entries[0] for entry in entries):
            return entries[0]
        return {name: _joined(entry[name] for entry in entries) for name in ("digest", "licence")}

    def made(self, index: int) -> tuple[Row, Files, dict[str, Path]]:
        """The row of a sample, which has no files yet, its files, and where each of them lies in its run."""
        k, old = self.places[index]
        part = self.parts[k]
        row = part.run[f"{old:08d}"].row
        files: Files = {}
        sources = {}
        for role, (name, stored) in row.files.items():
            path = part.path / name
            if (content := storage.read_written(path, stored, LARGEST_IMAGE_FILE)) is None:
                raise damaged(part.path, name)
            new = f"{name.rpartition('/')[0]}/{index:08d}.{name.rpartition('.')[2]}"
            files[role], sources[new] = (new, content), path
        told = {
            "sides": list(sides(part.run.document, row.recipe)),
            "merged": {"run": part.path.resolve().name, "id": row.request.id},
            "origins": [*origins(part.run.document, row), f"{part.digests['samples.jsonl'][:16]}/{row.request.id}"],
        }
        labels = {task: _without_ids(record) for task, record in row.labels.items()}
        made = Row(replace(row.request, index=index), {**row.recipe, **told}, labels=labels, trust=row.trust)
        return made, files, sources

    def close(self) -> None:
        for part in self.parts:
            part.run.close()


def _without_ids(record: Any) -> Any:
    """The record of a label whose things are numbered anew."""
    if not isinstance(record, list):
        return record
    return [{name: value for name, value in item.items() if name != "id"} for item in record]


def _joined(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _told(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def begin(merging: Merging, folder: Path) -> int:
    """Samples that the run folder holds already; other runs are refused."""
    return begun(folder, merging.document)


def run(
    merging: Merging,
    folder: Path,
    *,
    is_copied: bool,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Takes over the missing samples in order, then writes the index files; how many it took."""
    done = 0
    with RunFolder(folder, read_document(folder) or merging.document) as opened:
        there = opened.ledger.within(0, len(merging.places))
        wanted = (index for index in range(len(merging.places)) if index not in there)
        while not is_stopping() and (block := list(islice(wanted, BLOCK))):
            rows = _write(merging, block, folder, is_copied)
            opened.unseal()
            opened.commit(rows)
            done += len(rows)
            on_commit(len(rows))
        if not is_stopping():
            finish_run(opened)
    return done


def _write(merging: Merging, block: Sequence[int], folder: Path, is_copied: bool) -> list[Row]:
    """The rows of some samples, once their files are on the disk, as links where they can be."""
    made = [merging.made(index) for index in block]
    sources = {name: path for _, _, places in made for name, path in places.items()}
    written = into(folder)

    def publish(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        linked = {
            name: StoredFile(hashlib.sha256(content).hexdigest(), len(content))
            for name, content in files.items()
            if name in sources and not is_copied and storage.link(sources[name], folder / name)
        }
        return {**linked, **written({name: content for name, content in files.items() if name not in linked})}

    return publish_samples([(row, files) for row, files, _ in made], publish)


def to_remake(folder: Path, id: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], Row]:
    """run.json and the row of a sample of a run folder that merge made, with the settings in `given`."""
    stored, row = remakable("merge", folder, id)
    check_given(folder, {"kept": any(stored["config"].get("kept", ()))}, given)
    return stored, row


def remake(folder: Path, stored: Mapping[str, Any], row: Row, runs: Sequence[str] = ()) -> list[str]:
    """Takes over one sample of a merged run again; the files that were missing or damaged. `runs` are where the
    merged runs lie now, if they were moved.
    """
    paths = [Path(path) for path in runs or stored["composition"]["source"]["paths"]]
    if len(paths) != len(stored["config"]["kept"]):
        raise Refused(
            f"{folder}: was merged from {len(stored['config']['kept'])} runs, not from {len(paths)}",
            "Name them all, in their order, or none where they were not moved.",
        )
    chosen = list(zip(paths, stored["config"]["kept"]))
    for path, kept in chosen:
        check_filter(folder, path, kept)
    merging = Merging([open_part(path, only_kept=bool(kept)) for path, kept in chosen])
    check_same(folder, *map(decisive, (stored, merging.document)))
    with RunFolder(folder, stored) as opened:
        again, files, _ = merging.made(row.request.index)
        written = opened.restore(row, files, again.labels)
        finish_run(opened)
    return written
