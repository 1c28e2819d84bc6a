"""Where the files of samples go: below the run folder, or with --store to an object store of fsspec's."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
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
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.run_folder.seal import ELSEWHERE, SEAL, rebuilt_files

PIECE = 1 << 20  # bytes of a file copied at once
LONGEST = 4096  # bytes of a URL


class PublishingFolder:
    """The run folder of a process that only publishes the files of samples, where the configuration wants them;
    `commit` gets their rows to whoever has the ledger, which holds those of the samples that are `present`.
    """

    def __init__(
        self,
        config: RunConfig,
        document: Mapping[str, Any],
        present: Set[int],
        commit: Callable[[list[Row]], object],
    ):
        self._document, self._present, self.commit, self.ledger = document, present, commit, self
        self._has_thumbnails = not config.store  # which draws no sheets of them
        self._publish = ObjectStore(config.store).publish if config.store else into(Path(config.out))

    def unseal(self) -> None:
        """Done by whoever has the ledger."""

    def write(self, results: Sequence[Sample | SetAside], recipe: Mapping[str, Any]) -> list[Row]:
        return write_samples(results, recipe, self._document, self._publish, has_thumbnails=self._has_thumbnails)

    def within(self, first: int, stop: int) -> set[int]:
        return set(range(first, stop)) & self._present


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
