"""labelme:PATH[SPLIT]: pictures with the JSON files that labelme writes beside them."""

import base64
import binascii
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth import shapes, windows
from datasetdm_fast.untrusted import documents, images

LARGEST_DOCUMENT = 64 * 2**20  # bytes; a photo may be inside, as text
FORM = {"shapes": [{"label": str, "points": [[float]]}], "imagePath": str, "imageHeight": int, "imageWidth": int}
NO_AREA = ("point", "points", "line", "linestrip")  # kinds of shapes without one


class LabelMe(shapes.OutlineSource):
    """NAME.json beside its picture, in PATH or PATH/SPLIT; classes in the order of classes.txt or labels.txt, or else
    by name. Polygons, rectangles, circles and masks are read, shapes without an area are left out; shapes of one label
    and group_id are one thing, `__ignore__` is ignored.
    """

    rule = windows.RULES["coco"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        if split != "train" and not (path / split).is_dir():
            raise reading.no_split(path, split)
        whole, path = path, path / split if (path / split).is_dir() else path
        self.files = reading.listing(path, ".json")
        lists = [folder / name for folder in (path, whole) for name in ("classes.txt", "labels.txt")]
        self.list = next((file for file in lists if file.exists()), path)
        if self.list == path:
            names = sorted({name for file in self.files for name in _labels(file)})
        else:
            names = reading.class_file(self.list)
        self.set_things(filter(shapes.is_thing, names))
        if not self.thing_classes:
            raise reading.bad(self.list, "no class in it")
        super().__init__(size, len(self.files))

    def name(self, record: int) -> str:
        return str(self.files[record])

    def picture(self, record: int) -> Picture:
        path = self.files[record]
        document = _document(path)
        sides = (document["imageHeight"], document["imageWidth"])
        image = self._image(path, document, sides)
        outlines = []
        for number, shape in enumerate(document["shapes"]):
            try:
                if (mask := _mask(shape, image.shape, f"{path}, shape {number}")) is None:
                    continue
                if shapes.is_thing(shape["label"]) and shape["label"] not in self.thing_classes:
                    raise ValueError(f"the unknown class {documents.quote(shape['label'])}, {self.list} lacks it")
                group = shape.get("group_id")
                outlines.append(shapes.Shape(shape["label"], mask, "" if group is None else str(group)))
            except Refused:  # the image of a mask, which it names
                raise
            except (ValueError, TypeError, OverflowError) as error:
                raise reading.bad(path, f"shape {number}: {documents.reason_of(error)}") from error
        things = shapes.things_of(outlines, self.thing_classes)
        return Picture(path.stem, image, self.names_of(things), **things.fields)

    def _image(self, path: Path, document: dict[str, Any], sides: tuple[int, int]) -> np.ndarray:
        orientation = reading.as_drawn(sides[::-1])
        try:
            file = reading.inside(path.parent, document["imagePath"].replace("\\", "/"), path)
        except Refused:  # labelme may keep its files in a folder beside that of the images
            if not document.get("imageData"):
                raise
            file = None
        if file and (file.exists() or not document.get("imageData")):
            image = reading.colour_image(file, orientation)
        else:
            image = reading.colours(path, _decode_image(document["imageData"], path), orientation)
        if image.shape[:2] != sides:
            shape = f"{image.shape[1]} x {image.shape[0]}"
            raise reading.bad(path, f"says {sides[1]} x {sides[0]} pixels, but its image has {shape}")
        return image


def _document(path: Path) -> dict[str, Any]:
    document = documents.read_object(path, most=LARGEST_DOCUMENT)
    try:
        documents.check_form(document, FORM)
    except ValueError as error:
        raise reading.bad(path, f"not a file that labelme wrote ({error})") from error
    return document


def _labels(path: Path) -> list[str]:
    """The labels of the shapes with an area."""
    return [shape["label"] for shape in _document(path)["shapes"] if shape.get("shape_type") not in NO_AREA]


def _mask(shape: dict[str, Any], sides: tuple[int, ...], name: str) -> shapes.Mask | None:
    """The mask of a shape, None for one without an area."""
    kind, points = shape.get("shape_type", "polygon"), shape["points"]
    if any(len(point) != 2 for point in points):
        raise ValueError("a point that is not x and y")
    if kind in NO_AREA:
        return None
    if kind == "polygon" or (kind == "rectangle" and len(points) == 4):
        return shapes.polygon([value for point in points for value in point], sides)
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"the unknown shape_type {documents.quote(kind)}")
    if len(points) != 2:
        raise ValueError(f"a {kind} of {len(points)} points, expected 2")
    (x, y), (right, bottom) = points
    if kind == "rectangle":
        return shapes.box((min(x, right), min(y, bottom), max(x, right), max(y, bottom)), sides)
    if kind == "circle":
        return shapes.ellipse((x, y), (math.dist(*points),) * 2, sides)
    pixels = np.asarray(_decode_image(shape.get("mask"), name).convert("L")) > 0
    left, top = round(x), round(y)
    if not (0 <= left <= sides[1] - pixels.shape[1] and 0 <= top <= sides[0] - pixels.shape[0]):
        raise ValueError("a mask that lies outside of its picture")
    return partial(shapes.place, pixels, top, left, sides)


def _decode_image(text: Any, name: Path | str):
    """The image that a document holds as base64."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except binascii.Error as error:
        raise reading.bad(name, f"its picture is no base64 ({error})") from error
    return images.decode_image(data, str(name), most_pixels=reading.MOST_PIXELS)
