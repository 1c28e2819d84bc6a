"""demo:COUNT@FIRST_SEED: rendered scenes of the demo world with complete truth."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from datasetdm_fast.config import TASKS
from datasetdm_fast.engine.labels.pictures import bounds
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth.picture_source import largest

# Scenes that no decoder learns from or is evaluated on, as these have learned from them.
RESERVED_SEEDS = {
    "the networks of bench.world.judge": range(2_000_000, 5_000_000),
    "the diffusion model": range(10_000_000, 100_000_000),
}


class DemoWorld(LabelledSource):
    kind = "demo"
    tasks = TASKS
    is_rendered = captions_name_all = True
    classes, thing_classes = world.CLASSES, world.THINGS
    joints, limbs, max_depth = world.JOINTS, world.LIMBS, world.MAX_DEPTH
    render_view = staticmethod(world.view)  # of a seed, at so many pixels

    def __init__(self, count: int, first: int, size: int):
        self.first = first
        super().__init__(size, count)

    @classmethod
    def read(cls, path: Path, split: str, size: int, tasks: Sequence[str]) -> Self:
        """The scenes of an address; refuses seeds that the models of this world have learned from."""
        match = re.fullmatch(r"(\d{1,9})(?:@(\d{1,12}))?", str(path))
        kind, address = cls.kind, f"{cls.kind}:{path}"
        if not match or int(match[1]) == 0:
            raise Refused(f"--data {address}: expected {kind}:COUNT@FIRST_SEED", f"For example {kind}:500@900000.")
        count, first = int(match[1]), int(match[2] or 0)
        for owner, seeds in RESERVED_SEEDS.items():
            if first < seeds.stop and seeds.start < first + count:
                cause = f"--data {address}: some of these seeds belong to {owner}"
                raise Refused(cause, "Use others, for example 900000.")
        return cls(count, first, size)

    def name(self, record: int) -> str:
        return f"{self.kind} scene {self.first + record}"

    def path_of(self, record: int) -> str:
        return str(self.first + record)

    def load(self, record: int, seed: int | None) -> Labelled:
        """A scene drawn at the model's size: there is nothing to crop, whatever the seed."""
        view = self.render_view(self.first + record, self.size)
        present = [k for k in np.unique(view.instance) if k]
        people = [k for k in view.keypoints if (view.keypoints[k][:, 2] > 0).any() and k in present]
        shown = [view.instance == k for k in people]
        boxes = [(left, top, right - left, bottom - top) for left, top, right, bottom in map(bounds, shown)]
        return Labelled(
            id=str(self.first + record),
            image=view.image,
            caption=view.caption,
            semantic=view.semantic,
            masks=np.array([view.instance == k for k in present], bool).reshape(-1, self.size, self.size),
            mask_classes=np.array([self.thing_classes.index(view.scene.things[k - 1].kind) for k in present], np.int64),
            depth=view.depth,
            keypoints=np.array([view.keypoints[k] for k in people], np.float32).reshape(-1, len(self.joints), 3),
            keypoint_boxes=np.array(boxes, np.float32).reshape(-1, 4),
            keypoint_areas=np.array([mask.sum() for mask in shown], np.float32),
        )

    def areas(self, record: int) -> dict[str, int]:
        view = self.render_view(self.first + record, self.size)
        counts = np.bincount(view.instance.ravel(), minlength=len(view.scene.things) + 1)[1:].tolist()
        return largest((thing.kind, pixels) for thing, pixels in zip(view.scene.things, counts) if pixels)
