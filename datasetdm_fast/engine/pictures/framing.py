"""From a picture of any size to the model's square with its labels: the one place that resizes or crops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures.labelled import Labelled, Picture

UPSTREAM_SIDE = 512
PERSON_MARGIN = 1.25  # of the longer side of a person's box


@dataclass(frozen=True)
class Window:
    """The square of a picture to look at: its corner in the picture's pixels, and the scale."""

    left: float
    top: float
    scale: float


@dataclass(frozen=True)
class Rule:
    """How upstream draws a window in training, lengths for its 512 pixels."""

    scales: tuple[float, ...] = (1.0,)  # one of them times the picture's own size, but never smaller than the window
    shortest: tuple[int, ...] = ()  # or: the shorter side, drawn between these
    toward_object: float = 0.0  # share of windows that hold the centre of something labelled


RULES = {
    "voc": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2, 3), toward_object=5 / 8),
    "cityscapes": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8), toward_object=5 / 8),
    "deepfashion": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8), toward_object=5 / 8),
    "coco": Rule(shortest=(532, 832)),
    "kitti": Rule(shortest=(512, 512)),
    "vkitti2": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2)),
    "nyu": Rule(scales=(0.5, 0.8, 1, 1.3, 1.8, 2, 2.5)),
}


def fit_window(height: int, width: int, size: int) -> Window:
    """The largest square in the middle: the shorter side becomes `size`, the rest of the longer one is cut off."""
    side = min(height, width)
    return Window((width - side) / 2, (height - side) / 2, size / side)


def around(box: tuple[float, float, float, float], size: int, enlarged: float = 1.0) -> Window:
    """A square with the box in its middle and upstream's margin around it; what lies outside the picture is black."""
    x, y, width, height = box
    side = max(width, height, 1.0) * PERSON_MARGIN * enlarged
    return Window(x + width / 2 - side / 2, y + height / 2 - side / 2, size / side)


def draw_window(rule: Rule, picture: Picture, size: int, seed: int) -> Window:
    """A window by upstream's rule; the seed alone decides it."""
    random = np.random.default_rng(seed)
    if picture.person:
        return around(picture.person, size, float(np.clip(1 + 0.3 * random.standard_normal(), 0.7, 1.3)))
    height, width = picture.image.shape[:2]
    least = size / min(height, width)
    if rule.shortest:
        scale = random.integers(rule.shortest[0], rule.shortest[1] + 1) / UPSTREAM_SIDE * least
    else:
        scale = max(rule.scales[random.integers(len(rule.scales))] * size / UPSTREAM_SIDE, least)
    side = min(size / scale, height, width)  # rounding may make it longer than the picture
    left, top = random.uniform(0, width - side), random.uniform(0, height - side)
    if random.random() < rule.toward_object and (centre := _centre(picture, random)):
        left, top = (
            float(np.clip(random.uniform(c - side, c), 0, limit - side)) for c, limit in zip(centre, (width, height))
        )
    return Window(left, top, scale)


def _centre(picture: Picture, random: np.random.Generator) -> tuple[float, float] | None:
    """Column and row of the middle of one labelled class that is no background."""
    if picture.semantic is None:
        return None
    numbers = [k for k in np.flatnonzero(np.bincount(picture.semantic.ravel(), minlength=256)) if k not in (0, IGNORE)]
    if not numbers:
        return None
    rows, columns = np.nonzero(picture.semantic == random.choice(numbers))
    return float(columns.mean()), float(rows.mean())


def frame_picture(picture: Picture, window: Window, size: int, least_mask: float = 1.0) -> Labelled:
    """What the window shows, size x size: image filtered, labels nearest, masks below `least_mask` pixels dropped."""
    rows, columns = (
        _nearest(picture.image.shape[0], window.top, window.scale, size),
        _nearest(picture.image.shape[1], window.left, window.scale, size),
    )

    def resample(label: np.ndarray, outside: int) -> np.ndarray:
        pixels = label[np.maximum(rows, 0)[:, None], np.maximum(columns, 0)[None]]
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
        **({} if picture.keypoints is None else _frame_persons(picture, window, size)),
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
