"""Formats: the labels they need, the files of a sample, and the files of all samples together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.classes import MOST_IN_A_MAP, Classes
from datasetdm_fast.runs.exporting.settings import LayoutSettings, PictureSettings
from datasetdm_fast.runs.exporting.view import Content, SampleView

Files = dict[str, Content]  # path inside the format's folder, content
Entry = dict[str, Any]  # what the files of all samples need of one, as JSON


@dataclass(frozen=True)
class AllSamples:
    """The samples of an export, once the files of each are written."""

    entries: Callable[[str], Iterator[Entry]]  # of the samples of a split, in order
    views: Callable[[str, int, int], Iterator[SampleView]]  # samples of a split, from one position to another


@dataclass(frozen=True)
class ExportPlan:
    """Facts of an export that all of its files follow."""

    classes: Classes
    splits: Mapping[str, int]  # name -> samples
    tasks: frozenset[str]
    people: tuple[str, ...]  # the class of persons with joints, where there are any
    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    max_depth: float
    pictures: PictureSettings
    layout: LayoutSettings


class Format(ABC):
    """A layout that trainers read."""

    needs: tuple[tuple[str, ...], ...] = ()  # tasks of which the run must have all of one group
    forms: tuple[str, ...] = ("png", "jpg")  # of its image files
    known: Collection[str] | None = None  # classes that its consumers know, None = any
    has_maps = False  # whether it has label maps of 8 bits

    @abstractmethod
    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        """The files of one sample, and its entry for the files of all."""

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        """Files of all samples together, in chunks, by their path inside the format's folder."""
        return {}

    def check(self, name: str, plan: ExportPlan) -> None:
        """Refuses what the format, which the user calls by this name, cannot hold."""
        if self.needs and not any(set(group) <= plan.tasks for group in self.needs):
            needs = " or ".join(" and ".join(group) for group in self.needs)
            raise Refused(
                f"--to {name}: it needs labels for {needs}, there are some for {', '.join(sorted(plan.tasks))}",
                "Choose another format, or make the run with these labels.",
            )
        if (form := plan.pictures.image_format) not in ("same", *self.forms):
            raise Refused(f"--image-format {form}: {name} has {' or '.join(self.forms)} files", "Drop the flag.")
        if self.known is not None and not set(plan.classes.names) & set(self.known):
            raise Refused(
                f"--to {name}: none of the classes is one of its own ({', '.join(plan.classes.names)})",
                f"Rename some with --classes OLD=NEW; it knows {', '.join(self.known)}.",
            )
        if self.has_maps and (count := len(plan.classes.names)) > MOST_IN_A_MAP:
            raise Refused(
                f"--to {name}: {count} classes, its label maps hold {MOST_IN_A_MAP}",
                "Leave some out with --classes OLD=, or choose coco.",
            )

    def unknown_classes(self, plan: ExportPlan) -> list[str]:
        """The classes that it cannot show."""
        return [] if self.known is None else [name for name in plan.classes.names if name not in self.known]


def class_map(sample: SampleView, plan: ExportPlan) -> np.ndarray:  # [H, W] uint8
    """The classes of the instances, elsewhere those of the semantic map; 0 = background."""
    below = sample.semantic if "semantic" in plan.tasks else np.zeros((sample.height, sample.width), np.uint8)
    if "instance" not in plan.tasks:
        return below
    places = sample.number_things()
    numbers = np.array([0, *(plan.classes.numbers[thing.name] for thing in sample.things)], np.uint8)
    return np.where(places > 0, numbers[places], below)
