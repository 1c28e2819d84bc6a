"""statistics.png: how often each class is there, how large things are, how sure labels are, how deep images are."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.engine.labels.names import LabelName
from datasetdm_fast.runs.run_folder.document import sides
from datasetdm_fast.runs.run_folder.indexes.index_file import IndexFile
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.run_folder.scores import LEAST_SHARE

STATISTICS = "statistics.png"
MOST_CLASSES = 24  # bars, the most frequent ones
BINS = 20
NO_CLASS = {"background", "none"}
AREA_EDGES = tuple(2.0**-k for k in range(12, -1, -1))  # shares of an image
PANEL, LINE, MARGIN = (470, 250), 17, 10  # width and least height of a panel, height of a bar, all in pixels
INK, FAINT, BAR, PAPER = (33, 37, 41), (206, 212, 218), (44, 110, 190), (255, 255, 255)


@dataclass
class Figures:
    """What the pictures show of all samples."""

    images: Counter[str] = field(default_factory=Counter)  # by class
    areas: list[float] = field(default_factory=list)  # of things, as shares of their image
    scores: list[float] = field(default_factory=list)  # of things, or where there are none mean confidences of maps
    depths: list[float] = field(default_factory=list)  # mean of an image in metres


class StatisticsPicture(IndexFile):
    """A PNG with a panel for everything there are figures of."""

    def __init__(self, document: Mapping[str, Any], ledger: Ledger):
        super().__init__(document, ledger)
        self.figures = Figures()
        labels = by_kind(document["config"]["task"])
        self._kinds = {label: (LabelName.parse(label).task, kind_of(label)) for label in labels}
        self._has_things = any(task == "instance" for task, _ in self._kinds.values())

    def add(self, rows: Sequence[Row]) -> tuple[()]:
        figures, tables = self.figures, self.document["labels"]
        for row in rows:
            height, width = sides(self.document, row.recipe)
            shown: set[str] = set()
            for label, record in row.labels.items():
                task, kind = self._kinds[label]
                shown.update(kind.words(record, tables[label], LEAST_SHARE * height * width))
                if task == "instance":
                    figures.areas += [thing["area"] / (height * width) for thing in record]
                    figures.scores += [thing["score"] for thing in record]
                elif task == "depth":
                    figures.depths.append(record["mean"])
                elif kind.is_map and not self._has_things and record.get("mean_confidence") is not None:
                    figures.scores.append(record["mean_confidence"])
            figures.images.update(shown - NO_CLASS)
        return ()

    def end(self) -> Iterator[bytes]:
        yield draw_panels(self.figures)


def draw_panels(figures: Figures) -> bytes:
    """A PNG of panels, two in a row."""
    from PIL import Image, ImageDraw

    panels = list(panels_of(figures))
    rows = [panels[k : k + 2] for k in range(0, len(panels), 2)]
    heights = [max(max(PANEL[1], 60 + LINE * len(bars) * is_wide) for _, bars, is_wide in row) for row in rows]
    image = Image.new("RGB", (2 * PANEL[0], max(sum(heights), 1)), PAPER)
    pen, top = ImageDraw.Draw(image), 0
    for row, height in zip(rows, heights, strict=True):
        for k, (title, bars, is_wide) in enumerate(row):
            box = (k * PANEL[0], top, (k + 1) * PANEL[0], top + height)
            (draw_words if is_wide else draw_histogram)(pen, box, title, bars)
        top += height
    packed = BytesIO()
    image.quantize(32).save(packed, "PNG", optimize=False)
    return packed.getvalue()


Bars = Sequence[tuple[str, int]]


def panels_of(figures: Figures) -> Iterator[tuple[str, Bars, bool]]:
    """Title, bars, and whether their names are words, of every panel that has something to show."""
    if figures.images:
        most = sorted(figures.images.items(), key=lambda item: (-item[1], item[0]))
        left = f", the {MOST_CLASSES} most frequent of {len(most)}" if len(most) > MOST_CLASSES else ""
        yield f"images that show a class{left}", most[:MOST_CLASSES], True
    if figures.areas:
        counts = Counter(min(bisect_left(AREA_EDGES, area), len(AREA_EDGES) - 1) for area in figures.areas)
        names = [f"{edge:.2%}" if edge < 0.01 else f"{edge:.0%}" for edge in AREA_EDGES]
        yield (
            "things by area, up to this share of the image",
            [(name, counts[k]) for k, name in enumerate(names)],
            False,
        )
    if figures.scores:
        scores = "scores of things" if figures.areas else "mean confidence of maps"
        yield f"{scores}, up to", count_bins(figures.scores, 1.0), False
    if figures.depths:
        yield (
            "mean depth of an image, up to so many metres",
            count_bins(figures.depths, rounded_up(max(figures.depths))),
            False,
        )


def rounded_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not below a value.

    >>> rounded_up(3.2), rounded_up(80), rounded_up(0.5)
    (5.0, 100.0, 0.5)
    """
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(step * power for step in (1, 2, 5, 10) if value <= step * power * (1 + 1e-9))


def count_bins(values: Sequence[float], end: float) -> Bars:
    """How many values lie in each part of 0 to `end`, by the end of the part."""
    counts = Counter(min(int(value / end * BINS), BINS - 1) for value in values)
    return [(f"{(k + 1) * end / BINS:.3g}", counts[k]) for k in range(BINS)]


def draw_words(pen: Any, box: tuple[int, int, int, int], title: str, bars: Bars) -> None:
    """Bars to the right, the name of each before it and its number behind it."""
    left, top, right, _ = box
    draw_title(pen, left, top, title)
    most, font = max(count for _, count in bars), font_of(12)
    begin, length = left + 150, right - left - 150 - 70
    for k, (name, count) in enumerate(bars):
        y = top + 38 + k * LINE
        short = plain(name)
        pen.text((begin - 8, y + LINE // 2), short, INK, font, "rm")
        pen.rectangle((begin, y + 2, begin + max(round(length * count / most), 1), y + LINE - 3), BAR)
        pen.text((begin + round(length * count / most) + 6, y + LINE // 2), f"{count:,}", INK, font, "lm")


def draw_histogram(pen: Any, box: tuple[int, int, int, int], title: str, bars: Bars) -> None:
    """Bars upwards, numbers under some of them."""
    left, top, right, bottom = box
    draw_title(pen, left, top, title)
    most, font = max(max(count for _, count in bars), 1), font_of(11)
    begin, end, floor, ceiling = left + 60, right - 20, bottom - 34, top + 40
    step = (end - begin) / len(bars)
    for count in (0, most):
        y = floor - round((floor - ceiling) * count / most)
        pen.line((begin, y, end, y), FAINT)
        pen.text((begin - 6, y), f"{count:,}", INK, font, "rm")
    every = -(-len(bars) // 7)
    for k, (name, count) in enumerate(bars):
        x = begin + k * step
        if count:
            height = max(round((floor - ceiling) * count / most), 1)
            pen.rectangle((round(x + 1), floor - height, round(x + step - 2), floor), BAR)
        if (len(bars) - 1 - k) % every == 0:
            pen.text((round(x + step / 2), floor + 12), name, INK, font, "mm")


def draw_title(pen: Any, left: int, top: int, title: str) -> None:
    pen.text((left + MARGIN, top + 20), title, INK, font_of(14), "lm")


def plain(name: str) -> str:
    """A class name that fits before its bar; letters that the font may lack become question marks."""
    short = name if len(name) <= 20 else name[:19] + "…"
    return "".join(letter if letter.isprintable() and ord(letter) < 0x250 or letter == "…" else "?" for letter in short)


def font_of(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
