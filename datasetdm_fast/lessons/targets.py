"""What a decoder should have said about a labelled image, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.errors import Refused
from datasetdm_fast.truth.labelled import Labelled, LabelledSource

IGNORE = 255
NEEDS = {
    "semantic": ("semantic",),
    "instance": ("masks",),
    "depth": ("depth",),
    "pose": ("keypoints",),
    "open-vocabulary": ("masks", "semantic"),
}
WANTED = {
    "semantic": f"a class: every pixel is background or {IGNORE}, which is ignored",
    "instance": "a thing",
    "depth": "a depth of 0 to {farthest:g} m",
    "pose": "a person with a joint in sight",
    "open-vocabulary": "a thing",
}


@dataclass(frozen=True)
class TrainingTarget:
    """Truth of one view; fields a task does not need stay empty."""

    classes: Tensor  # [M] ids
    masks: Tensor  # [M, H, W] bool
    depth: Tensor  # [H, W] metres, 0 = unknown
    points: Tensor  # [J, 2] pixels
    weights: Tensor  # [J] 1 where the joint is in the picture

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.classes, self.masks, self.depth, self.points, self.weights))


def check_truth(source: LabelledSource, item: Labelled, task: str, spec: str) -> None:
    """Refuses a data set that does not hold what the task is taught by."""
    if all(getattr(item, name) is None for name in NEEDS[task]):
        raise Refused(
            f"--data {spec}: item {item.id} has no {' and no '.join(NEEDS[task])}, which {task} is taught by",
            "choose another --task, or other data",
        )
    names = {"semantic": "classes", "instance": "thing_classes", "open-vocabulary": "thing_classes", "pose": "joints"}
    if task in names and not getattr(source, names[task]):
        raise Refused(
            f"--data {spec}: the data set names no {names[task]}, which {task} needs",
            "choose another --task, or other data",
        )


def check_shown(source: LabelledSource, task: str, spec: str) -> None:
    """Refuses a data set none of whose images shows what the task is taught by; reads up to the first that does."""
    if not any(_shows(source, item, task) for item in source):
        raise Refused(
            f"--data {spec}: none of {len(source)} images shows {WANTED[task].format(farthest=source.max_depth)}",
            "look at the labels and their numbers",
        )


def _shows(source: LabelledSource, item: Labelled, task: str) -> bool:
    found = target(source, item, task)
    if task == "semantic":
        has_background = len(source.classes) > 1 and source.classes[0] in ("background", "none")
        return bool((found.classes >= has_background).any())
    return bool({"depth": found.depth, "pose": found.weights}.get(task, found.masks).any())


def target(source: LabelledSource, item: Labelled, task: str, one_class: int | None = None) -> TrainingTarget:
    """The truth of an item; `one_class` gives every instance that id."""
    classes, masks = _masks(source, item, task)
    if one_class is not None and task == "instance":
        classes = np.full_like(classes, one_class)
    depth = item.depth if task == "depth" else np.zeros((1, 1), np.float32)
    points, weights = np.zeros((len(source.joints), 2), np.float32), np.zeros(len(source.joints), np.float32)
    if task == "pose" and len(item.keypoints):
        person = int(np.argmax(item.keypoint_areas))  # the decoder answers with one figure: the largest
        points, weights = item.keypoints[person, :, :2], item.keypoints[person, :, 2] > 0
    tensors = (
        classes.astype(np.int64),
        masks.astype(bool),
        depth.astype(np.float32),
        points.astype(np.float32),
        weights.astype(np.float32),
    )
    return TrainingTarget(*(torch.from_numpy(np.ascontiguousarray(array)) for array in tensors))


def _masks(source: LabelledSource, item: Labelled, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks: one a present class for semantic, one a thing for instance and open vocabulary."""
    if task == "semantic":
        return _of_classes(item, {int(k): int(k) for k in np.unique(item.semantic) if k != IGNORE})
    if task == "open-vocabulary" and item.masks is None:
        things = {
            source.classes.index(name): k for k, name in enumerate(source.thing_classes) if name in source.classes
        }
        return _of_classes(item, {number: k for number, k in things.items() if (item.semantic == number).any()})
    if task in ("instance", "open-vocabulary"):
        return item.mask_classes, item.masks
    return np.zeros(0, np.int64), np.zeros((0, *item.image.shape[:2]), bool)


def _of_classes(item: Labelled, ids: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One mask for each pixel value, under the id it stands for."""
    masks = [item.semantic == number for number in ids]
    return np.array(list(ids.values()), np.int64), np.array(masks, bool).reshape(-1, *item.semantic.shape)
