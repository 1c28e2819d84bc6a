"""The final decoder beside those of the folds, on the same images: a training that ended badly shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.training import predictions
from datasetdm_fast.training.cross_validation import NAME, fold_folder
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.task_training import TaskPlan

MOST_IMAGES = 100  # that they are compared on
LEVEL = 0.995  # of the one-sided prediction interval of one more decoder
LEAST_SPREAD = 0.02  # relative standard deviation: folds may agree by chance


def compare_with_folds(
    session: TrainingSession, plan: TaskPlan, folder: Path, folds: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of the folds with the figures of the final decoder and theirs on all images, most of which each of
    them has learned from, and with the bound that one more such decoder keeps to.
    """
    task, count, numbers = plan.decoder.task, folds["folds"], session.numbers
    views = session.views(task, numbers[:: -(-len(numbers) // MOST_IMAGES)], 1)
    name = METRICS[task].figure
    folders = [folder, *(fold_folder(folder, count, number) for number in range(1, count + 1))]
    labels = (session.predictor(plan).predict(load_decoder(place), views) for place in folders)
    figures = [predictions.score(task, views, each).result().get(name) for each in labels]
    final, *others = [float(figure) for figure in figures if figure is not None] or [0.0]
    if len(others) < count:
        return {**folds}  # all truth is ignored
    document = {**folds, "final": {"figure": name, "value": final, "folds": others, "bound": bound_of(task, others)}}
    storage.publish({folder / "training" / NAME: (json.dumps(document, indent=2) + "\n").encode()})
    return document


def bound_of(task: str, figures: list[float]) -> float:
    """The worst figure that one more decoder of this kind has in 199 of 200 trainings."""
    mean, count = float(np.mean(figures)), len(figures)
    spread = max(float(np.std(figures, ddof=1)), LEAST_SPREAD * abs(mean))
    reach = float(stats.t.ppf(LEVEL, count - 1)) * spread * (1 + 1 / count) ** 0.5
    return mean + reach if METRICS[task].less_is_better else mean - reach


def is_worse(task: str, final: Mapping[str, Any]) -> bool:
    """Whether the final decoder is outside of the spread of the folds, on the worse side."""
    difference = final["value"] - final["bound"]
    return difference > 0 if METRICS[task].less_is_better else difference < 0
