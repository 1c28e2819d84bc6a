"""Runs become one: every sample once, numbered anew, with the provenance of each; no byte of its files changes.
Runs in shards become a manifest whose entries name the shards of others, of which none is copied.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasetdm_fast.cores import in_threads
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import check_numbers
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.composition import Source, identity_of
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.audit import find_sharded
from datasetdm_fast.runs.run_folder.document import (
    DOCUMENT,
    FORMAT,
    SHARDS,
    check_same,
    damage_failure,
    engines_of,
    pretty,
    read_document,
    shard_size,
    sides,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder, publish_inside, publish_samples, unseal
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.selections import DROPPED_IDS, encode_dropped, origins
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, is_url, shard_place
from datasetdm_fast.runs.run_folder.shards import PARALLEL_READS, ShardEntry, entry_name, list_shards
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import LARGEST_IMAGE_FILE
from datasetdm_fast.version import __version__

LISTS = ("classes", "numbers", "colours")  # of a label's table, which that of another run may continue
UNCOMPARED = ("size",)  # of a label's table: the sides of its pictures, which every row has
# of the run.json of each run
REPEATED = "config sampling model decoders engine processor mixed composition speed verified".split()
MOST_SIDES = 6  # sizes of images that a reader sees one by one
CONVERT = "Convert each of the runs: trainers read several exports."
BLOCK = 32  # samples written and committed together, fewer where they are large:
BLOCK_PIXELS = 2**22  # pixels of all their images


class Merging:
    """A merged run that has been checked and has written nothing yet; threads share it."""

    layout: Mapping[str, Any] = {}  # settings that say how its samples are stored

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self._check_alike()
        self.labels = {task: self._merge_table(task) for task in sources[0].document["config"]["task"]}
        self.classes = max((source.document["classes"] for source in sources), key=len)
        try:
            check_numbers(self.classes, self.labels)
        except ValueError as error:
            raise Refused(
                f"{sources[0].place} and the others: their labels number the classes differently ({error})", CONVERT
            ) from error
        self.sides: set[tuple[int, int]] = set()
        self.duplicates = 0  # samples left out, as an earlier one has the same image
        self._read_samples()

    def _read_samples(self) -> None:
        self.places: list[tuple[int, int]] = []  # run and index of every sample, in order
        sources, images = self.sources, set[bytes]()
        for k, source in enumerate(sources):
            for row in source.run.rows(("files",)):
                digest = bytes.fromhex(row.files["image"].stored.sha256)
                if digest in images:
                    self.duplicates += 1
                else:
                    images.add(digest)
                    self.sides.add(sides(source.document, row.recipe))
                    self.places.append((k, row.request.index))
        if not self.places:
            raise Refused(f"{sources[0].path}: holds no sample", "Name run folders with samples.")
        self.number = len(self.places)
        self.largest = max(height * width for height, width in self.sides)

    def _check_alike(self) -> None:
        """Refuses runs with other labels or image files than the first."""
        first = self.sources[0]
        for other in self.sources[1:]:
            for name in ("task", "image_format"):
                values = [source.document["config"][name] for source in (other, first)]
                if sorted(values[0]) != sorted(values[1]):
                    shown = [", ".join(value) if isinstance(value, list) else value for value in values]
                    raise Refused(
                        f"{other.place}: its {name} is {shown[0]}, that of {first.place} is {shown[1]}", CONVERT
                    )

    def _merge_table(self, task: str) -> dict[str, Any]:
        """The table of a label for all runs; lists of classes may continue one another."""
        first = self.sources[0]
        table = dict(first.document["labels"][task])
        for source in self.sources[1:]:
            other = source.document["labels"][task]
            for name in sorted((set(table) | set(other)) - set(UNCOMPARED)):
                ours, theirs = table.get(name), other.get(name)
                if name in LISTS and ours is not None and theirs is not None:
                    apart = next((k for k, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
                    if apart is None:
                        table[name] = max(ours, theirs, key=len)
                        continue
                    ours, theirs = ours[apart], theirs[apart]
                if ours != theirs:
                    raise Refused(
                        f"{source.place}: {task}.{name} has {documents.quote(theirs)} where {first.place} has "
                        f"{documents.quote(ours)}",
                        CONVERT,
                    )
        return table

    @cached_property
    def document(self) -> dict[str, Any]:
        """The content of run.json."""
        runs, sources = [source.document for source in self.sources], self.sources
        first, sizes = runs[0], {run["sampling"]["size"] for run in runs}
        words = dict.fromkeys(word for run in runs for word in run["plan"].get("words", ()))
        tables = [run.get("class_table") for run in runs]
        packages = [run["packages"] for run in runs if "packages" in run]
        sides = " or ".join(f"{width} × {height}" for height, width in sorted(self.sides)) + " pixels"
        document = {
            "format": FORMAT,
            "command": "merge",
            "versions": {"datasetdm_fast": __version__},
            "config": {
                **{name: first["config"][name] for name in ("task", "image_format", "sampler", "seed")},
                **self.layout,
                "number": self.number,
                "kept": [source.filter_digest for source in sources],
            },
            "plan": {"number": self.number, "batch_size": 1, "words": list(words), "seeds": "of their runs"},
            "sampling": {**first["sampling"], "size": max(sizes)},
            "model": _merge([run["model"] for run in runs], _join_models),
            "decoders": {task: _merge_decoders(task, runs) for task in first["decoders"]},
            "engine": _merge(
                [engine for run in runs for engine in engines_of(run)],
                lambda engines: {"engine": _join(engine.get("engine", "") for engine in engines)},
            ),
            "labels": self.labels,
            "classes": self.classes,
            "composition": {
                "told": f"Merged from the runs {', '.join(source.path.resolve().name for source in sources)}",
                "sides": sides if len(self.sides) <= MOST_SIDES else f"{len(self.sides)} sizes",
                "source": {
                    "path": sources[0].place,
                    "paths": [source.place for source in sources],
                    "digests": {
                        f"{k}/{name}": digest
                        for k, source in enumerate(sources)
                        for name, digest in source.digests.items()
                    },
                    "runs": [{name: run[name] for name in REPEATED if name in run} for run in runs],
                },
            },
        }
        if tables[0] and all(table == tables[0] for table in tables):
            document["class_table"] = tables[0]
        if packages:
            document["packages"] = packages[0]
        return document

    def compose(self, index: int) -> tuple[Row, Files, dict[str, Path]]:
        """The row of a sample without its files, these, and where files of the same bytes lie."""
        k, earlier = self.places[index]
        source = self.sources[k]
        row = source.run[f"{earlier:08d}"].row
        files: Files = {}
        places = {}
        for role, (name, stored) in row.files.items():
            path = source.path / name
            if (content := storage.read_written(path, stored, LARGEST_IMAGE_FILE)) is None:
                raise damage_failure(source.path, name)
            new = f"{name.rpartition('/')[0]}/{index:08d}.{name.rpartition('.')[2]}"
            files[role], places[new] = (new, content), path
        provenance = {
            "sides": list(sides(source.document, row.recipe)),
            "merged": {"run": source.path.resolve().name, "id": row.request.id},
            "origins": [*origins(source.document, row), f"{source.digests['samples.jsonl'][:16]}/{row.request.id}"],
        }
        labels = {task: _remove_ids(record) for task, record in row.labels.items()}
        new_row = Row(replace(row.request, index=index), {**row.recipe, **provenance}, labels=labels, trust=row.trust)
        return new_row, files, places

    def close(self) -> None:
        for source in self.sources:
            source.close()


def write_missing(
    merging: Merging,
    folder: Path,
    *,
    is_linked: bool = True,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Writes missing samples, committed in order, then the index files; how many it wrote."""
    count = 0
    with RunFolder(folder, read_document(folder) or merging.document) as opened:
        existing = opened.ledger.indices_between(0, merging.number)
        missing = (index for index in range(merging.number) if index not in existing)
        size = min(max(BLOCK_PIXELS // merging.largest, 1), BLOCK)
        for rows in in_threads(partial(_write, merging, folder, is_linked), missing, size, 1, is_stopping):
            unseal(folder)
            opened.ledger.commit(rows)
            count += len(rows)
            on_commit(len(rows))
        finish_run(opened)
    return count


def _write(merging: Merging, folder: Path, is_linked: bool, block: Sequence[int]) -> list[Row]:
    """The rows of some samples, once their files are on the disk, as links where they can be."""
    samples = [merging.compose(index) for index in block]
    sources = {name: path for *_, places in samples for name, path in places.items()} if is_linked else {}

    def publish(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        linked = {
            name: StoredFile(hashlib.sha256(content).hexdigest(), len(content))
            for name, content in files.items()
            if name in sources and storage.link(sources[name], folder / name)
        }
        others = {name: content for name, content in files.items() if name not in linked}
        return {**linked, **publish_inside(folder, others)}

    return publish_samples([(row, files) for row, files, _ in samples], publish)


def _remove_ids(record: Any) -> Any:
    """The record of a label whose things are numbered anew."""
    if not isinstance(record, list):
        return record
    return [{name: value for name, value in item.items() if name != "id"} for item in record]


def _join(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _merge(records: Sequence[Mapping[str, Any]], join: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The record of all runs where they have the same, else their join."""
    return dict(records[0]) if all(record == records[0] for record in records) else join(records)


def _join_models(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entries = dict.fromkeys(name for model in models for name in model if name != "digests")
    names = {name: _join(model[name] for model in models if name in model) for name in entries}
    digests = {f"{k}/{n}": digest for k, model in enumerate(models) for n, digest in model["digests"].items()}
    return {**names, "digests": digests}


def _merge_decoders(task: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    records = [run["decoders"].get(task, {"digest": "", "licence": "none"}) for run in runs]
    return _merge(
        records, lambda records: {name: _join(row[name] for row in records) for name in ("digest", "licence")}
    )


class ShardMerging(Merging):
    """A merged run in shards at `out`."""

    def __init__(self, sources: Sequence[Source], out: str):
        if folders := [source.place for source in sources if source.run.shards is None]:
            raise Refused(f"{folders[0]}: it is a run folder, and others are in shards", CONVERT)
        self.place = shard_place(out)
        size = max(shard_size(source.document["config"]) for source in sources)
        self.layout = {"layout": SHARDS, "shard_size": size}
        super().__init__(sources)

    def _read_samples(self) -> None:
        self.entries: list[ShardEntry] = []
        self.dropped: set[int] = set()
        sizes = {source.document["sampling"]["size"] for source in self.sources}
        if len(sizes) > 1:
            raise Refused(f"{self.sources[0].place} and the others: their images have different sizes", CONVERT)
        self.sides = {(size, size) for size in sizes}
        known = set()
        for source in self.sources:
            ledger = source.run.shards
            assert ledger is not None
            remaining = set(source.run.indices) if source.filter_digest or ledger.dropped else None
            for shard, entry in sorted(ledger.entries.items()):
                files = frozenset(file.sha256 for file in entry.files.values())
                if files in known:
                    self.duplicates += len(entry.indices)
                    continue
                known.add(files)
                place, number = ledger.source_of(shard)
                first = len(self.entries) * self.layout["shard_size"]
                self.entries.append(entry.renumber(first, {"place": self._name(place), "shard": number}))
                if remaining is not None:
                    self.dropped |= {first + k - entry.first for k in entry.indices if k not in remaining}
        self.number = sum(entry.stop - entry.first for entry in self.entries)

    def _name(self, place: ShardPlace) -> str:
        """A place as the manifest names it: a folder by its path from that of the merged run."""
        if is_url(self.place.name):
            return place.name if is_url(place.name) else str(Path(place.name).resolve())
        if is_url(place.name):
            raise Refused(f"--out {self.place.name}: a run in a folder names no URL ({place.name})", "Give a URL.")
        return os.path.relpath(Path(place.name).resolve(), Path(self.place.name).resolve())

    def count_existing(self) -> int:
        """Samples of the entries that are there; a place that holds another run is refused."""
        document = find_sharded(self.place.name)
        if document is not None:
            check_same(Path(self.place.name), *map(identity_of, (document, self.document)))
        elif self.place.names():
            raise Refused(f"{self.place.name}: it is not empty", "Choose another --out; nothing is ever overwritten.")
        existing = set(list_shards(self.place))
        return sum(entry.stop - entry.first for shard, entry in enumerate(self.entries) if shard in existing)

    def write_missing(self, on_commit: Callable[[int], None], is_stopping: Callable[[], bool]) -> int:
        """Writes the entries that are missing, behind run.json and the list of samples that are left out; how many
        samples they have.
        """
        self.place.remove_parts(DOCUMENT, DROPPED_IDS, *map(entry_name, range(len(self.entries))))
        existing = set(list_shards(self.place))
        missing = [shard for shard in range(len(self.entries)) if shard not in existing]
        if not existing:  # later the list is the user's own
            self.place.create(DOCUMENT, pretty(self.document))
            if content := encode_dropped(self.dropped):
                self.place.replace(DROPPED_IDS, content)

        def write(shard: int) -> int:
            if is_stopping():
                return 0
            self.place.create(entry_name(shard), self.entries[shard].encode())
            return self.entries[shard].stop - self.entries[shard].first

        count = 0
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            for samples in pool.map(write, missing):
                count += samples
                on_commit(samples)
        return count
