"""Which of the words asked of an image stands where."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, largest_first, present
from datasetdm_fast.engine.tasks import Task
from datasetdm_fast.engine.tasks.captions import OBJECT
from datasetdm_fast.engine.tasks.instance import NOTHING
from datasetdm_fast.engine.tasks.semantic import SMALL, masks_of, scaled_area
from datasetdm_fast.kernels.transfer import to_host
from datasetdm_fast.kernels.upsample_concat import resize

WORDS = 256  # with so many and more a label map, of a data set that is judged, is one of 32 bits


def best_query(class_logits: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score [B, K], probability [B, K] and mask logits [B, K, m, m] of the query that answers each word best."""
    probability = class_logits.softmax(-1)[..., OBJECT]
    inside = mask_logits > 0
    scores = probability * (mask_logits.sigmoid() * inside).sum((3, 4)) / (inside.sum((3, 4)) + NOTHING)
    best = scores.argmax(2, keepdim=True)
    masks = mask_logits.take_along_dim(best[..., None, None], 2)[:, :, 0]
    return scores.gather(2, best)[..., 0], probability.gather(2, best)[..., 0], masks


class OpenVocabularyTask(Task):
    needs, names = ("masks", "semantic"), "thing_classes"
    requirement = "a thing"
    small = {"batch_size": 12, "points": 512, "steps": 900}
    large = {"dropout": 0.2}

    def postprocess(
        self, raw: dict[str, Tensor], config: DecoderConfig, size: int, words: Sequence[str] = ()
    ) -> list[SemanticMap]:
        """Label maps over the words asked: 0 = none, k + 1 = word k; of two the likelier wins, then the first.

        `raw` is the answer to text [B, K, D] (`pred_logits` [B, K, N, 3], `pred_masks` [B, K, N, m, m]), or to text
        [B, D] without the K. `words` are the K names, the same for every image; left out, they are numbers.
        """
        class_logits, mask_logits = raw["pred_logits"].float(), raw["pred_masks"].float()
        if class_logits.ndim == 3:
            class_logits, mask_logits = class_logits[:, None], mask_logits[:, None]
        scores, probability, masks = best_query(class_logits, mask_logits)
        masks = resize(masks, size)
        is_there = (scores >= config.score_threshold) & (
            (masks > 0).sum((2, 3)) >= max(1, scaled_area(config.min_area, size))
        )
        likely = masks.sigmoid() * (probability * is_there)[..., None, None]
        largest, winner = (likely * (masks > 0)).max(1)
        is_word = largest > 0
        numbers = torch.where(is_word, winner + 1, 0).to(torch.uint8 if scores.shape[1] < WORDS else torch.int32)
        labels, confidence = to_host(numbers, torch.where(is_word, largest, 1 - likely.amax(1)))
        names = ("none", *(words or (str(k + 1) for k in range(scores.shape[1]))))
        return [SemanticMap(labels[b], confidence[b], names) for b in range(len(labels))]

    def truth(self, source: LabelledSource, item: Labelled) -> SemanticMap:
        is_many = len(source.thing_classes) >= WORDS
        words, target = np.zeros(item.image.shape[:2], np.int32 if is_many else np.uint8), self.target(source, item)
        for k in largest_first(target["masks"]):
            words[target["masks"][k]] = target["classes"][k] + 1
        return SemanticMap(words, np.ones(words.shape, np.float32), ("none", *source.thing_classes))

    def target(self, source: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        """One mask a thing, or where there are no masks one a class that is a thing."""
        if item.masks is not None:
            return {"classes": present(item.mask_classes), "masks": item.masks}
        things = {
            source.classes.index(name): k for k, name in enumerate(source.thing_classes) if name in source.classes
        }
        return masks_of(item, {number: k for number, k in things.items() if np.any(item.semantic == number)})

    def decoder(self, source: LabelledSource, is_small: bool, _: str) -> dict[str, Any]:
        sizes = {**SMALL, "queries": 8} if is_small else {"queries": 20}
        return {"kind": "open-vocabulary", "classes": source.thing_classes, "text_centre": is_small, **sizes}
