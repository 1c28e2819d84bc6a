"""An export in an object store: each file is written once it is made, with a note of what is done beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.export_folder import DOCUMENT, WORK, ExportFolder, Rows
from datasetdm_fast.runs.exporting.view import Content
from datasetdm_fast.runs.run_folder.document import pretty
from datasetdm_fast.runs.run_folder.object_store import PARALLEL_FILES, is_url
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardFolder, shard_place
from datasetdm_fast.untrusted import documents


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
            sizes = place.store.sizes()
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
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(self._place.remove, (f"{WORK}/{name}" for name in self._place.names(WORK))))
