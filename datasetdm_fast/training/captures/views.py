"""Training views: every image of a data set in several augmented draws, with noise seed, captures and target."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.training.captures.targets import TargetMemory, TrainingTarget, target_of
from datasetdm_fast.training.settings import ViewSettings
from datasetdm_fast.training.truth.augment import augment

TARGET_BYTES = 2**29  # of targets cached in memory; those beyond are computed each time
MUTE_PERIOD = 4  # with mixed captions, every fourth view has none
CACHED_ITEMS = 128  # labelled images cached in memory


class Captures(Protocol):
    """Captures of views: read from the cache, or recomputed."""

    is_stored: bool
    layout: Any  # cache.Layout of a view

    def batch(self, views: Sequence[int]) -> tuple[Tensor, ...]:
        """Per level [B, cells, channels]."""


class TrainingViews:
    """View v is draw v % draws of image v // draws."""

    captures: Captures

    def __init__(self, source: LabelledSource, numbers: Sequence[int], task: str, settings: ViewSettings):
        self.source, self.numbers, self.task, self.settings = source, tuple(numbers), task, settings
        self._targets: dict[int, TrainingTarget] = {}
        self._read = lru_cache(CACHED_ITEMS)(source.__getitem__)
        self._memory, self._lock = TargetMemory(TARGET_BYTES), threading.Lock()

    def __len__(self) -> int:
        return len(self.numbers) * self.settings.draws

    def with_captures(self, captures: Captures) -> Self:
        """These views with captures, which are numbered alike."""
        views = copy.copy(self)
        views.captures = captures
        return views

    def first_views(self, most_images: int) -> range:
        """The first view of each image, of so many images at most."""
        draws = self.settings.draws
        return range(0, min(len(self), most_images * draws), draws)

    def item(self, view: int) -> Labelled:
        """The augmented image of a view, with its truth."""
        settings = self.settings
        number, draw = self.numbers[view // settings.draws], view % settings.draws
        item = augment(self.source, number, settings.augmentation, draw, settings.seed, self._read, self.numbers)
        is_mixed = settings.captions == "mixed" and draw % MUTE_PERIOD == MUTE_PERIOD - 1
        return replace(item, caption="") if settings.captions == "none" or is_mixed else item

    def items(self, image: int) -> list[Labelled]:
        return [self.item(image * self.settings.draws + draw) for draw in range(self.settings.draws)]

    def seed(self, view: int) -> int:
        """The seed of a view's noise: it depends on the place in the data set, not on the number of images chosen."""
        draws = self.settings.draws
        return self.settings.seed + self.numbers[view // draws] * draws + view % draws

    def pixels(self, items: Sequence[Labelled]) -> Tensor:
        """[B, H, W, 3] in 0..255, as the autoencoder receives them."""
        return torch.from_numpy(np.stack([np.ascontiguousarray(item.image) for item in items]))

    def target(self, view: int) -> TrainingTarget:
        with self._lock:
            if view in self._targets:
                return self._targets[view]
        target = target_of(self.source, self.item(view), self.task)
        with self._lock:
            if copied := self._memory.copy(target):
                self._targets[view] = copied
        return target
