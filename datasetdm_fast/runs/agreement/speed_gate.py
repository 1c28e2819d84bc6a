"""The gate of an approximate speed: whether labels fit the images that it makes as they fit exact images.

Each image is labelled as it is sampled, and once more by the exact engine as a picture that exists. The agreement of
the two on exact images is the noise floor.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast import kernels
from datasetdm_fast.config import FAST, FP8
from datasetdm_fast.data import Annotation, Batch, DepthMap, Keypoints, Quarantined, Sample
from datasetdm_fast.disk import storage
from datasetdm_fast.engine import loop
from datasetdm_fast.engine.decoders.config import SHIPPED
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.loading.model import digest
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.calls import SpeedCalls
from datasetdm_fast.engine.loop.class_prompts import TIMESTEPS
from datasetdm_fast.engine.loop.inverting import inversion_generator, inversion_recipe
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.pictures.framing import PicturesInMemory
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import pretty
from datasetdm_fast.untrusted import documents

IMAGES, DEMO_IMAGES = 200, 64  # that are compared, of any model and of one that is shipped
MOST_LOST = {"IoU": 0.01, "PCK": 0.01, "REL": 0.002, "doubtful": 0.01}
ERRORS = ("REL", "doubtful")  # which are better where they are less
# relative distance of a call at a speed from the exact one; fp8 rounds to 0.01 to 0.07, own deep features to nothing
FARTHEST, FARTHEST_CACHED = 0.25, 0.05
NEAR = 0.1  # of a person's longer side: a joint as near as this is found, as in PCK@0.1
REPORT = "This is a mistake of the program: drop --speed, and report it."
LARGEST_FIGURES = 2**20  # bytes
# settings that figures do not hang on, or that recipes and digests stand for
UNREAD = "number per_class seed batch_size image_format model decoder speed layout shard_size".split()


@dataclass(frozen=True)
class LabelFigure:
    """One figure of the agreement, on exact images and on those of the speed."""

    measure: str  # "IoU semantic"
    exact: float
    speed: float
    limit: float  # that it may be worse by

    @property
    def is_passed(self) -> bool:
        worse = self.speed - self.exact if self.measure.split()[0] in ERRORS else self.exact - self.speed
        return bool(worse <= self.limit)


def count_images(job: Job) -> int:
    """How many images are compared: other seeds of the same prompts where the run has fewer."""
    most = DEMO_IMAGES if job.document["config"].get("model") in SHIPPED else IMAGES
    return min(most, job.plan.number) if job.plan.has_seeds else most


def count_calls(job: Job, exact: Recipe) -> int:
    """U-Net calls of what the cache does not hold."""
    recipes = [recipe for recipe in (job.recipe, exact) if not _place(job, recipe, exact).exists()]
    batches = -(-count_images(job) // job.plan.batch_size)
    labels = len(exact.captured) * bool(exact.captures) + bool(exact.attention) * len(TIMESTEPS)
    return batches * sum(len(recipe.schedule) + labels for recipe in recipes)


def judge_speed(job: Job, exact: Recipe, on_unet_call: Callable[[], None]) -> dict[str, Any]:
    """The verdict on a job's recipe as run.json has it, from the cache where nothing changed; `exact` has no speed."""
    check_promise(job.recipe)
    check_call(job)
    speed_figures, exact_figures = (
        _cached(_place(job, recipe, exact), partial(_figures, job, recipe, exact, on_unet_call))
        for recipe in (job.recipe, exact)
    )
    figures = [
        LabelFigure(name, exact_figures[name], value, MOST_LOST[name.split()[0]])
        for name, value in speed_figures.items()
    ]
    return {
        "name": job.recipe.facts["speed"],
        "number": count_images(job),
        "passed": all(figure.is_passed for figure in figures),
        "measures": [asdict(figure) | {"passed": figure.is_passed} for figure in figures],
    }


def check_promise(recipe: Recipe) -> None:
    """Refuses a recipe that is not what its speed is called: labels may fit images of far fewer calls as well."""
    name, calls = recipe.facts["speed"], len(recipe.schedule)
    if FAST in name and calls != 25:
        raise GateFailed(f"--speed {name}: it makes {calls} calls, not 25; nothing was written", REPORT)
    whole = [call for call in range(calls) if call not in recipe.cached and call not in recipe.captured[-1:]]
    if recipe.cached & {0, 1, 2, *recipe.captured} or any(
        call - max(other for other in whole if other < call) > 2 for call in recipe.cached
    ):
        raise GateFailed(f"--speed {name}: not every third call is whole; nothing was written", REPORT)
    if name == FP8 and recipe.fp8 & {0, calls - 1, *recipe.captured}:
        raise GateFailed(f"--speed {name}: its first, last or captured calls are in fp8; nothing was written", REPORT)


def check_call(job: Job) -> None:
    """Refuses a speed one call of which is not nearly the exact one: labels may fit other images as well."""
    engine, recipe, requests = job.engine, job.recipe, next(_batches(job)).padded
    if not (calls := sorted(recipe.fp8 | recipe.cached)):
        return
    text, _ = driver.BatchGenerator(engine, recipe, lambda: None).encode_prompts(requests)
    timestep = recipe.schedule.timesteps[calls[len(calls) // 2]]
    inputs = recipe.origin.begin(engine, recipe.schedule, requests).latents, timestep, text
    exact = engine.denoise(*inputs)
    others = SpeedCalls(engine, {1} if recipe.cached else (), {1} if recipe.fp8 else ())
    if recipe.cached:
        others.denoise(0, inputs[0], recipe.schedule.timesteps[0], text)  # whose deep features the next call replaces
        others.denoise(0, *inputs)
    distance = float((others.denoise(1, *inputs) - exact).norm() / exact.norm())
    limit = FARTHEST_CACHED if recipe.cached else FARTHEST
    if not distance <= limit:
        cause = f"a call is {distance:.2g} from the exact one, beyond {limit}; nothing was written"
        raise GateFailed(f"--speed {recipe.facts['speed']}: {cause}", REPORT)


def _cached(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    with suppress(Refused):  # a damaged file is measured again
        if path.exists():
            return documents.read_object(path, most=LARGEST_FIGURES)
    figures = measure()
    storage.make_folder(path.parent)
    storage.publish({path: pretty(figures)})
    return figures


def _place(job: Job, recipe: Recipe, exact: Recipe) -> Path:
    """Where the cache keeps the figures of a recipe."""
    document, rooms = job.document, (Path(loop.__file__).parents[1], Path(kernels.__file__).parent)
    parts = {
        "recipes": [dict(exact.facts), dict(recipe.facts)],
        "model": document["model"]["digests"],
        "decoders": {name: entry["digest"] for name, entry in document["decoders"].items()},
        "config": {name: value for name, value in document["config"].items() if name not in UNREAD},
        "images": count_images(job),
        "engine": document["engine"],
        "code": digest([*sorted(path for room in rooms for path in room.rglob("*.py")), Path(__file__)]),
    }
    return storage.cache_folder() / "speed" / f"{hashlib.sha256(pretty(parts)).hexdigest()[:32]}.json"


def _figures(job: Job, recipe: Recipe, exact: Recipe, on_unet_call: Callable[[], None]) -> dict[str, float]:
    """The agreement of the labels of images that `recipe` makes with those of the exact engine of the same images."""
    results = list(_results(job, recipe, on_unet_call))
    size = recipe.size
    images = [result.image if isinstance(result, Sample) else np.zeros((size, size, 3), np.uint8) for result in results]
    inverted = inversion_recipe(exact, job.engine, TIMESTEPS)
    make = inversion_generator(PicturesInMemory(images))
    truths = list(_results(job, inverted, on_unet_call, make))
    pairs = [
        (first, second)
        for first, second in zip(results, truths, strict=True)
        if isinstance(first, Sample) and isinstance(second, Sample)
    ]
    figures: dict[str, float] = {}
    for task in recipe.tasks:
        values = [_agreement(task, first.annotations[task], second.annotations[task]) for first, second in pairs]
        for name in dict.fromkeys(name for name, _ in filter(None, values)):
            known = [value[1] for value in values if value is not None and not np.isnan(value[1])]
            figures[f"{name} {task}"] = float(np.mean(known)) if known else 1.0
    doubtful = sum(isinstance(result, Quarantined) or result.is_doubtful for result in results)
    return figures | {"doubtful": doubtful / len(results)}


def _results(
    job: Job, recipe: Recipe, on_unet_call: Callable[[], None], make: Callable[..., Any] | None = None
) -> Iterator[Sample | Quarantined]:
    for _, results in driver.generate(_batches(job), job.engine, recipe, on_unet_call, make):
        yield from results


def _batches(job: Job) -> Iterator[Batch]:
    return job.plan.batches_of(range(count_images(job)))


def _agreement(task: str, label: Annotation, truth: Annotation) -> tuple[str, float] | None:
    """A figure's name and its value for one image; None for labels that cannot be compared so."""
    if isinstance(truth, DepthMap):
        return "REL", kind_of(task).distance(label, truth)
    name, compare = ("PCK", _share_of_joints) if isinstance(truth, Keypoints) else ("IoU", kind_of(task).overlap)
    # both ways: what one of the two alone shows counts, whichever it is
    values = [value for value in (compare(label, truth), compare(truth, label)) if value is not None]
    return (name, float(np.fmin.reduce(values))) if values else None


def _share_of_joints(label: Any, truth: Keypoints) -> float:
    """The share of the seen joints of `truth` that a person of `label` has near; NaN where it shows none."""
    hits = seen = 0
    for points, visibility in zip(truth.points[..., :2], truth.visibility):
        shown = points[visibility > 0]
        if not len(shown):
            continue
        side = max(float(np.ptp(shown, axis=0).max()), 1.0)
        near = [
            (np.linalg.norm(other[visibility > 0] - shown, axis=-1) <= NEAR * side).sum()
            for other in label.points[..., :2]
        ]
        hits, seen = hits + max(near, default=0), seen + len(shown)
    return hits / seen if seen else float("nan")
