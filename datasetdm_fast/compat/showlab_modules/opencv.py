"""A stand-in for OpenCV as far as DatasetDM's scripts call it: files, sizes, the order of channels and polygons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.compat.showlab.drawing import filled
from datasetdm_fast.compat.showlab_modules import session
from datasetdm_fast.untrusted import images

COLOUR, UNCHANGED = 1, -1  # how a file is read
SWAPPED = 4  # of cvtColor: the first and the last channel change places, whichever of both is red
JPEG_QUALITY = 95


def imread(path: str, flags: int = COLOUR) -> np.ndarray:
    """A file as channels blue, green, red of 8 bits, or unchanged."""
    picture = images.read_image(Path(path))
    if flags == UNCHANGED and picture.mode in ("L", "I", "I;16"):
        plane = np.array(picture)
        return plane if plane.dtype == np.uint8 else plane.astype(np.uint16)
    return np.ascontiguousarray(np.array(picture.convert("RGB"))[..., ::-1])


def imwrite(path: str, image: np.ndarray, params: Any = None) -> bool:
    """Writes a grey plane or channels blue, green, red: rounded half to even and clipped to 8 bits, 16 as they are."""
    session.current().written(path)
    plane = image if image.dtype == np.uint16 else np.rint(image).clip(0, 255).astype(np.uint8)
    if plane.ndim == 3:
        plane = plane[:, :, 0] if plane.shape[2] == 1 else plane[:, :, ::-1]
    options = {"quality": JPEG_QUALITY} if Path(path).suffix in (".jpg", ".jpeg") else {}
    Image.fromarray(np.ascontiguousarray(plane)).save(path, **options)
    return True


def write_first(image: np.ndarray, path: str) -> bool:
    """The same with the image first, as mmcv has it, and with the folders above the file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return imwrite(path, image)


def cvtColor(image: np.ndarray, code: int) -> np.ndarray:  # noqa: N802, the library's name
    if code != SWAPPED:
        raise ValueError(f"cvtColor: code {code}, expected that of BGR and RGB")
    return np.ascontiguousarray(image[..., ::-1])


def resize(
    image: np.ndarray, dsize: Sequence[int] | None = None, fx: float = 0.0, fy: float = 0.0, **_: Any
) -> np.ndarray:
    """The image, or plane, at another size (width, height), bilinear without a filter; 8 bits within a step."""
    height, width = image.shape[:2]
    columns, rows = dsize if dsize else (round(width * fx), round(height * fy))
    found = image.astype(np.float32)
    for axis, (count, ratio) in enumerate(((rows, fy if not dsize else 0), (columns, fx if not dsize else 0))):
        last = found.shape[axis] - 1
        places = ((np.arange(count) + 0.5) / (ratio or count / (last + 1)) - 0.5).clip(0, last)
        first = np.minimum(places.astype(int), max(last - 1, 0))
        share = (places - first).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(found.ndim)])
        after = found.take(np.minimum(first + 1, last), axis)
        found = found.take(first, axis) * (1 - share) + after * share
    return np.floor(found + 0.5).astype(image.dtype) if image.dtype == np.uint8 else found.astype(image.dtype)


def fillPoly(plane: np.ndarray, contours: Sequence[np.ndarray], value: int) -> np.ndarray:  # noqa: N802
    """Fills polygons of a plane in place."""
    for contour in contours:
        plane[filled(plane.shape[:2], contour.reshape(-1).tolist())] = value
    return plane


NAMES: dict[str, Any] = {
    "imread": imread,
    "imwrite": imwrite,
    "cvtColor": cvtColor,
    "resize": resize,
    "fillPoly": fillPoly,
    "COLOR_BGR2RGB": SWAPPED,
    "COLOR_RGB2BGR": SWAPPED,
    "IMREAD_COLOR": COLOUR,
    "IMREAD_UNCHANGED": UNCHANGED,
}
