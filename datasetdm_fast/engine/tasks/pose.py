"""The joints of the one person a pose decoder answers with.

Places are in pixels, 0 at the outer edge of the first pixel and `size` at that of the last.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Keypoints
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, present
from datasetdm_fast.engine.tasks import Task
from datasetdm_fast.kernels.transfer import to_device, to_host

WINDOW = 3  # bins each side of a peak that belong to it
FAINTEST = 1e-6  # heatmap values below it carry no shape to fit


def peaks(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Height [B, J] and column, row [B, J, 2] of the first maximum of each plane [B, J, h, w]."""
    height, first = planes.flatten(2).max(2)
    return height, torch.stack([first % planes.shape[-1], first // planes.shape[-1]], -1)


def neighbours(planes: Tensor, places: Tensor) -> Tensor:
    """The 3 x 3 values [B, J, 3, 3] around each place [B, J, 2], the border repeated."""
    height, width = planes.shape[-2:]
    steps = torch.arange(-1, 2, device=places.device)
    columns = (places[..., 0, None] + steps).clamp(0, width - 1)
    rows = (places[..., 1, None] + steps).clamp(0, height - 1)
    index = rows[..., :, None] * width + columns[..., None, :]
    return planes.flatten(2).gather(2, index.flatten(2)).unflatten(2, (3, 3))


def summit(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Height [B, J] and place [B, J, 2] at the top of the quadratic of logarithms (Zhang et al. 2020, eq. 8)."""
    height, places = peaks(heatmaps)
    values = neighbours(heatmaps, places).clamp(min=FAINTEST).log()
    dx, dy = (values[..., 1, 2] - values[..., 1, 0]) / 2, (values[..., 2, 1] - values[..., 0, 1]) / 2
    dxx = values[..., 1, 2] + values[..., 1, 0] - 2 * values[..., 1, 1]
    dyy = values[..., 2, 1] + values[..., 0, 1] - 2 * values[..., 1, 1]
    dxy = (values[..., 2, 2] - values[..., 2, 0] - values[..., 0, 2] + values[..., 0, 0]) / 4
    determinant = dxx * dyy - dxy * dxy
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / determinant.clamp(min=1e-12)[..., None]
    # At the border a neighbour is missing, and where the fit is no hill it has no top.
    sides = to_device(torch.tensor([heatmaps.shape[-1], heatmaps.shape[-2]]), places.device)
    is_inside = ((places > 0) & (places < sides - 1)).all(-1)
    is_hill = (dxx < 0) & (determinant > 1e-12) & (height > FAINTEST) & is_inside
    return height, places + torch.where(is_hill[..., None], step.clamp(-0.5, 0.5), 0)


def mean_bin(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probability [B, J] near the largest bin and the mean bin there [B, J]."""
    probability = logits.softmax(-1)
    bins = torch.arange(logits.shape[-1], device=logits.device)
    near = probability * ((bins - probability.argmax(-1, keepdim=True)).abs() <= WINDOW)
    mass = near.sum(-1)
    return mass, (near * bins).sum(-1) / mass


def joints(raw: dict[str, Tensor], size: int) -> Tensor:
    """Every joint's place in pixels and score [B, J, 3]."""
    if "heatmaps" in raw:
        heatmaps = raw["heatmaps"].float()
        score, places = summit(heatmaps)
        places = (places + 0.5) * (size / heatmaps.shape[-1])
    else:
        (sure_x, x), (sure_y, y) = mean_bin(raw["x"].float()), mean_bin(raw["y"].float())
        score, places = torch.minimum(sure_x, sure_y), torch.stack([x, y], -1)
    return torch.cat([places, score.clamp(0, 1)[..., None]], -1)


class PoseTask(Task):
    """The joints of the largest person."""

    needs, names = ("keypoints",), "joints"
    shown_by = "weights"
    requirement = "a person with a joint in sight"
    small = {"steps": 1500, "sigma": 1.5, "dropout": 0.0}
    large = {"sigma": 2.0}
    epochs = 400
    is_of_one_person = True

    def postprocess(self, raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[Keypoints]:
        """All joints of the person in each image, or no person where no joint is sure.

        Visibility is 2 for a joint at or above the score threshold, 1 down to half of it, 0 below.
        """
        places = joints(raw, size)
        score = places[..., 2]
        visibility = (score >= config.score_threshold).long() + (score >= config.score_threshold / 2).long()
        is_sure = visibility == 2
        mean = (score * is_sure).sum(1) / is_sure.sum(1).clamp(min=1)
        persons = is_sure.any(1).int()
        points, visibility, mean, persons = to_host(places, visibility, mean, persons)
        parts = [slice(b, b + persons[b]) for b in range(len(persons))]
        return [Keypoints(points[part], visibility[part], mean[part], config.joints, config.limbs) for part in parts]

    def truth(self, source: LabelledSource, item: Labelled) -> Keypoints:
        points = present(item.keypoints)
        seen = points[..., 2]
        return Keypoints(points, seen, np.ones(len(seen), np.float32), source.joints, source.limbs)

    def target(self, _: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        points = present(item.keypoints)
        if not len(points):
            return {}
        person = int(np.argmax(present(item.keypoint_areas)))  # the decoder answers with one figure: the largest
        return {"points": points[person, :, :2], "weights": points[person, :, 2] > 0}

    def decoder(self, source: LabelledSource, is_small: bool, head: str) -> dict[str, Any]:
        sizes = {"width": 32, "upscale": 0 if head == "simcc" else 2} if is_small else {}
        return {
            "kind": head,
            "joints": source.joints,
            "limbs": source.limbs,
            "score_threshold": 0.3 if is_small else 0.2,
            **sizes,
        }
