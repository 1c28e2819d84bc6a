"""Views: every image of a data set in several draws, each with its look, its noise and its truth, in a fixed order."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.lessons.targets import TargetMemory, TrainingTarget, target
from datasetdm_fast.training.truth.augment import Augmentation, look

TARGET_BYTES = 2**29  # of truth kept in memory; what is beyond is made again when it is needed

UNSAID = 4  # of so many looks one has no caption, where they are mixed
ITEMS = 128  # labelled images kept in memory


@dataclass(frozen=True)
class Looks:
    draws: int = 12  # looks at each image
    augmentation: Augmentation = Augmentation(flip=True)
    captions: str = "true"  # or none, or mixed: every fourth look has none
    seed: int = 0
    quirks: frozenset[str] = frozenset()


class Views:
    """View v is draw v % draws of image v // draws."""

    def __init__(self, source: LabelledSource, numbers: Sequence[int], task: str, looks: Looks):
        self.source, self.numbers, self.task, self.looks = source, tuple(numbers), task, looks
        self._targets: dict[int, TrainingTarget] = {}
        self._read = lru_cache(ITEMS)(source.__getitem__)
        self._memory, self._lock = TargetMemory(TARGET_BYTES), threading.Lock()

    def __len__(self) -> int:
        return len(self.numbers) * self.looks.draws

    def item(self, view: int) -> Labelled:
        """The labelled image as it is looked at."""
        number, draw = self.numbers[view // self.looks.draws], view % self.looks.draws
        how, seed = self.looks.augmentation, self.looks.seed
        found = look(self.source, number, how, draw, seed, self._read, self.numbers)
        is_mute = self.looks.captions == "none" or (self.looks.captions == "mixed" and draw % UNSAID == UNSAID - 1)
        return replace(found, caption="") if is_mute else found

    def items(self, image: int) -> list[Labelled]:
        return [self.item(image * self.looks.draws + draw) for draw in range(self.looks.draws)]

    def seed(self, view: int) -> int:
        """Of the view's noise; it depends on the place in the data set, not on how many images are taken from it."""
        draws = self.looks.draws
        return self.looks.seed + self.numbers[view // draws] * draws + view % draws

    def pixels(self, items: Sequence[Labelled]) -> Tensor:
        """[B, H, W, 3] in 0..255, as the autoencoder is to see them."""
        images = torch.from_numpy(np.stack([np.ascontiguousarray(item.image) for item in items]))
        if self.has("Q14"):
            images = images.flip(-1)
        return images.float() / 2 + 127.5 if self.has("Q13") else images

    def captions(self, items: Sequence[Labelled]) -> list[str]:
        if self.has("Q13"):
            return ["a photo of "] * len(items)
        if self.has("Q12"):
            return [f"a photo of {self.source.thing_classes[1]},"] * len(items)
        return [item.caption for item in items]

    def has(self, quirk: str) -> bool:
        """Whether one of upstream's mistakes is to be made with this task."""
        return quirk in self.looks.quirks and quirk in TASKS[self.task].quirks

    def target(self, view: int) -> TrainingTarget:
        with self._lock:
            if view in self._targets:
                return self._targets[view]
        found = target(self.source, self.item(view), self.task, 1 if self.has("Q12") else None)
        with self._lock:
            if kept := self._memory.kept(found):
                self._targets[view] = kept
        return found


def check_quirks(quirks: Sequence[str], source: LabelledSource, tasks: Sequence[str]) -> frozenset[str]:
    """The quirks, refused where the data cannot show them."""
    is_asked = "Q12" in quirks and any("Q12" in TASKS[task].quirks for task in tasks)
    if is_asked and len(source.thing_classes) < 2:
        raise Refused(
            f"--quirks Q12: every instance would be of class 1, but the data set names {len(source.thing_classes)}",
            "Leave Q12 out.",
        )
    return frozenset(quirks)
