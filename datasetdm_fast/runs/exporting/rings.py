"""Masks as polygons along the edges of their pixels, as one closed line each, and with few corners for a person."""

import numpy as np

from datasetdm_fast.engine.labels.pictures import borders, bounds, simplify

EDITABLE = 1.0  # pixels that a border for a person to correct may be away from the mask's
FEWEST = 8  # corners of a ring that is left as it is


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask [H, W] bool as corners [n, 2] of x, y: parts and holes, inside by the even-odd rule."""
    left, top, right, bottom = bounds(mask)
    if not right:
        return []
    corners = []
    for ring in borders(mask[top:bottom, left:right]):
        way = np.diff(ring, axis=0, append=ring[:1])
        corners.append(ring[(way != np.roll(way, 1, axis=0)).any(1)] + (left, top))  # no point on a straight stretch
    return corners


def is_hole(ring: np.ndarray) -> bool:
    """Whether a ring runs around pixels outside of the mask."""
    x, y = ring[:, 0], ring[:, 1]
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) < 0


def join_rings(outline: list[np.ndarray]) -> np.ndarray:
    """One closed line through all rings: each next one is reached, and left, along the same line of no width."""
    line = outline[0]
    for ring in outline[1:]:
        near = int(np.abs(line - ring[0]).sum(1).argmin())
        line = np.concatenate([line[: near + 1], ring, ring[:1], line[near:]])
    return line


def on_pixels(ring: np.ndarray) -> np.ndarray:
    """A ring through the outermost pixels of its mask instead of along their edges: the first and the last one of each
    edge, so that it does not leave the mask where two pixels touch at a corner.
    """
    ring = ring.astype(int)
    following = np.roll(ring, -1, axis=0)
    way = np.sign(following - ring)
    right = np.stack([-way[:, 1], way[:, 0]], 1)  # of the way along a ring lies the mask
    ends = np.stack([ring + (right + way - 1) // 2, following + (right - way - 1) // 2], 1).reshape(-1, 2)
    distinct = ends[(ends != np.roll(ends, -1, axis=0)).any(1)]
    return distinct if len(distinct) > 2 else ends[::2]  # a polygon has three corners or more


def group_parts(outline: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The rings of each part of a mask: its border and its own holes."""
    outer = [ring for ring in outline if not is_hole(ring)]
    parts: list[list[np.ndarray]] = [[ring] for ring in outer]
    for hole in filter(is_hole, outline):
        inside = [k for k, ring in enumerate(outer) if _holds(ring, hole)]
        # of parts within each other, the one that the hole is cut from is the smallest
        parts[min(inside, key=lambda k: float(np.ptp(outer[k], axis=0).prod()))].append(hole)
    return parts


def editable_parts(mask: np.ndarray) -> list[np.ndarray]:
    """A closed line [n, 2] of x, y for each part of a mask, its holes joined to it, within EDITABLE pixels of it."""
    lines = []
    for part in group_parts(rings(mask)):
        few = [ring if len(ring) <= FEWEST else simplify(ring, EDITABLE) for ring in part]
        # one that would lose its inside is left as it is
        lines.append(join_rings([less if len(less) > 2 else ring for less, ring in zip(few, part, strict=True)]))
    return lines


def _holds(ring: np.ndarray, hole: np.ndarray) -> bool:
    """Whether the pixel in a hole's upper left corner lies in a ring, by the even-odd rule."""
    x, y = hole[np.lexsort((hole[:, 0], hole[:, 1]))[0]] + 0.5
    start, end = ring, np.roll(ring, -1, axis=0)
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    return bool(np.count_nonzero(crosses & (start[:, 0] > x)) % 2)
