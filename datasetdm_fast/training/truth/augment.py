"""Augmentation of a labelled image and its truth: cropped, rotated, mirrored, relit, pasted into, sampled from a seed
alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import find_classes, mirrored_names, mirrored_text, spoken, with_article
from datasetdm_fast.engine.labels.pose import PERSON
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource

CONTRAST, BRIGHTNESS, GAIN, SATURATION, NOISE = (0.6, 1.4), 0.2, (0.7, 1.3), (0.3, 1.4), 0.04
GREY = np.float32([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Augmentation settings of the views of an image."""

    has_crops: bool = False  # each view is another scale and crop, by the rule of its data set
    flip: bool = False  # every second view is mirrored
    rotated: float = 0.0  # share of rotated views
    rotation: float = 0.0  # degrees, the standard deviation; twice as many at most
    light: float = 0.0  # chance of each of: brightness and contrast, gamma, hue and saturation
    zoom: float = 1.0  # largest zoom of a crop; every second view is cropped
    pasted: float = 0.0  # chance of pasting things of another image, and of each of its things
    is_recoloured: bool = False  # other saturation, tint, contrast, brightness, some noise


STRONG = Augmentation(flip=True, zoom=1.7, pasted=0.5, is_recoloured=True)
CROP, CROP_AND_FLIP = Augmentation(has_crops=True), Augmentation(has_crops=True, flip=True)
ROAD = Augmentation(has_crops=True, flip=True, light=0.5)
AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "strong": STRONG,
    "strong-depth": replace(STRONG, zoom=1.0),  # a crop would change how far things seem
    "voc": CROP,
    "cityscapes": CROP,
    "deepfashion": CROP,
    "coco": CROP_AND_FLIP,
    "lvis": CROP_AND_FLIP,
    "kitti": ROAD,
    "vkitti2": ROAD,
    "nyu": ROAD,
    "coco-pose": Augmentation(has_crops=True, flip=True, rotated=0.6, rotation=40.0),
}


def augment(
    source: LabelledSource,
    number: int,
    settings: Augmentation,
    draw: int,
    seed: int,
    read: Callable[[int], Labelled],
    others: Sequence[int] = (),
) -> Labelled:
    """View number `draw` of an item of a data set, whose items `read` returns; things are pasted from `others`."""
    random = np.random.default_rng([seed, number, draw])
    item = source.draw_view(number, int(random.integers(2**31))) if settings.has_crops else read(number)
    if random.random() < settings.rotated:
        most = 2 * settings.rotation
        item = rotate(item, float(np.clip(random.normal() * settings.rotation, -most, most)))
    if settings.flip and draw % 2:
        item = mirror(item, source)
    if draw or not settings.is_recoloured:  # the first view of strong augmentation is the image itself
        item = _vary(item, source, settings, random, read, others)
    return source.with_caption(item)


def _vary(
    item: Labelled,
    source: LabelledSource,
    settings: Augmentation,
    random: np.random.Generator,
    read: Callable[[int], Labelled],
    others: Sequence[int],
) -> Labelled:
    """The item with things of another item, cropped, recoloured and relit, each by chance."""
    if settings.pasted and random.random() < settings.pasted:
        other = read(others[int(random.integers(len(others)))])
        other = mirror(other, source) if settings.flip and random.random() < 0.5 else other
        item = paste(item, other, source, settings.pasted, random)
    if settings.zoom > 1 and random.random() < 0.5:
        item = crop(item, settings.zoom ** random.random(), *random.random(2))
    if settings.is_recoloured:
        item = replace(item, image=recolour(item.image, random))
    return replace(item, image=relight(item.image, settings.light, random)) if settings.light else item


def mirror(item: Labelled, source: LabelledSource) -> Labelled:
    """Left and right exchanged, in the names of joints and classes too, and of the classes that the caption names."""
    width = item.image.shape[1]
    planes = ("semantic", "masks", "crowds", "depth")
    changes = {name: getattr(item, name)[..., ::-1] for name in planes if getattr(item, name, None) is not None}
    if item.semantic is not None and (classes := mirrored_names(source.classes)) != list(range(len(classes))):
        changes["semantic"] = np.array([*classes, *range(len(classes), 256)], np.uint8)[changes["semantic"]]
    things = np.array(mirrored_names(source.thing_classes), np.int64)
    for name in ("mask_classes", "crowd_classes"):
        if (numbers := getattr(item, name)) is not None and len(things):
            changes[name] = np.where(numbers == EVERY_CLASS, numbers, things[numbers])
    if item.keypoints is not None:
        people = item.keypoints[:, mirrored_names(source.joints)] if source.joints else item.keypoints
        changes["keypoints"] = np.concatenate([width - people[..., :1], people[..., 1:]], -1)
    if item.keypoint_boxes is not None:
        x, y, w, h = np.moveaxis(item.keypoint_boxes, -1, 0)
        changes["keypoint_boxes"] = np.stack([width - x - w, y, w, h], -1)
    known = tuple(dict.fromkeys((*source.classes, *source.thing_classes)))
    if item.named is not None:
        other = {name: known[k] for name, k in zip(known, mirrored_names(known), strict=True)}
        changes["named"] = tuple(other.get(name, name) for name in item.named)
    caption = mirrored_text(item.caption, known, source.class_table)
    return replace(item, image=item.image[:, ::-1], caption=caption, **changes)


def rotate(item: Labelled, angle: float) -> Labelled:
    """The image rotated about its middle by `angle` degrees; pixels from outside are black and unknown in the truth."""
    size = item.image.shape[0]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = np.array([[c, s], [-s, c]])  # from the new picture to the old one
    return warp(item, back, np.full(2, size / 2) - back @ np.full(2, size / 2))


def crop(item: Labelled, zoom: float, x: float, y: float) -> Labelled:
    """A part of the image at its size; x and y in 0..1 move the part from one end of the image to the other."""
    size = item.image.shape[0]
    return warp(item, np.eye(2) / zoom, np.array([x, y]) * (size - size / zoom))


def warp(item: Labelled, back: np.ndarray, origin: np.ndarray) -> Labelled:
    """The image that shows at (x, y) what the item has at `back` (x, y) + `origin`; what lies outside is black and
    unknown in the truth.
    """
    size, forth = item.image.shape[0], np.linalg.inv(back).T
    numbers = (*back[0], origin[0], *back[1], origin[1])

    def move(plane: np.ndarray, fill: float, how: Image.Resampling = Image.Resampling.NEAREST) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(plane))
        return np.array(image.transform((size, size), Image.Transform.AFFINE, numbers, how, fillcolor=fill))

    changes = {"image": np.stack([move(item.image[..., k], 0, Image.Resampling.BILINEAR) for k in range(3)], -1)}
    if item.semantic is not None:
        changes["semantic"] = move(item.semantic, IGNORE)
    for name in ("masks", "crowds"):
        if (masks := getattr(item, name, None)) is not None:
            warped = [move(mask.astype(np.uint8), 0) > 0 for mask in masks]
            changes[name] = np.array(warped, bool).reshape(-1, size, size)
    if item.depth is not None:
        changes["depth"] = move(item.depth.astype(np.float32), 0.0)
    if item.keypoints is not None:
        places = (item.keypoints[..., :2] - origin) @ forth
        inside = ((places >= 0) & (places < size)).all(-1, keepdims=True)
        changes["keypoints"] = np.concatenate([places, item.keypoints[..., 2:] * inside], -1).astype(np.float32)
    if item.keypoint_boxes is not None:
        x, y, w, h = np.moveaxis(item.keypoint_boxes.astype(np.float64), -1, 0)
        corners = np.stack([np.stack([x + i * w, y + j * h], -1) for i in (0, 1) for j in (0, 1)], 1)
        corners = ((corners - origin) @ forth).clip(0, size).reshape(-1, 4, 2)
        low, high = corners.min(1), corners.max(1)
        changes["keypoint_boxes"] = np.concatenate([low, high - low], -1).astype(np.float32)
    return _without_empty(replace(item, **changes))


def _without_empty(item: Labelled) -> Labelled:
    """The item without masks and persons of which nothing is left."""
    changes = {}
    if item.masks is not None:
        left = item.masks.any((1, 2))
        changes = {"masks": item.masks[left], "mask_classes": np.asarray(item.mask_classes)[left]}
    if item.keypoints is not None:
        seen = (item.keypoints[..., 2] > 0).any(1)
        fields = ("keypoints", "keypoint_boxes", "keypoint_areas")
        changes |= {name: value[seen] for name in fields if (value := getattr(item, name)) is not None}
    return replace(item, **changes)


def paste(
    item: Labelled, other: Labelled, source: LabelledSource, chance: float, generator: np.random.Generator
) -> Labelled:
    """Things of another image over this one, each by a chance, in truth and caption too; where joints are known, no
    person, and a joint that is covered counts as hidden.
    """
    changes = {}
    things = [
        (name, mask)
        for name, mask in source.things_of(other)
        if not (name == PERSON and item.keypoints is not None) and generator.random() < chance
    ]
    over = np.any([np.zeros(item.image.shape[:2], bool), *(mask for _, mask in things)], 0)
    if not over.any():
        return item
    if item.semantic is not None:
        changes["semantic"] = np.where(over, other.semantic, item.semantic)
    if item.masks is not None:
        numbers = [source.thing_classes.index(name) for name, _ in things]
        changes["masks"] = np.concatenate([item.masks & ~over, [mask for _, mask in things]])
        changes["mask_classes"] = np.concatenate([item.mask_classes, numbers]).astype(np.int64)
    if item.crowds is not None:
        changes["crowds"] = item.crowds & ~over
    if item.depth is not None:
        changes["depth"] = np.where(over, other.depth, item.depth)
    if item.keypoints is not None:
        last = np.array(over.shape[::-1]) - 1
        column, row = np.moveaxis(item.keypoints[..., :2].astype(int).clip(0, last), -1, 0)
        changes["keypoints"] = item.keypoints.copy()
        changes["keypoints"][..., 2] = np.minimum(item.keypoints[..., 2], np.where(over[row, column], 1, 2))
    if item.named is not None:
        changes["named"] = tuple(dict.fromkeys((*item.named, *(name for name, _ in things))))
    elif item.caption:
        named = dict.fromkeys(name for name, _ in things)
        present = find_classes(item.caption, tuple(named), source.class_table)
        words = spoken([name for name in named if name not in present], source.class_table)
        changes["caption"] = ", ".join([item.caption, *map(with_article, words)])
    return _without_empty(replace(item, image=np.where(over[..., None], other.image, item.image), **changes))


def recolour(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The image with other saturation, tint, contrast and brightness, and some noise."""
    pixels = image.astype(np.float32) / 255
    grey = (pixels * GREY).sum(2, keepdims=True)
    pixels = grey + (pixels - grey) * generator.uniform(*SATURATION)
    pixels = pixels * generator.uniform(*GAIN, 3)
    pixels = (pixels - 0.5) * generator.uniform(*CONTRAST) + 0.5 + generator.uniform(-BRIGHTNESS, BRIGHTNESS)
    noise = generator.standard_normal(pixels.shape, np.float32) * generator.uniform(0, NOISE)
    return ((pixels + noise).clip(0, 1) * 255).round().astype(np.uint8)


def relight(image: np.ndarray, chance: float, generator: np.random.Generator) -> np.ndarray:
    """The image under another light, in the ranges of the usual photometric augmentations."""
    pixels = image.astype(np.float32) / 255
    if generator.random() < chance:
        contrast, brightness = generator.uniform(0.8, 1.2), generator.uniform(-0.2, 0.2)
        pixels = pixels * contrast + brightness
    if generator.random() < chance:
        pixels = pixels.clip(0, 1) ** generator.uniform(0.8, 1.2)
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    if generator.random() < chance:
        hue, saturation, value = (generator.uniform(-most, most) for most in (28, 30, 20))  # of 256 each
        planes = np.array(Image.fromarray(pixels).convert("HSV")).astype(np.float32)
        planes[..., 0] = (planes[..., 0] + hue) % 256
        planes[..., 1:] = (planes[..., 1:] + (saturation, value)).clip(0, 255)
        pixels = np.array(Image.fromarray(planes.astype(np.uint8), "HSV").convert("RGB"))
    return pixels
