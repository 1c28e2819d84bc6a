"""demo:COUNT@FIRST_SEED and hard:COUNT@FIRST_SEED: rendered scenes of a world with complete truth."""

import re

import numpy as np

from datasetdm_fast.config import TASKS
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.pictures.pictures import largest
from datasetdm_fast.engine.scenes.worlds import WORLDS, World, owner_of
from datasetdm_fast.errors import Refused


class DemoWorld(LabelledSource):
    tasks = TASKS
    is_rendered = captions_name_all = True

    def __init__(self, count: int, first: int, size: int, world: World = WORLDS["demo"]):
        self.first, self.world = first, world
        self.classes, self.thing_classes = world.classes, world.things
        self.joints, self.limbs, self.max_depth = world.joints, world.limbs, world.max_depth
        super().__init__(size, count)

    def name(self, record: int) -> str:
        return f"{self.world.name} scene {self.first + record}"

    def path_of(self, record: int) -> str:
        return str(self.first + record)

    def load(self, record: int, seed: int | None) -> Labelled:
        """A scene drawn at the model's size: there is nothing to crop, whatever the seed."""
        view = self.world.view(self.first + record, self.size)
        present = [k for k in np.unique(view.instance) if k]
        masks = (
            np.stack([view.instance == k for k in present]) if present else np.zeros((0, self.size, self.size), bool)
        )
        people = [k for k in view.keypoints if (view.keypoints[k][:, 2] > 0).any() and k in present]
        boxes, areas = [_box(view.instance == k) for k in people], [int((view.instance == k).sum()) for k in people]
        return Labelled(
            id=str(self.first + record),
            image=view.image,
            caption=view.caption,
            semantic=view.semantic,
            masks=masks,
            mask_classes=np.array([self.thing_classes.index(view.scene.things[k - 1].kind) for k in present], np.int64),
            depth=view.depth,
            keypoints=np.stack([view.keypoints[k] for k in people]).astype(np.float32)
            if people
            else np.zeros((0, len(self.joints), 3), np.float32),
            keypoint_boxes=np.array(boxes, np.float32).reshape(-1, 4),
            keypoint_areas=np.array(areas, np.float32),
        )

    def areas(self, record: int) -> dict[str, int]:
        view = self.world.view(self.first + record, self.size)
        counts = np.bincount(view.instance.ravel(), minlength=len(view.scene.things) + 1)[1:].tolist()
        return largest((thing.kind, pixels) for thing, pixels in zip(view.scene.things, counts) if pixels)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def read(kind: str, rest: str, size: int) -> DemoWorld:
    match = re.fullmatch(r"(\d{1,9})(?:@(\d{1,12}))?", rest)
    if not match or int(match[1]) == 0:
        raise Refused(f"--data {kind}:{rest}: expected {kind}:COUNT@FIRST_SEED", f"For example {kind}:500@900000.")
    count, first = int(match[1]), int(match[2] or 0)
    if owner := owner_of(range(first, first + count)):
        raise Refused(f"--data {kind}:{rest}: some of these seeds belong to {owner}", "Use others, for example 900000.")
    return DemoWorld(count, first, size, WORLDS[kind])
