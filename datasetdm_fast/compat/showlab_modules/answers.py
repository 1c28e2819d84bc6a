"""What DatasetDM's scripts import from its trainers and `tools.utils`: answers of decoders become masks and joints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from datasetdm_fast.compat.showlab.contours import largest_contour
from datasetdm_fast.compat.showlab.files import best_pairs
from datasetdm_fast.engine.decoders.config import COCO_LIMBS
from datasetdm_fast.engine.labels.pictures import skeletons

FAINTEST = 0.1  # pixels from the corner: a joint nearer than that was not found


class dict2obj:
    """A mapping whose entries are attributes, and whose mappings are such objects again."""

    def __init__(self, d: Mapping[str, Any]):
        self.entries = d

    def __getattr__(self, name: str) -> Any:
        value = self.entries[name]
        return dict2obj(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class FoundInstances:
    """The instances of an image, by the names that detectron2 gives them."""

    pred_masks: Tensor  # [k, H, W] 0 or 1, float
    pred_boxes: Tensor  # [k, 4], all 0 as in DatasetDM
    scores: Tensor  # [k]
    pred_classes: Tensor  # [k]

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: Any) -> FoundInstances:
        return replace(self, **{each.name: getattr(self, each.name).to(device) for each in fields(self)})


def instance_inference(
    mask_cls: Tensor, mask_pred: Tensor, class_n: int = 2, test_topk_per_image: int = 20, query_n: int = 100
) -> FoundInstances:
    """The most probable pairs of query and class, each with its mask and its score; sizes are those of the tensors."""
    masks, classes, scores = best_pairs(mask_cls, mask_pred, test_topk_per_image)
    return FoundInstances(masks, mask_pred.new_zeros(len(masks), 4), scores, classes)


def get_findContours(mask: np.ndarray) -> np.ndarray | list:
    """The external contour [n, 1, 2] with the largest bounding box; nothing of an empty mask."""
    found = largest_contour(mask > 0.5)
    return [] if found is None else found[:, None]


def mask_image(
    image: np.ndarray, mask_2d: np.ndarray, rgb: np.ndarray | None = None, valid: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The image, half of it the colour where the mask is, and that colour, drawn at random where none is given."""
    rgb = np.random.randint(0, 255, (1, 3), dtype=np.uint8) if rgb is None else rgb
    is_inside = mask_2d != 0
    image[is_inside] = image[is_inside] * 0.5 + np.asarray(rgb) * 0.5
    return image, rgb


def get_max_preds(batch_heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [B, J, 2] as x, y and heights [B, J, 1] of the maxima of heatmaps; 0, 0 where none is above 0."""
    flat = batch_heatmaps.reshape(*batch_heatmaps.shape[:2], -1)
    first, heights = flat.argmax(2), flat.max(2)[..., None]
    width = batch_heatmaps.shape[3]
    places = np.stack([first % width, first // width], -1).astype(np.float32)
    return places * (heights > 0), heights


@dataclass(frozen=True)
class PosePicture:
    """A picture that is saved as a plot is."""

    picture: Image.Image

    def savefig(self, path: str, **_: Any) -> None:
        self.picture.save(path)


def plot_pose(image: np.ndarray, dt_joints: np.ndarray, maxvals: np.ndarray | None = None) -> PosePicture:
    """Joints and limbs over an image, in this package's colours."""
    return PosePicture(skeletons(image, [(dt_joints, (dt_joints > FAINTEST).all(1))], COCO_LIMBS))
