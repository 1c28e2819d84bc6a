"""Where the files of a run in shards lie: a folder, or a store of fsspec's. Each appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import Missing, Refused, Unanswered
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LOCK
from datasetdm_fast.untrusted import documents

LARGEST_FILE = 2**28  # bytes of a file that is read as a whole
READ_AHEAD = 2**20  # bytes fetched beyond those that were asked for
PARALLEL_FILES = 16  # files copied together


class ShardFolder:
    """A folder on a disk that all processes of the run reach."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where it is missing."""
        return storage.read_if_there(self.path / name, LARGEST_FILE)

    def create(self, name: str, content: bytes) -> bool:
        """Whether this call wrote the file; False where there was one of that name."""
        return storage.create(self.path / name, content)

    def replace(self, name: str, content: bytes) -> None:
        """Writes a file, whatever was there."""
        storage.publish({self.path / name: content})

    def write(self, name: str, chunks: Iterable[bytes]) -> StoredFile:
        """Writes a file of any size; nothing where the chunks end in an error."""
        return storage.publish({self.path / name: chunks})[self.path / name]

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        storage.forget(self.path / name)

    def remove_parts(self, *names: str) -> None:
        """Removes what a process that was killed has half-written of these files."""
        storage.remove_parts_of(self.path / name for name in names)

    @contextmanager
    def hold(self, folder: str) -> Iterator[None]:
        """Holds what lies beside the shards for this process, as a run folder; cleans a folder that it writes to."""
        storage.make_folder((self.path / LOCK).parent)
        with storage.hold_lock(self.path / LOCK):
            storage.remove_temporaries(self.path / folder)
            yield

    def names(self, folder: str = "") -> list[str]:
        """The names of what lies in a folder, sorted; of one that is missing none."""
        path = self.path / folder
        with storage.refusing(path), suppress(FileNotFoundError), os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not storage.is_temporary(Path(entry.name)))
        return []

    def open(self, name: str) -> BinaryIO:
        """The file, for reading at any place."""
        with storage.refusing(self.path / name):
            return (self.path / name).open("rb")

    def refusing(self, name: str) -> AbstractContextManager[None]:
        """Within the block, an error of a file that is open becomes a refusal."""
        return storage.refusing(self.path / name)


class ShardBucket:
    """A folder of an object store."""

    def __init__(self, url: str):
        import fsspec

        self.name = url
        try:
            if url.startswith("file://"):  # a folder may have in its name the "::" that elsewhere joins file systems
                self.files = fsspec.filesystem("file")
                self.root = self.files._strip_protocol(url)
            else:
                # others write there, and a listing of before hides their files from every other call
                self.files, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise Missing(f"{url}: {error}", "Install it, for a cluster on each of its machines.") from error
        except Exception as error:  # whatever the file system of a stranger's package makes of a wrong address
            raise Refused(
                f"{documents.quote(url)}: {type(error).__name__}: {error}", "Name a folder such as s3://bucket/run."
            ) from error
        if "memory" in self._protocols:
            raise Refused(
                f"{url}: processes do not share memory",
                "Name a folder that all machines reach, such as s3://bucket/run.",
            )

    @property
    def _protocols(self) -> tuple[str, ...]:
        return (self.files.protocol,) if isinstance(self.files.protocol, str) else tuple(self.files.protocol)

    @property
    def disk(self) -> Path | None:
        """The folder that the URL names, where it is on a disk."""
        return Path(self.root) if "file" in self._protocols else None

    @contextmanager
    def refusing(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except Missing:
            raise
        except Exception as error:  # a store has errors of its own beside those of a disk
            kind = Missing if isinstance(error, FileNotFoundError) else Unanswered
            raise kind(
                f"{self.name}: {type(error).__name__}: {error}",
                "Check the address and the credentials, then run the same command again.",
            ) from error

    def require_bucket(self, *, is_made: bool) -> None:
        """Refuses a missing bucket, as its name may be misspelt; where it `is_made`, it is created."""
        if "file" in self._protocols:
            return
        bucket = self.root.strip("/").split("/")[0]
        with self.refusing():
            is_missing = not self.files.exists(bucket)
            if is_missing and is_made:
                self.files.mkdir(bucket)
        if is_missing and not is_made:
            raise Refused(
                f"--store {documents.quote(self.name)}: there is no bucket {documents.quote(bucket)}",
                "Check its name, or add --make-bucket.",
            )

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def read(self, name: str) -> bytes | None:
        with self.refusing(), suppress(FileNotFoundError):
            return self.files.cat_file(self._path(name))
        return None

    def create(self, name: str, content: bytes) -> bool:
        with self.refusing(), suppress(FileExistsError):
            self.files.pipe_file(self._path(name), content, mode="create")
            return True
        return False

    def replace(self, name: str, content: bytes) -> None:
        with self.refusing():
            self.files.pipe_file(self._path(name), content)

    def write(self, name: str, chunks: Iterable[bytes]) -> StoredFile:
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(prefix="datasetdm-") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                with storage.refusing(file.name):
                    file.write(chunk)
            with storage.refusing(file.name):
                file.flush()
            with self.refusing():
                self.files.put_file(file.name, self._path(name))
                is_whole = self.files.info(self._path(name))["size"] == size
        if not is_whole:
            raise Missing(f"{self.name}/{name}: it is incomplete", "Run the same command again: it resumes.")
        return StoredFile(digest.hexdigest(), size)

    def remove(self, name: str) -> None:
        with self.refusing(), suppress(FileNotFoundError):
            self.files.rm_file(self._path(name))

    def remove_parts(self, *names: str) -> None:
        """A store shows a file only once it is whole."""

    def hold(self, folder: str) -> AbstractContextManager[None]:
        """A store has no locks."""
        return nullcontext()

    def names(self, folder: str = "") -> list[str]:
        paths: list[str] = []
        with self.refusing(), suppress(FileNotFoundError):
            paths = self.files.ls(self._path(folder), detail=False)
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        return sorted(names - {self._path(folder).rpartition("/")[2], ""})

    def open(self, name: str) -> BinaryIO:
        with self.refusing():
            options: dict[str, Any] = {"block_size": READ_AHEAD, "cache_type": "readahead"}
            return self.files.open(self._path(name), "rb", **options)

    def sizes(self) -> dict[str, int]:
        """Path inside the run -> bytes, of its files."""
        with self.refusing():
            details = self.files.find(self.root, detail=True)
        inside = {name[name.index(self.root) + len(self.root) :].strip("/"): each for name, each in details.items()}
        try:
            return {
                documents.check_inside(name): inside[name]["size"] or 0
                for name in sorted(inside)
                if not storage.is_temporary(Path(name))
            }
        except ValueError as error:
            raise Refused(f"{self.name}: {error}", "No run has such a file: remove it there.") from error


ShardPlace = ShardFolder | ShardBucket  # names of files are paths inside it


def shard_place(place: str | Path) -> ShardPlace:
    """The place that a path or a URL names."""
    if not is_url(place):
        return ShardFolder(Path(place))
    bucket = ShardBucket(str(place))
    return ShardFolder(bucket.disk) if bucket.disk else bucket


def folder_of(place: ShardPlace) -> Path:
    """The folder of a run folder; only runs in shards are read from a store."""
    if isinstance(place, ShardFolder):
        return place.path
    if place.read(DOCUMENT) is None:
        raise Refused(f"{place.name}: holds no {DOCUMENT}, so it is not a run", "Check the address.")
    raise Refused(f"{place.name}: it is a run folder, and a store is read only in shards", "Copy it to a disk first.")


def is_url(place: str | Path) -> bool:
    """Whether a run is named by the URL of an object store."""
    return "://" in str(place)
