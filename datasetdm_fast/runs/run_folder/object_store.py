"""Object stores, as fsspec opens them by a URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents

PARALLEL_FILES = 16  # files copied together


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


def is_url(place: str | Path) -> bool:
    """Whether a run is named by the URL of an object store."""
    return "://" in str(place)
