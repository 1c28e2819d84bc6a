"""What reads labels without a decoder of ours: the protocol of the labellers that other packages register."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from datasetdm_fast.config import LABELLER_KINDS
from datasetdm_fast.data import Annotation, Capture, Request
from datasetdm_fast.plugins import named


@dataclass(frozen=True)
class LabellerInput:
    """A batch of images as a labeller is given it; the last of them may be repeated to fill the batch."""

    requests: tuple[Request, ...]  # prompt, seed and number of each image
    words: tuple[tuple[str, ...], ...]  # class words that are looked for in each, where it `asks_words`
    classes: tuple[str, ...]  # those of the whole run
    images: Tensor  # [B, H, W, 3] uint8, on the run's device
    latents: Tensor  # [B, 4, h, w] that the images were decoded from, or pictures were encoded to
    capture: Capture | None  # features and maps of one U-Net call, where it `reads_capture`


class Labeller(ABC):
    """What reads a label of every image; a LabelKind says how its labels lie in files.

    It is built once a process, with the device of the run. Numbers that are not finite may occur in what it is given:
    such a sample is set aside, whatever its label says.
    """

    reads_capture: ClassVar[bool] = False  # raw features and maps take memory, so they are kept for those who read them
    capture_timestep: ClassVar[int | None] = None  # U-Net timestep of that call, None = the last call of the sampler
    asks_words: ClassVar[bool] = False  # whether it looks for class words of the user's, as open-vocabulary decoders do

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def is_open(self) -> bool:
        """Whether its classes are the words it is asked for, as a decoder's configuration says of an open one."""
        return self.asks_words

    @abstractmethod
    def label(self, given: LabellerInput) -> list[Annotation]:
        """The label of each image."""


@lru_cache
def open_labeller(name: str, device: torch.device) -> Labeller:
    """The labeller that another package registers under a name, built once a device."""
    place = LABELLER_KINDS[name].labeller
    labeller = LABELLER_KINDS.loaded(name, lambda: named(place)(device))
    found: Labeller = LABELLER_KINDS.checked(name, labeller, Labeller)
    return found


def labels_of(name: str, device: torch.device, given: LabellerInput) -> list[Annotation]:
    """What a labeller answers for a batch; a Missing that names its package where it fails."""
    labeller = open_labeller(name, device)

    def answered() -> list[Annotation]:
        found = list(labeller.label(given))
        if len(found) != len(given.requests):
            raise ValueError(f"{len(found)} labels for {len(given.requests)} images")
        return found

    answer: list[Annotation] = LABELLER_KINDS.loaded(name, answered, "fails on a batch")
    return answer
