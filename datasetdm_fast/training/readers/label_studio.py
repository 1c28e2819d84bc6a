"""label-studio:PATH: pictures with the JSON that Label Studio exports: brushes, polygons, rectangles and ellipses."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import shapes
from datasetdm_fast.untrusted import documents

LARGEST_EXPORT = 2**30  # bytes; brushes are long lists of numbers
SHAPES = ("polygonlabels", "rectanglelabels", "ellipselabels", "brushlabels")
RESULT_FORM = {"original_width": int, "original_height": int, "value": dict}
DEEPEST = 8  # parts of a path by which pictures of one name are told apart
EXPORT = "In Label Studio choose Export and the format JSON."


class LabelStudio(shapes.OutlineSource):
    """A JSON file, or the only one of a folder or its split, of tasks; a picture has the name that its task ends in,
    also without the eight letters that an upload begins with, in `images` or beside the file; with its folders where
    others are called so, too. The first annotation of a task that was not cancelled counts, tasks without one are left
    out; classes are in the order of their names.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        folder = path.parent if path.is_file() else reading.split_folder(path, split)
        files = [path] if path.is_file() else reading.listing(folder, ".json")
        if len(files) > 1:
            raise reading.bad(folder, f"{len(files)} JSON files, of which one may be meant: name it")
        self.file, self.folder = files[0], folder
        exported = documents.parse_json(reading.storage.read(self.file, LARGEST_EXPORT), str(self.file))
        if not isinstance(exported, list) or not all(isinstance(task, dict) and "data" in task for task in exported):
            raise reading.bad(self.file, f"no list of tasks as Label Studio writes it. {EXPORT}")
        try:
            self.records = [(task["data"], results) for task in exported if (results := _results(task)) is not None]
        except (ValueError, TypeError) as error:
            raise reading.bad(self.file, f"not what Label Studio writes ({error})") from error
        if not self.records:
            only = ", but predictions: Label Studio's action Create Annotations From Predictions makes some of them"
            has_predictions = any(task.get("predictions") for task in exported)
            raise reading.bad(self.file, f"no task of it has annotations{only if has_predictions else ''}")
        named = {name for _, results in self.records for result in results for name in _labels(result)}
        self.set_things(sorted(filter(shapes.is_thing, named)))
        if not self.thing_classes:
            raise reading.bad(self.file, "no outline with a label in it")
        self.urls = [_url(data) for data, _ in self.records]
        self.counts = Counter(tail for url in {*self.urls} for tail in _tails(url))  # of different pictures
        super().__init__(size, len(self.records))

    def _places(self, record: int) -> list[Path]:
        """Where the picture of a task may lie by what no other task names."""
        tails = [tail for tail in _tails(self.urls[record]) if self.counts[tail] == 1]
        return [folder / tail for tail in tails for folder in (self.folder / "images", self.folder)]

    def name(self, record: int) -> str:
        places = self._places(record) or [Path(f"{self.file}: task {record}")]
        return str(next((place for place in places if place.is_file()), places[0]))

    def picture(self, record: int) -> Picture:
        if not self._places(record):
            has_url = f"{documents.quote(self.urls[record])}, as another does by its path"
            raise reading.bad(self.file, f"task {record} names {has_url if self.urls[record] else 'no picture'}")
        path, results = Path(self.name(record)), self.records[record][1]
        sides = next(((each["original_height"], each["original_width"]) for each in results), None)
        image = reading.colour_image(path, reading.as_drawn(sides[::-1]) if sides else None)
        shapes.check_sides(path, image, sides or image.shape[:2], self.file)
        outlines = ((_labels(each)[0], "", partial(_mask, each, image.shape[:2])) for each in results)
        things = self.draw(self.file, f"{path.name}, ", outlines)
        return Picture(path.stem, image, self.names_of(things), **things.fields)


def _results(task: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The labelled outlines of a task; None where nobody has labelled it."""
    done = [each for each in task.get("annotations", []) if isinstance(each, dict) and not each.get("was_cancelled")]
    if not done:
        return None
    results = [each for each in done[0].get("result", []) if isinstance(each, dict) and each.get("type") in SHAPES]
    for result in results:
        documents.check_form(result, RESULT_FORM)
    return [result for result in results if _labels(result)]


def _url(data: Any) -> str:
    """What a task calls its picture, beside which it may have texts."""
    values = [value for value in data.values() if isinstance(value, str)] if isinstance(data, dict) else []
    named = [value for value in values if any(ending in value.lower() for ending in reading.PICTURES)]
    return next(iter(named or values), "")


def _tails(url: str) -> list[str]:
    """The last part of a picture's path, also without what an upload begins with, then more and more of its path."""
    parts = urlsplit(url)
    path = unquote(parse_qs(parts.query).get("d", [parts.path])[0]).replace("\\", "/")  # of local files as of uploads
    *folders, name = [part for part in path.split("/") if part not in ("", ".", "..")][-DEEPEST:] or [""]
    names = dict.fromkeys((name, name[9:] if name[8:9] == "-" else name) if name else ())
    return ["/".join((*folders[k:], each)) for k in range(len(folders), -1, -1) for each in names]


def _labels(result: dict[str, Any]) -> list[str]:
    names = result["value"].get(result["type"], [])
    documents.check_form(names, [str])
    return list(names)


def _mask(result: dict[str, Any], sides: tuple[int, int]) -> shapes.Mask:
    """The mask of an outline, whose lengths are percents of the picture's sides."""
    kind, value = result["type"], result["value"]
    if kind == "brushlabels":
        mask = unpack_runs(value["rle"], 4 * sides[0] * sides[1]).reshape(*sides, 4)[..., 3] > 0
        return lambda: mask
    across, down = sides[1] / 100, sides[0] / 100
    if kind == "polygonlabels":
        return shapes.polygon([part for x, y in value["points"] for part in (x * across, y * down)], sides)
    x, y, angle = value["x"] * across, value["y"] * down, value.get("rotation", 0)
    if kind == "ellipselabels":
        return shapes.ellipse((x, y), (value["radiusX"] * across, value["radiusY"] * down), sides, angle)
    corners = (x, y, x + value["width"] * across, y + value["height"] * down)
    return shapes.box(corners, sides, angle, about=(x, y))


def unpack_runs(data: Any, count: int) -> np.ndarray:
    """[count] uint8 of a brush: 32 bits with how many follow, 5 with their width, 4 x 4 with those of lengths; then of
    each run a bit whether it repeats one number, 2 bits which width its length has, its length, its number or numbers.
    """
    documents.check_form(data, [int])
    bits, place = np.unpackbits(np.array(data, np.int64).astype(np.uint8)), 0

    def read(width: int, numbers: int = 1) -> np.ndarray:
        nonlocal place
        begin, place = place, place + width * numbers
        if place > len(bits):
            raise ValueError("a brush that ends too early")
        return bits[begin:place].reshape(numbers, width) @ (1 << np.arange(width - 1, -1, -1))

    if (stated := int(read(32)[0])) != count:
        raise ValueError(f"a brush of {stated} numbers, {count} are expected")
    width, lengths = int(read(5)[0]) + 1, [int(read(4)[0]) + 1 for _ in range(4)]
    pixels, filled = np.zeros(count, np.uint8), 0
    while filled < count:
        repeats = bool(read(1)[0])
        length = min(int(read(lengths[int(read(2)[0])])[0]) + 1, count - filled)
        pixels[filled : filled + length] = read(width, 1 if repeats else length)
        filled += length
    return pixels
