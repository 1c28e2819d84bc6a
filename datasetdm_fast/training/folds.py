"""Figures of k-fold cross-validation: every image is judged once, by a decoder that has learnt from other images only.

FOLDER/training/folds-K/1, 2 ...   the decoders of the folds, each trained and resumed as the decoder itself
FOLDER/training/folds.json         the figures over all images, with their intervals
"""

import gc
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.command_line.progress import StepProgress
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.split import groups
from datasetdm_fast.training import held_out, task_run
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.intervals import intervals
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.page import SHOWN
from datasetdm_fast.training.processes import Ranks
from datasetdm_fast.training.session import TrainingSession

NAME = "folds.json"
FORM = {"folds": int, "images": int, "held_out": dict, "held_out_intervals": dict}


def count_of(session: TrainingSession) -> int:
    """How many folds are asked for; `auto` asks for five where the held-out images are too few for a figure, or for as
    many as there are images that were not made of one picture.
    """
    asked, images = session.config.folds, len(session.numbers)
    held = len(session.parts[1])
    if asked == "no":
        return 0
    if asked == "auto":
        is_wanted = not held_out.are_enough(held) and images >= held_out.LEAST_IMAGES
        apart = held_out.unrelated(session.source, session.numbers) if is_wanted else 0
        return min(held_out.FOLDS, apart) if apart > 1 else 0
    if int(asked) > images:
        told = count_noun(images, "image")
        raise Refused(f"--folds: {asked} folds of {told}", "Ask for no more folds than there are images.")
    return int(asked)


def parts(source: LabelledSource, numbers: Sequence[int], folds: int, seed: int) -> list[list[int]]:
    """The item numbers of each fold, as equal as may be; items that were made of one picture are in the same fold, and
    so are the frames of a sequence where there are as many sequences as folds.
    """
    members = _grouped(numbers, source.filmed_in)
    if len(members) < folds:
        members = _grouped(numbers, source.made_of)
    found: list[list[int]] = [[] for _ in range(folds)]
    for group in np.random.default_rng([seed, folds, len(numbers)]).permutation(sorted(members)).tolist():
        min(found, key=len).extend(members[group])
    if not all(found):
        told = count_noun(len(members), "picture")
        raise Refused(f"--folds: {folds} folds of {told}", "Ask for no more folds than pictures.")
    return [sorted(fold) for fold in found]


def _grouped(numbers: Sequence[int], of_one: Callable[[int], tuple[str, ...]]) -> dict[int, list[int]]:
    """The item numbers by the number of their group, whose items have something of what `of_one` says in common."""
    members = defaultdict(list)
    for number, group in zip(numbers, groups([of_one(number) for number in numbers])):
        members[group].append(number)
    return members


def run(
    session: TrainingSession,
    task: str,
    folder: Path,
    ranks: Ranks,
    progress: Callable[[int, int], StepProgress],
    is_stopping: Callable[[], bool],
) -> dict[str, Any] | None:
    """The figures, or None where it was stopped; the same call again goes on. `progress` shows the steps of a
    fold, from its number and how many they are.
    """
    count, model = count_of(session), session.engine.model
    path, meter, has_changed = folder / "training" / NAME, METRICS[task](session.source), False
    folds = parts(session.source, session.numbers, count, session.config.seed)
    for number, fold in enumerate(folds, 1):
        inner = _without(session, fold)
        plan = inner.plan(task)
        plan = replace(plan, settings={**plan.settings, "fold": f"{number} of {count}"})
        place = folder / "training" / f"folds-{count}" / str(number)
        if task_run.finished(place, plan) is None:
            has_changed = True
            if not _is_trained(inner, place, plan, ranks, progress(number, plan.schedule.steps), is_stopping):
                return None
            gc.collect()  # a trainer refers to itself, and with it to its captures and targets
        elif ranks.is_first:
            task_run.clear(place)
    if not has_changed and (found := read(folder)) is not None and found["folds"] == count:
        return found
    for number, fold in enumerate(folds, 1):
        views = session.views(task, fold, 1)
        if ranks.is_first:
            decoder = load_decoder(folder / "training" / f"folds-{count}" / str(number))
            given = (plan.words, model.size, session.engine.device, model.tokenizer)
            for view, label in enumerate(held_out.answers(decoder, views, *given)):
                meter.add(views.item(view), label)
    document = None
    if ranks.is_first:
        document = {
            "task": task,
            "folds": count,
            "images": meter.count,
            "held_out": meter.result(),
            "held_out_intervals": intervals(meter, folds=count),
        }
        storage.publish({path: (json.dumps(document, indent=2) + "\n").encode()})
    return ranks.said(document)


def _without(session: TrainingSession, fold: Sequence[int]) -> TrainingSession:
    """The training of the decoder that judges a fold: of its other images some are held out only where they are enough
    to choose a step by.
    """
    judged = set(fold)
    inner = replace(session, numbers=tuple(item for item in session.numbers if item not in judged))
    if held_out.are_enough(len(inner.parts[1])):
        return inner
    return replace(inner, config=replace(session.config, held_out=0.0))


def _is_trained(
    inner: TrainingSession,
    place: Path,
    plan: task_run.TaskPlan,
    ranks: Ranks,
    progress: StepProgress,
    is_stopping: Callable[[], bool],
) -> bool:
    """Trains the decoder of a fold; whether it was not stopped."""
    with progress as shown:
        training = inner.training(place, plan, is_stopping)
        return training is not None and task_run.run(training, ranks, shown.on_step, is_stopping) is not None


def shown(session: TrainingSession, task: str, folder: Path) -> tuple[TrainingViews, Path] | None:
    """Images of the first fold for the page, with the folder of the decoder that has not seen them."""
    if not (count := count_of(session)):
        return None
    first = parts(session.source, session.numbers, count, session.config.seed)[0]
    return session.views(task, first[:SHOWN], 1), folder / "training" / f"folds-{count}" / "1"


def read(folder: Path) -> dict[str, Any] | None:
    """The figures that a decoder's folder has."""
    path = folder / "training" / NAME
    return task_run.read_state(path, FORM) if path.exists() else None
