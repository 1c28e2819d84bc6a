"""Where the files of samples go, below the run folder or with --store to an object store of fsspec's, and how a run in
such a store is read.
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import Sample, SetAside
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents
from datasetdm_fast.run_folder.document import DOCUMENT, LEDGER, LOCK, read_document
from datasetdm_fast.run_folder.folder import into, write_samples
from datasetdm_fast.run_folder.kept import KEPT
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.run_folder.seal import ELSEWHERE, SEAL, SPLIT, rebuilt_files

PIECE = 1 << 20  # bytes of a file copied at once
LONGEST = 4096  # bytes of a URL


class PublishingFolder:
    """The run folder of a process that only publishes the files of samples, where the configuration wants them;
    `commit` gets their rows to whoever has the ledger, and `wanted` tells which samples of a range that still lacks.
    """

    def __init__(
        self,
        config: RunConfig,
        document: Mapping[str, Any],
        wanted: Callable[[int, int], Set[int]],
        commit: Callable[[list[Row]], object],
    ):
        self._document, self._wanted, self.commit, self.ledger = document, wanted, commit, self
        self._has_thumbnails = not config.store  # which draws no sheets of them
        self._publish = ObjectStore(config.store).publish if config.store else into(Path(config.out))

    def unseal(self) -> None:
        """Done by whoever has the ledger."""

    def write(self, results: Sequence[Sample | SetAside], recipe: Mapping[str, Any]) -> list[Row]:
        return write_samples(results, recipe, self._document, self._publish, has_thumbnails=self._has_thumbnails)

    def within(self, first: int, stop: int) -> set[int]:
        return set(range(first, stop)) - self._wanted(first, stop)


def check(config: RunConfig) -> None:
    """Refuses a run folder whose samples are elsewhere than --store says."""
    folder = Path(config.out)
    if config.store and not config.cluster:
        raise Refused(
            f"--store {config.store}: only the workers of a cluster write there", "Add --cluster ray, or drop it."
        )
    noted = stored_at(folder)
    if read_document(folder) is not None and noted != config.store:
        there = f"at {documents.quoted(noted)}" if noted else "in the folder itself"
        raise Refused(
            f"--store {config.store or 'not given'}: the samples of {folder} are {there}",
            "Give what it was begun with, or choose another --out.",
        )


def stored_at(folder: Path) -> str:
    """The URL of the samples of a run folder, empty where they are in it."""
    path = folder / ELSEWHERE
    return storage.read(path, LONGEST).decode(errors="replace") if path.exists() else ""


class ObjectStore:
    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise Missing(f"--store {url}: {error}", "Install that on every machine of the cluster.") from error
        except Exception as error:  # whatever the file system of a stranger's package makes of a wrong address
            raise Refused(
                f"--store {documents.quoted(url)}: {type(error).__name__}: {error}",
                "Name a folder such as s3://bucket/run.",
            ) from error
        if "memory" in self._protocols:
            raise Refused(
                f"--store {url}: every process has a memory of its own",
                "Name a folder that all machines reach, such as s3://bucket/run.",
            )

    @property
    def _protocols(self) -> tuple[str, ...]:
        return (self.files.protocol,) if isinstance(self.files.protocol, str) else tuple(self.files.protocol)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a store has errors of its own beside those of a disk
            raise Missing(
                f"{self.url}: {type(error).__name__}: {error}",
                "Check the address and the credentials, then run the same line again.",
            ) from error

    def require_bucket(self, *, is_made: bool) -> None:
        """Refuses a bucket that is not there, as its name may be misspelt; where it `is_made`, it is created."""
        if "file" in self._protocols:
            return
        bucket = self.root.strip("/").split("/")[0]
        with self._refusing():
            is_there = self.files.exists(bucket)
            if not is_there and is_made:
                self.files.mkdir(bucket)
        if not is_there and not is_made:
            raise Refused(
                f"--store {documents.quoted(self.url)}: there is no bucket {documents.quoted(bucket)}",
                "Check its name, or add --make-bucket.",
            )

    def publish(self, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        """Digests and sizes of the files, once all are there."""
        if "file" in self._protocols:  # where a file is only whole at once if it is renamed
            return into(Path(self.root))(files)
        with self._refusing():
            for folder in sorted({name.rpartition("/")[0] for name in files}):
                self.files.makedirs(f"{self.root}/{folder}".rstrip("/"), exist_ok=True)
            self.files.pipe({f"{self.root}/{name}": content for name, content in files.items()})
            short = [name for name, content in files.items() if self.files.size(f"{self.root}/{name}") != len(content)]
        if short:
            raise Missing(
                f"{self.url}/{short[0]}: not all of it is there",
                "Run the same line again: it goes on where it stopped.",
            )
        return {name: StoredFile(hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where it is not there."""
        with self._refusing():
            try:
                return self.files.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """The files of the run, by their path inside it."""
        with self._refusing():
            found = self.files.find(self.root)
        return sorted(name[name.index(self.root) + len(self.root) :].strip("/") for name in found)

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file of any size here."""
        storage.make_folder(path.parent)
        with self._refusing():
            self.files.get_file(f"{self.root}/{name}", str(path))

    def complete(self, folder: Path) -> None:
        """Uploads the other files of the run folder, the seal last; a store that has this seal is complete."""
        seal = (folder / SEAL).read_bytes()
        if "file" in self._protocols:  # elsewhere a file is there or not
            storage.remove_temporaries(Path(self.root))  # what workers that were killed had half-written
        if self.read(SEAL) == seal:
            return
        document: dict[str, Any] = read_document(folder)
        for name in (DOCUMENT, LEDGER, LOCK, *rebuilt_files(folder, document), SEAL):
            self._copy(folder / name, name)

    def _copy(self, path: Path, name: str) -> None:
        """A file of any size, in pieces."""
        if "file" in self._protocols:
            with path.open("rb") as file:
                storage.publish({Path(self.root) / name: iter(lambda: file.read(PIECE), b"")})
            return
        with self._refusing():
            self.files.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(path), f"{self.root}/{name}")

    def note(self, folder: Path) -> None:
        if stored_at(folder) != self.url:
            storage.publish({folder / ELSEWHERE: self.url.encode()})


class StoreCopy:
    """The files of a run in an object store that this process has read, in a folder that goes with this object."""

    def __init__(self, url: str):
        self.store, place = ObjectStore(url), Path(tempfile.mkdtemp(prefix="datasetdm-"))
        self.folder = place / (url.rstrip("/").rpartition("/")[2].strip(".") or "run")  # exports name it
        weakref.finalize(self, _discard, place, os.getpid())

    def state(self) -> Path:
        """The folder, once it has what tells of the samples."""
        for name in (DOCUMENT, LEDGER, SEAL, KEPT, SPLIT):
            content = self.store.read(name)
            if content is not None:
                storage.publish({self.folder / name: content})
        return self.folder

    def samples(self, rows: Iterable[Row]) -> Path:
        """The folder, once it has the files of these rows."""
        wanted = {name for row in rows for name, _ in row.files.values()}
        for name in sorted(wanted):
            self._bring(name)
        return self.folder

    def whole(self) -> Path:
        """The folder, once it has every file of the run."""
        for name in self.store.names():
            if not storage.is_temporary(Path(name)):
                self._bring(documents.check_inside(name))
        return self.folder

    def _bring(self, name: str) -> None:
        path = self.folder / name
        if not path.exists():
            part = path.with_name(f".{path.name}.{os.getpid()}.part")  # other processes may read from the same folder
            self.store.fetch(name, part)
            storage.move(part, path)


def _discard(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked one leaves it to the first
        shutil.rmtree(folder, ignore_errors=True)


def is_url(place: str | Path) -> bool:
    """Whether a run is named by the URL of an object store."""
    return "://" in str(place)


def copy_of(place: str | Path) -> StoreCopy | None:
    """What reads the files of samples of a run that has them in an object store; None where they are in its folder."""
    url = str(place) if is_url(place) else stored_at(Path(place))
    return StoreCopy(url) if url else None
