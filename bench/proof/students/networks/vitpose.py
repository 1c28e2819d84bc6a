"""ViTPose (Xu et al. 2022): a plain vision transformer with a heatmap for each joint of an image's largest person."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import LEAST_JOINT_SCORE, Vocabulary
from datasetdm_fast.data import Keypoints
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.kernels.transfer import to_device

SIGMA = 2.0  # cells of a heatmap
HEIGHT = 100.0  # weight of the squared error, which is small
CELL = 4  # pixels of a side of a heatmap's cell
PATCH = 16


def _settings(vocabulary: Vocabulary, side: int) -> dict:
    return {"backbone_config": {"image_size": (side, side)}}


def _size(width: int, layers: int, heads: int) -> dict:
    backbone = {"model_type": "vitpose_backbone", "hidden_size": width, "num_hidden_layers": layers}
    backbone |= {"num_attention_heads": heads, "patch_size": (PATCH, PATCH), "out_indices": [layers]}
    return {"backbone_config": backbone, "use_simple_decoder": True, "scale_factor": PATCH // CELL}


def _loss(model: nn.Module, images: Tensor, items: Sequence[Labelled], vocabulary: Vocabulary) -> Tensor:
    """Squared error of the heatmaps; a joint that is not labelled in a person has none, one of nobody is empty."""
    found = model(pixel_values=images).heatmaps.float()
    height, width = found.shape[-2:]
    points = np.zeros((len(items), len(vocabulary.joints), 3), np.float32)
    for k, item in enumerate(items):
        if len(item.keypoints):
            points[k] = item.keypoints[int(np.argmax(item.keypoint_areas))]
    places = to_device(torch.from_numpy(points), found.device)
    rows, columns = (torch.arange(count, device=found.device) + 0.5 for count in (height, width))
    scale_x, scale_y = width / images.shape[-1], height / images.shape[-2]
    across = torch.exp(-((columns - places[..., 0, None] * scale_x) ** 2) / (2 * SIGMA**2))
    along = torch.exp(-((rows - places[..., 1, None] * scale_y) ** 2) / (2 * SIGMA**2))
    is_there = (places[..., 2] > 0).float()
    is_known = torch.where(is_there.any(1, keepdim=True), is_there, torch.ones_like(is_there))
    heat = along[..., :, None] * across[..., None, :] * is_there[..., None, None]
    error = ((found - heat) ** 2).mean((2, 3)) * is_known
    return HEIGHT * error.sum() / is_known.sum().clamp(min=1)


def _heat(model: nn.Module, images: Tensor) -> Tensor:
    """Heatmaps [B, J, H, W] at the size of the images."""
    found = model(pixel_values=images).heatmaps.float()
    return F.interpolate(found, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _read(maps: Tensor, vocabulary: Vocabulary) -> list[Keypoints]:
    """The highest place of each joint, whose height is its score; a person is scored by the mean of the joints."""
    heights, places = maps.flatten(2).max(2)
    width = maps.shape[-1]
    points = torch.stack([places % width + 0.5, places // width + 0.5, heights.clamp(0, 1)], 2).cpu().numpy()
    found = []
    for person in points.astype(np.float32):
        visibility = np.where(person[None, :, 2] >= LEAST_JOINT_SCORE, 2, 0)
        found.append(Keypoints(person[None], visibility, person[None, :, 2].mean(1), vocabulary.joints))
    return found


NETWORK = StudentNetwork(
    task="pose",
    model="VitPoseForPoseEstimation",
    config="VitPoseConfig",
    sizes={"small": _size(384, 12, 12), "tiny": _size(96, 3, 3), "base": _size(768, 12, 12)},
    settings=_settings,
    names=lambda vocabulary: vocabulary.joints,
    body="backbone.",
    loss=_loss,
    predict=_heat,
    read=_read,
    rate=5e-4,
    scales=(0.8, 1.25),
)
