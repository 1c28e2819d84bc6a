"""One class per task: how a decoder's raw tensors become labels, and how such a decoder is trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from datasetdm_fast.config import TASK_KINDS
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels import with_outlines
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.plugins import PartTable


class Task(ABC):
    """One kind of label that decoders can be taught and runs can make."""

    needs: tuple[str, ...]  # fields of Labelled, one of which holds its truth
    names: str = ""  # field of LabelledSource that has to name something
    shown_by: str = "masks"  # field of TrainingTarget that is empty or zero where there is nothing to learn
    requirement: str  # what an image has to show, for messages; {farthest} is the largest depth of the data set
    small: Mapping[str, Any]  # fields of the TrainingSchedule of a small decoder
    large: ClassVar[Mapping[str, Any]] = {}  # those of one of upstream's widths that are its own
    epochs: int = 0  # after which upstream's rate falls to a tenth, 0 = those of its data set
    is_of_one_person: bool = False  # whether data sets with several people show it one of them at a time

    def sees_one_person(self, data: str) -> bool:
        """Whether each picture that it reads of such data is of one person, where others read whole images."""
        return self.is_of_one_person and data.startswith("coco:")

    @abstractmethod
    def postprocess(self, raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[Any]:
        """The label of each image, `size` pixels a side."""

    @abstractmethod
    def truth(self, source: LabelledSource, item: Labelled) -> Annotation:
        """The truth of an item in the form of a label."""

    @abstractmethod
    def target(self, source: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        """Fields of its TrainingTarget; others stay empty."""

    def is_shown(self, source: LabelledSource, target: Mapping[str, np.ndarray]) -> bool:
        """Whether a target holds anything."""
        return bool(target[self.shown_by].any())

    @abstractmethod
    def decoder(self, source: LabelledSource, is_small: bool, head: str) -> dict[str, Any]:
        """Fields of the DecoderConfig that is taught; `head` is the kind of a pose decoder."""


TASKS = PartTable("task", Task, TASK_KINDS, make=lambda task: task())


def read_labels(
    raw: dict[str, Tensor], images: Iterable[np.ndarray], config: DecoderConfig, size: int, **options: Any
) -> list[Any]:
    """The labels in a decoder's raw tensors, with their outlines; `options` as the task's postprocess has it."""
    return with_outlines(TASKS[config.task].postprocess(raw, config, size, **options), images, config)
