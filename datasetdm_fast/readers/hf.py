"""hf:PATH[SPLIT]: a folder in one of Hugging Face's layouts, with an image and a label or depth map in each row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.foreign import documents, images
from datasetdm_fast.labels.depth import UNITS, unit_of
from datasetdm_fast.truth import framing, reading, tables
from datasetdm_fast.truth.labelled import IGNORED, Picture
from datasetdm_fast.truth.pictures import PictureSource

COLUMNS = {
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "mask", "annotation", "segmentation", "semantic", "labels"),
    "depth": ("depth", "depth_map"),
    "caption": ("caption", "text", "prompt"),
}
NOTE = "depth unit"  # of a depth map that says in which unit it is


class HuggingFace(PictureSource):
    """Pictures with metadata.jsonl or metadata.csv, Parquet files, or what save_to_disk wrote; columns by their usual
    names. The numbers of a label map are named by id2label.json, {"0": name, ...}, by the features of the table, or by
    classes.txt; max_depth.txt is as in a plain folder.
    """

    rule = framing.RULES["voc"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path, self.rows = path, tables.opened(path, split)
        names = self.rows.columns
        self.columns = {what: next((name for name in known if name in names), "") for what, known in COLUMNS.items()}
        if not self.columns["image"] or not (self.columns["label"] or self.columns["depth"]):
            raise reading.bad(
                path, f"its columns are {documents.one_line(', '.join(names))}, expected image and label or depth"
            )
        if self.columns["label"]:
            self.classes = self._classes()
            self.thing_classes = reading.without_background(self.classes)
        if self.columns["depth"]:
            self.max_depth = reading.farthest_depth(path / "max_depth.txt")
        self.tasks = (
            *(("semantic", "open-vocabulary") if self.classes else ()),
            *(("depth",) if self.max_depth else ()),
        )
        self.captions_name_all = self.columns["caption"] is None
        super().__init__(size, len(self.rows))

    def _classes(self) -> tuple[str, ...]:
        for folder in dict.fromkeys((self.rows.folder, self.path)):
            if (file := folder / "id2label.json").exists():
                return _numbered(file)
        if found := next(_names(self.rows.features(self.columns["label"])), ()):
            return found
        return reading.class_file(reading.first_there(self.path / "id2label.json", self.path / "classes.txt"))

    def name(self, record: int) -> str:
        return f"{self.path}: row {record}"

    def path_of(self, record: int) -> str:
        value = self.rows.row(record)[self.columns["image"]]
        path = value.get("path") if isinstance(value, dict) else value
        return path if isinstance(path, str) and path else str(record)

    def picture(self, record: int) -> Picture:
        row = self.rows.row(record)
        image = np.asarray(self._image(row, "image", record).convert("RGB"))
        labels = depth = None
        if self.columns["label"]:
            labels = self._map(row, "label", record, image.shape)[0]
            reading.check_numbers(self.name(record), labels, len(self.classes))
            labels = labels.astype(np.uint8)
        if self.columns["depth"]:
            raw, steps = self._map(row, "depth", record, image.shape)
            metres = raw.astype(np.float32) / steps
            depth = np.where(np.isfinite(metres) & (metres > 0) & (metres <= self.max_depth), metres, 0)
        caption = row[self.columns["caption"]] if self.columns["caption"] else None
        if caption is None:
            caption = self.caption(labels)
        if not isinstance(caption, str):
            raise reading.bad(self.name(record), "its caption is no text")
        return Picture(f"{record:08d}", image, caption, labels, depth=depth)

    def _image(self, row: dict[str, Any], what: str, record: int) -> Image.Image:
        value = row[self.columns[what]]
        value = {"path": value} if isinstance(value, str) else {"bytes": value} if isinstance(value, bytes) else value
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise reading.bad(self.name(record), f"no picture in the column {self.columns[what]}")
        name = f"{self.name(record)}, {self.columns[what]}"
        if value.get("bytes"):
            image = images.decode_image(value["bytes"], name, most_pixels=reading.MOST_PIXELS)
        else:
            file = reading.inside(self.rows.folder, value["path"], name)
            image = images.read_image(file, most_pixels=reading.MOST_PIXELS)
        reading.check_sides(name, image.size)
        return image

    def _map(self, row: dict[str, Any], what: str, record: int, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
        """The numbers of a map, and how many steps they have to the metre where they are depths: tables of numbers are
        metres, pictures are in the unit they name or the one of a plain folder.
        """
        value, column, steps = row[self.columns[what]], self.columns[what], 1.0
        if isinstance(value, (dict, str, bytes)):
            image = self._image(row, what, record)
            if image.mode not in ("I", "I;16", *(() if what == "depth" else reading.EIGHT_BITS)):
                wanted = "one number of 16 bits each" if what == "depth" else "one number each"
                raise reading.bad(self.name(record), f"the pixels of {column} are {image.mode}, expected {wanted}")
            found = np.asarray(image).astype(np.int32)
            steps = UNITS.get(image.info.get(NOTE, ""), UNITS[unit_of(self.max_depth)])
        else:
            try:
                found = np.asarray(value, np.float32 if what == "depth" else np.int32)
            except (TypeError, ValueError, OverflowError):
                raise reading.bad(self.name(record), f"{column} is no table of numbers") from None
        if found.shape != tuple(shape[:2]):
            size = " x ".join(map(str, found.shape[::-1]))
            raise reading.bad(
                self.name(record), f"{column} has {size} pixels, but its image has {shape[1]} x {shape[0]}"
            )
        return found, steps


def _names(feature: Any) -> Iterator[tuple[str, ...]]:
    """Class names that a feature tells, however deep in lists it stands."""
    if isinstance(feature, dict):
        names = feature.get("names")
        if isinstance(names, list) and names and len(names) <= IGNORED and all(isinstance(name, str) for name in names):
            yield tuple(names)
        for inner in feature.values():
            yield from _names(inner)
    elif isinstance(feature, list):
        for inner in feature:
            yield from _names(inner)


def _numbered(path: Path) -> tuple[str, ...]:
    found = documents.read_object(path)
    if (
        not found
        or set(found) != {str(k) for k in range(len(found))}
        or not all(isinstance(name, str) for name in found.values())
        or len(found) > IGNORED
    ):
        raise reading.bad(path, "not an object from the numbers 0, 1, 2 ... to class names")
    return tuple(found[str(k)] for k in range(len(found)))
