"""A run in shards: tar files as WebDataset reads them, a Parquet index beside each, and an entry of the manifest for
each that is complete. No file names all samples, so none is written at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from datasetdm_fast.data import Request
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.instance import InstanceKind
from datasetdm_fast.errors import Missing, Refused, Unanswered
from datasetdm_fast.runs.run_folder.document import (
    DOCUMENT,
    MANIFEST,
    SHARDS,
    parse_document,
    shard_size,
    to_see_damage,
)
from datasetdm_fast.runs.run_folder.ledger import (
    DONE,
    DOUBTFUL,
    PARTS,
    QUARANTINED,
    Row,
    RowFile,
    Tally,
    canonical,
    decode_trust,
    digest_of,
    encode_trust,
)
from datasetdm_fast.runs.run_folder.selections import PARALLEL_READS, SCORES_FOLDER, Score, ShardScores, read_dropped
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, is_url, shard_place
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import LARGEST_IMAGE_FILE

OPEN_SHARDS = 4  # whose index and file are kept
LARGEST_RECORD = 2**26  # bytes of the JSON file of a sample
RECORD = "json"  # the role of a sample's record among its files in a shard
NOTHING: Mapping[str, Any] = {}  # one for all entries
ENTRY_FORM = {
    "first": int,
    "stop": int,
    "doubtful": int,
    "outside": int,
    "measured": int,
    "quarantined": dict,
    "classes": dict,
    "files": dict,
}


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest says of a complete shard; readers and supervisors hold those of all shards."""

    first: int  # index of its first sample
    stop: int  # and of the one after its last
    doubtful: int  # samples; where they are rejected, those in whose place others were made
    outside: int  # samples out of the domain of the decoders
    measured: int  # samples for which that is known
    quarantined: Mapping[str, Sequence[int]]  # reason -> indices of samples that were quarantined
    classes: Mapping[str, int]  # class -> instances
    files: Mapping[str, StoredFile]  # name -> what was written
    source: Mapping[str, Any] | None = None  # place and number of the shard of another run that it is, of a merged run

    @property
    def indices(self) -> Sequence[int]:
        """The samples of the data set."""
        absent = {index for indices in self.quarantined.values() for index in indices}
        indices = range(self.first, self.stop)
        return [index for index in indices if index not in absent] if absent else indices

    def encode(self) -> bytes:
        return canonical({name: part for name, part in asdict(self).items() if name != "source" or part}).encode()

    def renumber(self, first: int, source: Mapping[str, Any]) -> ShardEntry:
        """This shard as one of a merged run, where its first sample has another index."""
        by = first - self.first
        quarantined = {reason: [index + by for index in indices] for reason, indices in self.quarantined.items()}
        return replace(self, first=first, stop=self.stop + by, quarantined=quarantined, source=source)


def read_stored(place: ShardPlace) -> dict[str, Any] | None:
    """run.json, None where there is none."""
    content = place.read(DOCUMENT)
    return None if content is None else parse_document(content, f"{place.name}/{DOCUMENT}")


def list_shards(place: ShardPlace) -> list[int]:
    """The shards that have an entry in the manifest."""
    numbers = (name.removesuffix(".json") for name in place.names(MANIFEST))
    return sorted(int(number) for number in numbers if number.isascii() and number.isdecimal() and len(number) < 12)


def entry_name(shard: int) -> str:
    return f"{MANIFEST}/{shard:05d}.json"


def tar_name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.tar"


def index_name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.parquet"


def write_tar(files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of a tar archive of files without time and owner."""
    size = 0
    for name, data in files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        yield (block := info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        size += len(block)
    yield b"\0" * (2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)


def sample_record(row: Row, id: str) -> bytes:
    """The JSON file of a sample: its request, the labels that are no maps, and how far they can be trusted."""
    request, trust = row.request, encode_trust(row.trust)
    record = {"id": id, "prompt": request.prompt, "seed": request.seed, "classes": list(request.classes)}
    record |= {"labels": row.labels, "trust": trust and json.loads(trust)}
    return canonical(record).encode()


def require_pyarrow(what: str = "runs in shards") -> Any:
    """The library of Parquet files, without which there is no such thing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise Missing(
            f"{what}: pyarrow is not installed", "Install it with: pip install 'datasetdm-fast[hf]'."
        ) from error
    return pyarrow


def _schema() -> Any:
    arrow = require_pyarrow()
    texts = {name: arrow.string() for name in ("id", "prompt", "negative", "class_prompt", "status", "reason")}
    file = {name: arrow.string() for name in ("role", "path", "sha256")} | {
        "offset": arrow.int64(),
        "size": arrow.int64(),
    }
    return arrow.schema(
        {
            "index": arrow.int64(),
            "seed": arrow.int64(),
            **texts,
            "classes": arrow.list_(arrow.string()),
            "class_counts": arrow.list_(arrow.struct({"class": arrow.string(), "count": arrow.int32()})),
            "trust": arrow.string(),
            "recipe": arrow.string(),
            "record_offset": arrow.int64(),
            "record_size": arrow.int64(),
            "files": arrow.list_(arrow.struct(file)),
        }
    )


def instance_classes(document: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Label -> class names by number, of the labels that are instances."""
    labels = [label for label in document["config"]["task"] if isinstance(kind_of(label), InstanceKind)]
    return {label: kind_of(label).names(document["labels"][label]) for label in labels}


def count_classes(row: Row, names: Mapping[str, Mapping[int, str]]) -> Counter[str]:
    """Instances of each class; `names` are the classes of labels by their numbers."""
    labels = ((names[label], row.labels.get(label) or ()) for label in names)
    return Counter(classes[record["category_id"]] for classes, records in labels for record in records)


Places = Mapping[str, tuple[int, int]]  # role of a file of a sample, the record among them -> offset in the tar, bytes


def encode_index(rows: Sequence[Row], places: Sequence[Places], counts: Sequence[Counter[str]]) -> bytes:
    """The Parquet index of a shard: its rows, where their files lie in the tar file, and their instances by class."""
    arrow = require_pyarrow()
    recipes: dict[str, str] = {}
    lines = []
    for row, of_files, of_classes in zip(rows, places, counts, strict=True):
        recipe = canonical(row.recipe)
        recipes[digest_of(recipe)] = recipe
        files = [
            {"role": role, "path": path, "sha256": stored.sha256, "size": stored.size, "offset": of_files[role][0]}
            for role, (path, stored) in row.files.items()
        ]
        request = asdict(row.request) | {"id": row.request.id}
        outcome = {"status": row.status, "reason": row.reason, "trust": encode_trust(row.trust)}
        counted = [{"class": name, "count": count} for name, count in sorted(of_classes.items())]
        outcome |= {"class_counts": counted, "recipe": digest_of(recipe), "files": files}
        offset, size = of_files.get(RECORD, (0, 0))
        lines.append(request | outcome | {"record_offset": offset, "record_size": size})
    schema = _schema().with_metadata({"recipes": canonical(recipes)})
    table, sink = arrow.Table.from_pylist(lines, schema=schema), arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class ShardIndex:
    """The rows of a shard without their labels, and where their files lie in the tar file."""

    rows: Mapping[int, Row]
    places: Mapping[int, Places]
    by: int = 0  # what was added to the indices of its samples

    def renumber(self, by: int, run: str) -> ShardIndex:
        """The samples of a run as those of a merged one."""
        rows = {}
        for index, row in self.rows.items():
            id, new = row.request.id, f"{index + by:08d}"
            files = {role: RowFile(name.replace(id, new), stored) for role, (name, stored) in row.files.items()}
            recipe = {**row.recipe, "merged": {"run": run, "id": id}}
            rows[index + by] = replace(row, request=replace(row.request, index=index + by), recipe=recipe, files=files)
        return ShardIndex(rows, {index + by: places for index, places in self.places.items()}, by)

    @classmethod
    def decode(cls, content: bytes) -> ShardIndex:
        arrow = require_pyarrow()
        table = arrow.parquet.ParquetFile(arrow.BufferReader(content)).read(use_threads=False)
        recipes = {name: json.loads(text) for name, text in json.loads(table.schema.metadata[b"recipes"]).items()}
        rows: dict[int, Row] = {}
        places: dict[int, dict[str, tuple[int, int]]] = {}
        for line in table.to_pylist():
            texts = (line["negative"] or "", line["class_prompt"] or "")
            request = Request(line["index"], line["prompt"], line["seed"], tuple(line["classes"]), *texts)
            files, trust = line["files"], json.loads(line["trust"]) if line["trust"] else None
            places[request.index] = {file["role"]: (file["offset"], file["size"]) for file in files}
            places[request.index][RECORD] = (line["record_offset"], line["record_size"])
            stored = {
                file["role"]: RowFile(documents.check_inside(file["path"]), StoredFile(file["sha256"], file["size"]))
                for file in files
            }
            outcome = (line["status"], line["reason"], decode_trust(trust))
            rows[request.index] = Row(request, dict(recipes[line["recipe"]]), stored, {}, *outcome)
        return cls(rows, places)


class ShardLedger:
    """The rows of a run in shards that are complete, read as those of a ledger are."""

    def __init__(
        self,
        place: ShardPlace,
        size: int = 0,
        shards: Collection[int] | None = None,
        dropped: frozenset[int] = frozenset(),
        number: int = 0,
        counts_only: bool = False,
    ):
        """Of all shards, or of these; a last one with fewer samples than a run of `number` needs is left out. A `size`
        of 0 is that of run.json, which is there before the first shard. With `counts_only` entries keep neither files
        nor classes, for whoever supervises a long run.
        """
        self.place, self._size, self.dropped, self._number = place, size, dropped, number
        self._counts_only = counts_only
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock, self._process = threading.RLock(), os.getpid()
        self._places: dict[str, ShardPlace] = {}
        self.entries: dict[int, ShardEntry] = {}
        self.short: set[int] = set()  # shards that need more samples than they have
        self.made = 0  # samples, quarantined ones included
        self.read_entries(list_shards(place) if shards is None else shards)

    def read_entries(self, shards: Collection[int]) -> list[ShardEntry]:
        """The entries of those of the shards that were not known before."""
        new = [shard for shard in shards if shard not in self.entries]
        if new and not self._size:
            self._size = shard_size((read_stored(self.place) or {"config": {}})["config"])
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            entries = dict(zip(new, pool.map(self._read_entry, new)))
        read = {shard: entry for shard, entry in entries.items() if entry}
        entries = {shard: entry for shard, entry in read.items() if not self.is_short(entry)}
        self.short |= read.keys() - entries.keys()
        self.entries |= entries
        self.made += sum(entry.stop - entry.first for entry in entries.values())
        return list(entries.values())

    def is_short(self, entry: ShardEntry) -> bool:
        """Whether a shard has fewer samples than it needs, as its run has grown since."""
        return entry.stop < min(entry.first + self._size, self._number)

    def remove_short(self) -> None:
        """Takes out the last shard of a smaller run, which a process of that may commit after its run has grown."""
        for shard in self.short:
            self.place.remove(entry_name(shard))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.RLock()}

    def _damage(self, name: str, cause: object) -> Refused:
        return Refused(f"{self.place.name}/{name}: {cause}", to_see_damage(self.place.name))

    def _read_entry(self, shard: int) -> ShardEntry | None:
        """None where a process that lets the run grow has taken it out since it was listed."""
        name = entry_name(shard)
        if (content := self.place.read(name)) is None:
            return None
        try:
            value = documents.parse_json(content, "it")
            documents.check_form(value, ENTRY_FORM)
            documents.check_form(list(value["quarantined"].values()), [[int]])
            files = {documents.check_inside(path): StoredFile(**file) for path, file in value["files"].items()}
            if (source := value.get("source")) is not None:
                documents.check_form(source, {"place": str, "shard": int})
                if is_url(source["place"]) and not is_url(self.place.name):
                    raise ValueError("a run in a folder names a URL")  # which no flag asked for
            value["classes"] = {sys.intern(name): count for name, count in value["classes"].items()}
            entry = ShardEntry(**{**{part: value[part] for part in ENTRY_FORM}, "files": files, "source": source})
            number = source["shard"] if source else shard
            if set(files) != {tar_name(number), index_name(number)}:
                raise ValueError("it names other files than those of its shard")
            if not shard * self._size == entry.first < entry.stop <= entry.first + self._size:
                raise ValueError("it has other samples than its shard")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damage(name, f"not an entry of the manifest ({documents.reason_of(error)})") from error
        if self._counts_only:
            return replace(entry, quarantined=entry.quarantined or NOTHING, classes=NOTHING, files=NOTHING)
        return entry

    def indices(self, *statuses: str) -> list[int]:
        statuses = statuses or (DONE,)
        entries = [self.entries[shard] for shard in sorted(self.entries)]
        results = [index for entry in entries for index in entry.indices] if DONE in statuses else []
        if QUARANTINED in statuses:
            results += [index for indices in self.quarantined_by_reason().values() for index in indices]
        if self.dropped:
            results = [index for index in results if index not in self.dropped]
        return sorted(results) if len(statuses) > 1 else results

    def count(self, status: str = DONE) -> int:
        if status == DOUBTFUL:
            return sum(entry.doubtful for entry in self.entries.values())
        if self.dropped:
            return len(self.indices(status))
        quarantined = sum(map(len, self.quarantined_by_reason().values()))
        # without lists of indices, which the supervisor of a long run would hold for every sample
        return self.made - quarantined if status == DONE else quarantined

    def count_trust(self) -> tuple[int, int, int]:
        entries = self.entries.values()
        doubtful, outside = sum(entry.doubtful for entry in entries), sum(entry.outside for entry in entries)
        measured = sum(entry.measured for entry in entries)
        dropped = [index for index in sorted(self.dropped) if index // self._size in self.entries]
        for trust in (row.trust for row in self.rows_of(dropped, ()) if row.trust):
            doubtful, measured = doubtful - (not trust.is_trusted), measured - (trust.domain is not None)
            outside -= trust.domain is not None and trust.domain > 1
        return doubtful, outside, measured

    def quarantined_by_reason(self) -> dict[str, list[int]]:
        results: dict[str, list[int]] = {}
        for entry in self.entries.values():
            for reason, indices in entry.quarantined.items():
                results.setdefault(reason, []).extend(indices)
        return results

    def tally(self, number: int, classes: int) -> Tally:
        return [(self.made, 0)]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within the block this process alone changes dropped samples and scores, which are those of now."""
        with self.place.hold(SCORES_FOLDER):
            self.dropped = read_dropped(self.place)
            self.__dict__.pop("scored", None)
            yield

    @cached_property
    def scored(self) -> ShardScores:
        return ShardScores(self.place)

    def add_scores(self, scores: Iterable[tuple[int, str, Score]], *, replaces: bool = True) -> None:
        """Adds scores of samples: index, name and value, in place of existing ones."""
        added: dict[int, dict[str, dict[int, Score]]] = {}
        for index, name, value in scores:
            added.setdefault(index // self._size, {}).setdefault(name, {})[index] = value
        for shard, each in added.items():
            self.scored.write(shard, each)

    def forget_scores(self, name: str, why: tuple[str, str]) -> None:
        self.scored.forget(name, why)

    def scores(self, name: str) -> list[tuple[int, Score]]:
        return list(self.scored.of(name))

    def score_names(self) -> list[str]:
        return self.scored.names()

    def class_words(self) -> list[tuple[int, tuple[str, ...]]]:
        return [(row.request.index, row.request.classes) for row in self.rows(parts=())]

    def read_note(self, name: str) -> str | None:
        content = self.place.read(f"{SCORES_FOLDER}/{name}")
        return content and content.decode(errors="replace")

    def by_shard(self, indices: Iterable[int]) -> dict[int, list[int]]:
        """Shard -> those of the samples that are in it."""
        shards: dict[int, list[int]] = {}
        for index in indices:
            shards.setdefault(index // self._size, []).append(index)
        return shards

    def rows_of(self, indices: Iterable[int], parts: Sequence[str] = PARTS) -> Iterator[Row]:
        """The rows of samples; only the indexes of their shards are read."""
        for shard, members in self.by_shard(indices).items():
            rows = self.index_of(shard).rows
            for index in members:
                yield self._with_labels(rows[index]) if "labels" in parts else rows[index]

    def row(self, index: int, parts: Sequence[str] = PARTS) -> Row | None:
        if index // self._size not in self.entries or index in self.dropped:
            return None
        row = self.index_of(index // self._size).rows.get(index)
        return self._with_labels(row) if row and "labels" in parts else row

    def rows(self, *statuses: str, parts: Sequence[str] = PARTS) -> Iterator[Row]:
        return self.rows_of(self.indices(*statuses), parts)

    def index_of(self, shard: int) -> ShardIndex:
        """The index of a shard; other bytes than were written are refused."""
        with self._lock:
            if (index := self._indexes.pop(shard, None)) is None:
                index = self._read_index(shard)
            self._indexes[shard] = index
            while len(self._indexes) > OPEN_SHARDS:
                self._indexes.popitem(last=False)
            return index

    def source_of(self, shard: int) -> tuple[ShardPlace, int]:
        """The place that has the files of a shard, and its number there."""
        if (source := self.entries[shard].source) is None:
            return self.place, shard
        if (name := source["place"]) not in self._places:
            self._places[name] = shard_place(name if is_url(name) else Path(self.place.name, name))
        return self._places[name], source["shard"]

    def _read_index(self, shard: int) -> ShardIndex:
        place, number = self.source_of(shard)
        name, entry = index_name(number), self.entries[shard]
        content = place.read(name)
        if content is None or hashlib.sha256(content).hexdigest() != entry.files[name].sha256:
            raise self._damage(name, "it is missing or has changed since it was written")
        try:
            index = ShardIndex.decode(content)
            return index.renumber(entry.first - min(index.rows), Path(place.name).name) if entry.source else index
        except (ValueError, TypeError, KeyError, AttributeError, OSError, NotImplementedError) as error:
            raise self._damage(name, f"not the index of a shard ({documents.reason_of(error)})") from error

    def _with_labels(self, row: Row) -> Row:
        if row.status != DONE:
            return row
        try:
            record = documents.parse_json(self.read_file(row, RECORD), "its record")
            documents.check_form(record, {"id": str, "labels": dict})
            if record["id"] != self.stored_id(row):
                raise ValueError(f"it is that of sample {documents.quote(record['id'])}")
        except (ValueError, TypeError) as error:
            name = tar_name(row.request.index // self._size)
            cause = f"the record of sample {row.request.id} is damaged ({documents.reason_of(error)})"
            raise self._damage(name, cause) from error
        return Row(row.request, dict(row.recipe), row.files, record["labels"], row.status, row.reason, row.trust)

    def stored_id(self, row: Row) -> str:
        """The id of a sample in its shard."""
        return f"{row.request.index - self.index_of(row.request.index // self._size).by:08d}"

    def read_file(self, row: Row, role: str) -> bytes:
        """The bytes of a file of a sample, as they are in its shard."""
        shard = row.request.index // self._size
        offset, size = self.index_of(shard).places[row.request.index][role]
        if not 0 <= size <= max(LARGEST_IMAGE_FILE, LARGEST_RECORD):
            raise self._damage(index_name(shard), f"a file of sample {row.request.id} has {size} bytes")
        place, number = self.source_of(shard)
        with self._lock, place.refusing(tar_name(number)):
            file = self._file(shard)
            file.seek(offset)
            return file.read(size)

    def _file(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():  # a fork shares the places in files with its parent
            self._open, self._process = OrderedDict(), os.getpid()
        if (file := self._open.pop(shard, None)) is None:
            place, number = self.source_of(shard)
            file = place.open(tar_name(number))
        self._open[shard] = file
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def digest_of_shard(place: ShardPlace, name: str) -> StoredFile | None:
    """Digest and size of a file of a run as it is now, None where it is missing."""
    try:
        with place.refusing(name), place.open(name) as file:
            return StoredFile(hashlib.file_digest(file, "sha256").hexdigest(), file.seek(0, os.SEEK_END))
    except Unanswered:
        raise
    except (Missing, FileNotFoundError):
        return None
