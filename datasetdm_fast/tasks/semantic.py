"""One class per pixel, from queries that each carry class probabilities and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.tasks.to_host import to_host

SURE = 0.5  # evidence above it counts towards the area of a class
AREA_SIDE = 512  # pixels of a side of the images that areas are given for


def scaled_area(min_area: int, size: int) -> float:
    """An area given for 512 x 512 pixels, in pixels of an image of this size."""
    return min_area * (size / AREA_SIDE) ** 2


def evidence(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Sum over queries of class probability times mask probability [B, K, H, W], "no object" left out after the
    softmax.
    """
    return torch.einsum("bnk,bnhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def without_small(found: Tensor, min_area: float) -> Tensor:
    """The evidence with every class but class 0 zeroed whose values above one half sum to less than `min_area`."""
    is_small = (found * (found > SURE)).sum((2, 3)) < min_area
    is_small[:, 0] = False
    return found.masked_fill(is_small[..., None, None], 0)


def upstream_labels(class_logits: Tensor, mask_logits: Tensor, min_area: float = 5000) -> Tensor:
    """DatasetDM's label map [B, H, W] int64 from masks already at image size; ties go to the lowest id."""
    return without_small(evidence(class_logits, mask_logits), min_area).argmax(1)


def postprocess(raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[SemanticMap]:
    """Label maps by DatasetDM's rule, with the winning class's share of all evidence as confidence."""
    found = evidence(raw["pred_logits"].float(), resize(raw["pred_masks"].float(), size))
    largest, labels = without_small(found, scaled_area(config.min_area, size)).max(1)
    labels, confidence = to_host(labels.to(torch.uint8), largest / found.sum(1).clamp(min=1e-12))
    return [SemanticMap(labels[b], confidence[b], config.classes) for b in range(len(labels))]
