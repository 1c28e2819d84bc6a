"""New runs made of samples of finished ones: what is compared first, and how missing samples are written."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.blocks import in_threads
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import LEDGER, check_same, made_by, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder, into, publish_samples
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row

BLOCK = 32  # samples written and committed together, fewer where they are large:
BLOCK_PIXELS = 2**22  # pixels of all their images


@dataclass(frozen=True)
class ComposedSample:
    """A sample of a new run: its row without files, its files, and where files of the same bytes lie."""

    row: Row
    files: Files
    sources: Mapping[str, Path] = field(default_factory=dict)  # name in the new run -> file


class Composition(ABC):
    """A new run that has been checked and has written nothing yet; threads share it."""

    number: int
    largest: int  # pixels of its largest image

    @property
    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The content of run.json."""

    @abstractmethod
    def compose(self, index: int) -> ComposedSample:
        """A sample of the new run."""

    @abstractmethod
    def close(self) -> None:
        """Closes the runs that it is made of."""


def identity_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the run.json of a composition that decides the bytes of its samples."""
    return {
        "command": made_by(document),
        "config": document["config"],
        "source": document.get("composition", {}).get("source", {}).get("digests"),
    }


def count_existing(folder: Path, document: Mapping[str, Any]) -> int:
    """Samples that the run folder of a composition holds, dropped ones among them; refuses a folder with other settings
    or of another source.
    """
    if (stored := read_document(folder)) is not None:
        check_same(folder, *map(identity_of, (stored, document)))
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count() + ledger.count_dropped()


def write_missing(
    composition: Composition,
    folder: Path,
    *,
    is_linked: bool = True,
    limit: int = 0,
    threads: int = 1,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Writes missing samples, in threads but committed in order, then the index files; how many it wrote. A limit of
    0 is none.
    """
    count = 0
    with RunFolder(folder, read_document(folder) or composition.document) as opened:
        existing = opened.ledger.indices_between(0, composition.number)
        missing = islice((index for index in range(composition.number) if index not in existing), limit or None)
        size = min(max(BLOCK_PIXELS // composition.largest, 1), BLOCK)
        for rows in in_threads(partial(_write, composition, folder, is_linked), missing, size, threads, is_stopping):
            opened.unseal()
            opened.commit(rows)
            count += len(rows)
            on_commit(len(rows))
        finish_run(opened)
    return count


def _write(composition: Composition, folder: Path, is_linked: bool, block: Sequence[int]) -> list[Row]:
    """The rows of some samples, once their files are on the disk, as links where they can be."""
    samples = [composition.compose(index) for index in block]
    sources = {name: path for sample in samples for name, path in sample.sources.items()} if is_linked else {}
    publish_bytes = into(folder)

    def publish(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        linked = {
            name: StoredFile(hashlib.sha256(content).hexdigest(), len(content))
            for name, content in files.items()
            if name in sources and storage.link(sources[name], folder / name)
        }
        return {**linked, **publish_bytes({name: content for name, content in files.items() if name not in linked})}

    return publish_samples([(sample.row, sample.files) for sample in samples], publish)
