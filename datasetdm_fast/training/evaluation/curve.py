"""The learning curve: figures by the number of labelled images, and a forecast for more of them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import data_record
from datasetdm_fast.training.captures.views import ViewSettings
from datasetdm_fast.training.evaluation.intervals import expanded_level
from datasetdm_fast.training.evaluation.measure import ScoreSettings, check_shown, measure
from datasetdm_fast.training.evaluation.meter import check_count
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.evaluation.settings import ANY_SIZE
from datasetdm_fast.training.readers import RENDERED_KINDS, parse_address
from datasetdm_fast.training.recipes import RecipeSettings
from datasetdm_fast.training.session import train_decoder

MORE = 50  # labels that the forecast adds
FLOORS = np.linspace(0, 0.99, 100)  # shares of the smallest error tried as the one that no number of labels removes
POINTS_FOR_FLOOR = 4  # counts below which the error is taken to fall to nothing
TRAIN = "train"  # the split of an address that names none
SMALLEST = 1e-6  # error whose logarithm is still taken


@dataclass(frozen=True)
class PowerLaw:
    """Error = floor + scale * labels ** -exponent, the usual learning curve; arrays hold a law each."""

    floor: np.ndarray  # [B]
    scale: np.ndarray
    exponent: np.ndarray

    def at(self, labels: float) -> np.ndarray:
        return self.floor + self.scale * labels**-self.exponent


def power_law(counts: Sequence[int], errors: np.ndarray) -> PowerLaw:
    """The laws nearest to errors [B, counts], by squares of the logarithm; an error never grows with labels."""
    errors = np.maximum(np.asarray(errors, np.float64), SMALLEST)
    x = np.log(np.asarray(counts, np.float64))
    spread = x - x.mean()
    shares = FLOORS if len(counts) >= POINTS_FOR_FLOOR else FLOORS[:1]
    floors = shares[:, None] * errors.min(1)  # [F, B]
    y = np.log(errors - floors[..., None])
    exponent = np.maximum(-(y * spread).sum(2) / (spread**2).sum(), 0)
    scale = np.exp(y.mean(2) + exponent * x.mean())
    fitted = floors[..., None] + scale[..., None] * np.exp(-exponent[..., None] * x)
    best = ((np.log(fitted) - np.log(errors)) ** 2).sum(2).argmin(0)
    return PowerLaw(*(np.take_along_axis(values, best[None], 0)[0] for values in (floors, scale, exponent)))


def error_of(task: str, values: np.ndarray) -> np.ndarray:
    """The distance of figures from perfect ones; its own inverse."""
    return np.asarray(values) if METRICS[task].less_is_better else 1 - np.asarray(values)


def forecast(
    task: str, counts: Sequence[int], values: np.ndarray, draws: np.ndarray, more: int, level: float
) -> dict[str, Any]:
    """The gain of `more` labels, from the figure [counts] and its bootstrap draws [B, counts]; a gain is less error."""
    law, resampled = power_law(counts, error_of(task, values)[None]), power_law(counts, error_of(task, draws))
    last, labels = counts[-1], counts[-1] + more
    error = float(law.at(labels)[0])
    return {
        "fit": {name: float(getattr(law, name)[0]) for name in ("floor", "scale", "exponent")},
        "more": {
            "labels": labels,
            "value": float(error_of(task, np.array(error))),
            "gain": float(law.at(last)[0]) - error,
            "interval": bounds(resampled.at(last) - resampled.at(labels), level),
        },
    }


def bounds(values: np.ndarray, level: float) -> list[float]:
    """Both ends of the interval that holds a share `level` of the values."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


def learning_curve(
    task: str,
    counts: Sequence[int],
    repeats: int,
    score: Callable[[int, int], Any],
    *,
    bootstrap: int,
    level: float,
    more: int = MORE,
) -> dict[str, Any]:
    """The task's figure at every count, with intervals over images and repeats, and the forecast.

    `score(count, repeat)` is the meter of a decoder trained on that many labels; all meters scored the same images.
    """
    figure, draws, figures = METRICS[task].figure, [], []
    random = np.random.default_rng(0)
    for count in counts:
        meters = [score(count, repeat) for repeat in range(repeats)]
        figures.append([check_count(meter)[figure] for meter in meters])
        of_meters = np.stack([meter.draws(max(bootstrap, 2))[figure] for meter in meters])
        draws.append(of_meters[random.integers(repeats, size=of_meters.shape[1]), np.arange(of_meters.shape[1])])
    values, resampled = np.array([float(np.mean(repeated)) for repeated in figures]), np.stack(draws, 1)
    is_known = np.isfinite(resampled).all(1)  # a draw none of whose images shows anything has no figure
    resampled = resampled[is_known] if is_known.any() else values[None]
    level = expanded_level(level, meters[0].telling)
    points = [
        {"labels": count, "value": value, "interval": bounds(column, level), "repeats": repeated}
        for count, value, column, repeated in zip(counts, values.tolist(), resampled.T, figures, strict=True)
    ]
    return {"figure": figure, "points": points} | forecast(task, counts, values, resampled, more, level)


def parse_counts(words: Sequence[str]) -> list[int]:
    """--curve's numbers, rising."""
    if not all(re.fullmatch(r"[1-9]\d{0,8}", word) for word in words) or len(words) < 2:
        raise Refused(
            f"--curve: {','.join(words)} is not two or more numbers of labels", "For example --curve 10,30,100,300."
        )
    return sorted({int(word) for word in words})


def training_address(data: str, learn_from: str, most: int) -> str:
    """The address of the images to train on, which are not those for scoring."""
    if not learn_from:
        if (kind := data.partition(":")[0]) in RENDERED_KINDS:
            learn_from = f"{kind}:{most}@1000"
        elif not data.startswith("vkitti2:"):  # whose address without brackets is every scene
            match = re.fullmatch(r"(.+)\[(.+)\]", data)
            learn_from = match[1] if match else ""
    if not learn_from or _place(learn_from) == _place(data) or _share_scenes(learn_from, data):
        raise Refused(
            f"--data {data} names the images for scoring, so none are left to train on",
            "Name other images to learn from with --learn-from DATA.",
        )
    return learn_from


def _place(address: str) -> tuple[str, Path, str]:
    """Where the images of an address lie, however it is written: a split may be a folder of its own."""
    kind, path, split = parse_address(address) or (address, Path(), None)
    path, split = path.resolve(), split or TRAIN
    return (kind, path / split, TRAIN) if (path / split).is_dir() else (kind, path, split)


def _share_scenes(*addresses: str) -> bool:
    """Whether two addresses of rendered scenes name some of the same."""
    matches = [re.fullmatch(rf"({'|'.join(RENDERED_KINDS)}):(\d+)(?:@(\d+))?", address) for address in addresses]
    if not all(matches) or matches[0][1] != matches[1][1]:
        return False
    (first, end), (other, other_end) = ((int(match[3] or 0), int(match[3] or 0) + int(match[2])) for match in matches)
    return first < other_end and other < end


@dataclass(frozen=True)
class CurveSettings:
    """How the decoders of a learning curve are trained, and on what they run."""

    repeats: int = 1  # decoders with other seeds
    steps: int = 0  # 0 = the usual number
    more: int = MORE
    skip_bad: bool = False
    engine: str = "auto"
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class LearningCurve:
    """A learning curve to be measured: its numbers of labels, and the data sets to train and to score on."""

    counts: list[int]
    address: str  # of the images to train on
    data: str  # address of those for scoring
    tasks: tuple[str, ...]

    @classmethod
    def open(
        cls, words: Sequence[str], learn_from: str, data: str, tasks: Sequence[str], open_source: Callable[..., Any]
    ) -> Self:
        """Checks, before a model loads, that the data sets can be read and have enough images."""
        counts = parse_counts(words)
        address = training_address(data, learn_from, counts[-1])
        tasks = tuple(tasks) or open_source(data, ANY_SIZE, ()).tasks[:1]
        open_source(data, ANY_SIZE, tasks)
        curve = cls(counts, address, data, tasks)
        for task in tasks:
            curve.check_enough(open_source(address, ANY_SIZE, (task,)))
        return curve

    def check_enough(self, source: LabelledSource) -> None:
        if self.counts[-1] > len(source):
            raise Refused(
                f"--curve: {self.counts[-1]} labels, but {self.address} has {len(source)} of the selected images",
                "Ask for fewer.",
            )

    def measure(
        self,
        engine: Any,
        task: str,
        open_selected: Callable[..., LabelledSource],
        open_whole: Callable[..., LabelledSource],
        scoring: ScoreSettings,
        settings: CurveSettings,
        on_images: Callable[[int, int, str], None],
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The curve of a task, and the images that were skipped."""
        size = engine.model.size
        labelled, scored = open_selected(self.address, size, (task,)), open_whole(self.data, size, (task,))
        check_shown(scored, task)  # which is else noticed only once a decoder is trained
        if settings.skip_bad:
            labelled = labelled.readable()
        self.check_enough(labelled)

        def score(count: int, repeat: int) -> Any:
            seed = scoring.seed + repeat
            options = {
                "view_settings": ViewSettings(captions=scoring.captions, seed=seed),
                "recipe_settings": RecipeSettings(steps=settings.steps, seed=seed),
            }
            decoder = train_decoder(engine, labelled, task, count, self.address, **options)
            decoders = {task: fold(decoder).requires_grad_(False)}
            reader = build_engine(settings.engine, engine.model, decoders, dtype=settings.dtype, device=settings.device)
            title = f"{task}, {count} labels"
            return measure(reader, scored, (task,), scoring, lambda done, total: on_images(done, total, title))[task]

        bounds = {"bootstrap": scoring.bootstrap, "level": scoring.level, "more": settings.more}
        result = learning_curve(task, self.counts, settings.repeats, score, **bounds) | {"captions": scoring.captions}
        if seen := data_record.count_shared(scored, labelled, self.counts[-1]):
            result["seen_in_training"] = seen
        return result, labelled.skipped | scored.skipped
