"""K-fold cross-validation: every image is scored once, by a decoder that was trained on other images only.

FOLDER/training/folds-K/1, 2 ...   the decoders of the folds, each trained and resumed like any other
FOLDER/training/folds.json         the figures over all images, with their intervals
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.training import checkpoint
from datasetdm_fast.training.evaluation.intervals import intervals
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.splits import are_enough, split_folds
from datasetdm_fast.training.task_training import TaskSettings, find_result, read_state, run_training

NAME = "folds.json"
FORM = {"folds": int, "images": int, "held_out": dict, "held_out_intervals": dict}


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
