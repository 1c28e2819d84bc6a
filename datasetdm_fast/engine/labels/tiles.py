"""Overlapping square tiles of a picture, and the labels of all tiles as one label of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from datasetdm_fast.data import IGNORE, Instances, SemanticMap
from datasetdm_fast.engine.labels import SAME, SHOWN_SCORE

OVERLAP = 1 / 4  # of a tile's side that it shares with the next one, at least


@dataclass(frozen=True)
class Tile:
    """The side of a tile's labels, that of the tile itself, and its corner in the picture."""

    size: int
    side: int
    top: int
    left: int

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        """A map of the labels [size, size] as [side, side]: the nearest value is taken, as none may be mixed."""
        nearest = (2 * np.arange(self.side) + 1) * self.size // (2 * self.side)
        return np.asarray(pixels[np.ix_(nearest, nearest)])


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

    def placements(self, size: int) -> Iterator[Tile]:
        """Where the labels of every tile, `size` pixels a side, lie in the picture."""
        for top, left in self.corners:
            yield Tile(size, self.side, top, left)

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


def part(place: Tile) -> tuple[slice, slice]:
    """The pixels of the whole picture under a tile."""
    return slice(place.top, place.top + place.side), slice(place.left, place.left + place.side)


def joined_map(tiling: Tiling, labels: Sequence[SemanticMap]) -> SemanticMap:
    """The class of every pixel, and how sure it is, from the tile in which it lies farthest inside."""
    whole, sure = np.full(tiling.sides, IGNORE, np.uint8), np.zeros(tiling.sides, np.float32)
    deepest, weights = np.zeros(tiling.sides, np.float32), tiling.weights
    for place, label in zip(tiling.placements(labels[0].labels.shape[0]), labels, strict=True):
        pixels = part(place)
        is_deeper = weights > deepest[pixels]
        deepest[pixels][is_deeper] = weights[is_deeper]
        whole[pixels][is_deeper] = place.scale(label.labels)[is_deeper]
        sure[pixels][is_deeper] = place.scale(label.confidence)[is_deeper]
    return SemanticMap(whole, sure, labels[0].classes)


@dataclass(frozen=True)
class _Piece:
    """An instance as one tile shows it."""

    tile: int
    place: Tile
    mask: np.ndarray  # [side, side] bool
    kind: int
    score: float

    def on(self, rows: slice, columns: slice) -> np.ndarray:
        """Its pixels in a part of the picture that its tile covers."""
        top, left = self.place.top, self.place.left
        return self.mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def is_same(self, other: _Piece) -> bool:
        """Whether another tile shows the same thing: where both look, half of the smaller one lies in the other."""
        is_alike = self.kind == other.kind and (self.score >= SHOWN_SCORE) == (other.score >= SHOWN_SCORE)
        if self.tile == other.tile or not is_alike:
            return False
        shared = [
            slice(max(first.start, second.start), min(first.stop, second.stop))
            for first, second in zip(part(self.place), part(other.place))
        ]
        if any(overlap.start >= overlap.stop for overlap in shared):
            return False
        first, second = self.on(*shared), other.on(*shared)
        smaller = min(np.count_nonzero(first), np.count_nonzero(second))
        return bool(smaller > 0 and np.count_nonzero(first & second) >= SAME * smaller)


def joined_instances(tiling: Tiling, labels: Sequence[Instances]) -> Instances:
    """The things of all tiles; what several tiles show of one is its mask together, with the best of their scores."""
    pieces = [
        _Piece(tile, place, place.scale(mask), int(kind), float(score))
        for tile, (label, place) in enumerate(zip(labels, tiling.placements(labels[0].masks.shape[1]), strict=True))
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
                mask[part(piece.place)] |= piece.mask
    return Instances(
        masks,
        np.array([pieces[thing].kind for thing in things], np.int64),
        np.array([max(_scores(pieces, group, thing)) for thing in things], np.float32),
        labels[0].classes,
    )


def _scores(pieces: Sequence[_Piece], group: Sequence[int], thing: int) -> list[float]:
    return [piece.score for piece, first in zip(pieces, group) if first == thing]
