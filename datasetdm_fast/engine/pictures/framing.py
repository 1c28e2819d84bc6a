"""From a picture of any size to the model's square with its labels: the one place that resizes or crops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Labelled, Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents


@dataclass(frozen=True)
class Window:
    """The square of a picture to look at: its corner in the picture's pixels, and the scale."""

    left: float
    top: float
    scale: float


def fit_window(height: int, width: int, size: int) -> Window:
    """The largest square in the middle: the shorter side becomes `size`, the rest of the longer one is cut off."""
    side = min(height, width)
    return Window((width - side) / 2, (height - side) / 2, size / side)


def frame_picture(picture: Picture, window: Window, size: int, least_mask: float = 1.0) -> Labelled:
    """What the window shows, size x size: image filtered, labels nearest, masks below `least_mask` pixels dropped."""
    rows, columns = (
        _nearest(picture.image.shape[0], window.top, window.scale, size),
        _nearest(picture.image.shape[1], window.left, window.scale, size),
    )

    def resample(label: np.ndarray, outside: int) -> np.ndarray:
        # a third of the time of both at once
        pixels = label.take(np.maximum(rows, 0), 0).take(np.maximum(columns, 0), 1)
        pixels[rows < 0] = outside
        pixels[:, columns < 0] = outside
        return np.asarray(pixels)

    def resample_masks(
        makers: Sequence[Callable[[], np.ndarray]], classes: Sequence[int], least: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masks of at least so many pixels, and their classes."""
        masks = ((resample(make(), 0), kind) for make, kind in zip(makers, classes))
        large = [(mask, kind) for mask, kind in masks if mask.sum() >= least]
        shape = (len(large), size, size)
        return np.array([mask for mask, _ in large], bool).reshape(shape), np.array(
            [kind for _, kind in large], np.int64
        )

    masks: dict[str, np.ndarray] = {}
    if picture.masks is not None:
        masks["masks"], masks["mask_classes"] = resample_masks(picture.masks, picture.mask_classes, least_mask)
        masks["crowds"], masks["crowd_classes"] = resample_masks(picture.crowds, picture.crowd_classes, 1)
    persons = {} if picture.keypoints is None else _frame_persons(picture, window, size)
    return Labelled(
        id=picture.id,
        image=_resize(picture.image, window, rows, columns, size),
        caption=picture.text,
        named=picture.named,
        semantic=None if picture.semantic is None else resample(picture.semantic, IGNORE).astype(np.uint8),
        depth=None if picture.depth is None else resample(picture.depth, 0).astype(np.float32),
        searched=picture.searched,
        not_exhausted=picture.not_exhausted,
        **masks,
        **persons,
    )


def _nearest(length: int, start: float, scale: float, size: int) -> np.ndarray:
    """The pixel that lies under the middle of each of `size` new ones, -1 outside."""
    places = np.floor(start + (np.arange(size) + 0.5) / scale + 1e-6).astype(np.int64)
    return np.where((places >= 0) & (places < length), places, -1)


def _resize(image: np.ndarray, window: Window, rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """The image under the window, each new pixel the mean of what it covers; black where there is none."""
    canvas = np.zeros((size, size, 3), np.uint8)
    inside_rows, inside_columns = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    if not len(inside_rows) or not len(inside_columns):
        return canvas
    top, bottom, left, right = inside_rows[0], inside_rows[-1] + 1, inside_columns[0], inside_columns[-1] + 1
    height, width = image.shape[:2]
    box = [
        window.left + left / window.scale,
        window.top + top / window.scale,
        window.left + right / window.scale,
        window.top + bottom / window.scale,
    ]
    box = [min(max(edge, 0.0), limit) for edge, limit in zip(box, (width, height, width, height))]
    first, last = (math.floor(box[0]), math.floor(box[1])), (math.ceil(box[2]), math.ceil(box[3]))
    part = Image.fromarray(np.ascontiguousarray(image[first[1] : last[1], first[0] : last[0]]))
    inner = (box[0] - first[0], box[1] - first[1], box[2] - first[0], box[3] - first[1])
    canvas[top:bottom, left:right] = np.asarray(
        part.resize((int(right - left), int(bottom - top)), Image.Resampling.BILINEAR, box=inner)
    )
    return canvas


def _frame_persons(picture: Picture, window: Window, size: int) -> dict[str, np.ndarray]:
    """Joints, boxes and areas in the window's pixels; outside joints are absent, persons without joints dropped."""
    assert picture.keypoints is not None and picture.keypoint_boxes is not None and picture.keypoint_areas is not None
    points = picture.keypoints.astype(np.float32).copy()
    points[..., :2] = (points[..., :2] - [window.left, window.top]) * window.scale
    is_outside = ((points[..., :2] < 0) | (points[..., :2] >= size)).any(-1)
    points[is_outside, 2] = 0
    boxes = picture.keypoint_boxes.astype(np.float32).reshape(-1, 4).copy()
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    corners = np.clip((corners - [window.left, window.top, window.left, window.top]) * window.scale, 0, size)
    is_there = (points[..., 2] > 0).any(1)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).astype(np.float32)
    areas = (picture.keypoint_areas * window.scale**2).astype(np.float32)
    return {"keypoints": points[is_there], "keypoint_boxes": boxes[is_there], "keypoint_areas": areas[is_there]}


@dataclass(frozen=True)
class PicturesInMemory:
    """Pictures in memory, whose names are their places."""

    images: Sequence[np.ndarray]  # each [H, W, 3] uint8

    @property
    def names(self) -> list[str]:
        return [str(place) for place in range(len(self.images))]

    def whole(self, index: int) -> np.ndarray:  # [H, W, 3] uint8
        return self.images[index]


def pictures_in_memory(images: Sequence[np.ndarray | Image.Image]) -> PicturesInMemory:
    """Images of a caller, checked."""
    return PicturesInMemory([_pixels(image, place) for place, image in enumerate(images)])


def _pixels(image: np.ndarray | Image.Image, place: int) -> np.ndarray:
    """The pixels of an image of a caller, checked."""
    pixels = _of_pillow(image, place) if hasattr(image, "getbands") else np.array(image)
    if pixels.dtype.kind in "OSU":
        raise Refused(
            f"image {place}: {image!r} is not an image",
            "Give an array of RGB in uint8, or an image of Pillow, as Image.open(FILE) returns it.",
        )
    is_picture = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if not is_picture or min(pixels.shape[:2]) < reading.LEAST_SIDE:
        raise Refused(
            f"image {place}: {pixels.dtype} of shape {list(pixels.shape)}, expected uint8 of shape [H, W, 3], sides of "
            f"at least {reading.LEAST_SIDE}",
            "Give an array of RGB in uint8, or an image of Pillow.",
        )
    return pixels


def _of_pillow(image: Image.Image, place: int) -> np.ndarray:
    """An image of Pillow as viewers show it and as the pictures of a folder are read."""
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut off what is above 255
        raise Refused(
            f"image {place}: its pixels are {image.mode}, expected an 8-bit picture",
            "Scale its values to 0 to 255 first.",
        )
    try:
        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything
        raise Refused(
            f"image {place}: it cannot be decoded ({documents.reason_of(error)})", "Get its file again."
        ) from error
    eight = image if image.mode in reading.COLOURS else image.convert("RGB")
    try:
        return reading.colours(f"image {place}", eight, reading.as_shown)
    except Refused as stop:
        raise Refused(stop.cause, "Give another image.") from stop


def crop_square(image: np.ndarray, size: int) -> np.ndarray:  # [size, size, 3] uint8
    """The largest square in the middle of an image [H, W, 3] uint8."""
    return frame_picture(Picture("", image, ""), fit_window(image.shape[0], image.shape[1], size), size).image
