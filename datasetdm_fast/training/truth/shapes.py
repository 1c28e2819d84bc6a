"""Outlines that people drew on a picture, as polygons in its pixels, and as the truth of a picture."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS

MOST_CORNERS = 100_000  # of all polygons of one thing
CORNERS_OF_A_CIRCLE = 64
IGNORED_NAMES = ("__ignore__", "ignore")  # of regions that are neither right nor wrong to find
Mask = Callable[[], np.ndarray]  # [H, W] bool


@dataclass(frozen=True)
class Shape:
    """One outline; shapes of one class and group are parts of one thing."""

    name: str  # of its class
    mask: Mask
    group: str = ""


def polygon(places: Sequence[float], sides: Sequence[int]) -> Mask:
    """What draws a polygon x, y, x, y, ...; a ValueError where it is none, or lies far outside of its picture."""
    height, width = sides[:2]
    if len(places) < 6 or len(places) % 2 or len(places) > 2 * MOST_CORNERS:
        raise ValueError(f"a polygon of {len(places)} numbers, expected x and y of at least three corners")
    if not all(-width <= x <= 2 * width for x in places[::2]) or not all(
        -height <= y <= 2 * height for y in places[1::2]
    ):
        raise ValueError("an outline far outside of its picture")
    return partial(rasterised, [list(places)], sides)


def box(corners: Sequence[float], sides: Sequence[int], angle: float = 0.0) -> Mask:
    """A rectangle between two corners, turned about its middle by so many degrees, clockwise."""
    left, top, right, bottom = corners
    middle = ((left + right) / 2, (top + bottom) / 2)
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return polygon(_turned(points, middle, angle), sides)


def ellipse(middle: Sequence[float], radii: Sequence[float], sides: Sequence[int], angle: float = 0.0) -> Mask:
    """The same for an ellipse of these radii."""
    steps = (2 * math.pi * k / CORNERS_OF_A_CIRCLE for k in range(CORNERS_OF_A_CIRCLE))
    points = [(middle[0] + radii[0] * math.cos(step), middle[1] + radii[1] * math.sin(step)) for step in steps]
    return polygon(_turned(points, middle, angle), sides)


def _turned(points: Iterable[Sequence[float]], middle: Sequence[float], angle: float) -> list[float]:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    away = [(x - middle[0], y - middle[1]) for x, y in points]
    return [value for x, y in away for value in (middle[0] + c * x - s * y, middle[1] + s * x + c * y)]


def rasterised(polygons: Sequence[Sequence[float]], sides: Sequence[int]) -> np.ndarray:
    """[H, W] bool inside any of the polygons (x, y, x, y, ...), filled as pycocotools fills them."""
    from pycocotools import mask as coco_mask

    height, width = sides[:2]
    drawn = coco_mask.merge(coco_mask.frPyObjects([list(map(float, corners)) for corners in polygons], height, width))
    return mask_rle.decode(drawn)


def placed(pixels: np.ndarray, top: int, left: int, sides: Sequence[int]) -> np.ndarray:
    """[H, W] bool of a small mask at its place in the picture."""
    mask = np.zeros(tuple(sides[:2]), bool)
    mask[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    return mask


def is_thing(name: str) -> bool:
    return name not in IGNORED_NAMES and not reading.is_background(name)


def things(shapes: Iterable[Shape], classes: Sequence[str]) -> dict[str, Any]:
    """The masks of a picture and their classes, shapes of one group joined; what is to be ignored is a crowd of
    every class.
    """
    found: dict[tuple[str, str], list[Mask]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault((shape.name, shape.group or f"#{place}"), []).append(shape.mask)
    masks = {key: parts for key, parts in found.items() if is_thing(key[0])}
    ignored = [parts for (name, _), parts in found.items() if name in IGNORED_NAMES]
    return {
        "masks": [partial(_joined, parts) for parts in masks.values()],
        "mask_classes": [classes.index(name) for name, _ in masks],
        "crowds": [partial(_joined, parts) for parts in ignored],
        "crowd_classes": [EVERY_CLASS] * len(ignored),
    }


def _joined(parts: Sequence[Mask]) -> np.ndarray:
    return np.any([part() for part in parts], axis=0)
