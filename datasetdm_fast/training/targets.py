"""What a decoder should have said about a labelled image, as tensors, mirrored where the view is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.readers import Labelled, Source


@dataclass(frozen=True)
class Target:
    """Truth of one view; fields a task does not need stay empty."""

    classes: Tensor  # [M] ids
    masks: Tensor  # [M, H, W] float
    depth: Tensor  # [H, W] metres, 0 = unknown
    points: Tensor  # [J, 2] pixels
    weights: Tensor  # [J] 1 where the joint is in the picture


def mirrored_joints(joints: tuple[str, ...]) -> list[int]:
    """For each joint the index of the one that takes its name in a mirror image."""
    swapped = [name.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right") for name in joints]
    return [joints.index(name) for name in swapped]


def target(source: Source, item: Labelled, task: str, is_mirrored: bool) -> Target:
    height, width = item.image.shape[:2]
    classes, masks = _masks(source, item, task)
    depth = item.depth if task == "depth" else np.zeros((1, 1), np.float32)
    points, weights = np.zeros((len(source.joints), 2), np.float32), np.zeros(len(source.joints), np.float32)
    if task == "pose" and len(item.keypoints):
        person = int(np.argmax(item.keypoint_areas))  # the decoder answers with one figure: the largest
        points, weights = item.keypoints[person, :, :2].copy(), (item.keypoints[person, :, 2] > 0).astype(np.float32)
    if is_mirrored:
        masks, depth, order = masks[..., ::-1], depth[..., ::-1], mirrored_joints(source.joints)
        points = np.stack([width - points[order, 0], points[order, 1]], 1)
        weights = weights[order]
    tensors = (classes.astype(np.int64), masks.astype(np.float32), depth.astype(np.float32), points, weights)
    return Target(*(torch.from_numpy(np.ascontiguousarray(array)) for array in tensors))


def _masks(source: Source, item: Labelled, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks: one a present class for semantic, one a thing for instance and open vocabulary."""
    if task == "semantic":
        classes = np.array([k for k in np.unique(item.semantic) if k != 255])
        return classes, np.stack([item.semantic == k for k in classes])
    if task in ("instance", "open-vocabulary"):
        return item.mask_classes, item.masks
    return np.zeros(0, np.int64), np.zeros((0, *item.image.shape[:2]), bool)
