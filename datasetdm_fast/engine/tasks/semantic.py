"""One class per pixel, from queries that each carry class probabilities and a mask."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import IGNORE, SemanticMap
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, present
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS
from datasetdm_fast.engine.tasks import Task
from datasetdm_fast.engine.tasks.captions import shared_by_words
from datasetdm_fast.kernels.transfer import to_host
from datasetdm_fast.kernels.upsample_concat import resize

# widths of a transformer of queries for small networks
SMALL = {"width": 64, "heads": 4, "layers": 3, "feed_forward": 128, "mask_dim": 64, "queries": 16, "upscale": 2}
SURE = 0.5  # evidence above it counts towards the area of a class
AREA_SIDE = 512  # pixels: areas are given for images of this side


def scaled_area(min_area: float, size: int) -> float:
    """An area given for 512 x 512 pixels, in pixels of an image of this size."""
    return min_area * (size / AREA_SIDE) ** 2


def evidence(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Sum over queries of class probability, "no object" left out, times mask probability [B, K, H, W]."""
    return torch.einsum("bnk,bnhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def without_small(values: Tensor, min_area: float) -> Tensor:
    """The evidence with every class but class 0 zeroed whose values above one half sum to less than `min_area`."""
    is_small = (values * (values > SURE)).sum((2, 3)) < min_area
    is_small[:, 0] = False
    return values * ~is_small[..., None, None]


def masks_of(item: Labelled, ids: Mapping[int, int]) -> dict[str, np.ndarray]:
    """One mask for each number of a label map, under the id it stands for."""
    labels = present(item.semantic)
    masks = np.array([labels == number for number in ids], bool).reshape(-1, *labels.shape)
    return {"classes": np.array(list(ids.values()), np.int64), "masks": masks}


class SemanticTask(Task):
    needs, names = ("semantic",), "classes"
    requirement = (
        f"a class to tell from another: every pixel is background, the only class or {IGNORE}, which is ignored"
    )
    small = {"batch_size": 12, "points": 512, "steps": 1250, "dropout": 0.6, "weight_decay": 0.2}
    large = {"dropout": 0.2}

    def postprocess(self, raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[SemanticMap]:
        """Label maps by DatasetDM's rule, with the winning class's share of all evidence as confidence."""
        values = evidence(raw["pred_logits"].float(), resize(raw["pred_masks"].float(), size))
        if "word_attention" in raw:
            values = shared_by_words(values, resize(raw["word_attention"], size), config)
        largest, labels = without_small(values, scaled_area(config.min_area, size)).max(1)
        labels, confidence = to_host(labels.to(torch.uint8), largest / values.sum(1).clamp(min=1e-12))
        return [SemanticMap(labels[b], confidence[b], config.classes) for b in range(len(labels))]

    def truth(self, source: LabelledSource, item: Labelled) -> SemanticMap:
        labels = present(item.semantic)
        return SemanticMap(labels, np.ones(labels.shape, np.float32), source.classes)

    def target(self, _: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        return masks_of(item, {int(k): int(k) for k in np.unique(present(item.semantic)) if k != IGNORE})

    def is_shown(self, source: LabelledSource, target: Mapping[str, np.ndarray]) -> bool:
        first = 1 if source.classes[0] in BACKGROUNDS else 0  # number of the first class to learn
        return len(source.classes) > 1 and bool((target["classes"] >= first).any())

    def decoder(self, source: LabelledSource, is_small: bool, _: str) -> dict[str, Any]:
        return {"kind": "segmentation", "classes": source.classes, **(SMALL if is_small else {})}
