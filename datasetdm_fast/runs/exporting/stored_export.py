"""An export in an object store: made in a temporary folder and then uploaded, its description last."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.export_folder import DOCUMENT
from datasetdm_fast.runs.run_folder.object_store import PARALLEL_FILES
from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.untrusted import documents

BLOCK = 2**20  # bytes read at once


class StoredExport:
    """The export at a URL, and the folder in which it is made."""

    def __init__(self, url: str):
        self.place = shard_place(url)
        folder = Path(tempfile.mkdtemp(prefix="datasetdm-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder / "export"
        content = self.place.read(DOCUMENT)
        if content is not None:  # with which the conversion compares its own
            storage.publish({self.folder / DOCUMENT: content})
        elif self.place.names():
            raise Refused(
                f"--out {documents.quote(url)}: it is not empty and not an export, because it has no {DOCUMENT}",
                "Choose another --out; nothing is ever overwritten.",
            )

    def upload(self) -> None:
        """Writes the files of the finished export; the description of one that was cut short says so until the end."""
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        begun = json.loads(storage.read(self.folder / DOCUMENT, 2**26)) | {"complete": False}
        self.place.replace(DOCUMENT, json.dumps(begun).encode())
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(self._upload, (name for name in names if name != DOCUMENT)))
        self._upload(DOCUMENT)

    def _upload(self, name: str) -> None:
        def blocks() -> Iterator[bytes]:
            with open(self.folder / name, "rb") as file:
                while block := file.read(BLOCK):
                    yield block

        self.place.write(name, blocks())
