"""python -m bench curve: the figures of decoders by the number of labelled images, and a forecast for more of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_end, print_result
from datasetdm_fast.config import TASKS
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.training.evaluation.meter import check_count, expanded_level, figure_name, nothing_shown
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.readers import EVERYTHING, RENDERED_KINDS, open_data, parse_address
from datasetdm_fast.training.truth.selection import DataSettings, Selection

PROG = "python -m bench curve"
EXAMPLES = ('--data "folder:photos[val]" --learn-from folder:photos --task semantic --counts 10,30,100',)
ANY_SIZE = 64  # pixels per side, where no image is read yet
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
    """--counts's numbers, rising."""
    if not all(re.fullmatch(r"[1-9]\d{0,8}", word) for word in words) or len(words) < 2:
        raise Refused(
            f"--counts: {','.join(words)} is not two or more numbers of labels", "For example --counts 10,30,100,300."
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


def curve_table(task: str, curve: Mapping[str, Any], level: float) -> str:
    """A learning curve with its forecast."""
    figure, more, last = figure_name(curve["figure"]), curve["more"], curve["points"][-1]
    lines = [f"{task}, {figure}", f"{'labels':>8}   value   {level:.0%} interval"]
    for point in curve["points"]:
        low, high = point["interval"]
        lines.append(f"{point['labels']:8}  {point['value']:6.4f}   {low:.4f} to {high:.4f}")
    low, high = more["interval"]
    if not high:  # no resample falls
        forecast = ["The figures do not improve with the number of labels, so nothing can be forecast."]
    else:
        gain = f"{more['gain']:.4f}"
        better = f"{gain} {'lower' if METRICS[task].less_is_better else 'higher'}" if float(gain) else "no change"
        forecast = [
            f"{more['labels'] - last['labels']} more labels would bring {figure} to about {more['value']:.4f}: "
            f"{better} ({level:.0%} interval {low:.4f} to {high:.4f})."
        ]
        if len(curve["points"]) < POINTS_FOR_FLOOR:
            forecast.append(
                f"Fewer than {POINTS_FOR_FLOOR} numbers cannot show where the curve levels off: take this as the most "
                "that can be hoped for."
            )
    return "\n".join([*lines, *forecast])


@dataclass(frozen=True)
class CurveConfig(DataSettings, ModelSettings, EngineSettings, OutputSettings):
    FLAGS = (
        "counts data learn_from task model select images limit_per_class min_area limit_images only_classes framing "
        "skip_bad allow_download captions bootstrap level repeats steps more engine dtype device batch_size seed "
        "threads dry_run json quiet"
    ).split()

    counts: tuple[str, ...] = setting(("10", "30", "100"), "numbers of labels, comma-separated", metavar="LIST")
    data: str = setting("demo:500@900000", "labelled images for scoring", metavar="DATA")
    learn_from: str = setting("", "labelled images; default: the train split of --data, or demo scenes", metavar="DATA")
    task: tuple[str, ...] = setting((), "labels; default: the first of the data", choices=TASKS, metavar="LIST")
    captions: str = setting("true", "text condition: each image's own caption, or none", choices=("true", "none"))
    bootstrap: int = setting(500, "bootstrap resamples per interval", metavar="N")
    level: float = setting(0.95, "confidence level of the intervals", metavar="SHARE")
    repeats: int = setting(1, "decoders with other seeds for each number", metavar="N")
    steps: int = setting(0, "steps of each training, 0 = the usual number", metavar="N")
    more: int = setting(MORE, "additional labels whose gain is forecast", metavar="N")
    batch_size: int = setting(10, "images per batch", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def open(self, address: str, size: int, tasks: Sequence[str], selection: Selection = EVERYTHING) -> LabelledSource:
        options = {"skip_bad": self.skip_bad, "framing": self.framing, "selection": selection}
        return open_data(address, size, tasks=tasks, **options)


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, CurveConfig, PROG, __doc__, EXAMPLES)
    counts = parse_counts(config.counts)
    address = training_address(config.data, config.learn_from, counts[-1])
    tasks = config.task or config.open(config.data, ANY_SIZE, ()).tasks[:1]
    config.open(config.data, ANY_SIZE, tasks)
    for task in tasks:  # before a model loads; a selection can leave fewer still
        check_enough(counts[-1], config.open(address, ANY_SIZE, (task,)), address)
    if config.dry_run:
        decoders = count_noun(config.repeats * len(counts), "decoder")
        line = f"{decoders} for each task would be trained on {address} and scored on {config.data}"
        return print_end(config, {"labels": counts, "repeats": config.repeats, "learn_from": address}, line)
    from datasetdm_fast.engine.engines import open_engine

    engine, results, lines = open_engine(config.model, None, **config.engine_choices())[0], {}, []
    for task in tasks:
        results[task] = measure_curve(config, engine, task, counts, address)
        lines.append(curve_table(task, results[task], config.level))
        if seen := results[task].get("seen_in_training"):
            lines.append(f"{task}: the training data held {seen} of these images; expect lower figures on others")
    print_result(config, {"curve": results}, "\n".join(lines))
    return 0


def measure_curve(config: CurveConfig, engine: Any, task: str, counts: Sequence[int], address: str) -> dict[str, Any]:
    """The curve of a task: decoders trained on more and more labels, scored on the same images."""
    from bench.proof.decoders import count_shared, train_decoder
    from datasetdm_fast.engine.decoders.trunk import fold
    from datasetdm_fast.engine.engines import build_engine
    from datasetdm_fast.training.evaluation.measure import measure
    from datasetdm_fast.training.evaluation.settings import ScoreSettings
    from datasetdm_fast.training.settings import RecipeSettings, ViewSettings

    size, scoring = engine.model.size, ScoreSettings(config.captions, config.batch_size, config.seed)
    labelled = config.open(address, size, (task,), config.selection())
    scored = config.open(config.data, size, (task,))
    check_shown(scored, task)  # otherwise noticed only once a decoder is trained
    if config.skip_bad:
        labelled = labelled.readable()
    check_enough(counts[-1], labelled, address)

    def score(count: int, repeat: int) -> Any:
        seed = config.seed + repeat
        options = {
            "view_settings": ViewSettings(captions=config.captions, seed=seed),
            "recipe_settings": RecipeSettings(steps=config.steps, seed=seed),
        }
        decoder = fold(train_decoder(engine, labelled, task, count, address, **options)).requires_grad_(False)
        run = {"dtype": config.dtype, "device": config.device}
        reader = build_engine(config.engine, engine.model, {task: decoder}, **run)
        return measure(reader, scored, (task,), scoring)[task]

    bounds = {"bootstrap": config.bootstrap, "level": config.level, "more": config.more}
    result = learning_curve(task, counts, config.repeats, score, **bounds) | {"captions": config.captions}
    seen = count_shared(scored, labelled, counts[-1])
    return result | ({"seen_in_training": seen} if seen else {})


def check_shown(source: Any, task: str) -> None:
    """Refuses images none of which shows anything of a task; reads up to the first that does."""
    from datasetdm_fast.engine import tasks

    labels = tasks.TASKS[task]
    targets = (labels.target(source, item) for item in source)
    if not any(target and labels.is_shown(source, target) for target in targets):
        raise nothing_shown()


def check_enough(most: int, source: LabelledSource, address: str) -> None:
    if most > len(source):
        raise Refused(
            f"--counts: {most} labels, but {address} has {len(source)} of the selected images", "Ask for fewer."
        )


if __name__ == "__main__":
    sys.exit(main())
