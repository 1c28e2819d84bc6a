"""A finished run folder whose samples are put into another one: what identifies it, and its samples as pixels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.run_folder.document import (
    DOCUMENT,
    LEDGER,
    check_same,
    damaged,
    made_by,
    maker,
    read_document,
    sides,
)
from datasetdm_fast.runs.run_folder.kept import KEPT
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.run_folder.object_store import refuse_stored
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.seal import index_files, is_sealed, read_seal
from datasetdm_fast.untrusted import images

KEPT_DECODED = 64 * 2**20  # bytes of pixels of samples that are used again soon
SEVERAL_SIZES = ("label", "merge")  # commands that make runs whose pictures may have sizes of their own
PIXEL_BYTES = 8  # of a sample with every kind of label


def digests_of(path: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that tell every sample of a sealed run with its labels."""
    sealed = read_seal(path)
    return {name: sealed[name] for name in index_files(document) if name.endswith((".json", ".jsonl"))}


def begun(folder: Path, document: Mapping[str, Any]) -> int:
    """Samples that the run folder of a composition holds already, dropped ones among them; other settings and another
    source are refused.
    """
    if (stored := read_document(folder)) is not None:
        check_same(folder, *map(decisive, (stored, document)))
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count() + ledger.count_dropped()


def source_path(folder: Path, stored: Mapping[str, Any], given: str) -> Path:
    """The run that the composition `folder` was made of; `given` is where it lies now, if it was moved."""
    path = Path(given or stored.get("composition", {}).get("source", {}).get("path", ""))
    if not given and not (path / DOCUMENT).exists():
        raise Refused(
            f"{folder}: was made of {path}, where there is no run folder any more",
            f"Tell where it is now: {maker(stored)} RUN --only ID --out {quote(folder)}",
        )
    check_filter(folder, path, stored["config"].get("kept", ""))
    return path


def check_filter(folder: Path, path: Path, kept: str) -> None:
    """Refuses to make samples of a composition again where its source is filtered otherwise now; `kept` is the digest
    of the filter that chose its samples, empty where none did.
    """
    if kept and (path / DOCUMENT).exists() and (found := storage.sha256_of(path / KEPT)) != kept:
        since = "has another one now" if found else "is not filtered any more"
        raise Refused(
            f"{folder}: was made of the samples that a filter of {path} kept, and that run {since}",
            f"Filter it as it was then: python -m datasetdm_fast.filter {quote(path)} --where CONDITION",
        )


@dataclass(frozen=True)
class Tile:
    """A sample as it is put into others."""

    row: Row
    pixels: dict[str, np.ndarray]  # role -> pixels of the file


def decisive(document: Mapping[str, Any]) -> dict[str, Any]:
    """What of the run.json of a composition decides the bytes of its samples."""
    return {
        "command": made_by(document),
        "config": document["config"],
        "source": document.get("composition", {}).get("source", {}).get("digests"),
    }


class Source:
    """A finished run folder, read one sample at a time by any thread."""

    def __init__(self, path: Path, *, only_kept: bool = False):
        self.path = path
        self.run = Run(path, kept=only_kept)
        refuse_stored(path)
        self.kept_digest = storage.sha256_of(path / KEPT) if only_kept else ""
        if only_kept and not self.kept_digest:
            raise Refused(
                f"--kept: {path} has not been filtered",
                f"Drop it, or filter first with: python -m datasetdm_fast.filter {quote(path)} --where CONDITION",
            )
        self.document: dict[str, Any] = self.run.document
        if self.document.get("command") == "splice":
            raise Refused(f"{path}: is itself spliced", "Name the run folder that it was made from.")
        if not self.run.is_complete or not is_sealed(path):
            raise Refused(f"{path}: the run is not finished", "Run the command that made it again: it resumes.")
        if not len(self.run):
            raise Refused(f"{path}: holds no sample", "Name a run folder with samples.")
        self.side: int = self.document["sampling"]["size"]
        if self.document.get("command") in SEVERAL_SIZES:
            self._check_sides()
        self.tile = lru_cache(max(KEPT_DECODED // (self.side**2 * PIXEL_BYTES), 1))(self._tile)

    def _check_sides(self) -> None:
        """Refuses pictures of other sizes than the run's model has."""
        for row in self.run.rows(()):
            height, width = row.recipe.get("sides", (self.side, self.side))
            if (height, width) != (self.side, self.side):
                raise Refused(
                    f"{self.path}: sample {row.request.id} has {width} x {height} pixels, expected {self.side} x "
                    f"{self.side} of all samples",
                    "Name a run folder whose pictures are squares of one size.",
                )

    def digests(self) -> dict[str, str]:
        """Digests of the files that tell every sample of the run with its labels."""
        return digests_of(self.path, self.document)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the run.json of a composition says of its source."""
        parts = ("versions", "config", "plan", "composition")
        told = {part: self.document[part] for part in parts if part in self.document}
        return {"path": str(self.path), "digests": self.digests(), **told}

    def label(self, tile: Tile, task: str) -> Any:
        """The label of a task, as its files and its row have it."""
        kind = kind_of(task)
        table = {**self.document["labels"][task], "size": (self.side, self.side)}
        return kind.decode({role: tile.pixels[role] for role in kind.files(table)}, tile.row.labels[task], table)

    def _tile(self, place: int) -> Tile:
        row = self.run[place].row
        if sides(self.document, row.recipe) != (self.side, self.side):
            raise damaged(self.path, f"the row of sample {row.request.id}")
        tables = self.document["labels"]
        roles = ("image", *(role for task in self.run.tasks for role in kind_of(task).files(tables[task])))
        return Tile(row, {role: self._pixels(row, role) for role in roles})

    def _pixels(self, row: Row, role: str) -> np.ndarray:
        if role not in row.files:
            raise damaged(self.path, f"the row of sample {row.request.id}")
        name, stored = row.files[role]
        if (data := storage.read_written(self.path / name, stored, images.LARGEST_IMAGE_FILE)) is None:
            raise damaged(self.path, name)
        pixels = np.asarray(images.decode_image(data, name))
        if pixels.shape[:2] != (self.side, self.side):
            raise damaged(self.path, name)
        return pixels

    def close(self) -> None:
        self.run.close()
