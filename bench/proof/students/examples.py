"""What student networks learn from and are asked: labelled images of a data set or of a run, classes numbered alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.proof.students.student_data import BACKGROUND, IGNORED, Vocabulary, vocabulary_of
from datasetdm_fast.engine.pictures import framing
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource, Picture
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth.augment import mirror, relight
from datasetdm_fast.training.truth.picture_source import PictureSource

MOST_BYTES = 2**30  # of decoded images that are kept in memory
LIGHT = 0.5  # chance of each change of light
FIELDS = {  # task -> the truth that is kept
    "semantic": ("semantic",),
    "instance": ("masks", "mask_classes", "crowds", "crowd_classes"),
    "depth": ("depth",),
    "pose": ("keypoints", "keypoint_boxes", "keypoint_areas"),
}


def shared_vocabulary(real: LabelledSource, run: LabelledSource | None = None) -> Vocabulary:
    """What students can name: the classes of the data set; where the run knows things and a background alone, as one
    that is labelled from attention, whatever is no thing is background in the data set, too.
    """
    found = vocabulary_of(real)
    if run is None or not set(BACKGROUNDS) & set(run.classes) or set(BACKGROUNDS) & set(found.classes):
        return found
    return replace(found, classes=(BACKGROUND, *found.things))


class Examples:
    """The images of a source with one task's truth in the numbers of a vocabulary; what was read is kept in memory."""

    def __init__(
        self,
        source: LabelledSource,
        vocabulary: Vocabulary,
        task: str,
        *,
        is_generated: bool = False,  # then what the vocabulary does not name is ignored, else it is background
        count: int = 0,  # the first of them, 0 = all
    ):
        self.source, self.task = source, task
        self._again: Callable[[Labelled], Labelled] = lambda item: item
        self.count = min(count or len(source), len(source))
        self.names = copy.copy(source)
        self.names.classes, self.names.thing_classes = vocabulary.classes, vocabulary.things
        self.names.joints = vocabulary.joints
        ground = next((k for k, name in enumerate(vocabulary.classes) if name in BACKGROUNDS), IGNORED)
        self.classes = np.full(256, IGNORED, np.uint8)
        for k, name in enumerate(source.classes):
            other = IGNORED if is_generated and name not in BACKGROUNDS else ground
            self.classes[k] = vocabulary.classes.index(name) if name in vocabulary.classes else other
        self.things = np.array(
            [vocabulary.things.index(name) if name in vocabulary.things else -1 for name in source.thing_classes],
            np.int64,
        )
        own, known = source.classes, vocabulary.classes
        if task == "instance":
            own, known = source.thing_classes, vocabulary.things
        if is_generated and task in ("semantic", "instance") and not {*own} & {*known} - {*BACKGROUNDS}:
            raise Refused(
                f"--run: its classes {', '.join(own[:5])} are none of the data's, {', '.join(known[:5])}",
                "Choose a run whose classes have the names that the data gives them.",
            )
        if task == "pose" and sorted(source.joints) != sorted(vocabulary.joints):
            raise Refused(
                f"--run: its persons have the joints {', '.join(source.joints)}, those of the data "
                f"{', '.join(vocabulary.joints)}",
                "Choose a run whose pose decoder was taught by data of the same joints.",
            )
        self.joints = [source.joints.index(name) for name in vocabulary.joints] if task == "pose" else []
        self._kept: dict[int, Labelled] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Labelled:
        if index in self._kept:
            return self._kept[index]
        item = self._again(self._numbered(self.source[index]))
        self._bytes += sum(value.nbytes for value in vars(item).values() if isinstance(value, np.ndarray))
        if self._bytes < MOST_BYTES:
            self._kept[index] = item
        return item

    def whole(self, index: int) -> Labelled:
        """An image and its map at their own size."""
        return self._numbered(whole_item(self.source, index))

    def relabelled(self, again: Callable[[Labelled], Labelled]) -> Examples:
        """The same images with the labels that `again` gives them."""
        found = copy.copy(self)
        found._again, found._kept, found._bytes = again, {}, 0
        return found

    def _numbered(self, item: Labelled) -> Labelled:
        found = {name: getattr(item, name) for name in FIELDS[self.task]}
        if self.task == "semantic":
            found["semantic"] = self.classes[item.semantic]
        elif self.task == "instance":
            for masks, numbers in (("masks", "mask_classes"), ("crowds", "crowd_classes")):
                if found[masks] is not None and len(found[masks]):
                    is_every = found[numbers] == EVERY_CLASS
                    own = np.where(is_every, EVERY_CLASS, self.things[found[numbers]])
                    kept = is_every | (own >= 0)
                    found[masks], found[numbers] = found[masks][kept], own[kept]
            for name in ("searched", "not_exhausted"):
                if (classes := getattr(item, name)) is not None:
                    found[name] = tuple(int(k) for k in self.things[list(classes)] if k >= 0)
        elif self.task == "pose":
            found["keypoints"] = item.keypoints[:, self.joints]
        return Labelled(item.id, item.image, item.caption, **found)

    def view(self, index: int, scales: tuple[float, float], random: np.random.Generator) -> Labelled:
        """An image in another scale and crop, mirrored or not, in another light; what lies outside it is ignored."""
        item = self[index]
        side = item.image.shape[0]
        scale = math.exp(random.uniform(*map(math.log, scales)))
        slack = side - side / scale  # pixels by which the window is smaller than the image
        left, top = random.uniform(min(slack, 0), max(slack, 0), 2)
        item = framing.frame_picture(_as_picture(item), framing.Window(left, top, scale), side)
        if random.random() < 0.5:
            item = mirror(item, self.names)
        return replace(item, image=relight(item.image, LIGHT, random))


def whole_item(source: LabelledSource, index: int) -> Labelled:
    """Item `index` at its own size; a scene, or the part of a picture with one person, has that of the model alone."""
    if not isinstance(source, PictureSource):
        return source[index]
    picture = source.guard(source.picture, source.order[index])
    if picture.person:
        return source[index]
    labels = {"semantic": picture.semantic, "depth": picture.depth}
    if picture.masks is not None:
        labels |= {"masks": _stacked(picture.masks, picture), "crowds": _stacked(picture.crowds, picture)}
        labels |= {name: np.array(getattr(picture, name), np.int64) for name in ("mask_classes", "crowd_classes")}
    return source.complete(Labelled(picture.id, picture.image, picture.text, named=picture.named, **labels))


def _stacked(masks: Sequence[Callable[[], np.ndarray]], picture: Picture) -> np.ndarray:
    return np.stack([make() for make in masks]).astype(bool) if masks else np.zeros((0, *picture.image.shape[:2]), bool)


def _as_picture(item: Labelled) -> Picture:
    fields = {name: getattr(item, name) for names in FIELDS.values() for name in names}
    for masks, numbers in (("masks", "mask_classes"), ("crowds", "crowd_classes")):
        found = fields.pop(masks), fields.pop(numbers)
        if found[0] is not None:
            fields |= {masks: [partial(np.array, mask) for mask in found[0]], numbers: found[1].tolist()}
    return Picture(item.id, item.image, item.caption, **fields)


def as_tensor(items: Sequence[Labelled], colours: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Images [B, 3, H, W] fp32, normalised by mean and deviation of each colour."""
    pixels = torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in colours)
    return ((pixels - mean) / deviation).contiguous()
