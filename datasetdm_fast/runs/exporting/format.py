"""Formats: the labels they need, the files of a sample, and those of all samples together; and a sample as they see it,
with chosen labels and classes by the export's numbers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from datasetdm_fast import _C
from datasetdm_fast.data import IGNORE
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import BACKGROUND, LabelName, kind_of, mask_rle
from datasetdm_fast.engine.labels.depth import DEFAULT_UNIT, LARGEST_STEP, UNITS
from datasetdm_fast.engine.labels.label_files import image_bytes
from datasetdm_fast.engine.labels.pose import PERSON
from datasetdm_fast.errors import GateFailed, Missing, Refused, Unanswered
from datasetdm_fast.runs.exporting.classes import MOST_IN_A_MAP, Classes, class_names, number_lookup
from datasetdm_fast.runs.exporting.settings import LayoutSettings, PictureSettings
from datasetdm_fast.runs.run_folder.corrections import Correction
from datasetdm_fast.runs.run_folder.document import runs_of, sides, to_see_damage
from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.untrusted import images


@dataclass(frozen=True)
class Linked:
    """A file of a run folder whose bytes are those that an export needs."""

    path: Path
    stored: StoredFile

    def read(self) -> bytes:
        return storage.read(self.path, self.stored.size)


Content = bytes | Linked


@dataclass(frozen=True)
class ExportPlan:
    """Facts of a run and of its export that all files follow."""

    labels: Mapping[str, str]  # task -> label of the run
    classes: Classes
    splits: Mapping[str, int]  # name -> samples
    things: Mapping[int, str]  # category in the run's records -> class name in the export
    numbers: np.ndarray  # [256] uint8: value of the run's label map -> number in the export
    is_partial: bool  # whether 255 in the run's label map is also what lies outside of another label
    people: tuple[str, ...]  # the class of persons with joints, where there are any
    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    max_depth: float
    pictures: PictureSettings
    layout: LayoutSettings
    digest: str  # SHA-256 of the samples and settings

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(self.labels)

    @classmethod
    def of(
        cls,
        document: Mapping[str, Any],
        labels: Mapping[str, str],
        classes: Classes,
        renaming: Mapping[str, str],
        **chosen: Any,
    ) -> Self:
        """The plan of a run by its run.json; `chosen` are splits, pictures, layout and digest."""
        names = {task: class_names(document, labels[task]) for task in ("semantic", "instance") if task in labels}
        things = {number: renaming.get(name, name) for number, name in names.get("instance", {}).items()}
        tables = {task: document["labels"][label] for task, label in labels.items()}
        people, person = tables.get("pose"), renaming.get(PERSON, PERSON)
        return cls(
            labels,
            classes,
            things={number: name for number, name in things.items() if name in classes.things},
            numbers=number_lookup(names.get("semantic", {}), classes, renaming),
            is_partial="semantic" in labels and _is_partial(document, labels["semantic"]),
            people=(person,) if people and person else (),
            joints=tuple(people["joints"]) if people else (),
            limbs=tuple((int(a), int(b)) for a, b in people["limbs"]) if people else (),
            max_depth=float(tables["depth"]["max_depth"]) if "depth" in tables else 0.0,
            **chosen,
        )


def _is_partial(document: Mapping[str, Any], label: str) -> bool:
    combined = [text for run in runs_of(document) for text in run["config"].get("combine", ())]
    limited = {text.partition(" within ")[0] for text in combined}
    is_within = not limited.isdisjoint({label, LabelName.parse(label).decoder} - {""})
    return is_within and BACKGROUND not in document["labels"][label]["classes"]


@dataclass(frozen=True)
class ExportedThing:
    """An instance: its class by name, and its mask as run lengths."""

    name: str
    score: float
    rle: mask_rle.Rle
    area: int  # pixels
    box: tuple[float, float, float, float]  # x, y, width, height

    @cached_property
    def mask(self) -> np.ndarray:  # [H, W] bool
        return mask_rle.decode(self.rle)


@dataclass(frozen=True)
class ExportedPerson:
    """Joints of a person, counted from the middle of the first pixel as COCO does."""

    name: str  # of its class
    joints: np.ndarray  # [J, 3] float64: x, y, visibility; zeros where a joint is absent
    joint_scores: tuple[float, ...]
    score: float
    area: float  # pixels
    box: tuple[float, float, float, float]  # x, y, width, height


class SampleView:
    """One sample of an export; pixels are read on first use, and compared with their digests."""

    def __init__(self, stored: StoredSample, split: str, plan: ExportPlan, correction: Correction | None):
        self.number, self.split, self.plan = stored.row.request.index, split, plan
        self._written, self._correction = stored.row, correction
        row = correction.correct_row(stored.row, stored.document["labels"]) if correction else stored.row
        self.stored = replace(stored, row=row)
        self.name = f"{self.number:08d}"
        self.height, self.width = sides(stored.document, stored.row.recipe)

    @property
    def prompt(self) -> str:
        return self.stored.prompt

    def read(self, role: str) -> bytes:
        """The bytes of a file of the run; refuses others than were written."""
        name, written = self.stored.row.files[role]
        try:
            data = self.stored.read(role)
        except Unanswered:
            raise
        except Missing as error:
            if (self.stored.folder / name).exists():
                raise GateFailed(error.cause, to_see_damage(self.stored.run)) from error
            data = b""
        except Refused as error:
            raise GateFailed(error.cause, to_see_damage(self.stored.run)) from error
        if len(data) != written.size or hashlib.sha256(data).hexdigest() != written.sha256:
            cause = f"{self.stored.run}/{name}: it is missing or has changed since it was written"
            raise GateFailed(cause, to_see_damage(self.stored.run))
        return data

    def _pixels(self, role: str) -> np.ndarray:
        return np.asarray(images.decode_image(self.read(role), self.stored.row.files[role].path))

    @cached_property
    def image(self) -> np.ndarray:  # [H, W, 3] uint8
        return self._pixels("image")

    def picture(self, forms: Sequence[str]) -> tuple[str, Content]:
        """The image as a file of one of these forms, png or jpg, and its ending."""
        stored = self.stored.row.files["image"].path.rpartition(".")[2]
        form = stored if self.plan.pictures.image_format == "same" else self.plan.pictures.image_format
        if form not in forms:
            form = forms[0]
        if form == stored:
            return form, self.link_file("image")
        return form, image_bytes(self.image, form, self.plan.pictures.quality)

    def link_file(self, role: str) -> Content:
        """A file of the run, as it is; of one that is in a shard its bytes."""
        data = self.read(role)
        if self.stored.shards:
            return data
        name, written = self.stored.row.files[role]
        return Linked(self.stored.folder / name, written)

    @cached_property
    def _map(self) -> np.ndarray:  # [H, W] uint8
        """The label map of the run, as it was corrected."""
        label = self.plan.labels["semantic"]
        labels, document = self._pixels(kind_of(label).roles[0]), self.stored.document
        if not self._correction:
            return labels
        return self._correction.correct_map(labels, class_names(document, label), self._written, document["labels"])

    @property
    def semantic(self) -> np.ndarray:  # [H, W] uint8
        """Class numbers of the export, 0 = background, 255 = ignored."""
        return self.plan.numbers[self._map]

    @property
    def ignored(self) -> np.ndarray:  # [H, W] bool
        """Where the corrected label map is ignored: not classes that the export leaves out, nor what lies outside."""
        if "semantic" in self.plan.labels and not self.plan.is_partial:
            return self._map == IGNORE
        return (self._correction or Correction()).region((self.height, self.width))

    def depth_file(self, steps: float) -> Content:
        """A 16-bit PNG with so many steps to the metre; depths that it has no number for are 0, as unknown ones."""
        label = self.plan.labels["depth"]
        kind, table = kind_of(label), self.stored.document["labels"][label]
        if UNITS[table.get("unit", DEFAULT_UNIT)] == steps:
            return self.link_file(kind.roles[0])
        pixels = {role: self._pixels(role) for role in kind.roles}
        depth = kind.decode(pixels, self.stored.row.labels[label], table)
        numbers = np.rint(depth.metres.astype(np.float64) * steps)
        return _C.png_encode_words(np.where(numbers <= LARGEST_STEP, numbers, 0).astype(np.uint16))

    @cached_property
    def things(self) -> tuple[ExportedThing, ...]:
        """Instances in the order of the run."""
        label = self.plan.labels["instance"]
        things = []
        for item in self.stored.row.labels[label]:
            name = self.plan.things.get(item["category_id"])
            if name is None or item["score"] < self.plan.pictures.least_score:
                continue
            things.append(ExportedThing(name, item["score"], item["segmentation"], item["area"], tuple(item["bbox"])))
        return tuple(things)

    def number_things(self) -> np.ndarray:  # [H, W] int32
        """The place of the instance of each pixel, from 1 on and that of the highest score; 0 where there is none."""
        places = np.zeros((self.height, self.width), np.int32)
        for k in np.argsort([thing.score for thing in self.things], kind="stable").tolist():
            places[self.things[k].mask] = k + 1
        places[self.ignored] = 0
        return places

    @cached_property
    def people(self) -> tuple[ExportedPerson, ...]:
        """Persons with at least one joint, in the order of the run."""
        people = []
        for item in self.stored.row.labels[self.plan.labels["pose"]]:
            if not (self.plan.people and item["num_keypoints"] and item["score"] >= self.plan.pictures.least_score):
                continue
            joints = np.array(item["keypoints"], np.float64).reshape(-1, 3)
            scores, area, box = tuple(item["keypoint_scores"]), float(item["area"]), tuple(item["bbox"])
            people.append(ExportedPerson(self.plan.people[0], joints, scores, item["score"], area, box))
        return tuple(people)


Files = dict[str, Content]  # path inside the format's folder, content
Entry = dict[str, Any]  # what the files of all samples need of one, as JSON


@dataclass(frozen=True)
class AllSamples:
    """The samples of an export, once the files of each are written."""

    entries: Callable[[str], Iterator[Entry]]  # of the samples of a split, in order
    views: Callable[[str, int, int], Iterator[SampleView]]  # samples of a split, from one position to another


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

    def find_limits(self, plan: ExportPlan, samples: AllSamples) -> Iterator[str]:
        """What a user should know of the files of all samples."""
        return iter(())

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
