"""Augmentation of a labelled image and its truth: cropped, rotated, mirrored, relit, drawn from a seed alone."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from datasetdm_fast.truth.labelled import Labelled, LabelledSource

IGNORE = 255
SIDES = re.compile(r"(?<![A-Za-z])(?:left|right)(?![A-Za-z])")


@dataclass(frozen=True)
class Augmentation:
    """How far a look may stray from the image."""

    is_drawn: bool = False  # each look is another scale and crop, by the rule of its data set
    flip: bool = False  # every second draw is mirrored
    turned: float = 0.0  # share of turned views
    rotation: float = 0.0  # degrees, the standard deviation; twice as many at most
    light: float = 0.0  # chance of each of: brightness and contrast, gamma, hue and saturation


CROP, CROP_AND_FLIP = Augmentation(is_drawn=True), Augmentation(is_drawn=True, flip=True)
ROAD = Augmentation(is_drawn=True, flip=True, light=0.5)
AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "voc": CROP,
    "cityscapes": CROP,
    "deepfashion": CROP,
    "coco": CROP_AND_FLIP,
    "lvis": CROP_AND_FLIP,
    "kitti": ROAD,
    "vkitti2": ROAD,
    "nyu": ROAD,
    "coco-pose": Augmentation(is_drawn=True, flip=True, turned=0.6, rotation=40.0),
}


def look(
    source: LabelledSource, number: int, how: Augmentation, draw: int, seed: int, read: Callable[[int], Labelled]
) -> Labelled:
    """Look number `draw` at an item of a data set, whose items `read` gives."""
    generator = np.random.default_rng([seed, number, draw])
    item = source.drawn(number, int(generator.integers(2**31))) if how.is_drawn else read(number)
    if generator.random() < how.turned:
        item = turned(item, float(np.clip(generator.normal() * how.rotation, -2 * how.rotation, 2 * how.rotation)))
    if how.flip and draw % 2:
        item = mirrored(item, source)
    return replace(item, image=lit(item.image, how.light, generator)) if how.light else item


def mirrored_names(names: tuple[str, ...]) -> list[int]:
    """For each joint or class the index of the one that takes its name in a mirror image."""
    swapped = [SIDES.sub(lambda word: "left" if word[0] == "right" else "right", name) for name in names]
    return [names.index(name) if name in names else k for k, name in enumerate(swapped)]


def mirrored(item: Labelled, source: LabelledSource) -> Labelled:
    """Left and right exchanged, in the names of joints and classes too."""
    width = item.image.shape[1]
    planes = ("semantic", "masks", "crowds", "depth")
    changes = {name: getattr(item, name)[..., ::-1] for name in planes if getattr(item, name, None) is not None}
    if item.semantic is not None and (classes := mirrored_names(source.classes)) != list(range(len(classes))):
        changes["semantic"] = np.array([*classes, *range(len(classes), 256)], np.uint8)[changes["semantic"]]
    things = np.array(mirrored_names(source.thing_classes), np.int64)
    for name in ("mask_classes", "crowd_classes"):
        if (numbers := getattr(item, name)) is not None and len(things):
            changes[name] = things[numbers]
    if item.keypoints is not None:
        people = item.keypoints[:, mirrored_names(source.joints)] if source.joints else item.keypoints
        changes["keypoints"] = np.concatenate([width - people[..., :1], people[..., 1:]], -1)
    if item.keypoint_boxes is not None:
        x, y, w, h = np.moveaxis(item.keypoint_boxes, -1, 0)
        changes["keypoint_boxes"] = np.stack([width - x - w, y, w, h], -1)
    return replace(item, image=item.image[:, ::-1], **changes)


def turned(item: Labelled, angle: float) -> Labelled:
    """The image rotated about its middle by `angle` degrees; pixels from outside are black and unknown in the truth."""
    size = item.image.shape[0]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = np.array([[c, s], [-s, c]])  # from the new picture to the old one
    origin = np.full(2, size / 2) - back @ np.full(2, size / 2)
    numbers = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])

    def moved(plane: np.ndarray, fill: float, how: Image.Resampling = Image.Resampling.NEAREST) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(plane))
        return np.array(image.transform((size, size), Image.Transform.AFFINE, numbers, how, fillcolor=fill))

    changes = {"image": np.stack([moved(item.image[..., k], 0, Image.Resampling.BILINEAR) for k in range(3)], -1)}
    if item.semantic is not None:
        changes["semantic"] = moved(item.semantic, IGNORE)
    for name in ("masks", "crowds"):
        if (masks := getattr(item, name, None)) is not None:
            changes[name] = np.array([moved(mask.astype(np.uint8), 0) > 0 for mask in masks], bool).reshape(
                -1, size, size
            )
    if item.depth is not None:
        changes["depth"] = moved(item.depth.astype(np.float32), 0.0)
    if item.keypoints is not None:
        places = (item.keypoints[..., :2] - origin) @ back
        inside = ((places >= 0) & (places < size)).all(-1)
        changes["keypoints"] = np.concatenate([places, (item.keypoints[..., 2] * inside)[..., None]], -1).astype(
            np.float32
        )
    if item.keypoint_boxes is not None:
        x, y, w, h = np.moveaxis(item.keypoint_boxes.astype(np.float64), -1, 0)
        corners = np.stack([np.stack([x + i * w, y + j * h], -1) for i in (0, 1) for j in (0, 1)], 1)
        corners = ((corners - origin) @ back).clip(0, size).reshape(-1, 4, 2)
        changes["keypoint_boxes"] = np.concatenate([corners.min(1), corners.max(1) - corners.min(1)], -1).astype(
            np.float32
        )
    return replace(item, **changes)


def lit(image: np.ndarray, chance: float, generator: np.random.Generator) -> np.ndarray:
    """The image under another light, in the ranges of the usual photometric augmentations."""
    pixels = image.astype(np.float32) / 255
    if generator.random() < chance:
        contrast, brightness = generator.uniform(0.8, 1.2), generator.uniform(-0.2, 0.2)
        pixels = pixels * contrast + brightness
    if generator.random() < chance:
        pixels = pixels.clip(0, 1) ** generator.uniform(0.8, 1.2)
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    if generator.random() < chance:
        hue, saturation, value = (
            generator.uniform(-28, 28),
            generator.uniform(-30, 30),
            generator.uniform(-20, 20),
        )  # of 256, 256, 256
        planes = np.array(Image.fromarray(pixels).convert("HSV")).astype(np.float32)
        planes[..., 0] = (planes[..., 0] + hue) % 256
        planes[..., 1:] = (planes[..., 1:] + (saturation, value)).clip(0, 255)
        pixels = np.array(Image.fromarray(planes.astype(np.uint8), "HSV").convert("RGB"))
    return pixels
