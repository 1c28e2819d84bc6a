"""Pictures as DatasetDM's demo and vis scripts show labels: its colour maps and blends, drawn by this package."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.colours import colour_in
from datasetdm_fast.engine.labels.pictures import HEAT


def near_to_far(share: np.ndarray) -> np.ndarray:
    """Values 0 to 1 from light to dark, DatasetDM's magma reversed: [H, W, 3] uint8."""
    anchors = np.array([list(bytes.fromhex(text)) for text in HEAT])
    place = share.clip(0, 1) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), anchors[:, k]) for k in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def jet(share: np.ndarray) -> np.ndarray:
    """Values 0 to 1 from blue over green to red: [H, W, 3] uint8."""
    distance = np.abs(4 * share.clip(0, 1)[..., None] - np.array([3, 2, 1]))
    return ((1.5 - distance).clip(0, 1) * 255).round().astype(np.uint8)


def over(pixels: np.ndarray, labels: np.ndarray, palette: str, alpha: float) -> Image.Image:
    """A label map in the colours of a data set over its image."""
    names = class_tables.table(palette).names
    table = np.array([colour_in(palette, names[k] if k < len(names) else "", k) for k in range(256)], np.float32)
    return Image.fromarray((pixels * (1 - alpha) + table[labels] * alpha).astype(np.uint8))


def filled(sides: tuple[int, int], contour: Sequence[int]) -> np.ndarray:
    """The mask [H, W] bool inside of a contour x0, y0, x1, y1, ..."""
    plane = Image.new("1", (sides[1], sides[0]))
    points = list(zip(contour[::2], contour[1::2]))
    (ImageDraw.Draw(plane).polygon if len(points) > 1 else ImageDraw.Draw(plane).point)(points, fill=1)
    return np.array(plane)
