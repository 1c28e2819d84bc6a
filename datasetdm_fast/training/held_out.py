"""The images a decoder is not taught from, and how it scores on them."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.decoders.checkpoint import Decoder, fold
from datasetdm_fast.engine.engines.device import allow_tf32
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.engine.tasks.outlines import read_labels
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.split import groups
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.meter import Meter
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.loop import projected

LEAST_IMAGES = 10  # images below which none is held out
FOLDS = 5  # of `--folds auto`
ENOUGH_IMAGES = 30  # held-out images below which no step is chosen by a figure, and it is told with a warning
NAMED = 5  # classes that a warning lists


def split(source: LabelledSource, numbers: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The item numbers to learn from, and those held out, both in their order; items that were made of one picture are
    on the same side, and so are the frames of a sequence unless none could be held out then.
    """
    count = len(numbers)
    wanted = min(max(round(share * count), 1), count - 1) if share and count >= LEAST_IMAGES else 0
    held: set[int] = set()
    for of_one in (source.filmed_in, source.made_of):
        held = held or _held(groups([of_one(number) for number in numbers]), wanted, seed)
    return [n for k, n in enumerate(numbers) if k not in held], [n for k, n in enumerate(numbers) if k in held]


def _held(numbered: Sequence[int], wanted: int, seed: int) -> set[int]:
    """The places that are held out of items with these numbers of their groups: whole groups of `wanted` items at most,
    or else the smallest group, if it is no more than half of all.
    """
    count = len(numbered)
    members = defaultdict(list)
    for place, group in enumerate(numbered):
        members[group].append(place)
    held: set[int] = set()
    for place in np.random.default_rng([seed, count]).permutation(count).tolist() if wanted else ():
        if place not in held and len(held) + len(members[numbered[place]]) <= wanted:
            held.update(members[numbered[place]])
    if wanted and not held and 2 * len(smallest := min(members.values(), key=len)) <= count:
        held.update(smallest)
    return held


def answers(
    decoder: Decoder,
    lessons: TrainingViews,
    words: Tensor | None,
    size: int,
    device: torch.device,
    tokenizer: Callable[..., object],
    batch_size: int = 8,
    views: Sequence[int] | None = None,
) -> list[Annotation]:
    """What a decoder in training says about each view, or some of them, as it would once loaded."""
    ready = fold(copy.deepcopy(decoder)).to(device)
    config, found = METRICS[ready.config.task].reading(ready.config), []
    asked = lessons.source.thing_classes if words is not None else ()
    with torch.inference_mode():
        chosen = range(len(lessons)) if views is None else views
        for start in range(0, len(chosen), batch_size):
            some = chosen[start : start + batch_size]
            text = None if words is None else words.to(device)[None].expand(len(some), -1, -1)
            levels = [level.to(device) for level in lessons.captures.batch(some)]
            allow_tf32(device, False)  # what an engine that made them in another precision has just set
            raw = ready(projected(ready, levels), text)
            items = [lessons.item(view) for view in some]
            raw = held_to(raw, config, lessons.captions(items), asked, tokenizer=tokenizer)
            words_asked = {"words": asked} if asked else {}
            found += read_labels(raw, (item.image for item in items), config, size, **words_asked)
    return found


def score(task: str, lessons: TrainingViews, found: Sequence[Annotation], views: Sequence[int] | None = None) -> Meter:
    """The meter of a task after all views, or some of them."""
    meter = METRICS[task](lessons.source)
    for view, label in zip(range(len(lessons)) if views is None else views, found, strict=True):
        meter.add(lessons.item(view), label)
    return meter


def classes_shown(learnt: TrainingViews) -> int:
    """How many classes the images show that a decoder learns from."""
    draws = learnt.settings.draws
    return len({int(k) for image in range(len(learnt.numbers)) for k in learnt.target(image * draws).classes})


def unrelated(source: LabelledSource, numbers: Sequence[int]) -> int:
    """How many groups some items are in, if those that were made of one picture are in the same: at most so many folds
    can be made of them.
    """
    return len(set(groups([source.made_of(number) for number in numbers])))


def are_enough(images: int) -> bool:
    """Whether a figure on so many images can be relied on, to choose by, too."""
    return images >= ENOUGH_IMAGES


def cautions(result: Mapping[str, Any], has_folds: bool = False) -> list[str]:
    """What to know of the held-out figures of a result; `has_folds` where cross-validation has better ones."""
    found, images = [], result["held_out_images"]
    if result.get("step_chosen_on_held_out"):
        found.append("the step of the weights was chosen on the same images, so that other images will score lower")
    few = f"{count_noun(images, 'image is', 'images are')} too few for a figure to rely on"
    apart = result.get("unrelated_images", images + result["images"])  # results of earlier versions lack it
    if not images and has_folds:
        found.append("no image was held out to measure it: see the figures of cross-validation")
    elif not images and apart < 2:
        found.append("no image was held out to measure it: evaluate on other data")
    elif not images:
        folds = min(FOLDS, apart) if result["images"] >= LEAST_IMAGES else 2
        found.append(
            f"no image was held out to measure it: --folds {folds} measures on all of them by cross-validation; or "
            "evaluate on other data"
        )
    elif not are_enough(images) and has_folds:
        found.append(f"{few}: see those of cross-validation")
    elif not are_enough(images):
        is_possible = (images + result["images"]) // 2 >= ENOUGH_IMAGES
        more = f"raise --held-out to {ENOUGH_IMAGES} images or more, or " if is_possible else ""
        found.append(
            f"{few}: --folds auto measures on all of them by cross-validation ({min(FOLDS, apart)} more trainings); or "
            f"{more}evaluate on other data"
        )
    if lacking := result.get("not_shown"):
        names = ", ".join(lacking[:NAMED]) + (f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else "")
        them = "it" if len(lacking) == 1 else "them"
        found.append(f"no held-out image shows {names}: means leave {them} out, and intervals allow for any score")
    if images and result.get("outlines") == FROM_IMAGE:
        found.append("labels have outlines that follow the image; figures of single steps were measured without them")
    if result.get("named_by_captions") and (images or has_folds):
        found.append(
            "where an image's caption names classes, only these were looked for; evaluate --captions unread measures "
            "without this"
        )
    return found


def is_better(task: str, value: float, best: float | None) -> bool:
    return best is None or (value < best if METRICS[task].less_is_better else value > best)
