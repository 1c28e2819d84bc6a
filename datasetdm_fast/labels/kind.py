"""The record of a label kind: all that is known of how its labels lie in files, look in pictures and are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Limit = tuple[float, float]  # of the median, of the 99th percentile
Pixels = Mapping[str, np.ndarray]  # role -> pixels of the file
Table = Mapping[str, Any]  # what run.json says of a task's labels: names and ranges


@dataclass(frozen=True)
class Gates:
    """Limits on the distance of two engines' labels: given the same input, and each engine on its own."""

    exact: Limit  # fp32 against fp32
    free_exact: Limit
    rounded: Limit  # fp16 or bf16 against fp32
    free_rounded: Limit


@dataclass(frozen=True)
class GalleryLayer:
    """What the gallery draws over an image.

    `drawing` is one of: map (a picture file with sharp pixels), picture (a smooth one), outlines (`values` are
    [class word, score, path of an SVG]), skeletons (`values` are x, y, visibility of every joint).
    """

    name: str
    title: str
    drawing: str
    role: str = ""  # of the file that is drawn
    picture: Callable[[np.ndarray], Image.Image] | None = None  # drawn in its place: a palette picture of its pixels
    values: Callable[[Any, Table], Any] | None = None  # what the page holds of a sample, from record and table
    unit: str = ""  # where the values are a range that the page tells


@dataclass(frozen=True)
class CardPart:
    """What the data set card says of a kind."""

    contents: str
    count: Callable[[Any], Mapping[Any, int]] = lambda record: {}  # what is added up over all records
    section: Callable[[Table, Mapping[Any, int]], Iterable[str]] = lambda table, counts: ()  # lines, from the sums


@dataclass(frozen=True)
class CocoFile:
    """An index file in COCO's form; the records of the kind are its annotations."""

    name: str
    categories: Callable[[Table], list[dict[str, Any]]]


@dataclass(frozen=True)
class LabelKind:
    """How the labels of one task are stored, read back, checked, drawn and compared."""

    attribute: str  # of a stored sample
    roles: tuple[str, ...]  # of the files of one label, each ROLE/ID.png
    encode: Callable[[Any, Mapping[str, Any]], tuple[dict[str, bytes], Any]]  # label, all labels -> files, record
    decode: Callable[[Pixels, Any, Table], Any]  # pixels, record, table -> label
    arrays: Callable[[Any], np.ndarray | dict[str, np.ndarray]]  # what a torch data set gives of a label
    picture: Callable[[Any, np.ndarray], Image.Image]  # label, image -> what a reader of a page sees
    table: Callable[[Any, int, Sequence[str]], dict[str, Any]]  # decoder's configuration, pixels of a side, words
    table_form: Mapping[str, Any]
    pixel_bytes: float  # of its files for a pixel, worst case seen
    check: Callable[[Any, Pixels, Table, int], Iterator[str]]  # record, pixels, table, side -> what is wrong
    card: CardPart
    layers: tuple[GalleryLayer, ...]
    distance: Callable[[Any, Any], float]  # of two labels, 0 where both say the same
    gates: Gates
    words: Callable[[Any, Table, float], Iterable[str]] = lambda record, table, least: ()  # classes a label shows
    # class word -> number of the colour its pixels have, from its own table and those of all tasks
    colours: Callable[[Table, Mapping[str, Table]], dict[str, int]] | None = None
    coco: CocoFile | None = None


def rounded(value: float, digits: int = 3) -> float:
    """A short decimal that survives JSON unchanged, and never -0.0."""
    return round(float(value), digits) + 0.0


def markdown_cell(name: str) -> str:
    """A class word inside a Markdown table: nothing in it can open a tag, a link or a column."""
    return "".join(letter if letter.isalnum() or letter in " -_." else f"&#{ord(letter)};" for letter in name)
