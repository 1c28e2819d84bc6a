"""New runs made of samples of finished ones: their source, what is compared, and how missing samples are written."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.blocks import in_threads
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import (
    LEDGER,
    check_same,
    damage_failure,
    made_by,
    read_document,
    refuse_shards,
    sides,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder, into, publish_samples
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.seal import index_files, is_sealed, read_seal
from datasetdm_fast.runs.run_folder.selections import FILTER, check_filtered
from datasetdm_fast.untrusted import images

CACHE_BYTES = 64 * 2**20  # of pixels of samples that are used again soon
SEVERAL_SIZES = ("label", "merge")  # commands that make runs whose pictures may have different sizes
PIXEL_BYTES = 8  # of a sample with every kind of label


class Source:
    """A finished run folder."""

    def __init__(self, place: str | Path, *, only_kept: bool = False):
        self.place, self.run = str(place), Run(place, kept=only_kept)
        self.path, self.document = self.run.path, self.run.document
        self._check_kind()
        if only_kept:
            check_filtered(self.path)
        self.filter_digest = storage.sha256_of(self.path / FILTER) if only_kept else ""
        if not self.run.is_complete or not self._is_closed():
            raise Refused(f"{place}: the run is not finished", "Run the command that made it again: it resumes.")

    def _check_kind(self) -> None:
        refuse_shards(self.path)

    def _is_closed(self) -> bool:
        return is_sealed(self.path)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the index files, which decide every sample of the run with its labels."""
        sealed = read_seal(self.path)
        return {name: sealed[name] for name in index_files(self.document) if name.endswith((".json", ".jsonl"))}

    @property
    def provenance(self) -> dict[str, Any]:
        """The source in the run.json of a composition."""
        parts = ("versions", "config", "plan", "composition")
        facts = {part: self.document[part] for part in parts if part in self.document}
        return {"path": str(self.path), "digests": self.digests, **facts}

    def close(self) -> None:
        self.run.close()


@dataclass(frozen=True)
class Tile:
    """A sample as it is put into others."""

    row: Row
    pixels: dict[str, np.ndarray]  # role -> pixels of the file


class TileSource(Source):
    """A finished run folder whose samples are squares of one size, read one at a time by any thread."""

    def __init__(self, path: Path, *, only_kept: bool = False):
        super().__init__(path, only_kept=only_kept)
        if self.document.get("command") == "splice":
            raise Refused(f"{path}: is itself spliced", "Name the run folder that it was made from.")
        if not len(self.run):
            raise Refused(f"{path}: holds no sample", "Name a run folder with samples.")
        self.side: int = self.document["sampling"]["size"]
        for row in self.run.rows(()) if self.document.get("command") in SEVERAL_SIZES else ():
            height, width = row.recipe.get("sides", (self.side, self.side))
            if (height, width) != (self.side, self.side):
                raise Refused(
                    f"{path}: sample {row.request.id} has {width} x {height} pixels, expected {self.side} x "
                    f"{self.side} of all samples",
                    "Name a run folder whose pictures are squares of one size.",
                )
        self.tile = lru_cache(max(CACHE_BYTES // (self.side**2 * PIXEL_BYTES), 1))(self._tile)

    def label(self, tile: Tile, task: str) -> Any:
        """The label of a task, as its files and its row have it."""
        kind = kind_of(task)
        table = {**self.document["labels"][task], "size": (self.side, self.side)}
        return kind.decode({role: tile.pixels[role] for role in kind.files(table)}, tile.row.labels[task], table)

    def _tile(self, position: int) -> Tile:
        row = self.run[position].row
        if sides(self.document, row.recipe) != (self.side, self.side):
            raise damage_failure(self.path, f"the row of sample {row.request.id}")
        tables = self.document["labels"]
        roles = ("image", *(role for task in self.run.tasks for role in kind_of(task).files(tables[task])))
        return Tile(row, {role: self._pixels(row, role) for role in roles})

    def _pixels(self, row: Row, role: str) -> np.ndarray:
        if role not in row.files:
            raise damage_failure(self.path, f"the row of sample {row.request.id}")
        name, stored = row.files[role]
        if (data := storage.read_written(self.path / name, stored, images.LARGEST_IMAGE_FILE)) is None:
            raise damage_failure(self.path, name)
        pixels = np.asarray(images.decode_image(data, name))
        if pixels.shape[:2] != (self.side, self.side):
            raise damage_failure(self.path, name)
        return pixels


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
    """Samples of a composition's run folder, dropped ones among them; another source or setting is refused."""
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
    """Writes missing samples, committed in order, then the index files; how many it wrote. A limit of 0 is none."""
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
