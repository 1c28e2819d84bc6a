"""The folder of an export: what it is of, which samples are done, and digests of all its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import locks, sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import GateFailed, Refused, refusing_form
from datasetdm_fast.runs.exporting.view import Linked
from datasetdm_fast.runs.run_folder.document import EXPORTS, check_same, pretty, run_around
from datasetdm_fast.untrusted import documents

DOCUMENT = "export.json"  # what the export is of; "complete" once nothing is left to be done
SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads them
WORK = ".converting"  # which samples are done; gone once the export is complete
FORM = {"format": int, "complete": bool, "settings": dict, "runs": [dict], "samples": int, "splits": dict}
FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS done (number INTEGER PRIMARY KEY, split TEXT NOT NULL, entries TEXT NOT NULL,
    files TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shared (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL);
"""
BLOCK = 256  # rows read at once


def read_export(folder: Path) -> dict[str, Any]:
    """export.json of a folder that must be an export."""
    path = folder / DOCUMENT
    found = documents.read_object(path)
    try:
        documents.check_form(found, FORM)
    except ValueError as error:
        raise Refused(f"{path}: not the description of an export ({error})", "Export again.") from error
    if found["format"] != FORMAT:
        raise Refused(
            f"{path}: format {documents.quote(found['format'])}, this version reads {FORMAT}",
            "Read it with the version that wrote it.",
        )
    return found


def check_target(folder: Path, described: Mapping[str, Any]) -> bool:
    """Whether the export is there already, complete; a folder that may not become this export is refused."""
    run = run_around(folder / "format")  # the folder itself may be one
    if run is not None and folder.resolve().relative_to(run).parts[:1] != (EXPORTS,):
        raise Refused(
            f"--out {folder}: it lies inside the run folder {run}", f"Choose {run / EXPORTS}, or another folder."
        )
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise storage.refusal(error, folder) from error
    # a process killed right at the start leaves no more than its work folder
    if not any(name != WORK and not storage.is_temporary(Path(name)) for name in names):
        return False
    if DOCUMENT not in names:
        raise Refused(
            f"--out {folder}: it is not empty and not an export, because it has no {DOCUMENT}",
            "Choose another --out; nothing is ever overwritten.",
        )
    there = read_export(folder)
    check_same(folder, there, {"settings": described["settings"]}, "an export")
    if there["splits"] != described["splits"] or _unnamed(there) != _unnamed(described):
        held, asked = (
            ", ".join(f"{name} {count}" for name, count in one["splits"].items()) for one in (there, described)
        )
        raise Refused(
            f"{folder}: it holds an export of other samples or of another split ({held} there, {asked} asked for)",
            "Choose another --out, or delete the folder if its run was changed since.",
        )
    return there["complete"]


def _unnamed(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of an export without the names of their folders, which may have been moved since."""
    return [{name: value for name, value in run.items() if name != "name"} for run in described["runs"]]


class ExportFolder(AbstractContextManager):
    """The folder of an export open for writing, held for this process until it is closed."""

    def __init__(self, folder: Path, described: Mapping[str, Any], *, is_copied: bool):
        self.folder, self._described, self._is_copied = folder, described, is_copied
        storage.make_folder(folder / WORK)
        with ExitStack() as closing:
            closing.enter_context(locks.hold_lock(folder / WORK / "lock"))
            storage.remove_temporaries(folder)
            if not (folder / DOCUMENT).exists():
                storage.publish({folder / DOCUMENT: pretty({**described, "complete": False})})
            self._done = sqlite.connect(folder / WORK / "done.sqlite", _SCHEMA)
            closing.callback(lambda: self._done.close())
            self._closing = closing.pop_all()

    def numbers(self) -> set[int]:
        """The samples whose files are all there."""
        return {number for (number,) in self._done.execute("SELECT number FROM done")}

    def publish(self, files: Mapping[str, bytes | Linked]) -> dict[str, StoredFile]:
        """What was written, once all files are on the disk under their names."""
        linked = {name: content for name, content in files.items() if isinstance(content, Linked)}
        if not self._is_copied:
            linked = {
                name: content for name, content in linked.items() if not storage.link(content.path, self.folder / name)
            }
        read = {name: storage.read(content.path, content.stored.size) for name, content in linked.items()}
        contents = {name: content for name, content in files.items() if isinstance(content, bytes)} | read
        stored = storage.publish({self.folder / name: content for name, content in contents.items()})
        kept = {name: content.stored for name, content in files.items() if isinstance(content, Linked)}
        return kept | {name: stored[self.folder / name] for name in contents}

    def commit(self, rows: Iterable[tuple[int, str, Mapping[str, Any], Mapping[str, StoredFile]]]) -> None:
        """Number, split, entries by format and files of samples, all or none."""
        values = [
            (
                number,
                split,
                json.dumps(entries, ensure_ascii=False),
                json.dumps([[name, stored.sha256, stored.size] for name, stored in files.items()]),
            )
            for number, split, entries, files in rows
        ]
        with self._done.transaction():
            self._done.execute_many("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?)", values)

    def entries(self, format: str, split: str) -> Iterator[dict[str, Any]]:
        """What the shared files of a format need of the samples of a split, in order."""
        path = f'$."{format}"'
        statement = "SELECT json_extract(entries, ?) FROM done WHERE split = ? ORDER BY number"
        for block in self._done.read_blocks(statement, (path, split), BLOCK):
            for (text,) in block:
                yield json.loads(text)

    def numbers_of(self, split: str, first: int, stop: int) -> list[int]:
        """The numbers of samples of a split, by their position in it."""
        statement = "SELECT number FROM done WHERE split = ? ORDER BY number LIMIT ? OFFSET ?"
        return [number for (number,) in self._done.execute(statement, (split, stop - first, first))]

    def written_twice(self, shared: Iterable[str]) -> str | None:
        """A file that two samples have written, or a sample and one of the files of all samples; None without any."""
        written = "SELECT json_extract(value, '$[0]') AS name FROM done, json_each(done.files)"
        is_twice = "count(*) > 1 OR name IN (SELECT value FROM json_each(?))"
        query = f"SELECT name FROM ({written}) GROUP BY name HAVING {is_twice} LIMIT 1"
        names = self._done.execute(query, (json.dumps([*shared]),))
        return names[0][0] if names else None

    def share(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file of all samples, unless it was written before."""
        if self._done.execute("SELECT 1 FROM shared WHERE name = ?", (name,)):
            return
        stored = storage.publish({self.folder / name: chunks})[self.folder / name]
        self._done.execute("INSERT INTO shared VALUES (?, ?, ?)", (name, stored.sha256, stored.size))

    def complete(self) -> int:
        """Writes digests and description, and takes the work folder away; how many files the export has."""
        count = 0

        def lines() -> Iterator[bytes]:
            nonlocal count
            for block in self._done.read_blocks("SELECT files FROM done ORDER BY number", (), BLOCK):
                for (text,) in block:
                    for name, sha256, _ in json.loads(text):
                        count += 1
                        yield f"{sha256}  {name}\n".encode()
            for name, sha256 in self._done.execute("SELECT name, sha256 FROM shared ORDER BY name"):
                count += 1
                yield f"{sha256}  {name}\n".encode()

        sums = storage.publish({self.folder / SUMS: lines()})[self.folder / SUMS]
        storage.publish({self.folder / DOCUMENT: pretty({**self._described, "complete": True, "sums": sums.sha256})})
        self.close()
        forget_work(self.folder)
        return count

    def close(self) -> None:
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def forget_work(folder: Path) -> None:
    """Takes away what a complete export needs no more."""
    with storage.refusing(folder / WORK):
        shutil.rmtree(folder / WORK, ignore_errors=True)


def stated(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file that an export has beside its description."""
    path = folder / SUMS
    with storage.refusing(path), refusing_form(path, "list of digests", "Export again."), open(path, "rb") as lines:
        for line in map(bytes.decode, lines):
            digest, _, name = line.rstrip("\n").partition("  ")
            yield documents.check_inside(name), digest


def counted(folder: Path) -> int:
    """How many files a complete export has, none of which may be gone; only audit compares their bytes."""
    count = 0
    for name, _ in stated(folder):
        count += 1
        if not storage.is_there(folder / name):
            raise GateFailed(
                f"{folder}: {name} is not there, although the export was completed",
                "Delete the folder and run the same command again: it gives the same bytes.",
            )
    return count
