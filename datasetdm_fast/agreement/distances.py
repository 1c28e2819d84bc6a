"""Distances between tensors, images and labels of two engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from datasetdm_fast.data import Annotation, DepthMap, Instances, Keypoints, SemanticMap

if TYPE_CHECKING:
    from datasetdm_fast.agreement.observe import Observation

TINY = 1e-30


# Distances: one number an image, 0 where both engines say the same ----------------------------------------------------
def relative(value: Tensor, truth: Tensor) -> np.ndarray:
    """Relative L2 of each image [B]; a value that is no number counts as infinitely far."""
    difference = (value.double() - truth.double()).flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1).clamp(
        min=TINY
    )
    return difference.nan_to_num(nan=float("inf")).numpy()


def by_image(noise: Tensor) -> Tensor:
    """A CFG batch [2B, ...] as [B, 2, ...]."""
    return noise.unflatten(0, (2, -1)).transpose(0, 1)


def image_distance(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square difference over the range: 0.01 is a PSNR of 40 dB."""
    return np.sqrt(((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))) / 255


def label_distance(found: Annotation, truth: Annotation) -> float:
    """0 where both say the same.

    Class maps: share of pixels that differ. Depth: mean relative error. Joints: mean distance in pixels. Instances: one
    minus the mean IoU, 1 where their classes differ.
    """
    return DISTANCES[type(truth)](found, truth)


def _semantic(found: SemanticMap, truth: SemanticMap) -> float:
    return float((found.labels != truth.labels).mean())


def _depth(found: DepthMap, truth: DepthMap) -> float:
    return float((np.abs(found.metres - truth.metres) / np.maximum(truth.metres, 1e-6)).mean())


def _instances(found: Instances, truth: Instances) -> float:
    if sorted(found.class_ids) != sorted(truth.class_ids):
        return 1.0
    if not len(truth.masks):
        return 0.0
    # Instances of one class may change places where their scores are nearly equal, so each looks for the mask most like
    # its own.
    ious = [
        max(_iou(mask, other) for other in found.masks[found.class_ids == kind])
        for mask, kind in zip(truth.masks, truth.class_ids)
    ]
    return 1.0 - float(np.mean(ious))


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def _keypoints(found: Keypoints, truth: Keypoints) -> float:
    if found.points.shape != truth.points.shape:
        return float("inf")
    return (
        float(np.linalg.norm(found.points[..., :2] - truth.points[..., :2], axis=-1).mean())
        if truth.points.size
        else 0.0
    )


DISTANCES = {SemanticMap: _semantic, DepthMap: _depth, Instances: _instances, Keypoints: _keypoints}


def teacher_forced_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Stage by stage, every stage given the same input: name -> one number an image, or one an image and call."""
    calls = [
        relative(by_image(value), by_image(right)) for value, right in zip(found.outputs, truth.outputs, strict=True)
    ]
    levels = {
        f"level {name}": np.max(
            [relative(value, right) for value, right in zip(found.levels[name], tensors, strict=True)], 0
        )
        for name, tensors in truth.levels.items()
        if tensors
    }
    outputs = {
        f"outputs {task}": np.max([relative(found.answers[task][name], value) for name, value in answer.items()], 0)
        for task, answer in truth.answers.items()
    }
    image = {"image": image_distance(found.images, truth.images)}
    return {"call": np.concatenate(calls), **levels, **outputs, **_label_distances("", found, truth), **image}


def free_running_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Each engine on its own from the same noise and prompt."""
    distances = {
        "text": relative(by_image(found.context), by_image(truth.context)),
        "free latents": relative(found.latents, truth.latents),
    }
    return distances | {
        "free image": image_distance(found.images, truth.images),
        **_label_distances("free ", found, truth),
    }


def _label_distances(prefix: str, found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{task}": np.array(
            [label_distance(value, right) for value, right in zip(found.labels[task], labels, strict=True)]
        )
        for task, labels in truth.labels.items()
    }
