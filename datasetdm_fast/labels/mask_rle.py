"""Boolean masks to COCO run-length strings and back, byte for byte what pycocotools writes."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from datasetdm_fast import _C

if TYPE_CHECKING:
    from torch import Tensor


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


def encode_on_device(masks: Tensor) -> Encoded:
    """The same for masks [N, H, W] bool on a GPU: the places where they change value are found there, and only these
    cross the bus.
    """
    import torch  # only callers that hold a tensor need it

    if masks.ndim != 3 or masks.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            f"encode_on_device: masks are {masks.dtype} {list(masks.shape)}, expected bool or uint8 [N, H, W]"
        )
    count, height, width = masks.shape
    if masks.device.type == "cpu" or not count:
        return encode(masks.cpu().numpy())
    masks = masks.contiguous()
    starts = torch.empty(count * width + 1, dtype=torch.int64, device=masks.device)
    areas = torch.empty(count, dtype=torch.int64, device=masks.device)
    extents = torch.empty((count, 4), dtype=torch.int32, device=masks.device)
    stream = torch.cuda.current_stream(masks.device).cuda_stream
    _C.mask_starts_cuda(
        masks.data_ptr(), count, height, width, starts.data_ptr(), areas.data_ptr(), extents.data_ptr(), stream
    )
    ends = starts[::width].cpu().numpy()
    places = torch.empty(int(ends[-1]), dtype=torch.int32, device=masks.device)
    if len(places):
        _C.mask_places_cuda(masks.data_ptr(), count, height, width, starts.data_ptr(), places.data_ptr(), stream)
    return from_changes(ends, places.cpu().numpy(), areas.cpu().numpy(), extents.cpu().numpy(), (height, width))


def from_changes(
    ends: np.ndarray, places: np.ndarray, areas: np.ndarray, extents: np.ndarray, size: tuple[int, int]
) -> Encoded:
    """What `encode` says, from the column-major places where each mask changes value: those of mask n are
    places[ends[n]:ends[n + 1]].

    `extents` [N, 4] are left, top, right and bottom, the last pixels included; right is -1 in an empty mask.
    """
    counts = _C.rle_from_changes(ends, places, *size)
    boxes = np.concatenate([extents[:, :2], extents[:, 2:] - extents[:, :2] + 1], 1).astype(np.float64)
    boxes[extents[:, 2] < 0] = 0
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
        counts = counts.decode(
            "latin-1"
        )  # every byte maps to one character; the reader refuses those outside its alphabet
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
