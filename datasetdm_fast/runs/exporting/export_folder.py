"""The folder of an export, or its place in a store: its description, which samples are done, digests of its files."""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import GateFailed, Refused, refusing_form
from datasetdm_fast.runs.exporting.format import Content, Linked
from datasetdm_fast.runs.run_folder.document import EXPORTS, check_same, pretty, run_around
from datasetdm_fast.runs.run_folder.shard_places import PARALLEL_FILES, ShardBucket, ShardFolder, is_url, shard_place
from datasetdm_fast.untrusted import documents

DOCUMENT = "export.json"  # the description of the export; "complete" once all is written
SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads them
WORK = ".converting"  # which samples are done; removed once the export is complete
FORM = {"format": int, "complete": bool, "settings": dict, "runs": [dict], "samples": int, "splits": dict}
FORMAT = 1
DEFAULTS = {"resize": 0, "part": ""}  # of settings that some versions do not have
_SCHEMA = """
CREATE TABLE IF NOT EXISTS done (number INTEGER PRIMARY KEY, split TEXT NOT NULL, entries TEXT NOT NULL,
    files TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shared (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL);
"""
BLOCK = 256  # rows read at once
Rows = Sequence[Sequence[Any]]


def done_row(number: int, split: str, entries: Mapping[str, Any], files: Mapping[str, StoredFile]) -> tuple[Any, ...]:
    """The row of a sample that is done, with its entries by format."""
    digests = [[name, stored.sha256, stored.size] for name, stored in files.items()]
    return number, split, json.dumps(entries, ensure_ascii=False), json.dumps(digests)


def read_export(folder: Path) -> dict[str, Any]:
    """export.json of a folder that must be an export."""
    path = folder / DOCUMENT
    document = documents.read_object(path)
    with refusing_form(path, "description of an export", "Export again."):
        documents.check_form(document, FORM)
    if document["format"] != FORMAT:
        raise Refused(
            f"{path}: format {documents.quote(document['format'])}, this version reads {FORMAT}",
            "Read it with the version that wrote it.",
        )
    return document


def check_target(folder: Path, description: Mapping[str, Any]) -> bool:
    """Whether the export is complete already; refuses a folder that may not become this export."""
    run = run_around(folder / "format")  # the folder itself may be one
    if run is not None and folder.resolve().relative_to(run).parts[:1] != (EXPORTS,):
        raise Refused(
            f"--out {folder}: it lies inside the run folder {run}", f"Choose {run / EXPORTS}, or another folder."
        )
    with storage.refusing(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # a process killed right at the start leaves no more than its work folder
    if not any(name != WORK and not storage.is_temporary(Path(name)) for name in names):
        return False
    if DOCUMENT not in names:
        raise Refused(
            f"--out {folder}: it is not empty and not an export, because it has no {DOCUMENT}",
            "Choose another --out; nothing is ever overwritten.",
        )
    stored = read_export(folder)
    settings = [{"settings": DEFAULTS | document["settings"]} for document in (stored, description)]
    check_same(folder, *settings, "an export")
    # the folders of the runs may have been renamed since
    contents = [[{**run, "name": ""} for run in document["runs"]] for document in (stored, description)]
    if stored["splits"] != description["splits"] or contents[0] != contents[1]:
        counts = [
            ", ".join(f"{name} {count}" for name, count in document["splits"].items())
            for document in (stored, description)
        ]
        raise Refused(
            f"{folder}: it holds an export of other samples or of another split ({counts[0]} there, {counts[1]} asked "
            "for)",
            "Choose another --out, or delete the folder if its run was changed since.",
        )
    return stored["complete"]


class ExportFolder(AbstractContextManager):
    """The folder of an export open for writing, locked by this process until it is closed."""

    def __init__(self, folder: Path, description: Mapping[str, Any], *, is_copied: bool):
        self.folder, self._description, self._is_copied = folder, description, is_copied
        storage.make_folder(folder / WORK)
        with ExitStack() as closing:
            closing.enter_context(storage.hold_lock(folder / WORK / "lock"))
            storage.remove_temporaries(folder)
            if not (folder / DOCUMENT).exists():
                storage.publish({folder / DOCUMENT: pretty({**description, "complete": False})})
            self._done = sqlite.connect(folder / WORK / "done.sqlite", _SCHEMA)
            closing.callback(lambda: self._done.close())
            self._closing = closing.pop_all()

    def numbers(self) -> set[int]:
        """The samples whose files are all there."""
        return {number for (number,) in self._done.execute("SELECT number FROM done")}

    def publish(self, files: Mapping[str, Content]) -> dict[str, StoredFile]:
        """The digests of files, once all of them are on the disk under their names."""
        stored = {name: content.stored for name, content in files.items() if isinstance(content, Linked)}
        contents = {}
        for name, content in files.items():
            if isinstance(content, bytes):
                contents[self.folder / name] = content
            elif self._is_copied or not storage.link(content.path, self.folder / name):
                contents[self.folder / name] = content.read()
        published = storage.publish(contents)
        return {name: published.get(self.folder / name) or stored[name] for name in files}

    def commit(self, done: Rows) -> None:
        """Marks samples whose files are on the disk as done, all or none."""
        self._add(done, [])

    def _add(self, done: Rows, shared: Rows) -> None:
        with self._done.transaction():
            self._done.execute_many("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?)", done)
            self._done.execute_many("INSERT OR REPLACE INTO shared VALUES (?, ?, ?)", shared)

    def entries(self, format: str, split: str) -> Iterator[dict[str, Any]]:
        """The entries of a format for the samples of a split, in order."""
        statement = "SELECT json_extract(entries, ?) FROM done WHERE split = ? ORDER BY number"
        for block in self._done.read_blocks(statement, (f'$."{format}"', split), BLOCK):
            yield from (json.loads(text) for (text,) in block)

    def numbers_of(self, split: str, first: int, stop: int) -> list[int]:
        """The numbers of samples of a split, by their position in it."""
        statement = "SELECT number FROM done WHERE split = ? ORDER BY number LIMIT ? OFFSET ?"
        return [number for (number,) in self._done.execute(statement, (split, stop - first, first))]

    def find_repeated(self, shared: Iterable[str]) -> str | None:
        """A file that two samples have written, or a sample and one of the shared files; None without any."""
        written = "SELECT json_extract(value, '$[0]') AS name FROM done, json_each(done.files)"
        is_repeated = "count(*) > 1 OR name IN (SELECT value FROM json_each(?))"
        query = f"SELECT name FROM ({written}) GROUP BY name HAVING {is_repeated} LIMIT 1"
        names = self._done.execute(query, (json.dumps([*shared]),))
        return names[0][0] if names else None

    def share(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file of all samples, unless it was written before."""
        if self._done.execute("SELECT 1 FROM shared WHERE name = ?", (name,)):
            return
        stored = self._write(name, chunks)
        self._add([], [(name, stored.sha256, stored.size)])

    def _write(self, name: str, chunks: Iterable[bytes]) -> StoredFile:
        return storage.publish({self.folder / name: chunks})[self.folder / name]

    def complete(self) -> int:
        """Writes digests and description, and removes the work folder; how many files the export has."""
        count = 0

        def lines() -> Iterator[bytes]:
            nonlocal count
            for block in self._done.read_blocks("SELECT files FROM done ORDER BY number", (), BLOCK):
                for name, sha256, _ in (file for (text,) in block for file in json.loads(text)):
                    count += 1
                    yield f"{sha256}  {name}\n".encode()
            for name, sha256 in self._done.execute("SELECT name, sha256 FROM shared ORDER BY name"):
                count += 1
                yield f"{sha256}  {name}\n".encode()

        sums = self._write(SUMS, lines())
        self._write(DOCUMENT, [pretty({**self._description, "complete": True, "sums": sums.sha256})])
        self.close()
        self._remove_work()
        return count

    def _remove_work(self) -> None:
        remove_work(self.folder)

    def close(self) -> None:
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_work(folder: Path) -> None:
    """Removes the files that a complete export no longer needs."""
    with storage.refusing(folder / WORK):
        shutil.rmtree(folder / WORK, ignore_errors=True)


def read_sums(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file that an export has beside its description."""
    path = folder / SUMS
    with storage.refusing(path), refusing_form(path, "list of digests", "Export again."), open(path, "rb") as lines:
        for line in map(bytes.decode, lines):
            digest, _, name = line.rstrip("\n").partition("  ")
            yield documents.check_inside(name), digest


def count_files(folder: Path) -> int:
    """How many files a complete export has, none of which may be missing; only audit compares their bytes."""
    count = 0
    for name, _ in read_sums(folder):
        count += 1
        if not storage.is_there(folder / name):
            raise GateFailed(
                f"{folder}: {name} is not there, although the export was completed",
                "Delete the folder and run the same command again: it gives the same bytes.",
            )
    return count


def open_target(out: str) -> tuple[Path, ShardBucket | None]:
    """The folder of an export, and None; or for a store a temporary folder with its description, and the store."""
    place = shard_place(out) if is_url(out) else ShardFolder(Path(out))
    if isinstance(place, ShardFolder):
        return place.path, None
    folder = Path(tempfile.mkdtemp(prefix="datasetdm-"))
    weakref.finalize(place, shutil.rmtree, folder, ignore_errors=True)
    content = place.read(DOCUMENT)
    if content is not None:  # with which the conversion compares its own
        storage.publish({folder / "export" / DOCUMENT: content})
    elif place.names():
        raise Refused(
            f"--out {documents.quote(out)}: it is not empty and not an export, because it has no {DOCUMENT}",
            "Choose another --out; nothing is ever overwritten.",
        )
    return folder / "export", place


class StoredExport(ExportFolder):
    """The export open for writing; files that an earlier process completed are not written again."""

    def __init__(self, folder: Path, description: Mapping[str, Any], place: ShardBucket):
        super().__init__(folder, description, is_copied=True)
        self._place, self._pool = place, self._closing.enter_context(ThreadPoolExecutor(PARALLEL_FILES))
        if not place.create(DOCUMENT, pretty({**description, "complete": False})):
            sizes = place.sizes()
            for note in self._pool.map(place.read, (f"{WORK}/{name}" for name in place.names(WORK))):
                self._read_note(note or b"", sizes)

    def _read_note(self, content: bytes, sizes: Mapping[str, int]) -> None:
        """Takes over what an earlier process did, unless its note cannot be read or one of its files is missing."""
        with suppress(ValueError, TypeError, IndexError, KeyError, Refused):
            note = documents.parse_json(content.decode(), WORK)
            files = [file for row in note["done"] for file in json.loads(row[3])] + note["shared"]
            if all(sizes.get(name) == size for name, _, size in files):
                super()._add(note["done"], note["shared"])

    def publish(self, files: Mapping[str, Content]) -> dict[str, StoredFile]:
        contents = {name: content if isinstance(content, bytes) else content.read() for name, content in files.items()}
        list(self._pool.map(self._place.replace, contents.keys(), contents.values()))  # raises what a thread raised
        return {name: StoredFile(hashlib.sha256(each).hexdigest(), len(each)) for name, each in contents.items()}

    def _write(self, name: str, chunks: Iterable[bytes]) -> StoredFile:
        return self._place.write(name, chunks)

    def _add(self, done: Rows, shared: Rows) -> None:
        super()._add(done, shared)
        names = [name for row in done for name, _, _ in json.loads(row[3])] + [name for name, _, _ in shared]
        if names:
            note = json.dumps({"done": done, "shared": shared}).encode()
            self._place.replace(f"{WORK}/{hashlib.sha256(names[0].encode()).hexdigest()[:16]}.json", note)

    def _remove_work(self) -> None:
        remove_notes(self._place)


def remove_notes(place: ShardBucket) -> None:
    """Removes from a store what a complete export no longer needs there."""
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(place.remove, (f"{WORK}/{name}" for name in place.names(WORK))))
