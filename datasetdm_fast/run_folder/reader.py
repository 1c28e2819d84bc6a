"""Samples and labels read back from a run folder."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.data import Trust
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents, images
from datasetdm_fast.labels import kind_of, label_files, task_of
from datasetdm_fast.labels.trust import trust_of
from datasetdm_fast.run_folder.document import DOCUMENT, LEDGER, most_samples, read_document, sides
from datasetdm_fast.run_folder.kept import read_kept
from datasetdm_fast.run_folder.ledger import DONE, DOUBTFUL, PARTS, SET_ASIDE, Ledger, Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredSample:
    """One sample of a run folder; image and labels are read when they are asked for."""

    row: Row
    folder: Path
    document: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.row.request.id

    @property
    def prompt(self) -> str:
        return self.row.request.prompt

    @property
    def seed(self) -> int:
        return self.row.request.seed

    @property
    def classes(self) -> tuple[str, ...]:
        return self.row.request.classes

    @property
    def meta(self) -> dict[str, Any]:
        return self.row.recipe

    @property
    def trust(self) -> Trust:
        """Whether its labels fit its prompt and one another: as it was judged when it was made, else as it is judged
        now.
        """
        if self.row.trust is not None:
            return self.row.trust
        labels = {task: self.label(task) for task in self.row.labels}
        with self._naming_damage():
            return trust_of(self.classes, labels)

    @property
    def image(self) -> np.ndarray:  # [H, W, 3] uint8
        with self._naming_damage():
            return np.array(images.read_image(self.folder / self.row.files["image"][0]))

    def __getattr__(self, name: str) -> Any:
        """`semantic`, `instances`, `depth`, `keypoints`, `open_vocabulary`: the label, None where the run did not make
        it.
        """
        return self.label(task_of(name))

    def label(self, task: str) -> Any:
        """The label of a task, None where the run did not make it."""
        if task not in self.row.labels:
            return None
        files = {role: name for role, (name, _) in self.row.files.items()}
        with self._naming_damage():
            table = {**self.document["labels"][task], "size": sides(self.document, self.row.recipe)}
            return label_files.decode(task, self.folder, files, self.row.labels[task], table)

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        """Refuses what has not the form it was written in."""
        try:
            yield
        except (Missing, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            cause = error.cause if isinstance(error, (Refused, Missing)) else f"{type(error).__name__}: {error}"
            raise Refused(
                f"{self.folder}: sample {self.id} is damaged ({documents.one_line(cause)})",
                f"See what is damaged with: python -m datasetdm_fast.audit {self.folder}",
            ) from error


class Run(AbstractContextManager):
    """A finished or growing run folder, read lazily; its length and order are those of the samples it held when it was
    opened.
    """

    def __init__(self, path: str | Path, *, kept: bool = False, doubtful: bool = False):
        self.path = Path(path)
        document = read_document(self.path) if (self.path / DOCUMENT).exists() else None
        if document is None:
            raise Refused(f"{path}: not a run folder", "Name a folder that generate has written.")
        if not (self.path / LEDGER).exists():
            raise Refused(
                f"{self.path}: holds no {LEDGER}", "Run generate with its flags once more: it goes on where it stopped."
            )
        self.document: dict[str, Any] = document
        self._ledger: Ledger | None = None
        self._owner = os.getpid()
        self._indices = self._rows().indices(DOUBTFUL if doubtful else DONE)
        if kept and (decided := read_kept(self.path)) is not None:
            self._indices = sorted(set(self._indices) & set(decided.kept))

    def _rows(self) -> Ledger:
        # SQLite connections do not survive a fork or a pickle, so each worker of a data loader opens its own.
        if self._ledger is None or self._owner != os.getpid():
            self._ledger, self._owner = Ledger(self.path / LEDGER, read_only=True), os.getpid()
        return self._ledger

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ledger": None}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.document["config"]["task"])

    @property
    def is_complete(self) -> bool:
        """Whether no sample of the plan is missing."""
        ledger = self._rows()
        number = self.document["plan"]["number"]
        if (there := ledger.count() + ledger.count(SET_ASIDE)) >= number:
            return True
        most = most_samples(self.document["config"], number)
        return most > number and there + ledger.count(DOUBTFUL) >= most

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[k] for k in range(len(self)))

    def rows(self, parts: Sequence[str] = PARTS) -> Iterator[Row]:
        """The rows of all samples in one pass, with these parts; see Ledger.rows."""
        wanted = set(self._indices)
        return (row for row in self._rows().rows(parts=parts) if row.request.index in wanted)

    def __getitem__(self, key: int | str) -> StoredSample:
        """The sample at a position, or the one with an id such as "00000003"."""
        index = self._index(key)
        row = self._rows().row(index)
        if row is None:
            raise IndexError(f"{self.path}: sample {index:08d} is no longer in the ledger")
        return StoredSample(row, self.path, self.document)

    def position(self, id: str) -> int:
        """The position of the sample with an id."""
        index = int(id) if id.isdecimal() and len(id) <= 18 else -1
        place = bisect_left(self._indices, index)
        if self._indices[place : place + 1] != [index]:
            raise KeyError(f"{self.path}: no sample has the id {id!r}")
        return place

    def _index(self, key: int | str) -> int:
        if isinstance(key, str):
            return self._indices[self.position(key)]
        try:
            return self._indices[key]
        except IndexError:
            raise IndexError(f"{self.path}: position {key} is outside of {len(self)} samples") from None

    def as_dataset(self, task: str) -> TaskDataset:
        """The run as a map-style torch data set of (image, label) tensors for one task."""
        if task not in self.tasks:
            raise Refused(
                f"{self.path}: has no labels for {task!r}, it has {', '.join(self.tasks)}", "Ask for one of these."
            )
        return TaskDataset(self, task)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class TaskDataset:
    """(image, label) pairs as torch tensors; a torch DataLoader takes it as it is.

    Image [3, H, W] float32, 0..1. Label: semantic and open-vocabulary [H, W] int64; depth [H, W] float32 metres;
    instance a dict with masks [N, H, W] bool, labels [N] int64 from 1, scores [N]; pose a dict with keypoints [P, J, 3]
    (x, y, visibility) and scores [P].
    """

    run: Run
    task: str

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        import torch

        sample = self.run[position]
        image = torch.from_numpy(sample.image).permute(2, 0, 1).float() / 255
        parts = kind_of(self.task).arrays(sample.label(self.task))
        if isinstance(parts, np.ndarray):
            return image, torch.from_numpy(parts)
        return image, {name: torch.from_numpy(value) for name, value in parts.items()}


def open_run(path: str | Path, *, kept: bool = False, doubtful: bool = False) -> Run:
    """A run folder for reading; with `kept`, without the samples that the last filter left out; with `doubtful`, those
    that `generate --keep trusted` set aside in place of the others.
    """
    return Run(path, kept=kept, doubtful=doubtful)
