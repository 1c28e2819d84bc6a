"""Spliced samples: several of a run side by side in one picture, with every label where its picture is."""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import Request
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.kind import Placement
from datasetdm_fast.engine.labels.label_files import Files, image_bytes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.compositions.composition import ComposedSample, Composition, Tile, TileSource
from datasetdm_fast.runs.run_folder.document import FORMAT
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.selections import origins
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import MOST_PIXELS
from datasetdm_fast.version import __version__

MOST = 8  # pictures of a side


@dataclass(frozen=True)
class Grid:
    """A table of pictures."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    def sides(self, side: int, is_resized: bool) -> tuple[int, int]:
        """Height and width of a grid of square pictures; a resized one is as large as one of them."""
        return (side, side) if is_resized else (self.rows * side, self.columns * side)

    def placements(self, side: int, is_resized: bool) -> Iterator[Placement]:
        """Where each picture lies, row by row; sides that do not divide differ by one pixel."""
        height, width = sides = self.sides(side, is_resized)
        for row in range(self.rows):
            top, bottom = (height * k // self.rows for k in (row, row + 1))
            for column in range(self.columns):
                left, right = (width * k // self.columns for k in (column, column + 1))
                yield Placement(side, side, top, left, bottom - top, right - left, sides)


def parse_grids(texts: Sequence[str]) -> tuple[Grid, ...]:
    """Grids from texts such as 3, which is 3x3, and 1x2: one row of two pictures."""
    grids = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,3})(?:[xX×](\d{1,3}))?", text, re.ASCII)
        rows, columns = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not (1 <= rows <= MOST and 1 <= columns <= MOST and rows * columns > 1):
            raise Refused(
                f"--grids: {documents.quote(text)} is not a grid of 2 to {MOST}x{MOST} pictures",
                "Write 2,3,4 for 2x2, 3x3 and 4x4, or 1x2 for one row of two pictures.",
            )
        grids.append(Grid(rows, columns))
    if not grids:
        raise Refused("--grids: the list is empty", "Write 2,3,4 for 2x2, 3x3 and 4x4.")
    return tuple(dict.fromkeys(grids))


def sample_positions(seed: int, cells: int, number: int) -> list[int]:
    """Positions of the samples of a grid, from its seed alone; none comes twice where there are enough."""
    dice = random.Random(f"splice {seed}")
    if cells > number:
        return [int(dice.random() * number) for _ in range(cells)]
    chosen: dict[int, None] = {}
    while len(chosen) < cells:
        chosen[int(dice.random() * number)] = None
    return list(chosen)


FREE_BYTES = 64 * 2**20  # that a run leaves for ledger, index files and other programs
PARTS = ("sampling", "model", "decoders", "engine")  # of run.json that are those of the source


class Splicing(Composition):
    """A run of spliced samples."""

    def __init__(self, source: TileSource, grids: Sequence[Grid], number: int, seed: int, is_resized: bool):
        self.source, self.grids, self.number, self.seed, self.is_resized = source, grids, number, seed, is_resized
        height, width = max(map(self.sides, grids), key=math.prod)
        self.largest = height * width
        if self.largest > MOST_PIXELS:
            raise Refused(
                f"--grids: {width} x {height} pixels, at most {MOST_PIXELS} are written",
                "Add --resize, or choose smaller grids.",
            )

    def sides(self, grid: Grid) -> tuple[int, int]:
        return grid.sides(self.source.side, self.is_resized)

    @property
    def tables(self) -> dict[str, Mapping[str, Any]]:
        """The tables of the labels in run.json."""
        return {task: kind_of(task).rewritten(table) for task, table in self.source.document["labels"].items()}

    @property
    def document(self) -> dict[str, Any]:
        """The content of run.json; model, decoders and their licences are those of the source."""
        source, grids = self.source.document, [str(grid) for grid in self.grids]
        how = ", resized to the size of one" if self.is_resized else ""
        shapes = sorted({self.sides(grid) for grid in self.grids})
        return {
            **{part: source[part] for part in PARTS},
            "labels": self.tables,
            "classes": source["classes"],
            **{part: source[part] for part in ("class_table", "packages", "mixed") if part in source},
            "format": FORMAT,
            "command": "splice",
            "versions": {"datasetdm_fast": __version__},
            "config": {
                **{name: source["config"][name] for name in ("task", "image_format", "sampler")},
                "grids": grids,
                "number": self.number,
                "resize": self.is_resized,
                "seed": self.seed,
                "kept": self.source.filter_digest,
            },
            "plan": {"number": self.number, "batch_size": 1, "words": source["plan"].get("words", [])},
            "composition": {
                "told": f"Spliced from the run {self.source.path.resolve().name}, grids {', '.join(grids)}{how}",
                "sides": " or ".join(f"{width} × {height}" for height, width in shapes) + " pixels",
                "source": self.source.provenance,
            },
        }

    def check_room(self, folder: Path) -> None:
        """Refuses a run that would fill the disk."""
        pixels = sum(math.prod(self.sides(grid)) for grid in self.grids) / len(self.grids)
        kinds = [kind_of(task) for task in self.source.run.tasks]
        needed = int(self.number * pixels * (3 + sum(kind.pixel_bytes for kind in kinds))) + FREE_BYTES
        if needed > (free := storage.free_bytes(folder.absolute())):
            raise Missing(
                f"{folder}: the run needs at most {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
                "Free some space, choose another --out, or make fewer images.",
            )

    def compose(self, index: int) -> ComposedSample:
        grid, seed = self.grids[index % len(self.grids)], self.seed + index
        positions = sample_positions(seed, grid.cells, len(self.source.run))
        tiles = [self.source.tile(position) for position in positions]
        placed = list(zip(tiles, grid.placements(self.source.side, self.is_resized), strict=True))
        requests = [tile.row.request for tile in tiles]
        order = dict.fromkeys(self.source.document["plan"].get("words", ()))
        named = {word for request in requests for word in request.classes}
        prompt = "; ".join(dict.fromkeys(each.prompt for each in requests))
        classes = tuple(word for word in order | dict.fromkeys(sorted(named)) if word in named)
        request, sides = Request(index, prompt, seed, classes), self.sides(grid)
        files, records = self._labels(request.id, placed, sides)
        form = self.source.document["config"]["image_format"]
        image = image_bytes(place_pixels("image", placed, sides), form)
        recipe = {
            "grid": str(grid),
            "sides": list(sides),
            "tiles": [each.id for each in requests],
            # also of variants and edits of the same pictures
            "groups": sorted({name for tile in tiles for name in origins(self.source.document, tile.row)}),
        }
        files = {"image": (f"images/{request.id}.{form}", image), **files}
        return ComposedSample(Row(request, recipe, labels=records), files)

    def _labels(
        self, id: str, placed: Sequence[tuple[Tile, Placement]], sides: tuple[int, int]
    ) -> tuple[Files, dict[str, Any]]:
        kinds, tables = {task: kind_of(task) for task in sorted(self.source.run.tasks)}, self.source.document["labels"]
        maps = {
            task: kind.decode(
                {role: place_pixels(role, placed, sides) for role in kind.files(tables[task])}, None, tables[task]
            )
            for task, kind in kinds.items()
            if kind.roles
        }
        files: Files = {}
        records: dict[str, Any] = {}
        for task, kind in kinds.items():
            if kind.roles:
                contents, records[task] = kind.encode(maps[task], maps, self.tables[task])
                files |= {role: (f"{role}/{id}.png", content) for role, content in contents.items()}
            else:
                items = (kind.move(item, place) for tile, place in placed for item in tile.row.labels[task])
                records[task] = [item for item in items if item is not None]
        return files, records

    def close(self) -> None:
        self.source.close()


def place_pixels(role: str, placed: Sequence[tuple[Tile, Placement]], sides: tuple[int, int]) -> np.ndarray:
    """The pixels of a role over a whole grid."""
    first = placed[0][0].pixels[role]
    whole = np.empty((*sides, *first.shape[2:]), first.dtype)
    for tile, place in placed:
        pixels = tile.pixels[role]
        if place.is_scaled and role == "image":
            resized = Image.fromarray(pixels).resize((place.columns, place.rows), Image.Resampling.BICUBIC)
            pixels = np.asarray(resized)
        elif role != "image":
            pixels = place.scale(pixels)
        whole[place.top : place.top + place.rows, place.left : place.left + place.columns] = pixels
    return whole
