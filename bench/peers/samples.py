"""What all peers share: the noise they begin with, and labels made of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from datasetdm_fast.data import Annotation, Request, Sample
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.labels import with_outlines
from datasetdm_fast.engine.loop.labelling import postprocess
from datasetdm_fast.engine.loop.prompts import Tokenizer
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.sampling.schedule import ImageNoise
from datasetdm_fast.stages import FACTOR


def noise_of(requests: Sequence[Request], recipe: Recipe) -> Tensor:
    """[B, 4, h, w] fp32 on the CPU, each image's from its own seed."""
    side = recipe.size // FACTOR
    return ImageNoise([request.seed for request in requests], (4, side, side)).draw()


def decoder_labels(
    requests: Sequence[Request],
    raw: dict[str, Tensor],
    images: Sequence[np.ndarray],
    config: DecoderConfig,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> list[Annotation]:
    """The labels of one decoder with the outlines that its configuration asks for."""
    return with_outlines(postprocess(requests, raw, config, recipe, tokenizer), images, config)


def samples_of(
    requests: Sequence[Request],
    images: np.ndarray,
    answers: Mapping[str, dict[str, Tensor]],
    decoders: Mapping[str, Decoder],
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> list[Sample]:
    """Images [B, H, W, 3] uint8 and raw answers of the decoders as samples; the labels are made where the answers lie,
    by the rules of `generate`.
    """
    labels = {
        task: decoder_labels(requests, raw, images, decoders[task].config, recipe, tokenizer)
        for task, raw in answers.items()
    }
    return [
        Sample(request, images[b], {task: made[b] for task, made in labels.items()})
        for b, request in enumerate(requests)
    ]
