"""yolo-seg:PATH[SPLIT]: images/SPLIT and labels/SPLIT, a class and a polygon a line, names in data.yaml."""

import math
from functools import partial
from pathlib import Path

from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.engine.pictures.pictures import MOST_SEMANTIC, PictureSource
from datasetdm_fast.training.truth.shapes import rasterised
from datasetdm_fast.untrusted import documents


class Yolo(PictureSource):
    """An image without a label file shows nothing, as YOLO has it."""

    rule = framing.RULES["coco"]
    captions_name_all = True

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path = path
        self.listed = _names(reading.first_there(path / "data.yaml", path / "dataset.yaml"))
        self.thing_classes = tuple(name for name in self.listed if not reading.is_background(name))
        self.classes = ("background", *self.thing_classes) if len(self.thing_classes) < MOST_SEMANTIC else ()
        self.tasks = ("semantic", "instance", "open-vocabulary") if self.classes else ("instance", "open-vocabulary")
        folder = reading.first_there(path / "images" / split, path / split / "images")
        self.labels = path / "labels" / split if folder.name == split else path / split / "labels"
        self.images = reading.listing(folder, *reading.PICTURES, *reading.OTHER_PICTURES)
        self.names = reading.names_of(folder, self.images)
        if not self.labels.is_dir():
            raise reading.bad(self.labels, "no such folder, expected the labels of the images beside it")
        if not any(self._label(record).exists() for record in range(len(self.images))):
            raise reading.bad(self.labels, f"no label of any of the {len(self.images)} images of {folder}")
        super().__init__(size, len(self.images))

    def _label(self, record: int) -> Path:
        return reading.beside(self.labels, self.names[record], ".txt")

    def picture(self, record: int) -> Picture:
        path = self.images[record]
        image, labels = reading.colour_image(path, reading.as_shown), self._label(record)
        rows = self._rows(labels, image.shape) if labels.exists() else []
        named = tuple(sorted({self.thing_classes[kind] for kind, _ in rows}))
        return Picture(
            path.stem,
            image,
            named,
            masks=[partial(rasterised, [points], image.shape) for _, points in rows],
            mask_classes=[k for k, _ in rows],
        )

    def _rows(self, path: Path, shape: tuple[int, ...]) -> list[tuple[int, list[float]]]:
        rows = []
        for number, line in enumerate(reading.lines(path, may_be_none=True), 1):
            try:
                first, *places = map(float, line.split())
                kind = int(first)  # some tools write 0.0
                if kind != first:
                    raise ValueError(first)
            except (ValueError, OverflowError):
                raise reading.bad(path, f"line {number} is not a class and the numbers of a polygon") from None
            if not 0 <= kind < len(self.listed):
                raise reading.bad(
                    path, f"line {number}: the unknown class {kind}, expected 0 to {len(self.listed) - 1}"
                )
            if len(places) < 6 or len(places) % 2:
                raise reading.bad(
                    path, f"line {number}: {len(places)} numbers, expected x and y of at least three corners"
                )
            if not all(math.isfinite(place) and -0.01 <= place <= 1.01 for place in places):
                raise reading.bad(path, f"line {number}: a corner outside the image, expected shares of 0 to 1")
            if (name := self.listed[kind]) in self.thing_classes:
                rows.append(
                    (self.thing_classes.index(name), [place * shape[1 - k % 2] for k, place in enumerate(places)])
                )
        return rows


def _names(path: Path) -> tuple[str, ...]:
    found = documents.read_yaml(path)
    names = found.get("names") if isinstance(found, dict) else None
    if isinstance(found, dict) and found.get("kpt_shape"):  # whose boxes and joints would pass for corners
        raise reading.bad(path, "its labels are boxes and joints (kpt_shape), expected outlines of things")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        named = {str(number): name for number, name in names.items()}  # as YOLO has it, numbers may be in quotes
        names = [named[str(k)] for k in range(len(named))]
    if isinstance(names, list):
        names = [str(name) if type(name) is int else name for name in names]  # a class may be called 7
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) < len(names)
    ):
        raise reading.bad(path, "names is no list of different class names")
    return tuple(names)
