"""One meter per task: it adds predictions and truth image by image, and computes figures; their intervals come from a
bootstrap over its images that also holds for few of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import special  # a quarter of the time that scipy.stats takes to import

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS, is_background
from datasetdm_fast.errors import Refused

BLOCK = 256  # images whose figures are computed together

FIGURES = {  # what people call the figures that files name by a key
    "miou": "mIoU",
    "seen": "mIoU of seen classes",
    "unseen": "mIoU of unseen classes",
    "harmonic": "harmonic mIoU",
    "in_common": "mIoU of classes in common",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "absrel": "AbsRel",
    "rmse": "RMSE (m)",
    "delta_1.25": "delta < 1.25",
    "delta_1.25_2": "delta < 1.25^2",
    "delta_1.25_3": "delta < 1.25^3",
    "pck": "PCK@0.1",
    "oks_ap": "OKS-AP",
    "oks_ap50": "OKS-AP50",
}


def figure_name(key: str) -> str:
    """A figure as people call it."""
    return FIGURES.get(key, key.replace("_", " "))


class Meter:
    """What every task's figures share."""

    each = "per_class"
    figure = ""  # the one of learning curves
    held_out_figure = ""  # by which a training keeps its best weights
    less_is_better = False
    shown_by_things: tuple[str, ...] = ()  # figures that are also computed by the number of things in an image

    @cached_property
    def things(self) -> list[int]:
        """How many things each image that was added shows; the caller of `add` appends it."""
        return []

    @classmethod
    def judging(cls, source: LabelledSource, config: DecoderConfig, unseen: Sequence[str] = ()) -> Meter:
        """The meter of a decoder on a data set; refuses a decoder that cannot be compared with it."""
        return cls(source)

    @classmethod
    def reading(cls, config: DecoderConfig) -> DecoderConfig:
        """The configuration with which labels are read from a decoder's outputs."""
        return config

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns of the figure named `each`."""
        return ()

    @property
    def count(self) -> int:
        return len(self.rows)  # of `add`, an entry an image

    def counts_hits(self, figure: str) -> bool:
        """Whether a figure is a share of hits, of which a few images may show no miss."""
        return True

    @property
    def telling(self) -> int:
        """How many images have something to find."""
        return self.count

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each figure [B] for weights [B, images]; the one named `each` is [B, classes], NaN for classes not shown."""
        raise NotImplementedError

    def result(self) -> dict:
        """Every figure that the images show something for, and those of each class they show; empty where they show
        nothing.
        """
        if not self.count:
            return {}
        figures = {name: values[0] for name, values in self.figures(np.ones((1, self.count))).items()}
        single = {name: float(value) for name, value in figures.items() if name != self.each and np.isfinite(value)}
        if not single:
            return {}
        return single | ({self.each: self.by_name(figures[self.each])} if self.each in figures else {})

    def not_shown(self, result: Mapping[str, Any]) -> list[str]:
        """The classes or joints that have no figure in a result, as no image shows them."""
        return [name for name in self.columns if name not in result.get(self.each, {})]

    def by_things(self) -> dict[str, dict[str, float]]:
        """The figures of `shown_by_things` over the images with 1, 2, 3 ... things, and how many images these are."""
        result = {}
        for count in sorted(set(self.things) - {0}) if self.shown_by_things else ():
            chosen = np.array(self.things) == count
            figures = self.figures(chosen[None].astype(np.float64))
            values = {name: float(np.nan_to_num(figures[name][0])) for name in self.shown_by_things}
            result[str(count)] = {"images": int(chosen.sum()), **values}
        return result

    def draws(self, number: int, seed: int = 0) -> dict[str, np.ndarray]:
        """The figures [number] of as many bootstrap draws: images with replacement, as many as there are."""
        random = np.random.default_rng(seed)
        weights = random.multinomial(self.count, np.full(self.count, 1 / self.count), size=number).astype(np.float64)
        return self.figures(weights)

    def count_images(self) -> np.ndarray:
        """How many images show each class or joint."""
        blocks = range(0, self.count, BLOCK)
        alone = (np.eye(min(BLOCK, self.count - start), self.count, start) for start in blocks)
        return sum(np.isfinite(self.figures(weights)[self.each]).sum(0) for weights in alone)

    def by_name(self, values: np.ndarray) -> dict[str, Any]:
        """Values by the names of the columns, without those that are no number."""
        return {name: value.tolist() for name, value in zip(self.columns, values) if np.isfinite(value).all()}


def translation(predicted: Sequence[str], known: Sequence[str], length: int) -> np.ndarray:
    """For each number that a decoder predicts, the number of that name in the data set. A class that the data set does
    not have is part of its background, or -1 where it has none.
    """
    table = np.full(max(length, len(predicted)), -1, np.int64)
    others = next((k for k, name in enumerate(known) if is_background(name)), -1)
    table[: len(predicted)] = [known.index(name) if name in known else others for name in predicted]
    return table


def check_names(task: str, predicted: Sequence[str], known: Sequence[str]) -> None:
    """Refuses to compare predictions and truth that have no name in common."""
    common = set(predicted) & set(known)
    if known and not common - set(BACKGROUNDS) and not set(predicted) <= set(BACKGROUNDS):
        shown = ", ".join(predicted[:5]), ", ".join(known[:5])
        raise Refused(
            f"{task}: the decoder knows {shown[0]}, the data set {shown[1]}: no class in common",
            "Evaluate on data with the decoder's classes, or name them with --class-names THEIRS=OURS or auto.",
        )


def check_count(meter: Meter) -> dict:
    """The result; refuses figures of no image, as where all truth is ignored, or no image shows a person."""
    if not (result := meter.result()):
        raise nothing_shown()
    return result


def nothing_shown() -> Refused:
    """The refusal of images without anything to compare with."""
    return Refused("evaluate: no image has the ground truth to compare with", "Choose other data.")


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, without NaN."""
    is_there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(is_there, values, 0).sum(-1) / is_there.sum(-1)


DRAWS = 2000  # bootstrap resamples
ALONE = 0.19  # share of the draws without a class: of one image 0.25 to 0.37 lack it, of two images at most 0.14
FURTHER = 1 / 3  # images of either kind that `_with_further` adds on average (Kerman 2011)


def intervals(
    meter: Meter, draws: int = DRAWS, level: float = 0.95, classes: int = 0, folds: int = 0
) -> dict[str, Any]:
    """[low, high] of every figure by bootstrap percentiles, expanded for few images: those with something to find, and
    for a class those that show it. None of a single image, of a class that a single image shows, as its draws are all
    alike, and of a mean over images whose draws all agree, as of few images that says nothing.

    A mean over classes is over `classes` of them, or over all that the images show: what a draw does not show may score
    anything. Where figures count hits, further images may score anything, too. Figures of `folds` are of as many
    decoders, none of which is the one that learns from all images: their intervals are wider.
    """
    if meter.count < 2:
        return {}
    figures, bounds, resampled = meter.result(), {}, meter.draws(draws)
    shown = meter.count_images() if meter.each in resampled else np.zeros(0)
    if classes := max(classes, int((shown > 0).sum())):
        resampled |= _over_classes(resampled, meter.each, classes)
    for name, values in resampled.items():
        if name not in figures:  # as no image shows what it is a mean of
            continue
        images = shown if name == meter.each else meter.telling
        values = _with_further(values, images) if meter.counts_hits(name) else values
        if name == meter.each:
            levels = [expanded_level(level, count, folds) for count in images]
            limits = [_between(*column) for column in zip(values.T, levels, strict=True)]
            is_alone = np.isnan(values).mean(0) > ALONE
            named = meter.by_name(np.where(is_alone[:, None], np.nan, limits))
            bounds[name] = {column: _holding(figures[name][column], *limits) for column, limits in named.items()}
        else:
            low, high = np.nan_to_num(_between(values, expanded_level(level, images, folds))).tolist()
            if low < high:
                bounds[name] = _holding(figures[name], low, high)
    return bounds


def _holding(figure: float, low: float, high: float) -> list[float]:
    return [min(low, figure), max(high, figure)]


def expanded_level(level: float, images: int, folds: int = 0) -> float:
    """The level of bootstrap percentiles of so many images that lie as far out as those of a t distribution (Hesterberg
    2015, 5.2), and further for `folds`, whose decoders would be others had they learnt from other images (Nadeau and
    Bengio 2003).
    """
    if images < 2:
        return level
    away = np.sqrt(images / (images - 1)) * special.stdtrit(images - 1, (1 + level) / 2)
    away *= np.sqrt(1 + folds / (folds - 1)) if folds else 1  # 1/(folds-1): scored images per training image
    return float(2 * special.ndtr(away) - 1)


def _over_classes(resampled: Mapping[str, np.ndarray], each: str, classes: int) -> dict[str, np.ndarray]:
    """The resampled means over classes as if over `classes` of them. All classes that a draw does not show have one
    value, as a decoder that is bad at one rare class is often bad at others.
    """
    share = np.minimum(np.isfinite(resampled[each]).sum(1) / classes, 1)
    unknown = (1 - share) * np.random.default_rng([0, classes]).random(len(share))
    return {name: np.nan_to_num(values) * share + unknown for name, values in resampled.items() if name != each}


def _with_further(values: np.ndarray, images: np.ndarray | int) -> np.ndarray:
    """Draws of a share over so many images as if there were a few more, of which some scored 0 and some 1: without
    them, what no image shows would count as impossible.
    """
    worst, best = np.random.default_rng(values.shape[0]).gamma(FURTHER, size=(2, *values.shape))
    return (values * images + best) / (images + worst + best)


def _between(values: np.ndarray, level: float) -> np.ndarray:
    """The two percentiles with the share `level` of the draws between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class that no draw shows
        return np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
