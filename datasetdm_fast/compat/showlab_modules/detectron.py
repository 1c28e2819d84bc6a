"""A stand-in for detectron2 as far as DatasetDM's scripts call it: instances, augmentations, points and drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional as F

from datasetdm_fast.compat.showlab_modules import session
from datasetdm_fast.engine.labels.pictures import masked
from datasetdm_fast.untrusted import images

JPEG_QUALITY = 95


class ImageInstances:
    """What is known of the things of an image, each kind of it an attribute that a script sets."""

    def __init__(self, image_size: Sequence[int]):
        self.image_size = tuple(image_size)

    def has(self, name: str) -> bool:
        return name in vars(self)

    def to(self, device: Any) -> ImageInstances:
        moved = ImageInstances(self.image_size)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if hasattr(value, "to") else value)
        return moved


class TensorHolder:
    """Boxes or masks of things, as one tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def to(self, device: Any) -> TensorHolder:
        return TensorHolder(self.tensor.to(device))


def polygons_to_bitmask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:  # [H, W] bool
    """The mask inside of any of some polygons x0, y0, x1, y1, ..."""
    if not len(polygons):
        return np.zeros((height, width), bool)
    flat = [np.asarray(one, float).reshape(-1).tolist() for one in polygons]
    return rle.decode(rle.merge(rle.frPyObjects(flat, height, width))).astype(bool)


# ---- pictures and augmentations


def read_image(path: str, format: str | None = None) -> np.ndarray:  # noqa: A002, as the library calls it
    """[H, W, 3] uint8 upright."""
    return np.array(ImageOps.exif_transpose(images.read_image(Path(path))).convert("RGB"))


class AugmentedInput:
    """An image on its way through augmentations."""

    def __init__(self, image: np.ndarray):
        self.image = image


def _resized(image: np.ndarray, sides: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(sides[::-1], how))


class ShortestEdge:
    """Draws the shorter side between two lengths, the longer one up to `max_size`."""

    def __init__(self, short_edge_length: Sequence[int], max_size: int, sample_style: str = "range"):
        if sample_style != "range":
            raise ValueError(f"ResizeShortestEdge: sample_style {sample_style!r}, expected range")
        self.lengths, self.longest = tuple(short_edge_length), max_size

    def draw(self, height: int, width: int) -> tuple[Callable, Callable]:
        length = np.random.randint(self.lengths[0], self.lengths[1] + 1)
        scale = min(length / min(height, width), self.longest / max(height, width))
        sides = int(height * scale + 0.5), int(width * scale + 0.5)
        ratio = np.array([sides[1] / width, sides[0] / height])
        return lambda image, how: _resized(image, sides, how), lambda points: points * ratio


class Crop:
    """Draws the place of a part of a given size."""

    def __init__(self, crop_type: str, crop_size: Sequence[int]):
        if crop_type != "absolute":
            raise ValueError(f"RandomCrop: crop_type {crop_type!r}, expected absolute")
        self.sides = tuple(crop_size)

    def draw(self, height: int, width: int) -> tuple[Callable, Callable]:
        rows, columns = min(self.sides[0], height), min(self.sides[1], width)
        top = np.random.randint(height - rows + 1)
        left = np.random.randint(width - columns + 1)
        return (
            lambda image, how: image[top : top + rows, left : left + columns],
            lambda points: points - np.array([left, top]),
        )


class Flip:
    """Mirrors every other image."""

    def __init__(self, prob: float = 0.5):
        self.probability = prob

    def draw(self, height: int, width: int) -> tuple[Callable, Callable]:
        if np.random.uniform(0, 1.0) >= self.probability:
            return lambda image, how: image, lambda points: points
        return lambda image, how: image[:, ::-1], lambda points: points * (-1, 1) + np.array([width, 0])


class Changes:
    """What augmentations drew for an image, to be done to its labels, too."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable, Callable]] = []

    def image(self, image: np.ndarray, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        for change, _ in self.steps:
            image = np.ascontiguousarray(change(image, how))
        return image

    def points(self, points: np.ndarray) -> np.ndarray:
        for _, change in self.steps:
            points = change(points)
        return points


def apply_transform_gens(steps: Sequence[Any], given: AugmentedInput) -> tuple[AugmentedInput, Changes]:
    """The augmented image, and what was done to it."""
    done, image = Changes(), given.image
    for step in steps:
        one = Changes()
        one.steps.append(step.draw(*image.shape[:2]))
        image = one.image(image)
        done.steps += one.steps
    return AugmentedInput(image), done


def transform_instance_annotations(annotation: dict, transforms: Changes, image_size: Sequence[int]) -> dict:
    """An annotation whose polygons or mask went the way of its image."""
    shape = annotation.get("segmentation")
    if isinstance(shape, list):
        shape = [transforms.points(np.asarray(one, float).reshape(-1, 2)).reshape(-1) for one in shape]
    elif isinstance(shape, dict):
        shape = transforms.image(rle.decode(shape), Image.Resampling.NEAREST)
    return {**annotation, "segmentation": shape}


# ---- points of masks


def point_sample(maps: Tensor, point_coords: Tensor, **options: Any) -> Tensor:  # [N, C, P]
    """Values of maps [N, C, H, W] at points [N, P, 2] (x, y in 0..1)."""
    return F.grid_sample(maps, 2 * point_coords[:, :, None] - 1, **options)[..., 0]


def get_uncertain_point_coords_with_randomness(
    coarse_logits: Tensor,
    uncertainty_func: Callable[[Tensor], Tensor],
    num_points: int,
    oversample_ratio: int,
    importance_sample_ratio: float,
) -> Tensor:  # [N, P, 2]
    """Points in 0..1: a share of them the most uncertain of many drawn, the others as they are drawn."""
    count, device = len(coarse_logits), coarse_logits.device
    many = torch.rand(count, int(num_points * oversample_ratio), 2, device=device)
    doubt = uncertainty_func(point_sample(coarse_logits, many, align_corners=False))[:, 0]
    hard = int(importance_sample_ratio * num_points)
    chosen = doubt.topk(hard, dim=1).indices
    rest = torch.rand(count, num_points - hard, 2, device=device)
    return torch.cat([many.take_along_dim(chosen[..., None], 1), rest], 1)


def sem_seg_postprocess(result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int) -> Tensor:
    """Class planes [C, h, w] without their padding, at another size."""
    planes = result[None, :, : img_size[0], : img_size[1]]
    return F.interpolate(planes, size=(output_height, output_width), mode="bilinear", align_corners=False)[0]


def retry_if_cuda_oom(function: Callable) -> Callable:
    """The function itself: what does not fit is refused by the engine."""
    return function


# ---- drawings


class Metadata(SimpleNamespace):
    """Names and colours of a data set."""

    def set(self, **values: Any) -> Metadata:
        vars(self).update(values)
        return self


class Catalog:
    """Data sets by name."""

    def __init__(self) -> None:
        self.known: dict[str, Metadata] = {}

    def get(self, name: str) -> Metadata:
        return self.known.setdefault(name, Metadata(name=name))

    def register(self, name: str, function: Callable) -> None:
        """Nothing is read by name."""


class SavedDrawing:
    """A picture that is saved as a plot is."""

    def __init__(self, picture: Image.Image):
        self.picture = picture

    def save(self, path: str) -> None:
        session.current().written(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": JPEG_QUALITY} if Path(path).suffix in (".jpg", ".jpeg") else {}
        self.picture.convert("RGB").save(path, **options)


class Visualizer:
    """Draws labels over an image: class maps in the colours of their data set, instances in this package's."""

    def __init__(self, img_rgb: np.ndarray, metadata: Metadata, scale: float = 1.0, instance_mode: Any = None):
        self.pixels, self.metadata = np.asarray(img_rgb), metadata

    def draw_sem_seg(self, labels: Any, alpha: float = 0.8) -> SavedDrawing:
        labels = self._fitted(labels)
        pixels = self.pixels.astype(np.float32)
        for number, colour in enumerate(self.metadata.stuff_colors):
            pixels[labels == number] = pixels[labels == number] * (1 - alpha) + np.array(colour, np.float32) * alpha
        return SavedDrawing(Image.fromarray(pixels.astype(np.uint8)))

    def draw_instance_predictions(self, predictions: Any) -> SavedDrawing:
        masks = [self._fitted(one) > 0 for one in predictions.pred_masks]
        masks = np.array(masks, bool).reshape(-1, *self.pixels.shape[:2])
        return SavedDrawing(masked(self.pixels, masks, np.asarray(predictions.pred_classes).astype(int)))

    def _fitted(self, plane: Any) -> np.ndarray:
        """A plane at the size of the image: scripts make theirs of 512 pixels, whatever the model's is."""
        picture = Image.fromarray(np.asarray(plane).astype(np.uint8))
        return np.array(picture.resize(self.pixels.shape[1::-1], Image.Resampling.NEAREST))


_DATA_SETS, _NAMES = Catalog(), Catalog()
MODULES: dict[str, dict[str, Any]] = {
    "detectron2.utils.memory": {"retry_if_cuda_oom": retry_if_cuda_oom},
    "detectron2.utils.comm": {"get_world_size": lambda: 1},
    "detectron2.utils.file_io": {"PathManager": SimpleNamespace(get_local_path=str)},
    "detectron2.utils.visualizer": {
        "ColorMode": SimpleNamespace(IMAGE=0, SEGMENTATION=1, IMAGE_BW=2),
        "Visualizer": Visualizer,
    },
    "detectron2.modeling.postprocessing": {"sem_seg_postprocess": sem_seg_postprocess},
    "detectron2.structures": {
        "Instances": ImageInstances,
        "Boxes": TensorHolder,
        "BitMasks": TensorHolder,
        "BoxMode": SimpleNamespace(XYXY_ABS=0, XYWH_ABS=1),
        "polygons_to_bitmask": polygons_to_bitmask,
    },
    "detectron2.data": {"DatasetCatalog": _DATA_SETS, "MetadataCatalog": _NAMES},
    "detectron2.data.transforms": {
        "AugInput": AugmentedInput,
        "apply_transform_gens": apply_transform_gens,
        "ResizeShortestEdge": ShortestEdge,
        "RandomCrop": Crop,
        "RandomFlip": Flip,
    },
    "detectron2.data.detection_utils": {
        "read_image": read_image,
        "transform_instance_annotations": transform_instance_annotations,
    },
    "detectron2.projects.point_rend.point_features": {
        "point_sample": point_sample,
        "get_uncertain_point_coords_with_randomness": get_uncertain_point_coords_with_randomness,
    },
}
