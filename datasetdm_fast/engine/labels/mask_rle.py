"""Boolean masks to COCO run-length strings and back, byte for byte what pycocotools writes."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np

from datasetdm_fast import _C


class Rle(TypedDict):
    """One mask as COCO stores it; `counts` is the compressed string of column-major run lengths, zeros first."""

    size: list[int]  # [H, W]
    counts: str


class Encoded(NamedTuple):
    rles: list[Rle]
    areas: np.ndarray  # [N] int64, pixels
    boxes: np.ndarray  # [N, 4] float64: x, y, width, height in pixels; zeros for an empty mask


def encode(masks: np.ndarray) -> Encoded:
    """Run-length strings, areas and boxes of N masks [N, H, W] bool, in one pass over them."""
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"encode: masks are {masks.dtype} {list(masks.shape)}, expected bool or uint8 [N, H, W]")
    counts, areas, boxes = _C.rle_encode(np.ascontiguousarray(masks).view(np.uint8))
    size = [masks.shape[1], masks.shape[2]]
    return Encoded([Rle(size=list(size), counts=text) for text in counts], areas, boxes)


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask [H, W] bool of one COCO RLE, a string or a list of run lengths; a malformed one is a ValueError."""
    height, width, counts = _parts(rle)
    return _C.rle_decode(counts, height, width).view(np.bool_)


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """The column-major run lengths [R] int64 of one COCO RLE, zeros first."""
    height, width, counts = _parts(rle)
    return _C.rle_to_runs(counts, height, width)


def _parts(rle: Mapping[str, Any]) -> tuple[int, int, str]:
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise ValueError(f"RLE: got {reprlib.repr(rle)}, expected a mapping with size and counts")
    height, width = _size(rle["size"])
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")  # every byte is a character; the reader refuses those outside its alphabet
    if not isinstance(counts, str):
        counts = _C.rle_from_runs(_runs(counts), height, width)
    if not counts.isascii():
        raise ValueError(f"RLE: counts hold characters outside ASCII: {reprlib.repr(counts)}")
    return height, width, counts


def _size(size: Any) -> tuple[int, int]:
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in size)
    ):
        raise ValueError(f"RLE: size is {reprlib.repr(size)}, expected two whole numbers [H, W]")
    if not all(0 < side < 2**31 for side in size):
        raise ValueError(f"RLE: size is {reprlib.repr(size)}, both sides must be at least 1 and fit 31 bits")
    return int(size[0]), int(size[1])


def _runs(runs: Any) -> np.ndarray:
    try:
        array = np.asarray(runs)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise ValueError(
            f"RLE: counts are {reprlib.repr(runs)}, expected a string or a list of whole numbers"
        ) from None
    return np.ascontiguousarray(array, dtype=np.int64)
