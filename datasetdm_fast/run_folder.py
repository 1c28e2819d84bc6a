"""The run folder: files published first, then their rows; everything that is not a sample's own file is rebuilt from the ledger."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast import gallery, leases
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Sample, SemanticMap, SetAside
from datasetdm_fast.disk import locks, sqlite, storage
from datasetdm_fast.disk.storage import Stored
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.foreign import documents, images
from datasetdm_fast.labels import label_files
from datasetdm_fast.ledger import SET_ASIDE, Ledger, Row
from datasetdm_fast.writers import INDEXES

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of the folder's layout; a reader refuses what it does not know
DOCUMENT, LEDGER, LOCK = "run.json", "state/ledger.sqlite", "state/lock"
OWN = "this"  # the line of the seal that is about the other lines
SEAL = "state/seal.json"  # digests of what is no sample's own file; empty from before the first change until everything is in place
ELSEWHERE = "state/store"  # the URL of the samples' files, where they are not in the folder
FORM = {
    "versions": {"datasetdm_fast": str},
    "config": {"task": [str], "image_format": str, "sampler": str, "seed": int},
    "plan": {"number": int, "batch_size": int},
    "sampling": {"size": int, "steps": int, "calls": int, "guidance": float},
    "model": {"name": str, "source": str, "licence": str, "digests": dict},
    "decoders": dict,
    "engine": dict,
    "labels": dict,
}
Publish = Callable[[Mapping[str, bytes]], Mapping[str, Stored]]  # files by their path inside the run folder -> what was written
DECODER_FORM = {"digest": str, "licence": str}
LABEL_FORMS = {
    "semantic": {"classes": [str]},
    "instance": {"classes": [str], "size": [int]},
    "depth": {"max_depth": float},
    "pose": {"joints": [str], "limbs": [[int]]},
    "open-vocabulary": {"classes": [str]},
}


def read_document(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where `folder` is no run folder yet; a folder that holds anything else is refused."""
    path = folder / DOCUMENT
    try:
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{folder}: a file has this name, expected a run folder", "Choose another --out.")
        if not path.exists():
            # A process killed right at the start leaves no more than its lock and a half-written description.
            if folder.is_dir() and any(inside.name != "state" and not storage.is_temporary(inside) for inside in folder.iterdir()):
                raise Refused(
                    f"{folder}: the folder is not empty and holds no {DOCUMENT}, so it is no run folder", "Choose another --out; nothing is ever overwritten."
                )
            return None
    except OSError as error:
        raise storage.refusal(error, folder) from error
    except Refused:
        raise
    except ValueError as error:  # a NUL byte
        raise Refused(f"--out {documents.shown(str(folder))}: no possible name of a folder ({error})", "Choose another --out.") from error
    document = documents.read_object(path)
    if document.get("format") != FORMAT:
        raise Refused(f"{path}: format {documents.shown(document.get('format'))}, this version reads {FORMAT}", "Read it with the version that wrote it.")
    try:
        check_document(document)
    except ValueError as error:
        raise Refused(f"{path}: not the description of a run ({error})", "Restore the file from a copy, or choose another --out.") from error
    return document


def check_document(document: Mapping[str, Any]) -> None:
    """A ValueError where it is not the content of a run.json."""
    documents.check_form(document, FORM)
    tasks, size = document["config"]["task"], document["sampling"]["size"]
    for name, entry in document["decoders"].items():
        documents.check_form(entry, DECODER_FORM, f"decoders.{name}")
    for task in tasks:
        if task not in LABEL_FORMS:
            raise ValueError(f"config.task names {documents.shown(task)}, expected {', '.join(LABEL_FORMS)}")
        documents.check_form(document["labels"].get(task), LABEL_FORMS[task], f"labels.{task}")
    if document["config"]["image_format"] not in ("png", "jpg"):
        raise ValueError(f"config.image_format is {documents.shown(document['config']['image_format'])}, expected png or jpg")
    if not 0 < size**2 <= images.MOST_PIXELS or not 0 < document["plan"]["number"] < 2**48 or not 0 < document["plan"]["batch_size"] < 2**31:
        raise ValueError("a number in sampling or plan is out of range")


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """One line per setting that differs, with both values."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        keys = sorted(set(stored) | set(wanted))
        return [line for key in keys for line in differences(stored.get(key), wanted.get(key), f"{name}.{key}" if name else key)]
    return [] if stored == wanted else [f"{name}: {_short(stored)} there, {_short(wanted)} asked for"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."


def check_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses to go on with a folder that was started otherwise in any of the parts of `wanted`."""
    found = [line for part in wanted for line in differences(stored.get(part), wanted[part], "" if part == "config" else part)]
    if found:
        raise Refused(f"{folder}: holds a run of another configuration ({'; '.join(found)})", "Choose another --out, or give the flags it was started with.")


class RunFolder:
    """A run folder open for writing, held for this process until `close`.

    A member is one of several processes of a run: somebody else holds the folder for all of them, and `journal` is how their ledger is kept.
    """

    def __init__(self, path: Path, document: Mapping[str, Any], *, is_member: bool = False, journal: str = sqlite.WRITE_AHEAD):
        self.path = path
        self.document: dict[str, Any] = json.loads(_pretty(document))  # in the order of the file, which is what a later start will read
        self._closing = ExitStack()
        storage.make_folder(path / "state")
        if not is_member:
            self._closing.enter_context(locks.locked(path / LOCK))
        try:
            if not is_member:
                clean(path)
            if not (path / DOCUMENT).exists():
                storage.publish({path / DOCUMENT: _pretty(document)})
            if not (path / SEAL).exists():
                storage.publish({path / SEAL: _pretty({})})
            self.ledger = self._closing.enter_context(Ledger(path / LEDGER, journal=journal))
            described = json.dumps(document, ensure_ascii=False, sort_keys=True)
            if self.ledger.noted("run") != described:
                unseal(path)
                self.ledger.note("run", described)
        except BaseException:
            self._closing.close()
            raise

    def add(self, results: Sequence[Sample | SetAside], recipe: Mapping[str, Any]) -> None:
        """Makes the results part of the data set, all or none."""
        self.unseal()
        self.ledger.commit(self.write(results, recipe))

    def unseal(self) -> None:
        """To be called before the first change."""
        unseal(self.path)

    def write(self, results: Sequence[Sample | SetAside], recipe: Mapping[str, Any]) -> list[Row]:
        """Publishes the files of the results in an unsealed folder; they are samples once the rows are committed. Threads may write different ones at once."""
        return write_samples(results, recipe, self.document["config"]["image_format"], into(self.path))

    def renew(self, row: Row, sample: Sample) -> list[str]:
        """Paths of the files that were missing or damaged and are there again; bytes that differ from the row's are never written."""
        made, records = label_files.encode(sample, self.document["config"]["image_format"])
        contents = {name: content for name, content in made.values()}
        expected = {name: stored.sha256 for name, stored in row.files.values()}
        other = sorted(
            name for name in contents.keys() | expected.keys() if name not in contents or hashlib.sha256(contents[name]).hexdigest() != expected.get(name)
        )
        if json.loads(json.dumps(records)) != row.labels:
            other.append("labels in the ledger")
        if other:
            raise GateFailed(
                f"sample {row.request.id}: made again it differs from the run folder in {', '.join(other)}; nothing was written",
                "Compare versions and device with run.json: the same bytes need the same ones.",
            )
        damaged = {name: content for name, content in contents.items() if storage.sha256_of(self.path / name) != expected[name]}
        storage.publish({self.path / name: content for name, content in damaged.items()})
        return sorted(damaged)

    def rebuild(self) -> None:
        """Writes every index file anew from the ledger, unless the last rebuild saw the same rows, and seals the folder."""
        if not has_indexes(self.path, self.document, self.ledger):
            unseal(self.path)
            try:
                storage.publish({self.path / name: INDEXES[name][1](self.document, self.ledger) for name in INDEXES if name in index_files(self.document)})
                gallery.write(self.path, self.document, self.ledger, has_samples=not (self.path / ELSEWHERE).exists())
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise Refused(
                    f"{self.path / LEDGER}: its rows do not fit {DOCUMENT} ({type(error).__name__}: {error})",
                    f"See what is damaged with: python -m datasetdm_fast.audit {self.path}",
                ) from error
            self.ledger.note("indexed", "yes")
        if not is_sealed(self.path) and self.ledger.settle():
            seal(self.path, self.document)

    def is_indexed(self) -> bool:
        return is_indexed(self.path, self.document, self.ledger)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_samples(results: Sequence[Sample | SetAside], recipe: Mapping[str, Any], image_format: str, publish: Publish) -> list[Row]:
    """The rows of the results, once `publish` has taken all of their files."""
    files, rows = {}, []
    for result in results:
        if isinstance(result, SetAside):
            rows.append(Row(result.request, dict(recipe), status=SET_ASIDE, reason=result.reason))
            continue
        made, records = label_files.encode(result, image_format)
        files[result.request.index] = made
        rows.append(Row(result.request, {**recipe, **result.provenance}, labels=records))
    stored = publish({name: content for made in files.values() for name, content in made.values()})
    for row in rows:
        row.files.update({role: (name, stored[name]) for role, (name, _) in files.get(row.request.index, {}).items()})
    return rows


def into(folder: Path) -> Publish:
    """Writes files below a folder."""

    def publish(files: Mapping[str, bytes]) -> dict[str, Stored]:
        stored = storage.publish({folder / name: content for name, content in files.items()})
        return {name: stored[folder / name] for name in files}

    return publish


def clean(folder: Path) -> None:
    """Removes what earlier processes left half-done; nobody else may be at work in the folder."""
    storage.remove_temporaries(folder)
    leases.remove(folder / leases.FILE)


def _pretty(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def note(folder: Path, name: str, value: Any) -> None:
    """Adds what was found out about a run later to its run.json, beside what decides its bytes."""
    document = read_document(folder)
    if document is None:
        raise Refused(f"{folder}: holds no {DOCUMENT}, so it is no run folder", "Name the folder of a run.")
    with locks.locked(folder / LOCK):
        was_sealed = is_sealed(folder)
        unseal(folder)
        storage.publish({folder / DOCUMENT: _pretty(document | {name: value})})
        if was_sealed:
            seal(folder, document)


def index_files(document: Mapping[str, Any]) -> list[str]:
    """The files of a run folder that are rebuilt from the ledger, the gallery's pictures aside."""
    tasks = ("", *document["config"]["task"])
    return [name for name, (task, _) in INDEXES.items() if task in tasks] + [gallery.PAGE]


def has_indexes(folder: Path, document: Mapping[str, Any], ledger: Ledger) -> bool:
    """Whether every index file is there and shows the rows of the ledger."""
    return ledger.noted("indexed") is not None and all((folder / name).exists() for name in index_files(document))


def is_indexed(folder: Path, document: Mapping[str, Any], ledger: Ledger) -> bool:
    """Whether nothing is left to be done for a folder whose samples are complete."""
    return has_indexes(folder, document, ledger) and is_sealed(folder) and (folder / LOCK).exists()


def seal(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes down the digests of run.json, ledger and index files, by which an audit knows that nobody changed them since."""
    digests = {name: storage.sha256_of(folder / name) for name in (DOCUMENT, LEDGER, LOCK, *index_files(document))}
    storage.publish({folder / SEAL: sealed(digests)})


def sealed(digests: Mapping[str, str]) -> bytes:
    """The seal of these digests, which has one of its own."""
    return _pretty({**digests, OWN: hashlib.sha256(_pretty(digests)).hexdigest()})


def unseal(folder: Path) -> None:
    """Takes the digests back before the first change, so that a run killed in the middle of one is not taken for a damaged one."""
    if is_sealed(folder):
        storage.publish({folder / SEAL: _pretty({})})


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).exists() and (folder / SEAL).stat().st_size > len(_pretty({}))


@dataclass(frozen=True)
class StoredSample:
    """One sample of a run folder; image and labels are read when they are asked for."""

    row: Row
    folder: Path
    tables: Mapping[str, Any]

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
        """How it was made."""
        return self.row.recipe

    @property
    def image(self) -> np.ndarray:  # [H, W, 3] uint8
        return label_files.read_image(self.folder / self.row.files["image"][0])

    @property
    def semantic(self) -> SemanticMap | None:
        return self._label("semantic")

    @property
    def instances(self) -> Instances | None:
        return self._label("instance")

    @property
    def depth(self) -> DepthMap | None:
        return self._label("depth")

    @property
    def keypoints(self) -> Keypoints | None:
        return self._label("pose")

    @property
    def open_vocabulary(self) -> SemanticMap | None:
        return self._label("open-vocabulary")

    def _label(self, task: str) -> Any:
        """The label of a task, None where the run did not make it."""
        if task not in self.row.labels:
            return None
        files = {role: name for role, (name, _) in self.row.files.items()}
        return label_files.decode(task, self.folder, files, self.row.labels[task], self.tables[task])


class Run:
    """A finished or growing run folder, read lazily; its length and order are those of the samples it held when it was opened."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        document = read_document(self.path) if (self.path / DOCUMENT).exists() else None
        if document is None:
            raise Refused(f"{path}: not a run folder", "Name a folder that generate has written.")
        if not (self.path / LEDGER).exists():
            raise Refused(f"{self.path}: holds no {LEDGER}", "Run generate with its flags once more: it goes on where it stopped.")
        self.document: dict[str, Any] = document
        self._ledger: Ledger | None = None
        self._owner = os.getpid()
        self._indices = self._rows().indices()

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

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, key: int | str) -> StoredSample:
        """The sample at a position, or the one with an id such as "00000003"."""
        index = self._index(key)
        row = self._rows().row(index)
        if row is None:
            raise IndexError(f"{self.path}: sample {index:08d} is no longer in the ledger")
        return StoredSample(row, self.path, self.document["labels"])

    def _index(self, key: int | str) -> int:
        if isinstance(key, str):
            index = int(key) if key.isdecimal() and len(key) <= 18 else -1
            place = bisect_left(self._indices, index)
            if self._indices[place : place + 1] != [index]:
                raise KeyError(f"{self.path}: no sample has the id {key!r}")
            return index
        try:
            return self._indices[key]
        except IndexError:
            raise IndexError(f"{self.path}: position {key} is outside of {len(self)} samples") from None

    def as_dataset(self, task: str) -> TaskDataset:
        """The run as a map-style torch data set of (image, label) tensors for one task."""
        if task not in self.tasks:
            raise Refused(f"{self.path}: has no labels for {task!r}, it has {', '.join(self.tasks)}", "Ask for one of these.")
        return TaskDataset(self, task)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class TaskDataset:
    """(image, label) pairs as torch tensors; a torch DataLoader takes it as it is.

    Image [3, H, W] float32, 0..1. Label: semantic and open-vocabulary [H, W] int64; depth [H, W] float32 metres; instance a dict with
    masks [N, H, W] bool, labels [N] int64 from 1, scores [N]; pose a dict with keypoints [P, J, 3] (x, y, visibility) and scores [P].
    """

    run: Run
    task: str

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        import torch

        sample = self.run[position]
        image = torch.from_numpy(sample.image).permute(2, 0, 1).float() / 255
        label = sample._label(self.task)
        if isinstance(label, SemanticMap):
            return image, torch.from_numpy(label.labels.astype(np.int64))
        if isinstance(label, DepthMap):
            return image, torch.from_numpy(label.metres)
        if isinstance(label, Instances):
            parts = {"masks": label.masks, "labels": label.class_ids + 1, "scores": label.scores}
        else:
            parts = {"keypoints": np.concatenate([label.points[..., :2], label.visibility[..., None]], -1).astype(np.float32), "scores": label.scores}
        return image, {name: torch.from_numpy(value) for name, value in parts.items()}


def open_run(path: str | Path) -> Run:
    """A run folder for reading."""
    return Run(path)
