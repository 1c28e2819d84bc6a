"""cvat:PATH[SPLIT]: images with the annotations.xml of "CVAT for images"."""

from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import shapes
from datasetdm_fast.untrusted import documents

LARGEST_TASK = 64 * 2**20  # bytes
NO_AREA = ("polyline", "points", "cuboid", "skeleton", "tag")  # kinds of shapes, and of labels, without an area
OUTLINES = ("polygon", "mask")


class Cvat(shapes.OutlineSource):
    """annotations.xml in PATH or PATH/SPLIT, or PATH/SPLIT.xml; images in `images` beside it, or in the folder of their
    subset.

    Polygons, boxes, ellipses and masks are read, shapes without an area are left out; shapes of one label and group are
    one thing, without a box around its outlines. Classes are those of the task in its order, without labels of shapes
    that are left out; an image without shapes shows nothing.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        if not (file := path / f"{split}.xml").exists():  # as datumaro calls it, the library of CVAT
            file = reading.first_there(reading.split_folder(path, split) / "annotations.xml")
        self.file, path = file, file.parent
        root = documents.read_xml(self.file, most=LARGEST_TASK)
        self.entries = list(root.iterfind("image"))
        if root.tag != "annotations" or not self.entries:
            raise reading.bad(self.file, 'no image in it, expected what CVAT calls "CVAT for images 1.1"')
        labels = [label for label in root.iterfind("meta//label") if label.findtext("type") not in NO_AREA]
        names = [label.findtext("name") or "" for label in labels]
        used = sorted({shape.get("label", "") for entry in self.entries for shape in entry if shape.tag not in NO_AREA})
        self.set_things(filter(shapes.is_thing, dict.fromkeys(names or used)))
        if not all(self.thing_classes) or not self.thing_classes:
            raise reading.bad(self.file, "a label without a name, or no label")
        self.folder = path / "images" if (path / "images").is_dir() else path
        super().__init__(size, len(self.entries))

    def name(self, record: int) -> str:
        return str(self.folder / self.entries[record].get("name", f"image {record}"))

    def picture(self, record: int) -> Picture:
        entry = self.entries[record]
        name = entry.get("name", "")
        paths = [
            reading.inside(self.folder, f"{subset}/{name}" if subset else name, self.file)
            for subset in (entry.get("subset", ""), "")
        ]
        path = paths[0] if paths[0].exists() else paths[1]
        try:
            sides = (int(entry.get("height", "")), int(entry.get("width", "")))
        except ValueError:
            raise reading.bad(self.file, f"{path.name} has no width and height") from None
        image = reading.colour_image(path, reading.as_drawn(sides[::-1]))
        shapes.check_sides(path, image, sides, self.file)
        outlines = ((*_name_and_group(shape), partial(_part_mask, shape, entry, image.shape)) for shape in entry)
        things = self.draw(self.file, f"{path.name}, ", outlines)
        stem = Path(entry.get("name", "")).with_suffix("").as_posix()
        return Picture(stem, image, self.names_of(things), **things.fields)


def _name_and_group(shape: Element) -> tuple[str, str]:
    return shape.get("label", ""), shape.get("group_id", "").lstrip("0")


def _part_mask(shape: Element, entry: Element, sides: tuple[int, ...]) -> shapes.Mask | None:
    """The mask of a shape; none of a box around outlines of its label and group, as datumaro writes beside them."""
    mask, (name, group) = _mask(shape, sides), _name_and_group(shape)
    if mask is not None and shape.tag == "box" and group:
        others = (each for each in entry if each.tag in OUTLINES and _name_and_group(each) == (name, group))
        outlines = [outline() for each in others if (outline := _mask(each, sides)) is not None]
        if outlines and not (np.any(outlines, axis=0) & ~mask()).any():
            return None
    return mask


def _mask(shape: Element, sides: tuple[int, ...]) -> shapes.Mask | None:
    """The mask of a shape, None for one without an area."""

    def numbers(*names: str) -> list[float]:
        return [float(shape.get(name, "")) for name in names]

    angle = float(shape.get("rotation", 0))
    if shape.tag == "polygon":
        return shapes.polygon([float(value) for value in shape.get("points", "").replace(";", ",").split(",")], sides)
    if shape.tag == "box":
        return shapes.box(numbers("xtl", "ytl", "xbr", "ybr"), sides, angle)
    if shape.tag == "ellipse":
        return shapes.ellipse(numbers("cx", "cy"), numbers("rx", "ry"), sides, angle)
    if shape.tag == "mask":
        return _runs(shape, sides)
    if shape.tag not in NO_AREA:
        raise ValueError(f"the unknown shape {documents.quote(shape.tag)}")
    return None


def _runs(shape: Element, sides: tuple[int, ...]) -> shapes.Mask:
    """A mask of run lengths, row by row inside of its box, the first of pixels outside of the thing."""
    left, top, width, height = (int(shape.get(name, "")) for name in ("left", "top", "width", "height"))
    if not (0 < width <= sides[1] and 0 < height <= sides[0]):
        raise ValueError("a mask that lies outside of its picture")
    counts = np.array([int(count) for count in shape.get("rle", "").split(",")], np.int64)
    can_fit = (counts >= 0) & (counts <= width * height)  # a sum of larger ones may overflow to the right number
    if not can_fit.all() or counts.sum() != width * height or len(counts) > width * height + 1:
        raise ValueError(f"runs that do not add up to the {width} x {height} pixels of their box")
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
    return shapes.place_inside(pixels, left, top, sides)
