"""Samples that are generated right after a training, from its captions: whether the model draws what was taught."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.data import Sample
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.device import is_out_of_memory
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.task_training import read_state

NAME = "self_check.json"
SAMPLES, STEPS = 8, 20
MOST_READ = 40  # captions that are chosen from


@dataclass(frozen=True)
class SelfCheck:
    """The samples, and how many are out of the domain of the decoder."""

    samples: Sequence[Sample]
    outside: int

    @property
    def document(self) -> dict[str, Any]:
        return {"samples": len(self.samples), "out_of_domain": self.outside}


def check_itself(session: TrainingSession, decoder: Decoder, folder: Path) -> SelfCheck | None:
    """Samples of the captions of training images, whose counts are written into the decoder's folder; None for a
    decoder without a domain, and where captions or memory do not allow it.
    """
    if decoder.domain is None:
        return None
    task, engine = decoder.config.task, session.engine
    if not (captions := _choose_captions(session)):
        return None
    options = {"dtype": engine.fingerprint()["dtype"], "device": str(engine.device)}
    try:
        pipeline = Pipeline(build_engine(engine.name, engine.model, {task: decoder}, **options))
        size = min(len(captions), pipeline.engine.suggested_batch())
        steps = min(STEPS, engine.model.defaults.steps)
        samples = pipeline(captions, tasks=(task,), steps=steps, batch_size=size).samples
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    outside = sum(sample.trust is not None and (sample.trust.domain or 0) > 1 for sample in samples)
    check = SelfCheck(samples, outside)
    storage.publish({folder / "training" / NAME: (json.dumps(check.document, indent=2) + "\n").encode()})
    return check


def _choose_captions(session: TrainingSession) -> list[str]:
    """Captions of training images from all over the data, of those that the text encoder reads whole."""
    tokenizer, numbers = session.engine.model.tokenizer, session.split[0]
    captions = [session.source[number].caption for number in numbers[:: -(-len(numbers) // MOST_READ)]]
    short = [text for text in captions if len(tokenizer(text).input_ids) <= tokenizer.model_max_length]
    count = min(SAMPLES, len(short))
    return [short[k * len(short) // count] for k in range(count)]


def read_check(folder: Path) -> Mapping[str, Any] | None:
    """The counts of a decoder's self-check."""
    path = folder / "training" / NAME
    return read_state(path, {"samples": int, "out_of_domain": int}) if path.exists() else None
