"""The external contours of a mask as OpenCV finds them (Suzuki and Abe 1985), without points on straight lines."""

import numpy as np

# Steps to the eight neighbours, counter-clockwise from the one on the right, as (down, right).
AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
BORDER, EXIT = 2, 3  # marks of a pixel on a border that was followed; the mask ends to the right of an EXIT


def external_contours(mask: np.ndarray) -> list[np.ndarray]:
    """The outer borders [n, 2] of x, y of a mask [H, W] that lie in no hole, the one that begins lowest first."""
    plane = np.pad(mask.astype(np.uint8), 1)
    wide = plane.shape[1]
    starts = np.flatnonzero((plane[:, 1:] == 1) & (plane[:, :-1] == 0))
    pixels = bytearray(plane.tobytes())
    borders = []
    for start in starts.tolist():
        row, place = divmod(start, wide - 1)
        at = row * wide + place + 1
        if pixels[at] == 1 and not _is_inside(pixels, row * wide, at):
            borders.append(_follow_border(pixels, at, wide))
    return borders[::-1]


def _is_inside(pixels: bytearray, row: int, at: int) -> bool:
    """Whether a pixel lies inside the last border to the left of it in its row."""
    return pixels.rfind(BORDER, row, at) > pixels.rfind(EXIT, row, at)


def _follow_border(pixels: bytearray, start: int, wide: int) -> np.ndarray:
    """The border that begins at its first pixel in reading order, which is marked on the way."""
    steps = [down * wide + right for down, right in AROUND]
    first = _first_from(pixels, start, steps, 4, -1)
    if first is None:
        pixels[start] = EXIT
        return _points([start], wide)
    corners, at, came, before = [], start, first, None
    while True:
        ahead, passed = came, False
        while True:  # counter-clockwise around the pixel, from the one after where the border came from
            ahead = (ahead + 1) % 8
            if pixels[at + steps[ahead]]:
                break
            passed |= ahead == 0
        if passed:
            pixels[at] = EXIT
        elif pixels[at] == 1:
            pixels[at] = BORDER
        if ahead != before:
            corners.append(at)
            before = ahead
        following = at + steps[ahead]
        if following == start and at == start + steps[first]:
            return _points(corners, wide)
        at, came = following, (ahead + 4) % 8


def _first_from(pixels: bytearray, at: int, steps: list[int], begin: int, turn: int) -> int | None:
    """The direction of the first neighbour inside, turning from a direction that is outside; None where all are."""
    return next((k % 8 for k in range(begin + turn, begin + 8 * turn, turn) if pixels[at + steps[k % 8]]), None)


def _points(places: list[int], wide: int) -> np.ndarray:
    """Places of the padded mask as x, y of the mask itself."""
    return np.stack([np.array(places) % wide - 1, np.array(places) // wide - 1], 1).astype(np.int32)


def largest_contour(mask: np.ndarray) -> np.ndarray | None:
    """The external contour with the largest bounding box, of equal ones the first; None of an empty mask."""
    contours = external_contours(mask)
    areas = [int(np.prod(np.ptp(points, axis=0) + 1)) for points in contours]
    return contours[areas.index(max(areas))] if contours else None
