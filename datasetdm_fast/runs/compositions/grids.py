"""Grids of pictures: their notation, which samples a grid takes, and where each of them lies."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasetdm_fast.engine.labels.kind import Placement
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

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
