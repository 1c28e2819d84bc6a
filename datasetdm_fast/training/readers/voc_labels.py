"""Names, numbers and colours of the classes of data laid out as PASCAL VOC."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.untrusted import images

Colour = tuple[int, int, int]


def pack(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def packed_colours(path: Path, shape: Sequence[int]) -> np.ndarray | None:
    """[H, W] int32 of the colours of a map as large as its image; None of one that holds numbers."""
    image = images.read_image(path, most_pixels=reading.MOST_PIXELS, holds_numbers=True)
    if image.mode not in ("RGB", "RGBA"):
        return None
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    if pixels.shape[:2] != tuple(shape[:2]):
        raise reading.bad(
            path, f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its image has {shape[1]} x {shape[0]}"
        )
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def read_label_map(path: Path) -> dict[str, Colour | None]:
    """The classes of a file of lines NAME:COLOUR:PARTS:ACTIONS with their colours, the background's first."""
    classes: dict[str, Colour | None] = {}
    lines = [line.split(":") for line in reading.lines(path) if not line.startswith("#")]
    for name, *rest in lines:
        parts = rest[0].split(",") if rest and rest[0] else []
        if not all(part.strip().isdecimal() and int(part) < 256 for part in parts) or len(parts) not in (0, 3):
            raise reading.bad(path, f"{rest[0]!r} is no colour, expected three numbers from 0 to 255")
        classes[name] = (int(parts[0]), int(parts[1]), int(parts[2])) if parts else None
    if len(classes) < len(lines) or len(classes) < 2 or not all(classes) or len(classes) > IGNORE:
        raise reading.bad(path, "its names are not different ones, the background's first")
    first = next((name for name in classes if reading.is_background(name)), None)
    return classes if first is None else {first: classes.pop(first), **classes}


def numbers_of(colours: Sequence[Colour | None]) -> np.ndarray | None:
    """[256] int32: the class of each number of a map where the colours of all classes are those of numbers in VOC's
    palette, as tools leave numbers out; else a number is a place in the list.
    """
    known = {pack(colour): number for number, colour in enumerate(palette())}
    numbers = [known[pack(colour)] for colour in colours if colour and pack(colour) in known]
    if len({*numbers}) < len(colours):
        return None
    classes = np.full(256, -1, np.int32)
    classes[IGNORE] = IGNORE
    classes[numbers] = range(len(numbers))
    return classes


@cache
def palette() -> tuple[list[int], ...]:
    """The 256 colours of PASCAL VOC: the bits of a number dealt out to red, green and blue."""
    bits = [[(number >> place) & 1 for place in range(9)] for number in range(256)]
    return tuple([sum(each[3 * k + channel] << (7 - k) for k in range(3)) for channel in range(3)] for each in bits)


def read_csv_classes(path: Path) -> tuple[str, ...]:
    """The classes of a table of pixel values and names, in the order of the values."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(reading.lines(path))][1:]
    if not rows or any(len(row) != 2 or row[0] != str(number) for number, row in enumerate(rows)):
        raise reading.bad(path, "no table of pixel values from 0 on and class names")
    return reading.with_background([name for _, name in rows])
