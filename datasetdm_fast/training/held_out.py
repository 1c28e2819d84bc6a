"""The images a decoder is not taught from, and how it scores on them."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Annotation
from datasetdm_fast.decoders.checkpoint import Decoder, fold
from datasetdm_fast.evaluation.metrics import METRICS
from datasetdm_fast.tasks import TASKS
from datasetdm_fast.tasks.captions import held_to
from datasetdm_fast.training.loop import TrainingViews, projected

LEAST_IMAGES = 10  # images below which none is held out


def split(numbers: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The item numbers to learn from, and those held out, both in their order."""
    count = round(share * len(numbers)) if len(numbers) >= LEAST_IMAGES else 0
    count = min(max(count, 1), len(numbers) - 1) if share and len(numbers) >= LEAST_IMAGES else 0
    chosen = set(np.random.default_rng([seed, len(numbers)]).permutation(len(numbers))[:count].tolist())
    return [n for k, n in enumerate(numbers) if k not in chosen], [n for k, n in enumerate(numbers) if k in chosen]


def answers(
    decoder: Decoder, lessons: TrainingViews, words: Tensor | None, size: int, device: torch.device, batch_size: int = 8
) -> list[Annotation]:
    """What a decoder in training says about each view, as it would once loaded."""
    ready = fold(copy.deepcopy(decoder)).to(device)
    config, found = METRICS[ready.config.task].reading(ready.config), []
    asked = lessons.views.source.thing_classes if words is not None else ()
    with torch.inference_mode():
        for start in range(0, lessons.count, batch_size):
            views = range(start, min(start + batch_size, lessons.count))
            text = None if words is None else words.to(device)[None].expand(len(views), -1, -1)
            raw = ready(projected(ready, [level.to(device) for level in lessons.captures.batch(views)]), text)
            raw = held_to(raw, config, lessons.views.captions([lessons.views.item(view) for view in views]), asked)
            found += TASKS[config.task].postprocess(raw, config, size, **({"words": asked} if asked else {}))
    return found


def score(task: str, lessons: TrainingViews, found: Sequence[Annotation]) -> dict:
    meter = METRICS[task](lessons.views.source)
    for view, label in enumerate(found):
        meter.add(lessons.views.item(view), label)
    return meter.result()


def is_better(task: str, value: float, best: float | None) -> bool:
    return best is None or (value < best if METRICS[task].less_is_better else value > best)
