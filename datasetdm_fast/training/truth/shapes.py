"""Outlines drawn on an image, as masks in its pixels and as the truth of an image."""

import base64
import binascii
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth.picture_source import MOST_SEMANTIC, PictureSource
from datasetdm_fast.untrusted import documents, images

MOST_CORNERS = 100_000  # of all polygons of one thing
CIRCLE_CORNERS = 64
IGNORED_NAMES = ("__ignore__", "ignore")  # of regions in which every prediction is ignored
LARGEST_DOCUMENT = 64 * 2**20  # bytes; a photo may be inside, as text
LARGEST_PACKED = 64 * 2**20  # bytes of a mask's picture
Mask = Callable[[], np.ndarray]  # [H, W] bool
Outline = tuple[str, str, Callable[[], Mask | None]]  # class, group, and what makes its mask; None: it has no area


@dataclass
class Things:
    """The masks of an image's things, and of crowds, in which every prediction is ignored."""

    masks: list[Mask] = field(default_factory=list)
    mask_classes: list[int] = field(default_factory=list)
    crowds: list[Mask] = field(default_factory=list)
    crowd_classes: list[int] = field(default_factory=list)

    def add(self, mask: Mask, class_id: int, is_crowd: bool = False) -> None:
        (self.crowds if is_crowd else self.masks).append(mask)
        (self.crowd_classes if is_crowd else self.mask_classes).append(class_id)

    @property
    def fields(self) -> dict[str, Any]:
        """As fields of a Picture."""
        return dict(vars(self))


class OutlineSource(PictureSource):
    """A data set whose truth is outlines of things; its label maps are drawn from them, where 8 bits suffice."""

    rule = "coco"
    captions_name_all = True
    class_list = "the classes"  # where they are from

    def set_things(self, names: Iterable[str]) -> None:
        self.thing_classes = tuple(names)
        self.classes = ("background", *self.thing_classes) if len(self.thing_classes) < MOST_SEMANTIC else ()
        self.tasks = (*(("semantic",) if self.classes else ()), "instance", "open-vocabulary")

    def names_of(self, things: Things) -> tuple[str, ...]:
        return tuple(self.thing_classes[k] for k in sorted({*things.mask_classes}))

    def draw(self, file: Path, place: str, outlines: Iterable[Outline]) -> Things:
        """The things of an image from its outlines in a file, those of one class and group joined; regions to ignore
        are crowds of every class. A wrong outline is named by its number after `place`.
        """
        parts: dict[tuple[str, str], list[Mask]] = {}
        for number, (name, group, make) in enumerate(outlines):
            try:
                if (mask := make()) is None:
                    continue
                if is_thing(name) and name not in self.thing_classes:
                    raise ValueError(f"the unknown class {documents.quote(name)}, it is none of {self.class_list}")
            except Refused:  # the image of a mask, which it names
                raise
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise reading.bad(file, f"{place}shape {number}: {documents.reason_of(error)}") from error
            parts.setdefault((name, group or f"#{number}"), []).append(mask)
        things = Things()
        for (name, _), masks in parts.items():
            if is_thing(name):
                things.add(partial(_union, masks), self.thing_classes.index(name))
            elif name in IGNORED_NAMES:
                things.add(partial(_union, masks), EVERY_CLASS, is_crowd=True)
        return things


def read_document(file: Path, form: Mapping[str, Any], program: str) -> dict[str, Any]:
    """A JSON file of this form, as a program wrote it."""
    document = documents.read_object(file, most=LARGEST_DOCUMENT)
    try:
        documents.check_form(document, form)
    except ValueError as error:
        raise reading.bad(file, f"not a file that {program} wrote ({error})") from error
    return document


def check_sides(path: Path, image: np.ndarray, sides: Sequence[int], file: Path) -> np.ndarray:
    """The image, which has the height and width that its file of labels says."""
    if image.shape[:2] != tuple(sides):
        shape = f"{image.shape[1]} x {image.shape[0]}"
        raise reading.bad(path, f"{shape} pixels, but {file.name} says {sides[1]} x {sides[0]}")
    return image


def decode_image(text: Any, name: Path | str, is_packed: bool = False) -> Image.Image:
    """The image that a document holds as base64, packed by zlib or not."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        if is_packed:
            data = zlib.decompressobj().decompress(data, LARGEST_PACKED)
    except (binascii.Error, zlib.error) as error:
        raise reading.bad(name, f"its picture is no base64 ({error})") from error
    return images.decode_image(data, str(name), most_pixels=reading.MOST_PIXELS)


def place_inside(pixels: np.ndarray, left: float, top: float, sides: Sequence[int]) -> Mask:
    """The mask of a small one at its place in the image."""
    left, top = round(left), round(top)
    margins = ((top, sides[0] - top - pixels.shape[0]), (left, sides[1] - left - pixels.shape[1]))
    if min(map(min, margins)) < 0:
        raise ValueError("a mask that lies outside of its picture")
    return partial(np.pad, pixels, margins)


def polygon(places: Sequence[float], sides: Sequence[int]) -> Mask:
    """The mask of a polygon x, y, x, y, ...; a ValueError where it is none, or lies far outside of its image."""
    height, width = sides[:2]
    if len(places) < 6 or len(places) % 2 or len(places) > 2 * MOST_CORNERS:
        raise ValueError(f"a polygon of {len(places)} numbers, expected x and y of at least three corners")
    if not all(-limit <= place <= 2 * limit for place, limit in zip(places, cycle((width, height)))):
        raise ValueError("an outline far outside of its picture")
    return partial(rasterise, [list(places)], sides)


def box(
    corners: Sequence[float], sides: Sequence[int], angle: float = 0.0, about: Sequence[float] | None = None
) -> Mask:
    """A rectangle between two corners, rotated by so many degrees, clockwise, about a point or else its centre."""
    left, top, right, bottom = corners
    centre = ((left + right) / 2, (top + bottom) / 2)
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return polygon(_rotate(points, about or centre, angle), sides)


def ellipse(centre: Sequence[float], radii: Sequence[float], sides: Sequence[int], angle: float = 0.0) -> Mask:
    """An ellipse of these radii, rotated about its centre by so many degrees, clockwise."""
    steps = (2 * math.pi * k / CIRCLE_CORNERS for k in range(CIRCLE_CORNERS))
    points = [(centre[0] + radii[0] * math.cos(step), centre[1] + radii[1] * math.sin(step)) for step in steps]
    return polygon(_rotate(points, centre, angle), sides)


def _rotate(points: Iterable[Sequence[float]], centre: Sequence[float], angle: float) -> list[float]:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    offsets = [(x - centre[0], y - centre[1]) for x, y in points]
    return [value for x, y in offsets for value in (centre[0] + c * x - s * y, centre[1] + s * x + c * y)]


def rasterise(polygons: Sequence[Sequence[float]], sides: Sequence[int]) -> np.ndarray:
    """[H, W] bool inside any of the polygons (x, y, x, y, ...), filled as pycocotools fills them."""
    from pycocotools import mask as coco_mask

    height, width = sides[:2]
    rles = coco_mask.frPyObjects([list(map(float, corners)) for corners in polygons], height, width)
    return mask_rle.decode(coco_mask.merge(rles))


def is_thing(name: str) -> bool:
    return name not in IGNORED_NAMES and not reading.is_background(name)


def _union(masks: Sequence[Mask]) -> np.ndarray:
    return reduce(np.logical_or, (mask() for mask in masks))  # one at a time, as a thing may have thousands
