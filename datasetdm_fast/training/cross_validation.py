"""K-fold cross-validation: every image is scored once, by a decoder that was trained on other images only.

FOLDER/training/folds-K/1, 2 ...   the decoders of the folds, each trained and resumed like any other
FOLDER/training/folds.json         the figures over all images, with their intervals
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.training import checkpoint, predictions
from datasetdm_fast.training.evaluation.meter import intervals
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.settings import TaskSettings
from datasetdm_fast.training.splits import are_enough, split_folds
from datasetdm_fast.training.task_training import TaskPlan, find_result, read_state, run_training

NAME = "folds.json"
FORM = {"folds": int, "images": int, "held_out": dict, "held_out_intervals": dict}
MOST_IMAGES = 100  # that they are compared on
LEVEL = 0.995  # of the one-sided prediction interval of one more decoder
LEAST_SPREAD = 0.02  # relative standard deviation: folds may agree by chance


def cross_validate(
    session: TrainingSession,
    task: str,
    folder: Path,
    count: int,
    settings: TaskSettings,
    progress: Callable[[int, int], Any],
    is_stopping: Callable[[], bool],
) -> dict[str, Any] | None:
    """The figures, or None where it was stopped; the same call then resumes. `progress` gets the number and the steps
    of a fold, and returns a context with `on_step`.
    """
    path, has_changed = folder / "training" / NAME, False
    folds = split_folds(session.source, session.numbers, count, session.view_settings.seed)
    for number, fold in enumerate(folds, 1):
        inner, place = without_fold(session, fold), fold_folder(folder, count, number)
        plan = inner.plan(task)
        plan = replace(plan, settings={**plan.settings, "fold": f"{number} of {count}"})
        if find_result(place, plan) is None:
            has_changed = True
            with progress(number, plan.schedule.steps) as shown:
                training = inner.open_training(place, plan, settings, is_stopping)
                if training is None or run_training(training, shown.on_step, is_stopping) is None:
                    return None
            del training
            gc.collect()  # a trainer refers to itself, and so to its captures and targets
        else:
            checkpoint.remove(place / "training")
    if not has_changed and (stored := read_folds(folder)) is not None and stored["folds"] == count:
        return stored
    meter = METRICS[task](session.source)
    for number, fold in enumerate(folds, 1):
        views = session.views(task, fold, 1)
        decoder = load_decoder(fold_folder(folder, count, number))
        for view, label in enumerate(session.predictor(plan).predict(decoder, views)):
            meter.add(views.item(view), label)
    document = {
        "task": task,
        "folds": count,
        "images": meter.count,
        "held_out": meter.result(),
        "held_out_intervals": intervals(meter, folds=count),
    }
    storage.publish({path: (json.dumps(document, indent=2) + "\n").encode()})
    return document


def without_fold(session: TrainingSession, fold: Sequence[int]) -> TrainingSession:
    """The session of the decoder that is scored on a fold: of its other images some are held out only if they are
    enough to choose weights by.
    """
    excluded = set(fold)
    inner = replace(session, numbers=tuple(item for item in session.numbers if item not in excluded))
    return inner if are_enough(len(inner.split[1])) else replace(inner, held_out=0.0)


def fold_folder(folder: Path, count: int, number: int) -> Path:
    return folder / "training" / f"folds-{count}" / str(number)


def read_folds(folder: Path) -> dict[str, Any] | None:
    """The figures of cross-validation in a decoder's folder."""
    path = folder / "training" / NAME
    return read_state(path, FORM) if path.exists() else None


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
    reach = float(special.stdtrit(count - 1, LEVEL)) * spread * (1 + 1 / count) ** 0.5
    return mean + reach if METRICS[task].less_is_better else mean - reach


def is_worse(task: str, final: Mapping[str, Any]) -> bool:
    """Whether the final decoder is outside of the spread of the folds, on the worse side."""
    difference = final["value"] - final["bound"]
    return difference > 0 if METRICS[task].less_is_better else difference < 0
