"""What reads labels without a decoder of ours: the protocol of the labellers that other packages register."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import LABELLER_KINDS
from datasetdm_fast.data import IGNORE, Annotation, Capture, DepthMap, Instances, Keypoints, Request, SemanticMap
from datasetdm_fast.engine.labels import Table, kind_of
from datasetdm_fast.plugins import load_place

BOOLEANS, INTEGERS, NUMBERS = ("booleans", "b"), ("integers", "iu"), ("numbers", "iuf")  # with their kinds of dtypes
# the arrays of a record and their axes: H and W of the image, N things, P people, J joints
FORMS = {
    SemanticMap: {"labels": ("HW", INTEGERS), "confidence": ("HW", NUMBERS)},
    Instances: {"masks": ("NHW", BOOLEANS), "class_ids": ("N", INTEGERS), "scores": ("N", NUMBERS)},
    DepthMap: {"metres": ("HW", NUMBERS)},
    Keypoints: {"points": ("PJ3", NUMBERS), "visibility": ("PJ", INTEGERS), "scores": ("P", NUMBERS)},
}


@dataclass(frozen=True)
class LabellerInput:
    """A batch of images as a labeller is given it; the last of them may be repeated to fill the batch."""

    requests: tuple[Request, ...]  # prompt, seed and number of each image
    words: tuple[tuple[str, ...], ...]  # class words that are looked for in each, where it `asks_words`
    classes: tuple[str, ...]  # those of the whole run
    images: Tensor  # [B, H, W, 3] uint8, on the run's device
    latents: Tensor  # [B, C, h, w] that the images were decoded from, or pictures were encoded to
    capture: Capture | None  # features and maps of one U-Net call, where it `reads_capture`


class Labeller(ABC):
    """What reads a label of every image; a LabelKind says how its labels lie in files.

    It is built once a process, with the device of the run. Numbers that are not finite may occur in what it is given:
    such a sample is quarantined, whatever its label says.
    """

    reads_capture: ClassVar[bool] = False  # raw features and maps take memory, so they are kept for those who read them
    capture_timestep: ClassVar[int | None] = None  # U-Net timestep of that call, None = the last call of the sampler
    asks_words: ClassVar[bool] = False  # whether it looks for class words of the user's, as open-vocabulary decoders do

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def is_open(self) -> bool:
        """Whether its classes are query words, like those of an open decoder."""
        return self.asks_words

    @abstractmethod
    def label(self, batch: LabellerInput) -> list[Annotation]:
        """The label of each image."""


@lru_cache
def open_labeller(name: str, device: torch.device) -> Labeller:
    """The labeller that another package registers under a name, built once a device."""
    place = LABELLER_KINDS[name].labeller
    labeller = LABELLER_KINDS.guard(name, lambda: load_place(place)(device))
    return LABELLER_KINDS.check_type(name, labeller, Labeller)


def labels_of(name: str, device: torch.device, batch: LabellerInput) -> list[Annotation]:
    """What a labeller answers for a batch; a Missing that names its package where it fails."""
    labeller = open_labeller(name, device)

    def label_batch() -> list[Annotation]:
        labels = list(labeller.label(batch))
        if len(labels) != len(batch.requests):
            raise ValueError(f"{len(labels)} labels for {len(batch.requests)} images")
        table = kind_of(name).table(labeller, batch.images.shape[2], batch.classes)
        for label in labels:
            check_label(label, batch.images.shape[1:3], table)
        return labels

    return LABELLER_KINDS.guard(name, label_batch, "fails on a batch")


def check_label(label: Any, sides: Sequence[int], table: Table) -> None:
    """A ValueError where a label does not fit an image of this height and width, or the table of its run."""
    if type(label) not in FORMS:
        raise ValueError(f"a {type(label).__name__} is none of {', '.join(kind.__name__ for kind in FORMS)}")
    known = dict(zip("HW3", (*sides, 3)))
    if isinstance(label, Keypoints):
        known["J"] = len(label.joints)
    for name, (axes, (expected, kinds)) in FORMS[type(label)].items():
        array = getattr(label, name)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name}: a {type(array).__name__}, expected an array of {expected}")
        if array.dtype.kind not in kinds:
            raise ValueError(f"{name}: an array of {array.dtype}, expected {expected}")
        fitting = [known.get(axis, length) for axis, length in zip(axes, array.shape)]
        if array.ndim != len(axes) or list(array.shape) != fitting:
            shape = ", ".join(str(known.get(axis, axis)) for axis in axes)
            raise ValueError(f"{name}: an array of shape {list(array.shape)}, expected [{shape}]")
        known |= dict(zip(axes, array.shape))
    for name in ("classes", "joints"):
        names, known_names = getattr(label, name, None), table.get(name)
        if names is not None and known_names is not None and list(names) != list(known_names):
            raise ValueError(f"{name}: {', '.join(names)}, expected {', '.join(known_names)}")
    if isinstance(label, SemanticMap | Instances):
        used = np.unique(label.class_ids if isinstance(label, Instances) else label.labels[label.labels != IGNORE])
        if strange := [number for number in used if not 0 <= number < len(label.classes)]:
            raise ValueError(f"the class {strange[0]} is none of 0 to {len(label.classes) - 1}")
