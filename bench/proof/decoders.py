"""Decoders that are trained in memory on some images of a data set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import predictions, word_heads
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.data_record import image_digests
from datasetdm_fast.training.recipes import TrainingSchedule
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.settings import Inversion
from datasetdm_fast.training.trainer import Trainer


def fit(
    config: DecoderConfig,
    views: TrainingViews,
    schedule: TrainingSchedule,
    words: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A trained decoder; `words` [K, D] are class embeddings for open vocabulary."""
    trainer = Trainer(config, schedule, views, words, device)
    try:
        while trainer.state.step < schedule.steps:
            trainer.step()
    finally:
        trainer.close()
    return trainer.state.averaged_decoder()


def train_decoder(
    engine: Any,
    source: LabelledSource,
    task: str,
    count: int,
    address: str = "demo:",
    **settings: Any,
) -> Decoder:
    """A decoder trained on the first `count` items of a data set as the command would, none held out; `settings` are
    further fields of the session. Captures of an image are shared by every count, task and later run.
    """
    if not 1 <= count <= len(source):
        raise Refused(
            f"{task}: {count} images to learn from, expected 1 to {len(source)}, which the data set has",
            "Choose another number, or data with more images.",
        )
    inversion = Inversion((engine.model.defaults.capture,))
    session = TrainingSession(address, engine, source, tuple(range(count)), inversion=inversion, **settings)
    plan, views = session.plan(task), session.views(task, range(count))
    decoder = fit(plan.decoder, views, plan.schedule, plan.words, device=engine.device)
    decoder.config = word_heads.learn_heads(views, plan.decoder, engine.model.tokenizer).add_to(plan.decoder)

    def predict(chosen: Sequence[int]) -> list:
        return session.predictor(plan).predict(decoder, views, chosen)

    decoder.config = predictions.choose_outlines("auto", decoder.config, views, predict)
    return decoder


def count_shared(scored: LabelledSource, trained_on: LabelledSource, count: int) -> int:
    """How many images of a data set are among the first `count` of another, whatever their addresses."""
    if scored.is_rendered or trained_on.is_rendered:
        return 0
    known = {*image_digests(trained_on, count)}
    return sum(image in known for image in image_digests(scored, len(scored)))
