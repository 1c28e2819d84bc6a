"""Class colours: the same number has the same colour in every label file and on every page."""

import colorsys
from collections.abc import Iterable
from functools import cache
from typing import Any

from datasetdm_fast.engine.labels import class_tables

HUES = "3e4658 c9a27b e6523c 3484e4 f7b500 925cd6 ff78ac 2eb26c 00b6c6 b0ce3a f08a2c 5c68e6 d64080 1478a0 96aa82 b46e46"
COLOURS: tuple[Any, ...] = tuple(tuple(bytes.fromhex(hue)) for hue in HUES.split())
IGNORED = (236, 236, 236)
OURS, CUSTOM = "ours", "table"  # palettes: of this package, and that of the user's class table
NOTHING = (0, 0, 0)
BORDERS = {"voc": (224, 224, 192), "cityscapes": NOTHING, "coco": NOTHING}  # palette -> colour of ignored pixels


def colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue, 0..255, of one class number; 255 is the ignored pixel."""
    if index == 255:
        return IGNORED
    if index < len(COLOURS):
        return COLOURS[index]
    # The golden ratio spreads any number of hues so that neighbours differ.
    turn = index * 0.618033988749895 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(turn, 0.55 + 0.35 * (index % 3) / 2, 0.95 - 0.25 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def palette(numbers: tuple[int, ...] = ()) -> bytes:
    """The 256 colours of an index PNG; value k has the colour of class numbers[k], of k itself beyond them."""
    shown = [*numbers, *range(len(numbers), 256)]
    return bytes(value for number in shown for value in colour(number))


def colour_in(palette: str, name: str, index: int) -> tuple[int, int, int]:
    """The colour of a class in a palette of `--palette`, by its name, and in ours by its number."""
    official = None if palette == OURS else class_tables.builtin_table(palette).colour(name)
    return official or (NOTHING if palette != OURS and name == "background" else colour(index))


@cache
def official_palette(palette: str, classes: tuple[tuple[int, str], ...]) -> bytes:
    """The 256 colours of an index PNG in the palette of a data set; `classes` are its numbers with their names."""
    named = dict(classes)
    shown = [colour_in(palette, named[number], number) if number in named else colour(number) for number in range(255)]
    return bytes(value for each in (*shown, BORDERS[palette]) for value in each)


def strangers(table: class_tables.ClassTable, names: Iterable[str]) -> list[str]:
    """The classes that a table has no colour for."""
    return [name for name in names if name != "background" and table.colour(name) is None]
