"""Intervals of a meter's figures, by a bootstrap over its images that also holds for few of them."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special  # a quarter of the time that scipy.stats takes to import

from datasetdm_fast.training.evaluation.meter import Meter

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
