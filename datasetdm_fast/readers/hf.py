"""hf:PATH[SPLIT]: a folder saved by Hugging Face's `datasets`, with an image and a label or depth map in each row."""

from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents, images
from datasetdm_fast.truth import framing, reading
from datasetdm_fast.truth.labelled import IGNORED, Picture
from datasetdm_fast.truth.pictures import PictureSource

COLUMNS = {
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "mask", "annotation", "segmentation", "semantic", "labels"),
    "depth": ("depth", "depth_map"),
    "caption": ("caption", "text", "prompt"),
}


class HuggingFace(PictureSource):
    """Columns by their usual names; id2label.json, {"0": name, ...}, names the numbers of the label map."""

    rule = framing.RULES["voc"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path, self.rows = path, _opened(path, split)
        names = self.rows.column_names
        self.columns = {what: next((name for name in known if name in names), None) for what, known in COLUMNS.items()}
        if self.columns["image"] is None or not (self.columns["label"] or self.columns["depth"]):
            raise reading.bad(
                path, f"its columns are {documents.one_line(', '.join(names))}, expected image and label or depth"
            )
        import datasets

        for column in (self.columns[what] for what in ("image", "label", "depth")):
            if column and isinstance(self.rows.features[column], datasets.Image):
                # bytes as they are stored: they go through the same checks as any file
                self.rows = self.rows.cast_column(column, datasets.Image(decode=False))
        if self.columns["label"]:
            self.classes = _classes(path / "id2label.json")
            self.thing_classes = reading.without_background(self.classes)
        self.max_depth = 10.0 if self.columns["depth"] else 0.0
        self.tasks = (
            *(("semantic", "open-vocabulary") if self.classes else ()),
            *(("depth",) if self.max_depth else ()),
        )
        super().__init__(size, len(self.rows))

    def name(self, record: int) -> str:
        return f"{self.path}: row {record}"

    def picture(self, record: int) -> Picture:
        try:
            row = self.rows[record]
        except Exception as error:  # Arrow and the library raise nearly anything over a damaged file
            raise reading.bad(self.name(record), f"not readable ({type(error).__name__})") from error
        image = np.asarray(self._image(row, "image", record).convert("RGB"))
        labels = depth = None
        if self.columns["label"]:
            labels = self._map(row, "label", record, image.shape)
            reading.check_numbers(self.name(record), labels, len(self.classes))
            labels = labels.astype(np.uint8)
        if self.columns["depth"]:
            raw = self._map(row, "depth", record, image.shape).astype(np.float32)
            # whole numbers are millimetres of a 16-bit picture, others are metres
            metres = raw / 1000 if isinstance(row[self.columns["depth"]], dict) else raw
            depth = np.where(np.isfinite(metres) & (metres > 0) & (metres <= self.max_depth), metres, 0)
        caption = row[self.columns["caption"]] if self.columns["caption"] else None
        if caption is None:
            caption = self.caption(labels)
        if not isinstance(caption, str):
            raise reading.bad(self.name(record), "its caption is no text")
        return Picture(f"{record:08d}", image, caption, labels, depth=depth)

    def _image(self, row: dict[str, Any], what: str, record: int):
        value = row[self.columns[what]]
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise reading.bad(self.name(record), f"no picture in the column {self.columns[what]}")
        name = f"{self.name(record)}, {self.columns[what]}"
        image = (
            images.decode_image(value["bytes"], name) if value.get("bytes") else images.read_image(Path(value["path"]))
        )
        reading.check_sides(name, image.size)
        return image

    def _map(self, row: dict[str, Any], what: str, record: int, shape: tuple[int, ...]) -> np.ndarray:
        value = row[self.columns[what]]
        if isinstance(value, dict):
            image = self._image(row, what, record)
            if image.mode not in ("I", "I;16", *(() if what == "depth" else reading.EIGHT_BITS)):
                wanted = "one number of 16 bits each" if what == "depth" else "one number each"
                raise reading.bad(
                    self.name(record), f"the pixels of {self.columns[what]} are {image.mode}, expected {wanted}"
                )
            found = np.asarray(image).astype(np.int32)
        else:
            try:
                found = np.asarray(value, np.float32 if what == "depth" else np.int32)
            except (TypeError, ValueError, OverflowError):
                raise reading.bad(self.name(record), f"{self.columns[what]} is no table of numbers") from None
        if found.shape != tuple(shape[:2]):
            size = " x ".join(map(str, found.shape[::-1]))
            raise reading.bad(
                self.name(record), f"{self.columns[what]} has {size} pixels, but its image has {shape[1]} x {shape[0]}"
            )
        return found


def _opened(path: Path, split: str):
    try:
        import datasets
    except ImportError as error:
        raise Missing("hf: the library `datasets` is not installed", "Install datasetdm-fast[hf].") from error
    reading.first_there(path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise Refused(
            f"{path}: not a folder that `datasets` saved ({type(error).__name__})", "Save it with save_to_disk."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise Refused(f"{path}: no split {split!r}", f"It has {', '.join(found)}.")
        found = found[split]
    elif split != "train":
        raise reading.no_split(path, split)
    return found


def _classes(path: Path) -> tuple[str, ...]:
    found = documents.read_object(path)
    if (
        not found
        or set(found) != {str(k) for k in range(len(found))}
        or not all(isinstance(name, str) for name in found.values())
        or len(found) > IGNORED
    ):
        raise reading.bad(path, "not an object from the numbers 0, 1, 2 ... to class names")
    return tuple(found[str(k)] for k in range(len(found)))
