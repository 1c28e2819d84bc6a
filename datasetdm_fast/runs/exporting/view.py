"""A sample as an export shows it: chosen labels, classes by the export's numbers, at the size asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import kind_of, mask_rle
from datasetdm_fast.engine.labels.depth import DEFAULT_UNIT, LARGEST_STEP, UNITS
from datasetdm_fast.engine.labels.image_files import image_bytes
from datasetdm_fast.engine.labels.kind import Placement
from datasetdm_fast.engine.labels.names import LabelName
from datasetdm_fast.engine.labels.pose import MIDDLE, TO_EDGE
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.runs.exporting.classes import BACKGROUND, IGNORED, PERSON, Classes, Renaming, class_names, lookup
from datasetdm_fast.runs.exporting.settings import ExportSettings
from datasetdm_fast.runs.run_folder.document import runs_of, sides, to_see_damage
from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.untrusted import images


@dataclass(frozen=True)
class Linked:
    """A file of a run folder whose bytes are those that an export needs."""

    path: Path
    stored: StoredFile


@dataclass(frozen=True)
class RunView:
    """What the samples of one run have in common."""

    labels: Mapping[str, str]  # task -> label of the run
    things: Mapping[int, str]  # category in the run's records -> class name in the export
    numbers: np.ndarray  # [256] uint8: value of the run's label map -> number in the export
    person: str  # class name of persons with joints
    is_partial: bool  # whether 255 in the run's label map is also what lies outside of another label

    @classmethod
    def of(
        cls, document: Mapping[str, Any], labels: Mapping[str, str], classes: Classes, renamed: Renaming
    ) -> "RunView":
        things = class_names(document, labels["instance"]) if "instance" in labels else {}
        maps = class_names(document, labels["semantic"]) if "semantic" in labels else {}
        return cls(
            labels,
            {number: new for number, name in things.items() if (new := renamed(name)) in classes.things},
            lookup(maps, classes, renamed),
            renamed(PERSON),
            "semantic" in labels and _is_partial(document, labels["semantic"]),
        )


def _is_partial(document: Mapping[str, Any], label: str) -> bool:
    """Whether a run holds a label map only within another label, and it has no class for what lies outside."""
    found = [text.partition(" within ")[0] for run in runs_of(document) for text in run["config"].get("combine", ())]
    called = {label, LabelName.parse(label).decoder} - {""}
    return BACKGROUND not in document["labels"][label]["classes"] and not called.isdisjoint(found)


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
    sure: tuple[float, ...]  # score of each joint
    score: float
    area: float  # pixels
    box: tuple[float, float, float, float]  # x, y, width, height


class SampleView:
    """One sample of an export; pixels are read when they are asked for, and compared with their digests."""

    def __init__(self, stored: StoredSample, number: int, split: str, run: RunView, settings: ExportSettings):
        self.stored, self.number, self.split, self.run, self.settings = stored, number, split, run, settings
        self.name = f"{number:08d}"
        height, width = sides(stored.document, stored.row.recipe)
        longest = settings.resize or max(height, width)
        rows, columns = (max(round(side * longest / max(height, width)), 1) for side in (height, width))
        self.place = Placement(height, width, 0, 0, rows, columns, (rows, columns))

    @property
    def height(self) -> int:
        return self.place.rows

    @property
    def width(self) -> int:
        return self.place.columns

    @property
    def prompt(self) -> str:
        return self.stored.prompt

    def read(self, role: str) -> bytes:
        """The bytes of a file of the run; others than were written are refused."""
        name, written = self.stored.row.files[role]
        try:
            data = storage.read_written(self.stored.folder / name, written, images.LARGEST_IMAGE_FILE)
        except (Missing, Refused) as error:
            raise self._damaged(error.cause) from error
        if data is None:
            raise self._damaged(f"{self.stored.run}/{name}: it is missing or has changed since it was written")
        return data

    def _damaged(self, cause: str) -> GateFailed:
        return GateFailed(cause, to_see_damage(self.stored.run))

    def _pixels(self, role: str) -> np.ndarray:
        return np.asarray(images.decode_image(self.read(role), self.stored.row.files[role][0]))

    @cached_property
    def image(self) -> np.ndarray:  # [H, W, 3] uint8
        pixels = self._pixels("image")
        if self.place.is_scaled:
            shrunk = Image.fromarray(pixels).resize((self.width, self.height), Image.Resampling.LANCZOS)
            pixels = np.asarray(shrunk)
        return pixels

    def picture(self, forms: Sequence[str]) -> tuple[str, bytes | Linked]:
        """The image as a file of one of these forms, png or jpg, and its ending."""
        there = self.stored.row.files["image"][0].rpartition(".")[2]
        wanted = there if self.settings.image_format == "same" else self.settings.image_format
        if wanted not in forms:
            wanted = forms[0]
        if wanted == there and not self.place.is_scaled:
            return wanted, self.linked("image")
        return wanted, image_bytes(self.image, wanted, self.settings.quality)

    def linked(self, role: str) -> Linked:
        """A file of the run, as it is."""
        self.read(role)
        name, written = self.stored.row.files[role]
        return Linked(self.stored.folder / name, written)

    @cached_property
    def _map(self) -> np.ndarray:  # [H, W] uint8
        """The label map of the run, at the size of the export."""
        return self.place.scale(self._pixels(kind_of(self.run.labels["semantic"]).roles[0]))

    @property
    def semantic(self) -> np.ndarray:  # [H, W] uint8
        """Class numbers of the export, 0 = background, 255 = to be ignored."""
        return self.run.numbers[self._map]

    @property
    def ignored(self) -> np.ndarray:  # [H, W] bool
        """Where the label map of the run is to be ignored: not what the export leaves out, nor what lies outside."""
        if "semantic" not in self.run.labels or self.run.is_partial:
            return np.zeros((self.height, self.width), bool)
        return self._map == IGNORED

    @property
    def depth_role(self) -> str:
        """The role of the depth file of the run."""
        return kind_of(self.run.labels["depth"]).roles[0]

    @property
    def depth_steps(self) -> float:
        """Steps of a metre in that file."""
        return UNITS[self._table("depth").get("unit", DEFAULT_UNIT)]

    @cached_property
    def depth(self) -> np.ndarray:  # [H, W] float32 metres
        label = self.run.labels["depth"]
        pixels = {role: self._pixels(role) for role in kind_of(label).roles}
        found = kind_of(label).decode(pixels, self.stored.row.labels[label], self._table("depth"))
        return self.place.scale(found.metres)

    def depth_file(self, steps: float) -> bytes | Linked:
        """A 16-bit PNG with so many steps to the metre; what it has no number for is 0, as what is unknown."""
        if self.depth_steps == steps and not self.place.is_scaled:
            return self.linked(self.depth_role)
        pixels = np.rint(self.depth.astype(np.float64) * steps)
        return _C.png_encode_words(np.where(pixels <= LARGEST_STEP, pixels, 0).astype(np.uint16))

    def _table(self, task: str) -> Mapping[str, Any]:
        return self.stored.document["labels"][self.run.labels[task]]

    @cached_property
    def things(self) -> tuple[ExportedThing, ...]:
        """Instances in the order of the run."""
        label = self.run.labels["instance"]
        found = []
        for item in self.stored.row.labels[label]:
            name = self.run.things.get(item["category_id"])
            if name is None or item["score"] < self.settings.least_score:
                continue
            moved = kind_of(label).move(item, self.place) if self.place.is_scaled else item
            if moved is not None:
                found.append(
                    ExportedThing(name, item["score"], moved["segmentation"], moved["area"], tuple(moved["bbox"]))
                )
        return tuple(found)

    @cached_property
    def people(self) -> tuple[ExportedPerson, ...]:
        """Persons of whom a joint is there, in the order of the run."""
        label, found = self.run.labels["pose"], []
        is_from_middle = self._table("pose").get("origin") == MIDDLE
        right, down = self.width / self.place.width, self.height / self.place.height
        for item in self.stored.row.labels[label]:
            if not (self.run.person and item["num_keypoints"] and item["score"] >= self.settings.least_score):
                continue
            joints = np.array(item["keypoints"], np.float64).reshape(-1, 3)
            seen = joints[:, 2] > 0
            if not is_from_middle:
                joints[seen, :2] -= TO_EDGE
            if self.place.is_scaled:
                joints[seen, :2] = (joints[seen, :2] + TO_EDGE) * (right, down) - TO_EDGE
            x, y, width, height = item["bbox"]
            box = (x * right, y * down, width * right, height * down)
            sure = tuple(item["keypoint_scores"])
            found.append(ExportedPerson(self.run.person, joints, sure, item["score"], item["area"] * right * down, box))
        return tuple(found)
