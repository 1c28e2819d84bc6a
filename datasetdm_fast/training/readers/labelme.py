"""labelme:PATH[SPLIT]: pictures with the JSON files that labelme writes beside them."""

import math
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth import shapes
from datasetdm_fast.untrusted import documents

FORM = {"shapes": [{"label": str, "points": [[float]]}], "imagePath": str, "imageHeight": int, "imageWidth": int}
NO_AREA = ("point", "points", "line", "linestrip")  # kinds of shapes without one


class LabelMe(shapes.OutlineSource):
    """NAME.json in PATH or PATH/SPLIT, beside its picture or where its imagePath says in PATH; classes in the order of
    classes.txt or labels.txt, or else by name. Polygons, rectangles, circles and masks are read, shapes without an area
    are left out; shapes of one label and group_id are one thing, `__ignore__` is ignored.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.root, path = path, reading.split_folder(path, split)
        self.images = reading.listing(path, ".json")
        lists = [folder / name for folder in (path, self.root) for name in ("classes.txt", "labels.txt")]
        self.list = next((file for file in lists if file.exists()), path)
        if self.list == path:
            names = sorted({name for file in self.images for name in _labels(file)})
        else:
            names = reading.class_file(self.list)
        self.set_things(filter(shapes.is_thing, names))
        self.class_list = str(self.list)
        if not self.thing_classes:
            raise reading.bad(self.list, "no class in it")
        super().__init__(size, len(self.images))

    def picture(self, record: int) -> Picture:
        path = self.images[record]
        document = shapes.read_document(path, FORM, "labelme")
        sides = (document["imageHeight"], document["imageWidth"])
        image = self._image(path, document, sides)
        outlines = (
            (
                shape["label"],
                "" if shape.get("group_id") is None else str(shape["group_id"]),
                partial(_mask, shape, image.shape, f"{path}, shape {number}"),
            )
            for number, shape in enumerate(document["shapes"])
        )
        things = self.draw(path, "", outlines)
        return Picture(path.stem, image, self.names_of(things), **things.fields)

    def _image(self, path: Path, document: dict[str, Any], sides: tuple[int, int]) -> np.ndarray:
        orientation = reading.as_drawn(sides[::-1])
        name, file = document["imagePath"].replace("\\", "/"), None
        with suppress(Refused):  # of another machine
            file = reading.inside(self.root, os.path.relpath(path.parent / name, self.root), path)
        if not (file and file.is_file()):
            file = None if document.get("imageData") else reading.inside(path.parent, name.rpartition("/")[2], path)
        if file:
            image = reading.colour_image(file, orientation)
        else:
            image = reading.colours(path, shapes.decode_image(document["imageData"], path), orientation)
        return shapes.check_sides(path, image, sides, path)


def _labels(path: Path) -> list[str]:
    """The labels of the shapes with an area."""
    return [
        shape["label"]
        for shape in shapes.read_document(path, FORM, "labelme")["shapes"]
        if shape.get("shape_type") not in NO_AREA
    ]


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
        return shapes.box((x, y, right, bottom), sides)  # from either corner
    if kind == "circle":
        return shapes.ellipse((x, y), (math.dist(*points),) * 2, sides)
    pixels = np.asarray(shapes.decode_image(shape.get("mask"), name).convert("L")) > 0
    return shapes.place_inside(pixels, x, y, sides)
