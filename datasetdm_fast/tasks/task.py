"""The record of a task: from a decoder's raw tensors to labels, and how such a decoder is taught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasetdm_fast.data import Annotation
from datasetdm_fast.labels.kind import LabelKind
from datasetdm_fast.truth.labelled import Labelled, LabelledSource


@dataclass(frozen=True)
class Teaching:
    """What decoders of a task are taught from, how they are built and how long they are taught."""

    needs: tuple[str, ...]  # fields of Labelled, one of which holds its truth
    wanted: str  # what an image has to show, for messages; {farthest} is the largest depth of the data set
    truth: Callable[[LabelledSource, Labelled], Annotation]  # in the form of a label
    target: Callable[[LabelledSource, Labelled], dict[str, np.ndarray]]  # fields of TrainingTarget; others stay empty
    is_shown: Callable[[LabelledSource, Mapping[str, np.ndarray]], bool]  # whether a target holds anything
    decoder: Callable[
        [LabelledSource, bool, str], dict[str, Any]
    ]  # source, whether small, kind of head -> DecoderConfig
    small: Mapping[str, Any]  # fields of the TrainingSchedule of a small decoder
    large: Mapping[str, Any]  # those of one of upstream's widths that are its own
    names: str = ""  # field of LabelledSource that has to name something
    epochs: int = 0  # after which upstream's rate falls to a tenth, 0 = those of its data set
    quirks: tuple[str, ...] = ()  # upstream's mistakes that can be repeated


@dataclass(frozen=True)
class Task:
    """One kind of label that decoders can be taught and runs can make."""

    label: LabelKind
    postprocess: Callable[..., list[Any]]  # raw tensors, DecoderConfig, pixels of a side -> a label an image
    teaching: Teaching
    is_of_one_person: bool = False  # whether data sets with several people show it one of them at a time
