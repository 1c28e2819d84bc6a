"""Run folders in an object store of fsspec's, which are read there."""

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.corrections import CORRECTIONS
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LEDGER, to_see_damage
from datasetdm_fast.runs.run_folder.seal import SEAL
from datasetdm_fast.runs.run_folder.selections import FILTER, SPLIT
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import LARGEST_IMAGE_FILE

LONGEST = 4096  # bytes of a URL
PARALLEL_FILES = 16  # files copied together
COPYING = "state/copying"  # the URL of a run of which this folder does not have all files yet


class ObjectStore:
    def __init__(self, url: str):
        import fsspec

        self.url = url
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
    def translate_errors(self) -> Iterator[None]:
        try:
            yield
        except Missing:
            raise
        except Exception as error:  # a store has errors of its own beside those of a disk
            raise Missing(
                f"{self.url}: {type(error).__name__}: {error}",
                "Check the address and the credentials, then run the same command again.",
            ) from error

    def require_bucket(self, *, is_made: bool) -> None:
        """Refuses a missing bucket, as its name may be misspelt; where it `is_made`, it is created."""
        if "file" in self._protocols:
            return
        bucket = self.root.strip("/").split("/")[0]
        with self.translate_errors():
            is_missing = not self.files.exists(bucket)
            if is_missing and is_made:
                self.files.mkdir(bucket)
        if is_missing and not is_made:
            raise Refused(
                f"--store {documents.quote(self.url)}: there is no bucket {documents.quote(bucket)}",
                "Check its name, or add --make-bucket.",
            )

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where it is missing."""
        with self.translate_errors():
            try:
                return self.files.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def sizes(self) -> dict[str, int]:
        """Path inside the run -> bytes, of its files."""
        with self.translate_errors():
            details = self.files.find(self.root, detail=True)
        inside = {name[name.index(self.root) + len(self.root) :].strip("/"): each for name, each in details.items()}
        try:
            return {
                documents.check_inside(name): inside[name]["size"] or 0
                for name in sorted(inside)
                if not storage.is_temporary(Path(name))
            }
        except ValueError as error:
            raise Refused(f"{self.url}: {error}", "No run has such a file: remove it there.") from error

    def fetch(self, name: str, path: Path) -> bool:
        """Copies a file of any size here; False where the store has none of that name."""
        storage.make_folder(path.parent)
        with self.translate_errors():
            try:
                self.files.get_file(f"{self.root}/{name}", str(path))
            except FileNotFoundError:
                return False
            except OSError as error:
                if storage.is_full(error):  # the disk here, not the store
                    storage.forget(path)
                    raise storage.refusal(error, path.parent) from error
                raise
        return True


class StoreCopy:
    """The files of a run in an object store that were fetched into `folder`, by default a temporary one."""

    def __init__(self, url: str, folder: Path | None = None):
        self.store = ObjectStore(url)
        self._larger_disk = "choose another --out" if folder else "name a folder on a larger disk with TMPDIR"
        if folder is not None:
            self.folder = folder
            return
        place = Path(tempfile.mkdtemp(prefix="datasetdm-"))
        self.folder = place / (url.rstrip("/").rpartition("/")[2].strip(".") or "run")  # exports name it
        first = os.getpid()  # a forked process leaves it to the first
        weakref.finalize(self, lambda: os.getpid() == first and shutil.rmtree(place, ignore_errors=True))

    def fetch_state(self) -> Path:
        """The folder, once it has the files that describe the samples."""
        for name in (DOCUMENT, LEDGER, SEAL, FILTER, SPLIT, CORRECTIONS):
            content = self.store.read(name)
            if content is not None:
                storage.publish({self.folder / name: content})
        return self.folder

    def read(self, name: str) -> bytes:
        """The bytes of a file of a sample, which is not copied."""
        path = self.folder / name
        content = storage.read(path, LARGEST_IMAGE_FILE) if path.exists() else self.store.read(name)
        if content is None:
            raise Missing(f"{self.store.url}: {documents.quote(name)} is not there", to_see_damage(self.store.url))
        return content

    def fetch_all(
        self, on_begin: Callable[[int], object] = lambda number: None, on_file: Callable[[], object] = lambda: None
    ) -> Path:
        """The folder with every file of the run, run.json and seal last; `on_begin` gets their number."""
        sizes = self.store.sizes()
        required = sum(size for name, size in sizes.items() if not (self.folder / name).exists())
        if required > (free := storage.free_bytes(self.folder.absolute())):
            raise Missing(
                f"{self.folder}: the run needs {required / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
                f"Free some space, or {self._larger_disk}.",
            )
        on_begin(len(sizes))
        last = sizes.keys() & {DOCUMENT, SEAL}
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            for names in (sizes.keys() - last, last):
                for _ in pool.map(self._require, names):
                    on_file()
        return self.folder

    def _require(self, name: str) -> None:
        if self.fetch(name) is None:
            raise Missing(f"{self.store.url}: {documents.quote(name)} is not there", to_see_damage(self.store.url))

    def fetch(self, name: str) -> Path | None:
        """The copy of a file, None where the store has none of that name."""
        path = self.folder / name
        if path.exists():
            return path
        # other threads, and other processes, may fetch the same file into the same folder
        part = path.with_name(f".{path.name}.{threading.get_native_id()}.part")
        if not self.store.fetch(name, part):
            storage.forget(part)
            return None
        storage.move(part, path)
        return path


def copy_run(copies: StoreCopy, on_begin: Callable[[int], object], on_file: Callable[[], object]) -> None:
    """Copies a finished run into a folder that is empty or that a killed copying began; a whole one stays as it is."""
    folder, store, begun = copies.folder, copies.store, copies.folder / COPYING
    document = store.read(DOCUMENT)
    if document is None:
        raise unfinished_run(store.url)
    if begun.exists():
        is_other = storage.read(begun, LONGEST) != store.url.encode()
        _remove_outdated(folder, {} if is_other else store.sizes())
    elif (folder / DOCUMENT).exists():
        is_other = storage.sha256_of(folder / DOCUMENT) != hashlib.sha256(document).hexdigest()
        if not is_other:
            return
    else:
        is_other = folder.exists() and any(folder.iterdir())
    if is_other:
        raise Refused(f"{folder}: it holds something other than {store.url}", "Choose another --out.")

    def begin(number: int) -> None:
        storage.publish({begun: store.url.encode()})
        on_begin(number)

    copies.fetch_all(begin, on_file)
    storage.remove(begun)


def _remove_outdated(folder: Path, sizes: Mapping[str, int]) -> None:
    """Removes what a killed copying fetched and the run may have changed since: all but the samples' own files."""
    for name, size in sizes.items():
        is_sample = "/" in name and not name.startswith(("state/", "gallery/", "review/"))
        if (folder / name).exists() and not (is_sample and (folder / name).stat().st_size == size):
            storage.remove(folder / name)


def unfinished_run(url: str) -> Refused:
    """The refusal of a URL where no finished run is."""
    return Refused(
        f"{url}: holds no {DOCUMENT}, so it is not a finished run",
        "Check the address; of a run in progress name the folder that its --out names.",
    )


def is_url(place: str | Path) -> bool:
    """Whether a run is named by the URL of an object store."""
    return "://" in str(place)


def copy_of(place: str | Path) -> StoreCopy | None:
    """What fetches the files of samples of a run in an object store; None of a folder."""
    return StoreCopy(str(place)) if is_url(place) else None
