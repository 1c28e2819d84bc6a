"""Windows that DatasetDM draws of a picture in training."""

from dataclasses import dataclass

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures.framing import Window
from datasetdm_fast.engine.pictures.labelled import Picture

UPSTREAM_SIDE = 512
PERSON_MARGIN = 1.25  # of the longer side of a person's box


@dataclass(frozen=True)
class Rule:
    """How upstream draws a window in training, lengths for its 512 pixels."""

    scales: tuple[float, ...] = (1.0,)  # one of them times the picture's own size, but never smaller than the window
    shortest: tuple[int, ...] = ()  # or: the shorter side, drawn between these
    toward_object: float = 0.0  # share of windows that hold the centre of something labelled


RULES = {
    "": Rule(),
    "voc": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2, 3), toward_object=5 / 8),
    "cityscapes": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8), toward_object=5 / 8),
    "deepfashion": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8), toward_object=5 / 8),
    "coco": Rule(shortest=(532, 832)),
    "kitti": Rule(shortest=(512, 512)),
    "vkitti2": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2)),
    "nyu": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2, 2.5)),
}

RULE_OF = {"lvis": "coco", "coco-pose": "coco"}  # augmentations that crop by the rule of another


def around(box: tuple[float, float, float, float], size: int, enlarged: float = 1.0) -> Window:
    """A square with the box in its middle and upstream's margin around it; what lies outside the picture is black."""
    x, y, width, height = box
    side = max(width, height, 1.0) * PERSON_MARGIN * enlarged
    return Window(x + width / 2 - side / 2, y + height / 2 - side / 2, size / side)


def draw_window(rule: Rule, picture: Picture, size: int, seed: int) -> Window:
    """A window by upstream's rule; the seed alone decides it."""
    random = np.random.default_rng(seed)
    if picture.person:
        return around(picture.person, size, float(np.clip(1 + 0.3 * random.standard_normal(), 0.7, 1.3)))
    height, width = picture.image.shape[:2]
    least = size / min(height, width)
    if rule.shortest:
        scale = random.integers(rule.shortest[0], rule.shortest[1] + 1) / UPSTREAM_SIDE * least
    else:
        scale = max(rule.scales[random.integers(len(rule.scales))] * size / UPSTREAM_SIDE, least)
    side = min(size / scale, height, width)  # rounding may make it longer than the picture
    left, top = random.uniform(0, width - side), random.uniform(0, height - side)
    if random.random() < rule.toward_object and (centre := _centre(picture, random)):
        left, top = (
            float(np.clip(random.uniform(c - side, c), 0, limit - side)) for c, limit in zip(centre, (width, height))
        )
    return Window(left, top, scale)


def _centre(picture: Picture, random: np.random.Generator) -> tuple[float, float] | None:
    """Column and row of the middle of one labelled class that is no background."""
    if picture.semantic is None:
        return None
    numbers = [k for k in np.flatnonzero(np.bincount(picture.semantic.ravel(), minlength=256)) if k not in (0, IGNORE)]
    if not numbers:
        return None
    rows, columns = np.nonzero(picture.semantic == random.choice(numbers))
    return float(columns.mean()), float(rows.mean())
