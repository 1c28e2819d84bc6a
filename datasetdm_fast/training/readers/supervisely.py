"""supervisely:PATH[SPLIT]: pictures in `img` with a JSON file each in `ann`, as Supervisely exports projects."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import shapes
from datasetdm_fast.untrusted import documents

PROGRAM = "Supervisely"
NO_AREA = ("point", "line", "polyline", "graph", "cuboid", "any")  # kinds of figures without one
META_FORM = {"classes": [{"title": str, "shape": str}]}
FORM = {"size": {"height": int, "width": int}, "objects": [{"classTitle": str, "geometryType": str}]}


class Supervisely(shapes.OutlineSource):
    """A project: meta.json beside its data sets; a split is the data set of its name, without one all are read. Classes
    are those of meta.json in its order. Bitmaps, polygons and rectangles are read, figures without an area left out.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.meta = reading.first_there(path / "meta.json")
        folder = reading.split_folder(path, split)
        folders = [folder] if (folder / "ann").is_dir() else sorted(inner.parent for inner in folder.glob("*/ann"))
        if not folders:
            raise reading.bad(folder, "no data set in it, expected folders with img/ and ann/")
        self.images = [file for each in folders for file in reading.listing(each / "ann", ".json")]
        names = [
            kind["title"]
            for kind in shapes.read_document(self.meta, META_FORM, PROGRAM)["classes"]
            if kind["shape"] not in NO_AREA
        ]
        self.set_things(filter(shapes.is_thing, dict.fromkeys(names)))
        self.class_list = str(self.meta)
        if not self.thing_classes:
            raise reading.bad(self.meta, "no class with an area in it")
        super().__init__(size, len(self.images))

    def picture(self, record: int) -> Picture:
        file = self.images[record]
        document, path = shapes.read_document(file, FORM, PROGRAM), file.parent.parent / "img" / file.stem
        sides = document["size"]["height"], document["size"]["width"]
        image = shapes.check_sides(path, reading.colour_image(path, reading.as_drawn(sides[::-1])), sides, file)
        outlines = (
            (entry["classTitle"], "", partial(_mask, entry, sides, f"{file}, shape {number}"))
            for number, entry in enumerate(document["objects"])
        )
        things = self.draw(file, "", outlines)
        return Picture(path.stem, image, self.names_of(things), **things.fields)


def _mask(entry: dict[str, Any], sides: tuple[int, int], name: str) -> shapes.Mask | None:
    """The mask of a figure, None for one without an area. Its corners are numbers of pixels, both ends included."""
    kind = entry["geometryType"]
    if kind in NO_AREA:
        return None
    if kind == "bitmap":
        packed = shapes.decode_image(entry["bitmap"]["data"], name, is_packed=True)
        pixels = packed.convert("RGBA").getchannel("A") if packed.has_transparency_data else packed.convert("L")
        return shapes.place_inside(np.asarray(pixels) > 0, *entry["bitmap"]["origin"], sides)
    if kind not in ("polygon", "rectangle"):
        raise ValueError(f"the unknown geometryType {documents.quote(kind)}")
    documents.check_form(entry["points"], {"exterior": [[float]], "interior": [[[float]]]})
    outer = entry["points"]["exterior"]
    if kind == "rectangle":
        (left, top), (right, bottom) = outer
        return shapes.box((min(left, right), min(top, bottom), max(left, right) + 1, max(top, bottom) + 1), sides)
    rings = [[tuple(point) for point in ring] for ring in (outer, *entry["points"]["interior"])]
    for ring in rings:
        shapes.polygon([value for point in ring for value in point], sides)  # refuses what is none
    return partial(_fill, rings, sides)


def _fill(rings: list[list[Any]], sides: tuple[int, int]) -> np.ndarray:
    """[H, W] bool inside the first ring but in none of the others, each with its own corners and edges."""
    canvas = Image.new("L", sides[::-1])
    for number, ring in enumerate(rings):
        ImageDraw.Draw(canvas).polygon(ring, fill=int(number == 0))
    return np.asarray(canvas) > 0
