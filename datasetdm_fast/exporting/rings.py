"""Masks as polygons along the edges of their pixels."""

import numpy as np

from datasetdm_fast.labels.pictures import borders


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask [H, W] bool as corners [n, 2] of x, y: parts and holes, inside by the even-odd rule."""
    down, across = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(down):
        return []
    part = mask[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
    return [_corners(ring) + (across[0], down[0]) for ring in borders(part)]


def _corners(ring: np.ndarray) -> np.ndarray:
    """A ring without the points on its straight stretches."""
    way = np.diff(ring, axis=0, append=ring[:1])
    return ring[(way != np.roll(way, 1, axis=0)).any(1)]


def is_hole(ring: np.ndarray) -> bool:
    """Whether a ring runs around what is outside."""
    x, y = ring[:, 0], ring[:, 1]
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) < 0
