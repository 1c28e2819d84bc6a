"""One mask per thing, every part and hole of it kept."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import Instances
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, present
from datasetdm_fast.engine.tasks import Task
from datasetdm_fast.engine.tasks.captions import shared_by_words
from datasetdm_fast.engine.tasks.semantic import SMALL, scaled_area
from datasetdm_fast.kernels.transfer import to_host
from datasetdm_fast.kernels.upsample_concat import resize

MOST_INSTANCES = 100  # instances of an image
NOTHING = 1e-6  # pixels added to an area before dividing by it
# A mask is a fragment of a thing if this share of it lies within a cell of a better mask of its class, and it has at
# most this share of that one's area.
INSIDE, LARGEST_PART = 0.7, 0.5
MOST_PIXELS = 2**26  # of masks that are resized together: 256 MiB in fp32


def candidates(probability: Tensor, mask_logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, class and score [B, k] of the k most probable pairs of query and class, of equal ones the earlier first,
    by probabilities [B, N, K]; score = probability times mean mask probability inside the mask.
    """
    classes = probability.shape[-1]
    best, flat = (values[:, :count] for values in probability.flatten(1).sort(dim=1, descending=True, stable=True))
    queries = flat // classes
    inside = mask_logits > 0
    mean = (mask_logits.sigmoid() * inside).sum((2, 3)) / (inside.sum((2, 3)) + NOTHING)
    return queries, flat % classes, best * mean.gather(1, queries)


def not_overlapping(inside: Tensor, classes: Tensor, is_candidate: Tensor, threshold: float) -> Tensor:
    """Which wanted masks [B, k, m, m] overlap no better kept one by more than `threshold`, nor are part of one."""
    masks = inside.float()
    pixels, grown = masks.flatten(2), F.max_pool2d(masks, 3, 1, 1).flatten(2)
    common = pixels @ pixels.transpose(1, 2)
    areas = pixels.sum(2)
    iou = common / (areas[:, :, None] + areas[:, None] - common).clamp(min=1)
    is_part = pixels @ grown.transpose(1, 2) >= INSIDE * areas[:, :, None].clamp(min=1)
    is_part &= (areas[:, :, None] <= LARGEST_PART * areas[:, None]) & (classes[:, :, None] == classes[:, None])
    is_hidden_by = ((iou > threshold) | is_part).tril(-1)  # [B, worse, better]
    selected = is_candidate
    while True:  # settles after as many rounds as the longest chain of masks hiding one another
        next_selected = is_candidate & ~(is_hidden_by & selected[:, None]).any(2)
        if torch.equal(next_selected, selected):
            return selected
        selected = next_selected


def inside_masks(values: Tensor, mask_logits: Tensor) -> Tensor:
    """[B, K, N] the mean of values [B, K, h, w] inside the masks of N queries."""
    masks = mask_logits.sigmoid().flatten(2)
    return resize(values, mask_logits.shape[-1]).flatten(2) @ masks.mT / (masks.sum(2)[:, None] + NOTHING)


def large_masks(mask_logits: Tensor, size: int) -> Tensor:
    """[N, size, size] bool of masks [N, h, w], a bounded number of them at a time."""
    count = max(MOST_PIXELS // size**2, 1)
    masks = torch.empty(len(mask_logits), size, size, dtype=torch.bool, device=mask_logits.device)
    for part, answer in zip(mask_logits.split(count), masks.split(count)):
        torch.gt(resize(part[None], size)[0], 0, out=answer)
    return masks


class InstanceTask(Task):
    needs, names = ("masks",), "thing_classes"
    requirement = "a thing"
    small = {"batch_size": 12, "points": 512, "steps": 1500, "dropout": 0.0}

    def postprocess(self, raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[Instances]:
        """Instances from best to worst: score at the threshold or above, none twice, none empty or too small."""
        probability, mask_logits = raw["pred_logits"].float().softmax(-1)[..., :-1], raw["pred_masks"].float()
        if "word_attention" in raw:
            inside = inside_masks(raw["word_attention"], mask_logits)
            probability = shared_by_words(probability.mT, inside, config).mT
        queries, classes, scores = candidates(probability, mask_logits, min(MOST_INSTANCES, mask_logits.shape[1]))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        queries, classes = queries.gather(1, order), classes.gather(1, order)
        images = torch.arange(len(queries), device=queries.device)[:, None].expand_as(queries)
        chosen = mask_logits[images, queries]  # [B, k, m, m]
        is_selected = not_overlapping(chosen > 0, classes, scores >= config.score_threshold, config.overlap_threshold)
        masks = large_masks(chosen[is_selected], size) if is_selected.any() else is_selected.new_zeros(0, size, size)
        is_large = masks.sum((1, 2)) >= max(1, scaled_area(config.min_area, size))
        values = images[is_selected], masks, classes[is_selected], scores[is_selected]
        image_of, *arrays = to_host(*(value[is_large] for value in values))
        parts = ([array[image_of == b] for array in arrays] for b in range(len(queries)))
        return [Instances(inside, numbers, sure, config.classes) for inside, numbers, sure in parts]

    def truth(self, source: LabelledSource, item: Labelled) -> Instances:
        masks = present(item.masks)
        return Instances(masks, present(item.mask_classes), np.ones(len(masks), np.float32), source.thing_classes)

    def decoder(self, source: LabelledSource, is_small: bool, _: str) -> dict[str, Any]:
        return {"kind": "segmentation", "classes": source.thing_classes, **(SMALL if is_small else {})}

    def target(self, source: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        return {"classes": present(item.mask_classes), "masks": present(item.masks)}
