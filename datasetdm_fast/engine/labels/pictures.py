"""Pictures of labels: coloured depth, mask outlines, painted masks and skeletons."""

import base64
import html
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.engine.labels.label_files import encode_picture

DEPTH_SIDE = 256  # pixels of a coloured depth picture
HEAT = ("fcfdbf", "fec287", "fb8761", "e55964", "b5367a", "812581", "4f127b", "1c1044", "000004")  # near to far
PREVIEW_SAMPLES = 6  # of an output or a run in a notebook
PREVIEW_SIDE = 160  # pixels of a picture in a notebook
PREVIEW_LETTERS = 90  # of the line below it; the whole line is its tooltip
OUTLINE_SIDE = 256  # cells an outline is traced on at most
TOLERANCE = 1 / 260  # image widths an outline may be simplified by


def depth_picture(millimetres: np.ndarray) -> Image.Image:
    """A coloured picture of a depth map, from its nearest to its farthest point and what is not known."""
    known = millimetres > 0
    near, far = int(millimetres.min(where=known, initial=millimetres.max())), int(millimetres.max())
    steps = (millimetres.astype(np.float32) - near) * (255 / max(far - near, 1)) + 0.5
    steps = np.where(known, steps, 255).astype(np.uint8)
    image = Image.fromarray(steps)
    longest = max(image.size)
    if longest > DEPTH_SIDE:
        sides = [max(side * DEPTH_SIDE // longest, 1) for side in image.size]
        image = image.resize(tuple(sides), Image.Resampling.BOX)
    anchors = np.array([list(bytes.fromhex(text)) for text in HEAT])
    place = np.linspace(0, len(HEAT) - 1, 256)
    channels = [np.interp(place, np.arange(len(HEAT)), anchors[:, k]) for k in range(3)]
    image.putpalette(np.stack(channels, 1).round().astype(np.uint8).tobytes())
    return image


def preview(pictures: Sequence[tuple[np.ndarray | Image.Image, str]], title: str = "") -> str:
    """HTML of small pictures with a line below each, for a notebook; nothing in the lines can open a tag."""
    cells = []
    for picture, line in pictures:
        shown = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        shown = shown.convert("RGB")
        shown.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        source = f"data:image/jpeg;base64,{base64.b64encode(encode_picture(shown, 'JPEG', quality=85)).decode()}"
        text = html.escape(line if len(line) <= PREVIEW_LETTERS else f"{line[: PREVIEW_LETTERS - 1]}…")
        style = f"display:inline-block;margin:4px;width:{PREVIEW_SIDE}px;vertical-align:top;overflow-wrap:anywhere"
        cells.append(
            f'<figure style="{style}" title="{html.escape(line)}"><img src="{source}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f"<div>{html.escape(title)}<br>{''.join(cells)}</div>" if title else f"<div>{''.join(cells)}</div>"


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what a mask [H, W] holds, all 0 where it is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)


def outline(mask: np.ndarray) -> str:
    """The borders of a mask [H, W] bool, holes included, as the path of an SVG in pixels."""
    step = max(max(mask.shape) // OUTLINE_SIDE, 1)
    tolerance, mask = TOLERANCE * max(mask.shape), mask[::step, ::step]
    left, top, right, bottom = bounds(mask)
    if not right:
        return ""
    # The middles of the pixel edges lie on a slanted border's line, where the corners make a staircase of it.
    middles = ((ring + np.roll(ring, -1, axis=0)) / 2 * step for ring in borders(mask[top:bottom, left:right]))
    rings = (simplify(ring, tolerance) + (left * step, top * step) for ring in middles)
    return "".join(_path(ring) for ring in rings if len(ring) > 2)


def _path(ring: np.ndarray) -> str:
    """A ring as part of an SVG's path: where it begins, then the way from each corner to the next."""
    first, ways = ring[0], np.diff(ring, axis=0).tolist()
    numbers = [f"{value:g}" for way in ways for value in way]
    joined = "".join(number if number[0] == "-" or not k else f" {number}" for k, number in enumerate(numbers))
    return f"M{first[0]:g} {first[1]:g}l{joined}z"


def borders(mask: np.ndarray) -> list[np.ndarray]:
    """Closed rings [n, 2] of x, y along the pixel edges between inside and outside."""
    around, wide = np.pad(mask, 1), mask.shape[1] + 1
    edges: dict[int, list[int]] = {}  # corners are numbered row by row, `wide` of them in a row
    for outside, start, end in (
        (around[:-2, 1:-1], 0, 1),  # outside above: walk right along the top edge
        (around[1:-1, 2:], 1, wide + 1),
        (around[2:, 1:-1], wide + 1, wide),
        (around[1:-1, :-2], wide, 0),
    ):
        rows, columns = np.nonzero(mask & ~outside)
        for corner in (rows * wide + columns).tolist():
            edges.setdefault(corner + start, []).append(corner + end)
    rings = []
    while edges:
        first = place = next(iter(edges))
        ring = [first]
        while True:
            following = edges[place].pop()
            if not edges[place]:
                del edges[place]
            place = following
            if place == first:
                break
            ring.append(place)
        corners = np.array(ring)
        rings.append(np.stack([corners % wide, corners // wide], 1).astype(float))
    return rings


def simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """The ring without points within `tolerance` of the line between their neighbours (Douglas and Peucker)."""
    far = int(np.abs(ring - ring[0]).sum(1).argmax())
    closed = np.concatenate([ring, ring[:1]]).tolist()  # plain numbers, as most spans are too short for arrays
    corners, spans = {0, far}, [(0, far), (far, len(ring))]
    while spans:
        a, b = spans.pop()
        (x, y), (end_x, end_y) = closed[a], closed[b]
        dx, dy = end_x - x, end_y - y
        most, worst = tolerance * max(math.hypot(dx, dy), 1e-9), 0
        for k in range(a + 1, b):
            offset = abs((closed[k][0] - x) * dy - (closed[k][1] - y) * dx)
            if offset > most:
                most, worst = offset, k
        if worst:
            corners.add(worst)
            spans += [(a, worst), (worst, b)]
    return ring[sorted(corners)]


def paint_map(labels: np.ndarray) -> Image.Image:
    """A label map in the colours of its classes."""
    table = np.array([colour(k) for k in range(max(256, int(labels.max()) + 1))], np.uint8)
    return Image.fromarray(table[labels])


def paint_masks(image: np.ndarray, masks: np.ndarray, classes: np.ndarray) -> Image.Image:
    """Each thing in its class's colour, the same for truth and answer, within a white outline of its own."""
    pixels = np.ascontiguousarray(image).astype(np.float32)
    for mask, k in zip(masks, classes):
        pixels[mask] = 0.4 * pixels[mask] + 0.6 * np.array(colour(int(k) + 1), np.float32)
    for mask in masks:
        around = np.pad(mask, 1)
        is_inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        pixels[mask & ~is_inside] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def draw_skeletons(
    image: np.ndarray, people: Sequence[tuple[np.ndarray, np.ndarray]], limbs: Sequence[tuple[int, int]]
) -> Image.Image:
    """Joints [J, 2] that are seen, and the limbs between them, over the image."""
    picture = Image.fromarray(np.ascontiguousarray(image)).copy()
    pen = ImageDraw.Draw(picture)
    for points, seen in people:
        for a, b in limbs:
            if seen[a] and seen[b]:
                pen.line([tuple(points[a]), tuple(points[b])], fill=(255, 230, 0), width=2)
        for (x, y), is_seen in zip(points, seen):
            if is_seen:
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(255, 60, 60))
    return picture
