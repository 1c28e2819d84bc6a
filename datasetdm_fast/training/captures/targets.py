"""Training targets: the truth of a labelled image as tensors."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused

ALIGNMENT = 8  # bytes


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
    """Memory for cached targets outside of the heap: small blocks that stay would fragment it, until the tensors of the
    next step do not fit. Pages count once they are written.
    """

    def __init__(self, size: int):
        self._bytes, self._used = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8), 0

    def copy(self, target: TrainingTarget) -> TrainingTarget | None:
        """A copy of the target in this memory, None where it no longer fits."""
        if self._used + target.bytes + ALIGNMENT * len(fields(target)) > len(self._bytes):
            return None
        return TrainingTarget(*map(self._copy, (getattr(target, field.name) for field in fields(target))))

    def _copy(self, tensor: Tensor) -> Tensor:
        room = self._bytes[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def check_truth(source: LabelledSource, task: str, spec: str) -> None:
    """Refuses a data set without the truth that a task is trained with, or none of whose images shows any; reads up to
    the first image that does.
    """
    kind, first = TASKS[task], source[0]
    if all(getattr(first, name) is None for name in kind.needs):
        raise Refused(
            f"--data {spec}: item {first.id} has no {' and no '.join(kind.needs)}, which {task} needs for training",
            "Choose another --task, or other data.",
        )
    if kind.names and not getattr(source, kind.names):
        raise Refused(
            f"--data {spec}: the data set names no {kind.names}, which {task} needs",
            "Choose another --task, or other data.",
        )
    has_crowds = False
    for item in source:
        if kind.is_shown(source, _arrays(source, item, task)):
            return
        has_crowds = has_crowds or item.crowds is not None and len(item.crowds) > 0
    raise Refused(
        f"--data {spec}: none of {len(source)} images shows {kind.requirement.format(farthest=source.max_depth)}",
        "All of its regions are crowds or ignored, and teach nothing: mark single things, in COCO with iscrowd 0."
        if has_crowds
        else "Check the labels: their class numbers, or the unit of depth.",
    )


def target_of(source: LabelledSource, item: Labelled, task: str) -> TrainingTarget:
    arrays = _arrays(source, item, task)
    return TrainingTarget(**{name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()})


def _searched_classes(source: LabelledSource, item: Labelled) -> Sequence[int]:
    """The classes that are absent where no mask is of them, none: all. A crowd may be of its class."""
    crowds, things = (() if kinds is None else kinds for kinds in (item.crowd_classes, item.mask_classes))
    unclear = {int(kind) for kind in crowds}.difference(int(kind) for kind in things)
    if not unclear:
        return item.searched or ()
    return [kind for kind in item.searched or range(len(source.thing_classes)) if kind not in unclear]


def _arrays(source: LabelledSource, item: Labelled, task: str) -> dict[str, np.ndarray]:
    """Every field of a target, empty where the task does not fill it."""
    joints = len(source.joints)
    empty = {
        "classes": np.zeros(0, np.int64),
        "masks": np.zeros((0, *item.image.shape[:2]), bool),
        "depth": np.zeros((1, 1), np.float32),
        "points": np.zeros((joints, 2), np.float32),
        "weights": np.zeros(joints, np.float32),
        "searched": np.array(_searched_classes(source, item), np.int64),
    }
    filled = empty | TASKS[task].target(source, item)
    return {name: np.asarray(array, empty[name].dtype) for name, array in filled.items()}
