"""Labels that a decoder in training predicts for training views, and their figures."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.cores import in_blocks
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder, fold
from datasetdm_fast.engine.engines.device import allow_tf32
from datasetdm_fast.engine.labels import with_outlines
from datasetdm_fast.engine.tasks import read_labels
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.meter import Meter
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.trainer import project

BATCH_SIZE = 8
MOST_OUTLINE_IMAGES = 100  # training images by which outlines are chosen


@dataclass(frozen=True)
class Predictor:
    """Reads the labels of decoders from captures, as an engine does once they are loaded."""

    words: Tensor | None  # class embeddings
    size: int  # pixels per side
    device: torch.device
    tokenizer: Callable[..., object]

    def predict(self, decoder: Decoder, views: TrainingViews, chosen: Sequence[int] | None = None) -> list[Annotation]:
        """The labels of all views, or of the chosen ones."""
        ready = fold(copy.deepcopy(decoder)).to(self.device)
        config, labels = METRICS[ready.config.task].reading(ready.config), []
        queries = views.source.thing_classes if self.words is not None else ()
        with torch.inference_mode():
            for batch in in_blocks(range(len(views)) if chosen is None else chosen, BATCH_SIZE):
                text = None if self.words is None else self.words.to(self.device)[None].expand(len(batch), -1, -1)
                levels = [level.to(self.device) for level in views.captures.batch(batch)]
                allow_tf32(self.device, False)  # what an engine that made them in another precision has just set
                raw = ready(project(ready, levels), text)
                items = [views.item(view) for view in batch]
                raw = held_to(raw, config, [item.caption for item in items], queries, tokenizer=self.tokenizer)
                options = {"words": queries} if queries else {}
                labels += read_labels(raw, (item.image for item in items), config, self.size, **options)
        return labels


def score(task: str, views: TrainingViews, labels: Sequence[Annotation], chosen: Sequence[int] | None = None) -> Meter:
    """The meter of a task after the labels of all views, or of the chosen ones."""
    meter = METRICS[task](views.source)
    for view, label in zip(range(len(views)) if chosen is None else chosen, labels, strict=True):
        meter.add(views.item(view), label)
    return meter


def is_better(task: str, value: float, best: float | None) -> bool:
    return best is None or (value < best if METRICS[task].less_is_better else value > best)


def count_classes_shown(views: TrainingViews) -> int:
    """How many classes the training images show."""
    return len({int(k) for view in views.first_views(len(views.numbers)) for k in views.target(view).classes})


def choose_outlines(
    requested: str,
    config: DecoderConfig,
    views: TrainingViews,
    predict: Callable[[Sequence[int]], Sequence[Annotation]],
) -> DecoderConfig:
    """The decoder's configuration with the requested outlines; with `auto`, those that follow the image where they are
    nearer to the truth in the first view of every training image; with an empty text, unchanged.
    """
    if requested != "auto":
        return replace(config, outlines=requested) if requested else config
    chosen = views.first_views(MOST_OUTLINE_IMAGES)
    plain, following = predict(chosen), replace(config, outlines=FROM_IMAGE)
    redrawn = with_outlines(plain, (views.item(view).image for view in chosen), following)
    name = METRICS[config.task].figure
    before, after = (score(config.task, views, labels, chosen).result().get(name) for labels in (plain, redrawn))
    is_nearer = before is not None and after is not None and is_better(config.task, after, before)
    return following if is_nearer else config
