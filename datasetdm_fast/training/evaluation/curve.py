"""The learning curve: how true labels become with the number of labelled images, and what more of them would bring."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.errors import Refused
from datasetdm_fast.training.evaluation.intervals import expanded
from datasetdm_fast.training.evaluation.meter import check_count, figure_name
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.readers import RENDERED_KINDS

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
    """What is missing to perfect labels; its own inverse."""
    return np.asarray(values) if METRICS[task].less_is_better else 1 - np.asarray(values)


def forecast(
    task: str, counts: Sequence[int], values: np.ndarray, draws: np.ndarray, more: int, level: float
) -> dict[str, Any]:
    """What `more` labels bring, from the figure [counts] and its bootstrap draws [B, counts]; a gain is less error."""
    law = power_law(counts, error_of(task, values)[None])
    drawn = power_law(counts, error_of(task, draws))
    last = counts[-1]
    gains = drawn.at(last) - drawn.at(last + more)
    error = float(law.at(last + more)[0])
    fit = {"floor": float(law.floor[0]), "scale": float(law.scale[0]), "exponent": float(law.exponent[0])}
    found = {"labels": last + more, "value": float(error_of(task, np.array(error)))}
    return {"fit": fit, "more": found | {"gain": float(law.at(last)[0]) - error, "interval": bounds(gains, level)}}


def bounds(values: np.ndarray, level: float) -> list[float]:
    """Both ends of the interval that holds a share `level` of the values."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


def learning_curve(
    task: str,
    counts: Sequence[int],
    repeats: int,
    judge: Callable[[int, int], Any],
    *,
    bootstrap: int,
    level: float,
    more: int = MORE,
) -> dict[str, Any]:
    """The task's figure at every count, with intervals over images and repeats, and the forecast.

    `judge(count, repeat)` is a meter after a decoder taught by that many labels has answered; all meters have seen the
    same images.
    """
    figure, draws, each = METRICS[task].figure, [], []
    random = np.random.default_rng(0)
    for count in counts:
        meters = [judge(count, repeat) for repeat in range(repeats)]
        each.append([check_count(meter)[figure] for meter in meters])
        drawn = np.stack([meter.draws(max(bootstrap, 2))[figure] for meter in meters])
        draws.append(drawn[random.integers(repeats, size=drawn.shape[1]), np.arange(drawn.shape[1])])
    values, drawn = np.array([float(np.mean(own)) for own in each]), np.stack(draws, 1)
    is_known = np.isfinite(drawn).all(1)  # a draw none of whose images shows anything says nothing
    drawn = drawn[is_known] if is_known.any() else values[None]
    level = expanded(level, meters[0].telling)
    points = [
        {"labels": count, "value": value, "interval": bounds(column, level), "repeats": own}
        for count, value, column, own in zip(counts, values.tolist(), drawn.T, each, strict=True)
    ]
    return {"figure": figure, "points": points} | forecast(task, counts, values, drawn, more, level)


def parse_counts(words: Sequence[str]) -> list[int]:
    """--curve's numbers, rising."""
    if not all(re.fullmatch(r"[1-9]\d{0,8}", word) for word in words) or len(words) < 2:
        raise Refused(
            f"--curve: {','.join(words)} is not two or more numbers of labels", "For example --curve 10,30,100,300."
        )
    return sorted({int(word) for word in words})


def to_learn_from(data: str, learn_from: str, most: int) -> str:
    """The address of the images that teach: not those that judge."""
    if not learn_from:
        if (kind := data.partition(":")[0]) in RENDERED_KINDS:
            if not most:
                raise Refused("--real 0: there is no end of rendered scenes", "Give the number of them to learn from.")
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
    kind, _, rest = address.partition(":")
    match = re.fullmatch(r"(.+?)(?:\[([\w.,-]+)\])?", rest, re.DOTALL)
    path, split = (Path(match[1]).expanduser().resolve(), match[2] or TRAIN) if match else (Path(rest), TRAIN)
    return (kind, path / split, TRAIN) if (path / split).is_dir() else (kind, path, split)


def _share_scenes(*addresses: str) -> bool:
    """Whether two addresses of rendered scenes name some of the same."""
    found = [re.fullmatch(rf"({'|'.join(RENDERED_KINDS)}):(\d+)(?:@(\d+))?", address) for address in addresses]
    if not all(found) or found[0][1] != found[1][1]:
        return False
    (first, end), (other, other_end) = ((int(match[3] or 0), int(match[3] or 0) + int(match[2])) for match in found)
    return first < other_end and other < end


def told(task: str, found: dict[str, Any], level: float) -> str:
    """The curve as lines to read."""
    figure, more, last = figure_name(found["figure"]), found["more"], found["points"][-1]
    lines = [f"{task}, {figure}", f"{'labels':>8}   value   {level:.0%} interval"]
    for point in found["points"]:
        low, high = point["interval"]
        lines.append(f"{point['labels']:8}  {point['value']:6.4f}   {low:.4f} to {high:.4f}")
    low, high = more["interval"]
    added = more["labels"] - last["labels"]
    if not high:  # no draw falls
        return "\n".join([*lines, "The figures do not improve with the number of labels, so nothing can be forecast."])
    better = f"{more['gain']:.4f} {'lower' if METRICS[task].less_is_better else 'higher'}"
    better = "no change" if float(f"{more['gain']:.4f}") == 0 else better
    lines.append(
        f"{added} more labels would bring {figure} to about {more['value']:.4f}: {better} ({level:.0%} interval "
        f"{low:.4f} to {high:.4f})."
    )
    if len(found["points"]) < POINTS_FOR_FLOOR:
        lines.append(
            f"Fewer than {POINTS_FOR_FLOOR} numbers cannot show where the curve levels off: take this as the most "
            "that can be hoped for."
        )
    return "\n".join(lines)
