"""Overlapping square tiles of a picture, and the labels of all tiles as one label of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from datasetdm_fast.data import IGNORE, Instances, SemanticMap
from datasetdm_fast.engine.labels import SAME, SHOWN_SCORE

Part = tuple[slice, slice]  # rows and columns
OVERLAP = 1 / 4  # of a tile's side that it shares with the next one, at least


@dataclass(frozen=True)
class Tiling:
    """The tiles of a picture of `sides` pixels: squares of `side` pixels, row by row."""

    sides: tuple[int, int]  # height and width of the picture
    side: int
    corners: tuple[tuple[int, int], ...]  # top and left of every tile

    @classmethod
    def of(cls, sides: tuple[int, int], size: int) -> Tiling:
        """Tiles of a model's size in the picture's own pixels; of the shorter side where that is smaller."""
        side = min(size, *sides)
        rows, columns = (_starts(length, side) for length in sides)
        return cls(sides, side, tuple((top, left) for top in rows for left in columns))

    @property
    def parts(self) -> list[Part]:
        """The rows and columns of the picture under every tile."""
        return [(slice(top, top + self.side), slice(left, left + self.side)) for top, left in self.corners]

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        """A map of a tile's labels, of any side, as [side, side]: the nearest value is taken, as none may be mixed."""
        nearest = (2 * np.arange(self.side) + 1) * len(pixels) // (2 * self.side)
        return np.asarray(pixels[np.ix_(nearest, nearest)])

    @property
    def weights(self) -> np.ndarray:  # [side, side] float32
        """How far inside of a tile each of its pixels lies: 1 at the border, more towards the middle."""
        place = np.arange(self.side)
        inward = np.minimum(place, place[::-1]) + 1.0
        return np.asarray(np.minimum.outer(inward, inward), np.float32)


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin so that they cover a length, evenly and each OVERLAP of the next at least."""
    count = -(-(length - side) // max(int(side * (1 - OVERLAP)), 1)) + 1
    return [round(k * (length - side) / max(count - 1, 1)) for k in range(count)]


def joined_map(tiling: Tiling, labels: Sequence[SemanticMap]) -> SemanticMap:
    """The class of every pixel, and how sure it is, from the tile in which it lies farthest inside."""
    whole, sure = np.full(tiling.sides, IGNORE, np.uint8), np.zeros(tiling.sides, np.float32)
    deepest, weights = np.zeros(tiling.sides, np.float32), tiling.weights
    for part, label in zip(tiling.parts, labels, strict=True):
        is_deeper = weights > deepest[part]
        deepest[part][is_deeper] = weights[is_deeper]
        whole[part][is_deeper] = tiling.scale(label.labels)[is_deeper]
        sure[part][is_deeper] = tiling.scale(label.confidence)[is_deeper]
    return SemanticMap(whole, sure, labels[0].classes)


@dataclass(frozen=True)
class _Piece:
    """An instance as one tile shows it."""

    part: Part  # of the picture, under the tile
    mask: np.ndarray  # [side, side] bool
    kind: int
    score: float

    def on(self, rows: slice, columns: slice) -> np.ndarray:
        """Its pixels in a part of the picture that its tile covers."""
        top, left = (axis.start for axis in self.part)
        return self.mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def is_same(self, other: _Piece) -> bool:
        """Whether another tile shows the same thing: where both look, half of the smaller one lies in the other."""
        is_alike = self.kind == other.kind and (self.score >= SHOWN_SCORE) == (other.score >= SHOWN_SCORE)
        if self.part == other.part or not is_alike:
            return False
        shared = [
            slice(max(first.start, second.start), min(first.stop, second.stop))
            for first, second in zip(self.part, other.part)
        ]
        first, second = self.on(*shared), other.on(*shared)
        smaller = min(np.count_nonzero(first), np.count_nonzero(second))
        return bool(smaller > 0 and np.count_nonzero(first & second) >= SAME * smaller)


def joined_instances(tiling: Tiling, labels: Sequence[Instances]) -> Instances:
    """The things of all tiles; what several tiles show of one is its mask together, with the best of their scores."""
    pieces = [
        _Piece(part, tiling.scale(mask), int(kind), float(score))
        for part, label in zip(tiling.parts, labels, strict=True)
        for mask, kind, score in zip(label.masks, label.class_ids, label.scores)
    ]
    group = list(range(len(pieces)))  # the number of the first piece of the same thing
    for (a, first), (b, second) in combinations(enumerate(pieces), 2):
        if group[a] != group[b] and first.is_same(second):
            low, high = sorted((group[a], group[b]))
            group = [low if number == high else number for number in group]
    things = sorted(set(group), key=lambda number: (-max(_scores(pieces, group, number)), number))
    masks = np.zeros((len(things), *tiling.sides), bool)
    for mask, thing in zip(masks, things):
        for piece, number in zip(pieces, group):
            if number == thing:
                mask[piece.part] |= piece.mask
    return Instances(
        masks,
        np.array([pieces[thing].kind for thing in things], np.int64),
        np.array([max(_scores(pieces, group, thing)) for thing in things], np.float32),
        labels[0].classes,
    )


def _scores(pieces: Sequence[_Piece], group: Sequence[int], thing: int) -> list[float]:
    return [piece.score for piece, first in zip(pieces, group) if first == thing]
