"""Accuracy of labels: mIoU of semantic maps and class words, errors of depth; ranking.py has AP, PCK and OKS-AP.

A meter keeps counts of each image, and `figures` combines the images by weights: all ones for the result, resampled
counts for a bootstrap.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from datasetdm_fast.config import TASK_KINDS
from datasetdm_fast.data import IGNORE, DepthMap, SemanticMap
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.plugins import PartTable
from datasetdm_fast.training.evaluation.meter import Meter, check_names, mean, translation


class _Overlap(Meter):
    """Intersection over union by class over all images; with `unseen` classes also the harmonic mean."""

    figure = held_out_figure = "miou"
    shown_by_things = ("miou",)

    def __init__(self, classes: Sequence[str], unseen: Collection[str] = ()):
        self.classes, self.rows = tuple(classes), []  # [3, K] int64 an image: both, either, truth
        self.unseen = np.array([name in unseen for name in self.classes], bool)
        self.is_background = np.array([name in BACKGROUNDS for name in self.classes], bool)

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        both, either, truth = np.einsum("bn,nik->ibk", weights, np.stack(self.rows).astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = np.where(self.has_figure(either, truth), both / either, np.nan)
            figures = {"miou": mean(iou), "per_class": iou}
            if self.unseen.any():
                seen, unseen = mean(iou[:, ~self.unseen & ~self.is_background]), mean(iou[:, self.unseen])
                harmonic = np.where(seen + unseen == 0, 0, 2 * seen * unseen / (seen + unseen))
                figures |= {"seen": seen, "unseen": unseen, "harmonic": harmonic}
        return figures

    @property
    def columns(self) -> Sequence[str]:
        return self.classes

    def count_images(self) -> np.ndarray:
        return np.stack([self.has_figure(either, truth) for _, either, truth in self.rows]).sum(0)

    def has_figure(self, either: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Whether a class has a figure: where the truth shows it."""
        return truth > 0


def _separate_unseen(known: Sequence[str], unseen: Sequence[str]) -> Sequence[str]:
    """The unseen classes, none where all of them are."""
    if unknown := [name for name in unseen if name not in known]:
        raise Refused(
            f"--unseen: the data set has no class {unknown[0]!r}{nearest(unknown[0], known)}",
            f"It has {', '.join(known[:20])}.",
        )
    return unseen if len(unseen) < len(known) else ()


class Semantic(_Overlap):
    """Mean intersection over union over all pixels; 255 in the truth is left out, a class it lacks is background."""

    def __init__(self, source: LabelledSource, unseen: Collection[str] = ()):
        super().__init__(source.classes, unseen)

    @classmethod
    def judging(cls, source: LabelledSource, config: DecoderConfig, unseen: Sequence[str] = ()) -> Semantic:
        check_names(config.task, config.classes, source.classes)
        return cls(source, _separate_unseen(source.classes, unseen))

    def add(self, truth: Labelled, predicted: SemanticMap) -> None:
        known, count = truth.semantic != IGNORE, len(self.classes)
        if not known.any():
            return
        real = truth.semantic[known].astype(np.int64)
        guess = translation(predicted.classes, self.classes, 256)[predicted.labels[known]]
        both = np.bincount(real[real == guess], minlength=count)
        total, guessed = np.bincount(real, minlength=count), np.bincount(guess[guess >= 0], minlength=count)
        self.rows.append(np.stack([both, total + guessed - both, total]))


class OpenVocabulary(_Overlap):
    """Mean intersection over union of each class word, queried in every image, so that false positives count, too.
    Crowds are left out, and so are classes that an image was not searched for.
    """

    def __init__(self, source: LabelledSource, unseen: Collection[str] = ()):
        super().__init__(source.thing_classes, unseen)

    @classmethod
    def judging(cls, source: LabelledSource, config: DecoderConfig, unseen: Sequence[str] = ()) -> OpenVocabulary:
        """Classes that a decoder of words was not trained on are unseen by default."""
        untrained = [name for name in source.thing_classes if config.classes and name not in config.classes]
        return cls(source, _separate_unseen(source.thing_classes, unseen or untrained))

    def has_figure(self, either: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return either > 0

    def add(self, truth: Labelled, predicted: SemanticMap) -> None:
        row = np.zeros((3, len(self.classes)), np.int64)
        known = _known_pixels(truth)
        if not known.any():
            return
        for k, name in enumerate(self.classes):
            if truth.searched is not None and k not in truth.searched:
                continue
            mine = truth.mask_classes == k
            here = truth.masks[mine].any(0) & known if mine.any() else np.zeros(truth.image.shape[:2], bool)
            seen = np.zeros_like(here)
            if name in predicted.classes:
                seen = (predicted.labels == predicted.classes.index(name)) & known
            if k in truth.not_exhausted:
                seen = seen & here
            row[:, k] = (here & seen).sum(), (here | seen).sum(), here.sum()
        self.rows.append(row)


def _known_pixels(truth: Labelled) -> np.ndarray:
    """[H, W] bool: the pixels whose truth is known."""
    if truth.semantic is not None:
        return truth.semantic != IGNORE
    if truth.crowds is None:
        return np.ones(truth.image.shape[:2], bool)
    return truth.masks.any(0) | ~truth.crowds.any(0)


class Depth(Meter):
    """Mean absolute relative error, RMSE in metres and the shares within a factor 1.25, its square and its cube."""

    figure = held_out_figure = "absrel"
    less_is_better = True

    def __init__(self, source: LabelledSource):
        self.rows: list[tuple[float, ...]] = []

    def counts_hits(self, figure: str) -> bool:
        return figure not in ("absrel", "rmse")  # which are errors

    def add(self, truth: Labelled, predicted: DepthMap) -> None:
        known = truth.depth > 0
        if not known.any():  # nothing to compare with
            return
        real, guess = truth.depth[known].astype(np.float64), predicted.metres[known].astype(np.float64)
        ratio = np.maximum(guess / real, real / np.maximum(guess, 1e-6))
        within = (float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3))
        self.rows.append((float(np.mean(np.abs(guess - real) / real)), float(np.mean((guess - real) ** 2)), *within))

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        means = weights @ np.array(self.rows) / weights.sum(1, keepdims=True)
        means[:, 1] = np.sqrt(means[:, 1])
        return dict(zip(("absrel", "rmse", "delta_1.25", "delta_1.25_2", "delta_1.25_3"), means.T))


METRICS = PartTable("meter", Meter, TASK_KINDS)
