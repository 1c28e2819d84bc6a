"""What a decoder should have said about a labelled image, as tensors."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused

ALIGNED = 8  # bytes
DTYPES = {
    "classes": np.int64,
    "masks": bool,
    "depth": np.float32,
    "points": np.float32,
    "weights": np.float32,
    "searched": np.int64,
}


@dataclass(frozen=True)
class TrainingTarget:
    """Truth of one view; fields a task does not need stay empty."""

    classes: Tensor  # [M] ids
    masks: Tensor  # [M, H, W] bool
    depth: Tensor  # [H, W] metres, 0 = unknown
    points: Tensor  # [J, 2] pixels
    weights: Tensor  # [J] 1 where the joint is in the picture
    searched: Tensor  # [S] ids that the picture was searched for; none: for all

    @property
    def bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


class TargetMemory:
    """Room for the truth of many views apart from the heap, which small blocks that stay would leave in pieces, too
    small for the tensors of the next step. Pages count once they are written.
    """

    def __init__(self, size: int):
        self._bytes, self._used = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8), 0

    def kept(self, target: TrainingTarget) -> TrainingTarget | None:
        """The same truth in this memory, None where it does not fit any more."""
        if self._used + target.bytes + ALIGNED * len(fields(target)) > len(self._bytes):
            return None
        return TrainingTarget(*map(self._copied, (getattr(target, field.name) for field in fields(target))))

    def _copied(self, tensor: Tensor) -> Tensor:
        room = self._bytes[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def check_truth(source: LabelledSource, item: Labelled, task: str, spec: str) -> None:
    """Refuses a data set that does not hold what the task is taught by."""
    taught = TASKS[task]
    if all(getattr(item, name) is None for name in taught.needs):
        raise Refused(
            f"--data {spec}: item {item.id} has no {' and no '.join(taught.needs)}, which {task} needs for training",
            "Choose another --task, or other data.",
        )
    if taught.names and not getattr(source, taught.names):
        raise Refused(
            f"--data {spec}: the data set names no {taught.names}, which {task} needs",
            "Choose another --task, or other data.",
        )


def check_shown(source: LabelledSource, task: str, spec: str) -> None:
    """Refuses a data set none of whose images shows what the task is taught by; reads up to the first that does."""
    taught = TASKS[task]
    if not any(taught.is_shown(source, _arrays(source, item, task)) for item in source):
        wanted = taught.wanted.format(farthest=source.max_depth)
        raise Refused(
            f"--data {spec}: none of {len(source)} images shows {wanted}",
            "Check the labels: their class numbers, or the unit of depth.",
        )


def target(source: LabelledSource, item: Labelled, task: str, one_class: int | None = None) -> TrainingTarget:
    """The truth of an item; `one_class` gives every mask that id."""
    arrays = _arrays(source, item, task)
    if one_class is not None:
        arrays["classes"] = np.full_like(arrays["classes"], one_class)
    return TrainingTarget(
        **{name: torch.from_numpy(np.array(array, DTYPES[name], order="C")) for name, array in arrays.items()}
    )


def _searched(source: LabelledSource, item: Labelled) -> Sequence[int]:
    """The classes of which nothing is there where no mask is of them, none: all. A crowd may be of its class."""
    crowds, things = (() if kinds is None else kinds for kinds in (item.crowd_classes, item.mask_classes))
    unclear = {int(kind) for kind in crowds}.difference(int(kind) for kind in things)
    if not unclear:
        return item.searched or ()
    return [kind for kind in item.searched or range(len(source.thing_classes)) if kind not in unclear]


def _arrays(source: LabelledSource, item: Labelled, task: str) -> dict[str, np.ndarray]:
    """Every field of a target, those the task does not fill without content."""
    joints = len(source.joints)
    return {
        "classes": np.zeros(0, np.int64),
        "masks": np.zeros((0, *item.image.shape[:2]), bool),
        "depth": np.zeros((1, 1), np.float32),
        "points": np.zeros((joints, 2), np.float32),
        "weights": np.zeros(joints, np.float32),
        "searched": np.array(_searched(source, item), np.int64),
        **TASKS[task].target(source, item),
    }
