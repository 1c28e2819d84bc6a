"""Whether a taught decoder's labels get outlines that follow the image, by what that does to images it learnt from."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.decoders.checkpoint import Decoder
from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.evaluation.metrics import METRICS
from datasetdm_fast.tasks.outlines import outlined
from datasetdm_fast.training import held_out
from datasetdm_fast.training.loop import TrainingViews
from datasetdm_fast.training.settings import TrainConfig

MOST_IMAGES = 100  # that are looked at


def chosen(
    config: TrainConfig,
    decoder: Decoder,
    lessons: TrainingViews,
    words: Tensor | None,
    size: int,
    device: torch.device,
    tokenizer: Callable[..., object],
) -> DecoderConfig:
    """The decoder's configuration with the outlines of the settings; with `auto` those of the image where they are
    nearer the truth in the first view of every image, which they never are with `--preset upstream`.
    """
    own = decoder.config
    if config.outlines != "auto" or config.preset == "upstream":
        return own if config.outlines == "auto" else replace(own, outlines=config.outlines)
    draws = lessons.views.looks.draws
    views = range(0, min(lessons.count, MOST_IMAGES * draws), draws)
    plain = held_out.answers(decoder, lessons, words, size, device, tokenizer, views=views)
    following = replace(own, outlines=FROM_IMAGE)
    redrawn = outlined(plain, (lessons.views.item(view).image for view in views), following)
    name = METRICS[own.task].figure
    before, after = (held_out.score(own.task, lessons, labels, views).result().get(name) for labels in (plain, redrawn))
    is_nearer = before is not None and after is not None and held_out.is_better(own.task, after, before)
    return following if is_nearer else own
