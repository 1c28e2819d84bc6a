"""GLPN (Kim et al. 2022): SegFormer's body with a head for depth in metres."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.data import DepthMap
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.kernels.transfer import to_device

LEAST = 1e-3  # metres
VARIANCE_SHARE = 0.5  # of the squared mean that the scale-invariant loss forgives


def _settings(vocabulary: Vocabulary, side: int) -> dict[str, int]:
    return {"max_depth": max(1, int(np.ceil(vocabulary.max_depth)))}


def _loss(model: nn.Module, images: Tensor, items: Sequence[Labelled], vocabulary: Vocabulary) -> Tensor:
    """The scale-invariant logarithmic error (Eigen et al. 2014) over the pixels whose depth is known."""
    truth = to_device(torch.from_numpy(np.stack([item.depth for item in items])), images.device)
    known = truth > 0
    count = known.sum().clamp(min=1)
    error = torch.where(known, _log_depth(model, images)[:, 0] - truth.clamp(min=LEAST).log(), 0.0)
    spread = (error**2).sum() / count - VARIANCE_SHARE * (error.sum() / count) ** 2
    return spread.clamp(min=1e-12).sqrt()


def _log_depth(model: nn.Module, images: Tensor) -> Tensor:
    """Logarithm [B, 1, H, W] of metres, whose mean over views is taken."""
    found = model(pixel_values=images).predicted_depth.float()[:, None]
    found = F.interpolate(found, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return found.clamp(min=LEAST).log()


def _read(maps: Tensor, vocabulary: Vocabulary) -> list[DepthMap]:
    return [DepthMap(metres, vocabulary.max_depth) for metres in maps[:, 0].exp().cpu().numpy()]


NETWORK = StudentNetwork(
    task="depth",
    model="GLPNForDepthEstimation",
    config="GLPNConfig",
    sizes={
        "b0": {},
        "tiny": {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 128), "num_attention_heads": (1, 1, 2, 4)},
        "b4": {"depths": (3, 8, 27, 3), "hidden_sizes": (64, 128, 320, 512)},
    },
    settings=_settings,
    body="glpn.",
    loss=_loss,
    predict=_log_depth,
    read=_read,
    mirror=lambda vocabulary: [0],
    scales=(1.0, 1.5),
)
