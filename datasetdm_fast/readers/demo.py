"""demo:COUNT@FIRST_SEED: rendered scenes of the demo world with complete truth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datasetdm_fast import readers
from datasetdm_fast.demo import world
from datasetdm_fast.errors import Refused


@dataclass(frozen=True)
class DemoWorld:
    count: int
    first: int
    size: int
    classes: tuple[str, ...] = world.CLASSES
    thing_classes: tuple[str, ...] = world.THINGS
    joints: tuple[str, ...] = world.JOINTS
    limbs: tuple[tuple[int, int], ...] = world.LIMBS
    max_depth: float = world.MAX_DEPTH

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[readers.Labelled]:
        return (self[k] for k in range(self.count))

    def __getitem__(self, index: int) -> readers.Labelled:
        if not 0 <= index < self.count:
            raise IndexError(index)
        view = world.view(self.first + index, self.size)
        present = [k for k in np.unique(view.instance) if k]
        masks = np.stack([view.instance == k for k in present]) if present else np.zeros((0, self.size, self.size), bool)
        people = [k for k in view.keypoints if (view.keypoints[k][:, 2] > 0).any() and k in present]
        boxes, areas = [_box(view.instance == k) for k in people], [int((view.instance == k).sum()) for k in people]
        return readers.Labelled(
            id=str(self.first + index),
            image=view.image,
            caption=view.caption,
            semantic=view.semantic,
            masks=masks,
            mask_classes=np.array([world.THINGS.index(view.scene.things[k - 1].kind) for k in present], np.int64),
            depth=view.depth,
            keypoints=np.stack([view.keypoints[k] for k in people]).astype(np.float32) if people else np.zeros((0, len(world.JOINTS), 3), np.float32),
            keypoint_boxes=np.array(boxes, np.float32).reshape(-1, 4),
            keypoint_areas=np.array(areas, np.float32),
        )


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def read(rest: str, size: int) -> DemoWorld:
    match = re.fullmatch(r"(\d+)(?:@(\d+))?", rest)
    if not match or int(match[1]) == 0:
        raise Refused(f"--data demo:{rest}: expected demo:COUNT@FIRST_SEED", "For example demo:500@900000.")
    return DemoWorld(count=int(match[1]), first=int(match[2] or 0), size=size)
