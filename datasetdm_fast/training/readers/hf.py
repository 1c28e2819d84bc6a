"""hf:PATH[SPLIT]: a folder in one of Hugging Face's layouts, with an image and a label or depth map in each row."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.depth import LARGEST_STEP, UNITS, unit_of
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth import tables
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.untrusted import documents, images

COLUMNS = {
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "mask", "annotation", "segmentation", "semantic", "labels"),
    "depth": ("depth", "depth_map"),
    "caption": ("caption", "text", "prompt"),
}
TABLE = "classes.json"  # of a data set that convert wrote: classes, the unit of depths
TABLE_FORM = {"id2label": dict, "things": [str], "max_depth": float, "depth_steps_of_a_metre": float}
NOTE = "depth unit"  # key of a depth map's own unit


class HuggingFace(PictureSource):
    """Images with metadata.jsonl or metadata.csv, Parquet files, or what save_to_disk of datasets wrote; columns by
    their usual names. The numbers of label maps are named by id2label.json, {"0": name, ...}, by the features of the
    table, or by classes.txt; max_depth.txt is as in a plain folder. What convert wrote has all of it in classes.json;
    its lists of objects and people are ignored.
    """

    rule = "voc"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path, self.rows = path, tables.open_rows(path, split)
        names = self.rows.columns
        self.columns = {what: next((name for name in known if name in names), "") for what, known in COLUMNS.items()}
        first = self._look_at(0)
        self.columns |= {what: _map_column(COLUMNS[what], names, first) for what in ("label", "depth")}
        self.table = self._table()
        if not self.columns["image"] or not (self.columns["label"] or self.columns["depth"]):
            raise reading.bad(
                path,
                f"its columns are {documents.one_line(', '.join(names))}, expected image and a map in label or depth",
            )
        if self.columns["label"]:
            self.classes = self._classes()
            things = self.table.get("things", self.classes)  # which earlier versions did not write
            self.thing_classes = tuple(n for n in reading.without_background(self.classes) if n in things)
        if self.columns["depth"]:
            self.max_depth = self.table.get("max_depth") or reading.farthest_depth(path / "max_depth.txt")
        map_tasks, depth_tasks = ("semantic", "open-vocabulary"), ("depth",)
        self.tasks = (*(map_tasks if self.classes else ()), *(depth_tasks if self.max_depth else ()))
        self.captions_name_all = not self.columns["caption"]
        super().__init__(size, len(self.rows))

    def _look_at(self, record: int) -> dict[str, Any]:
        """A row, empty where it cannot be read, which is reported when it has to be, as it may be skipped."""
        try:
            return self.rows.row(record) if record < len(self.rows) else {}
        except Refused:
            return {}

    def _table(self) -> dict[str, Any]:
        """The content of classes.json, empty where there is none."""
        path = self.path / TABLE
        if not path.exists():
            return {}
        table = documents.read_object(path)
        try:
            documents.check_form(table, {name: form for name, form in TABLE_FORM.items() if name in table})
            if not 0 <= table.get("max_depth", 0) <= LARGEST_STEP or table.get("depth_steps_of_a_metre", 1) <= 0:
                raise ValueError("a depth out of range")
        except ValueError as error:
            raise reading.bad(path, f"not what convert writes ({error})") from error
        return table

    def _classes(self) -> tuple[str, ...]:
        if "id2label" in self.table:
            return _class_names(self.path / TABLE, self.table["id2label"])
        for folder in dict.fromkeys((self.rows.folder, self.path)):
            if (file := folder / "id2label.json").exists():
                return _class_names(file, documents.read_object(file))
        if names := next(_feature_names(self.rows.features(self.columns["label"])), ()):
            return reading.with_background(names)
        return reading.class_file(reading.first_there(self.path / "id2label.json", self.path / "classes.txt"))

    def name(self, record: int) -> str:
        return f"{self.path}: row {record}"

    def path_of(self, record: int) -> str:
        value = self._look_at(record).get(self.columns["image"])
        path = value.get("path") if isinstance(value, dict) else value
        return path if isinstance(path, str) and path else str(record)

    def picture(self, record: int) -> Picture:
        row = self.rows.row(record)
        maps = {what: self._map(row, what, record) for what in ("label", "depth") if self.columns[what]}
        image = self._colours(row, record, maps)
        labels = depth = None
        if "label" in maps:
            labels = maps["label"][0]
            reading.check_numbers(self.name(record), labels, len(self.classes))
            labels = labels.astype(np.uint8)
        if "depth" in maps:
            raw, steps = maps["depth"]
            metres = raw.astype(np.float32) / steps
            depth = np.where((metres > 0) & (metres <= self.max_depth), metres, 0)
        caption = row[self.columns["caption"]] if self.columns["caption"] else None
        if not isinstance(caption, (str, NoneType)):
            raise reading.bad(self.name(record), "its caption is not a text")
        caption = self.things_in(labels) if caption is None else caption
        return Picture(f"{record:08d}", image, caption, labels, depth=depth)

    def _image(self, row: dict[str, Any], what: str, record: int, holds_numbers: bool = False) -> Image.Image:
        value = row[self.columns[what]]
        value = {"path": value} if isinstance(value, str) else {"bytes": value} if isinstance(value, bytes) else value
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise reading.bad(self.name(record), f"no picture in the column {self.columns[what]}")
        name = f"{self.name(record)}, {self.columns[what]}"
        options = {"most_pixels": reading.MOST_PIXELS, "holds_numbers": holds_numbers}
        if value.get("bytes"):
            image = images.decode_image(value["bytes"], name, may_be_tiff=True, **options)
        else:
            file = reading.inside(self.rows.folder, value["path"], name)
            image = images.read_image(file, **options)
        reading.check_sides(name, image.size)
        return image

    def _colours(
        self, row: dict[str, Any], record: int, maps: Mapping[str, tuple[np.ndarray, float]]
    ) -> np.ndarray:  # [H, W, 3] uint8
        """The picture of a row, turned as its maps lie; maps of another size are refused."""
        sizes = {self.columns[what]: array.shape[::-1] for what, (array, _) in maps.items()}
        column, first = next(iter(sizes.items()), ("", ()))
        turned = reading.as_sized(column, lambda: first) if column else None
        image = reading.colours(f"{self.name(record)}, image", self._image(row, "image", record), turned)
        for column, size in sizes.items():
            if size != image.shape[1::-1]:
                shape = f"{image.shape[1]} x {image.shape[0]}"
                size = " x ".join(map(str, size))
                raise reading.bad(self.name(record), f"{column} has {size} pixels, but its image has {shape}")
        return image

    def _map(self, row: dict[str, Any], what: str, record: int) -> tuple[np.ndarray, float]:
        """The numbers of a map, and how many steps they have to the metre where they are depths: tables of numbers are
        metres, pictures are in the unit they name or the one of a plain folder.
        """
        value, column, steps = row[self.columns[what]], self.columns[what], 1.0
        if isinstance(value, (dict, str, bytes)):
            image = self._image(row, what, record, holds_numbers=True)
            if image.mode not in ("I", "I;16", *(() if what == "depth" else reading.EIGHT_BITS)):
                expected = "one number of 16 bits each" if what == "depth" else "one number each"
                raise reading.bad(self.name(record), f"the pixels of {column} are {image.mode}, expected {expected}")
            array = np.asarray(image).astype(np.int32)
            named_steps = self.table.get("depth_steps_of_a_metre") or UNITS.get(image.info.get(NOTE, ""))
            steps = named_steps or UNITS[unit_of(self.max_depth)]
        else:
            try:
                array = np.asarray(value, np.float32 if what == "depth" else np.int32)
                if array.ndim != 2:
                    raise ValueError("no rows of numbers")
            except (TypeError, ValueError, OverflowError):
                raise reading.bad(self.name(record), f"{column} is no table of numbers") from None
        return array, steps


def _map_column(known: Sequence[str], names: Sequence[str], row: Mapping[str, Any]) -> str:
    """The first of the known columns that holds maps: a label may be the class of the whole picture."""
    present = [name for name in known if name in names]
    maps = [name for name in present if _may_be_map(row.get(name))]
    return next(iter(maps or [name for name in present if not isinstance(row.get(name), (int, float))]), "")


def _may_be_map(value: Any) -> bool:
    """Whether a cell is a picture, the path of one, or rows of numbers; of an empty one nothing is known."""
    is_path = isinstance(value, str) and value.lower().endswith(reading.PICTURES)
    return value is None or is_path or isinstance(value, (bytes, dict, list))


def _feature_names(feature: Any) -> Iterator[tuple[str, ...]]:
    """Class names in the description of a column, at any depth of lists."""
    if isinstance(feature, dict):
        names = feature.get("names")
        if isinstance(names, list) and names and len(names) <= IGNORE and all(isinstance(name, str) for name in names):
            yield tuple(names)
        for inner in feature.values():
            yield from _feature_names(inner)
    elif isinstance(feature, list):
        for inner in feature:
            yield from _feature_names(inner)


def _class_names(path: Path, id2label: dict[str, Any]) -> tuple[str, ...]:
    """The classes of an object from their numbers to their names, in the order of the numbers."""
    are_names = all(isinstance(name, str) for name in id2label.values())
    if not (0 < len(id2label) <= IGNORE and set(id2label) == {str(k) for k in range(len(id2label))} and are_names):
        raise reading.bad(path, "not an object from the numbers 0, 1, 2 ... to class names")
    return reading.with_background([id2label[str(k)] for k in range(len(id2label))])
