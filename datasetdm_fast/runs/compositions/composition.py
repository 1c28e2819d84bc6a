"""New runs made of samples of finished ones: their source, and what is compared."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.run import count_rows
from datasetdm_fast.runs.run_folder.document import (
    SHARDS,
    check_same,
    damage_failure,
    made_by,
    read_document,
    refuse_shards,
    sides,
)
from datasetdm_fast.runs.run_folder.folder import is_sealed, read_seal
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import Row, canonical
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.selections import DROPPED_IDS, FILTER, check_filtered, encode_dropped
from datasetdm_fast.untrusted import images

CACHE_BYTES = 64 * 2**20  # of pixels of samples that are used again soon
SEVERAL_SIZES = ("label", "merge", "splice")  # commands that make runs whose pictures may have different sizes
PIXEL_BYTES = 8  # of a sample with every kind of label


class Source:
    """A finished run, in a folder unless it `may_be_sharded`."""

    def __init__(self, place: str | Path, *, only_kept: bool = False, may_be_sharded: bool = False):
        self.place, self.run = str(place), Run(place, kept=only_kept)
        self.path, self.document = self.run.path, self.run.document
        if not may_be_sharded:
            refuse_shards(self.path)
        if only_kept:
            check_filtered(self.path)
        self.filter_digest = storage.sha256_of(self.path / FILTER) if only_kept else ""
        self._sealed = read_seal(self.path) if self.run.shards is None and is_sealed(self.path) else {}
        if not self.run.is_complete or not (self._sealed or self.run.shards is not None):
            raise Refused(f"{place}: the run is not finished", "Run the command that made it again: it resumes.")

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the index files, or of all shards and of what was dropped from them, which decide every sample
        with its labels.
        """
        if (shards := self.run.shards) is not None:
            files = [sorted(file.sha256 for file in entry.files.values()) for entry in shards.entries.values()]
            contents = {SHARDS: canonical(files).encode(), DROPPED_IDS: encode_dropped(shards.dropped)}
            return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if content}
        return {name: self._sealed[name] for name in writers(self.document) if name.endswith((".json", ".jsonl"))}

    @property
    def provenance(self) -> dict[str, Any]:
        """The source in the run.json of a composition."""
        parts = ("versions", "config", "plan", "composition")
        facts = {part: self.document[part] for part in parts if part in self.document}
        return {"path": str(self.path), "digests": self.digests, **facts}

    def close(self) -> None:
        self.run.close()


@dataclass(frozen=True)
class SourceSample:
    """A sample of a run as it is read."""

    row: Row
    pixels: dict[str, np.ndarray]  # role -> pixels of the file


class SquareSource(Source):
    """A finished run folder whose samples are squares of one size, read one at a time by any thread."""

    def __init__(self, path: Path, *, only_kept: bool = False):
        super().__init__(path, only_kept=only_kept)
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

    def label(self, tile: SourceSample, task: str) -> Any:
        """The label of a task, as its files and its row have it."""
        kind = kind_of(task)
        table = {**self.document["labels"][task], "size": (self.side, self.side)}
        return kind.decode({role: tile.pixels[role] for role in kind.roles}, tile.row.labels[task], table)

    def _tile(self, position: int) -> SourceSample:
        row = self.run[position].row
        if sides(self.document, row.recipe) != (self.side, self.side):
            raise damage_failure(self.path, f"the row of sample {row.request.id}")
        roles = ("image", *(role for task in self.run.tasks for role in kind_of(task).roles))
        return SourceSample(row, {role: self._pixels(row, role) for role in roles})

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
    return count_rows(folder)
