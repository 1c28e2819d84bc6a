"""Samples and labels read back from a run folder."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from datasetdm_fast.data import NamedLabels, Trust
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import check_label, kind_of, task_of
from datasetdm_fast.engine.labels.class_tables import ClassTable
from datasetdm_fast.engine.labels.pictures import PREVIEW_SAMPLES, preview
from datasetdm_fast.engine.labels.trust import trust_of
from datasetdm_fast.errors import Missing, Refused, Unanswered, nearest
from datasetdm_fast.runs.run_folder.corrections import CORRECTIONS
from datasetdm_fast.runs.run_folder.document import (
    DOCUMENT,
    LEDGER,
    is_sharded,
    require_document,
    shard_size,
    sides,
    table_of,
    to_see_damage,
    without_ledger,
)
from datasetdm_fast.runs.run_folder.folder import replace_file
from datasetdm_fast.runs.run_folder.goal import goal_of
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, PARTS, Ledger, Row
from datasetdm_fast.runs.run_folder.scores import passing
from datasetdm_fast.runs.run_folder.selections import FILTER, SPLIT, Filter, read_dropped, read_filter
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardPlace, folder_of, shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, read_stored
from datasetdm_fast.untrusted import documents, images

if TYPE_CHECKING:
    from PIL import Image

    from datasetdm_fast.runs.run_folder.shard_stream import ShardStream
    from datasetdm_fast.runs.run_folder.task_dataset import TaskDataset, Transform


@dataclass(frozen=True)
class StoredSample(NamedLabels):
    """One sample of a run folder; image and labels are read when they are asked for."""

    row: Row
    folder: Path
    document: Mapping[str, Any]
    class_table: ClassTable | None = None  # the words of --class-table that its run was made with
    shards: ShardLedger | None = None  # where its files are in a shard

    @property
    def id(self) -> str:
        return self.row.request.id

    @property
    def run(self) -> str:
        """The folder or the URL of its run."""
        return self.shards.place.name if self.shards else str(self.folder)

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
        return copy.deepcopy(self.row.recipe)  # rows share its parts

    @property
    def trust(self) -> Trust:
        """Whether its labels fit its prompt and one another, judged when it was made, or else now."""
        if self.row.trust is not None:
            return self.row.trust
        labels = {task: self.label(task) for task in self.row.labels}
        with self._naming_damage():
            return trust_of(self.classes, labels, self.prompt, self.class_table)

    @property
    def is_doubtful(self) -> bool:
        return not self.trust.is_trusted

    @property
    def image(self) -> np.ndarray:  # [H, W, 3] uint8
        with self._naming_damage():
            return np.array(self._read_image("image"))

    def read(self, role: str) -> bytes:
        """The bytes of one of its files."""
        if self.shards:
            return self.shards.read_file(self.row, role)
        return storage.read(self.folder / self.row.files[role].path, images.LARGEST_IMAGE_FILE)

    def _read_image(self, role: str) -> Image.Image:
        return images.decode_image(self.read(role), str(self.folder / self.row.files[role].path))

    def __repr__(self) -> str:
        labels = ", ".join(self.row.labels)
        return f"<StoredSample {self.id} of {self.folder}: {self.prompt!r}, seed {self.seed}, labels {labels}>"

    def _repr_html_(self) -> str:
        image = self.image
        labels = [(self._label_picture(task, image), task) for task in self.row.labels]
        return preview([(image, f"{self.id}: {self.prompt}"), *labels])

    def _label_picture(self, task: str, image: np.ndarray) -> Image.Image:
        """What a reader sees of a label; a class has the colour of the run's files in all of them."""
        kind = kind_of(task)
        if not kind.is_map:
            return kind.picture(self.label(task), image)
        with self._naming_damage():
            return self._read_image(kind.roles[0])

    def __getattr__(self, name: str) -> Any:
        """Refuses a name that is no label's."""
        return self.label(task_of(name))

    def label(self, task: str) -> Any:
        """The label of a task, None where the run did not make it."""
        if task not in self.row.labels:
            check_label(task)
            return None
        kind = kind_of(task)
        with self._naming_damage():
            table = {**self.document["labels"][task], "size": sides(self.document, self.row.recipe)}
            pixels = {role: np.array(self._read_image(role)) for role in kind.roles}
            return kind.decode(pixels, self.row.labels[task], table)

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        """Refuses what has not the form it was written in."""
        try:
            yield
        except Unanswered:
            raise
        except (Missing, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            cause = error.cause if isinstance(error, (Refused, Missing)) else f"{type(error).__name__}: {error}"
            raise Refused(
                f"{self.run}: sample {self.id} is damaged ({documents.one_line(cause)})", to_see_damage(self.run)
            ) from error


class Run(AbstractContextManager["Run"]):
    """A finished or growing run, read lazily: the samples that it held when it was opened."""

    def __init__(self, path: str | Path, *, kept: bool = False, doubtful: bool = False):
        place = shard_place(path)
        is_stored = isinstance(place, ShardBucket) and is_sharded(read_stored(place) or {"config": {}})
        self.path = fetch_state(place) if is_stored else folder_of(place)
        self.document = require_document(self.path)
        self.shards: ShardLedger | None = None
        if is_sharded(self.document):
            self.shards = ShardLedger(place, shard_size(self.document["config"]), dropped=read_dropped(place))
        if self.shards is None and not (self.path / LEDGER).exists():
            raise without_ledger(self.path, self.document)
        self._ledger: Ledger | None = None
        self._owner = os.getpid()
        self._status = DOUBTFUL if doubtful else DONE
        self._indices = self.ledger.indices(self._status)
        if kept and (decided := read_filter(self.path)) is not None:
            self._indices = self.keep(decided)._indices

    @property
    def ledger(self) -> Ledger | ShardLedger:
        """The rows of the run, with those of samples that are not in the data set."""
        if self.shards is not None:
            return self.shards
        # SQLite connections do not survive a fork or a pickle, so each worker of a data loader opens its own; and
        # another process may have dropped samples or made more, which a connection to a finished run does not notice.
        if self._ledger is None or self._owner != os.getpid() or self._ledger.is_outdated():
            self._ledger, self._owner = Ledger(self.path / LEDGER, read_only=True), os.getpid()
        return self._ledger

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ledger": None}

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of its samples."""
        return tuple(self._indices)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.document["config"]["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of all labels, each at the place of its number."""
        return tuple(self.document["classes"])

    @cached_property
    def _class_table(self) -> ClassTable | None:  # one for all samples, as matchers are kept by their table
        return table_of(self.document)

    @property
    def is_complete(self) -> bool:
        """Whether no sample of the plan is missing."""
        goal = goal_of(self.document["config"], self.document["plan"]["number"])
        return goal.is_reached(self.ledger.tally(goal.number, len(goal.names)))

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[k] for k in range(len(self)))

    def __contains__(self, sample: object) -> bool:
        """Whether it holds a sample, or one with an id such as "00000003"."""
        if isinstance(sample, str):
            with suppress(KeyError):
                return self.position(sample) >= 0
        return isinstance(sample, StoredSample) and sample.id in self and self[sample.id] == sample

    def rows(self, parts: Sequence[str] = PARTS) -> Iterator[Row]:
        """The rows of all samples in one pass, with these parts; see Ledger.rows."""
        if self.shards is not None:
            return self.shards.rows_of(self._indices, parts)
        indices = set(self._indices)
        return (row for row in self.ledger.rows(self._status, parts=parts) if row.request.index in indices)

    @overload
    def __getitem__(self, key: slice) -> Run: ...

    @overload
    def __getitem__(self, key: int | str) -> StoredSample: ...

    def __getitem__(self, key: int | str | slice) -> StoredSample | Run:
        """The sample at a position, the one with an id such as "00000003", or a run of those in a slice."""
        if isinstance(key, slice):
            if key.step is not None and key.step < 0:
                raise Refused(f"{self.path}: the samples of a run have one order", "Use reversed(run) for the other.")
            return self.select(self._indices[key])
        index = self._index(key)
        row = self.ledger.row(index)
        if row is None:
            raise IndexError(f"{self.path}: sample {index:08d} is no longer in the ledger")
        return self.sample_of(row)

    def sample_of(self, row: Row) -> StoredSample:
        """The sample of a row."""
        return StoredSample(row, self.path, self.document, self._class_table, self.shards)

    def keep(self, decided: Filter) -> Run:
        """This run with only the samples that a filter keeps."""
        return self.select(set(self._indices) & set(decided.remaining))

    def select(self, indices: Iterable[int]) -> Run:
        """This run with only these samples; it has another connection to the ledger."""
        fewer = copy.copy(self)
        fewer._ledger, fewer._indices = None, sorted(indices)
        return fewer

    def where(
        self,
        condition: str = "",
        *,
        classes: Sequence[str] = (),
        trusted: bool | None = None,
        test: Callable[[StoredSample], bool] | None = None,
    ) -> Run:
        """The samples that pass: a condition on scores as `filter --where` takes it, a prompt that names one of some
        classes, labels to be trusted or not, and a test of each sample.
        """
        if isinstance(classes, str):
            raise Refused(f"classes: {classes!r} is one string, expected a sequence of words", f"Write ({classes!r},).")
        classes = tuple(classes)  # of an iterator, too
        known = self.document["plan"].get("words", classes)
        for word in classes:
            if word not in known:
                raise Refused(
                    f"classes: no prompt of {self.path} was searched for {word!r}{nearest(word, known)}",
                    f"Choose from {', '.join(known) or 'none'}.",
                )
        chosen = self._indices
        if condition:
            passes = set(passing(self.path, self.ledger, condition).remaining)
            chosen = [index for index in chosen if index in passes]
        if classes:
            naming = {row.request.index for row in self.rows(()) if set(classes) & set(row.request.classes)}
            chosen = [index for index in chosen if index in naming]
        fewer = self.select(chosen)
        if trusted is None and test is None:
            return fewer
        left = [
            sample.row.request.index
            for sample in fewer
            if trusted in (None, sample.trust.is_trusted) and (test is None or test(sample))
        ]
        return self.select(left)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {len(self)} sample{'s' * (len(self) != 1)}, labels {', '.join(self.tasks)}>"

    def _repr_html_(self) -> str:
        shown = [self[k] for k in range(min(len(self), PREVIEW_SAMPLES))]
        return preview([(sample.image, f"{sample.id}: {sample.prompt}") for sample in shown], repr(self))

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

    def replace_file(self, name: str, content: bytes | None) -> None:
        """Replaces a small file beside the samples, such as that of a filter, or removes it."""
        self.close()
        if self.shards is None:
            replace_file(self.path, self.document, name, content)
        elif content is None:
            self.shards.place.remove(name)
        else:
            self.shards.place.remove_parts(name)
            self.shards.place.replace(name, content)

    @overload
    def as_dataset(
        self, task: str | Sequence[str], transform: Transform | None = None, *, streaming: Literal[False] = False
    ) -> TaskDataset: ...

    @overload
    def as_dataset(
        self,
        task: str | Sequence[str],
        transform: Transform | None = None,
        *,
        streaming: Literal[True],
        seed: int | None = None,
    ) -> ShardStream: ...

    def as_dataset(
        self,
        task: str | Sequence[str],
        transform: Transform | None = None,
        *,
        streaming: bool = False,
        seed: int | None = None,
    ) -> TaskDataset | ShardStream:
        """The run as a map-style torch data set: (image, label) for one task, (image, {task: label}) for several.

        `transform` takes both and gives what the data set gives of them. With `streaming` a run in shards is an
        iterable data set, which reads whole shards and shuffles them where there is a `seed`.
        """
        if not isinstance(task, Collection):
            raise Refused(
                f"task: {task!r} was given, expected a label or several labels", "Give one, such as 'semantic'."
            )
        for label in (task,) if isinstance(task, str) else task:
            if label not in self.tasks:
                raise Refused(
                    f"{self.path}: has no labels for {label!r}, it has {', '.join(self.tasks)}"
                    f"{nearest(label, self.tasks)}",
                    "Ask for one of these.",
                )
        from datasetdm_fast.runs.run_folder.task_dataset import TaskDataset

        dataset = TaskDataset(self, task if isinstance(task, str) else tuple(task), transform)
        if not streaming:
            return dataset
        if self.shards is None:
            raise Refused(f"{self.path}: it is not a run in shards, which streaming reads", "Drop streaming=True.")
        from datasetdm_fast.runs.run_folder.shard_stream import ShardStream

        return ShardStream(self.shards.by_shard(self._indices), dataset, seed)

    def close(self) -> None:
        if self.shards is not None:
            self.shards.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch_state(place: ShardPlace) -> Path:
    """A temporary folder with the small files of a run in a store, which lasts as long as `place`."""
    parent, first = Path(tempfile.mkdtemp(prefix="datasetdm-")), os.getpid()

    def remove() -> None:
        if os.getpid() == first:  # a forked process leaves it to the first
            shutil.rmtree(parent, ignore_errors=True)

    weakref.finalize(place, remove)
    folder = parent / (place.name.rstrip("/").rpartition("/")[2].strip(".") or "run")  # exports name it
    contents = {name: place.read(name) for name in (DOCUMENT, FILTER, SPLIT, CORRECTIONS)}
    storage.publish({folder / name: content for name, content in contents.items() if content is not None})
    return folder


def open_run(path: str | Path, *, kept: bool = False, doubtful: bool = False) -> Run:
    """A run folder, or the URL of a run in an object store, for reading; with `kept`, without the samples that the last
    filter left out; with `doubtful`, those that `generate --keep trusted` or `--accept` quarantined, in place of them.
    """
    return Run(path, kept=kept, doubtful=doubtful)
