"""What a student learns from: real labelled images, or those of a run folder with the labels to be trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Instances, SemanticMap
from datasetdm_fast.engine.labels.class_tables import mirrored_names
from datasetdm_fast.engine.labels.trust import without_doubtful
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, largest_first
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.reader import StoredSample

SIDE = 64  # pixels of a side of an image
CELL = 2  # pixels of a side of what one answer is given for
CELLS = SIDE // CELL
MOST_TIMES = 4.0
IGNORED = 255
BACKGROUND = "background"
PERSON = "person"
LEAST_JOINT_SCORE = 0.3  # of a joint of a generated image, else it is ignored


@dataclass(frozen=True)
class Vocabulary:
    """What a student can name."""

    classes: tuple[str, ...]
    things: tuple[str, ...]
    joints: tuple[str, ...]
    max_depth: float

    @property
    def mirror(self) -> list[int]:
        """The joint that each becomes in a mirror."""
        return mirrored_names(self.joints)


def digest_of_items(items: Iterable[Labelled]) -> str:
    """SHA-256 of pictures and labels."""
    digest = hashlib.sha256()
    for item in items:
        for name, value in vars(item).items():
            if isinstance(value, np.ndarray):
                digest.update(f"{name} {value.dtype.str} {value.shape}\0".encode())
                digest.update(np.ascontiguousarray(value).data)
        digest.update(f"{item.searched} {item.not_exhausted}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class StudentData:
    """Labelled images as tensors."""

    vocabulary: Vocabulary
    images: Tensor  # [N, SIDE, SIDE, 3] uint8
    semantic: Tensor  # [N, CELLS, CELLS] uint8, 255 = ignored
    instance: Tensor  # [N, CELLS, CELLS] uint8, 0 = no thing, 255 = ignored
    depth: Tensor  # [N, CELLS, CELLS] fp32 metres, 0 = unknown
    joints: Tensor  # [N, J, 3] fp32: x, y in cells, 1 where known
    weights: Tensor  # [N] how often an image is drawn, beside the others
    left_out: int = 0  # images that were not trusted

    def __len__(self) -> int:
        return len(self.images)

    def teaches(self, task: str) -> bool:
        """Whether any image has a label of a task that the vocabulary names."""
        instance = (self.instance > 0) & (self.instance != IGNORED)
        ground = [k for k, name in enumerate(self.vocabulary.classes) if name in BACKGROUNDS]
        labelled = {
            "semantic": ~torch.isin(self.semantic, torch.tensor([*ground, IGNORED])),
            "instance": instance,
            "depth": self.depth > 0,
            "pose": self.joints[..., 2] > 0,
        }
        return bool(labelled[task].any())

    def balanced(self) -> StudentData:
        """The same images, those that show a rarer thing drawn more often, up to MOST_TIMES as often as the others."""
        if not self.vocabulary.things:  # as in data of depths
            return self
        numbers = [self.vocabulary.classes.index(name) for name in self.vocabulary.things]
        shows = torch.stack([(self.semantic == number).flatten(1).any(1) for number in numbers], 1).float()
        rarity = (shows / shows.mean(0).clamp(min=1 / len(self))).amax(1)
        least = rarity[rarity > 0].min() if (rarity > 0).any() else torch.tensor(1.0)
        return replace(self, weights=(rarity / least).clamp(1, MOST_TIMES))


def vocabulary_of(source: LabelledSource) -> Vocabulary:
    """What a data set names; without a class for every pixel, whatever is no thing is background."""
    classes = source.classes if "semantic" in source.tasks else (BACKGROUND, *source.thing_classes)
    things = tuple(name for name in source.thing_classes if name in classes)
    return Vocabulary(tuple(classes), things, tuple(source.joints), source.max_depth)


def real(items: Iterable[Labelled], source: LabelledSource, vocabulary: Vocabulary) -> StudentData:
    """Labelled images of a data set read at SIDE pixels."""
    return _stacked(vocabulary, [_of_truth(item, source, vocabulary) for item in items])


def _of_truth(item: Labelled, source: LabelledSource, vocabulary: Vocabulary) -> tuple[np.ndarray, ...]:
    shape, masks = item.image.shape[:2], () if item.masks is None else item.masks
    if item.semantic is not None and "semantic" in source.tasks:
        semantic = item.semantic
    else:
        semantic = np.full(shape, 0 if item.masks is not None else IGNORED, np.uint8)
        for k in largest_first(masks):
            semantic[masks[k]] = vocabulary.classes.index(source.thing_classes[item.mask_classes[k]])
    instance = np.full((CELLS, CELLS), IGNORED if item.masks is None else 0, np.uint8)
    for k in largest_first(masks):
        instance[covered(masks[k])] = min(k + 1, IGNORED - 1)
    for crowd in () if item.crowds is None else item.crowds:
        instance[covered(crowd)] = IGNORED
        semantic = np.where(crowd & (semantic == 0), IGNORED, semantic)
    depth = np.zeros((CELLS, CELLS), np.float32) if item.depth is None else _depth(item.depth)
    joints = np.zeros((len(vocabulary.joints), 3), np.float32)
    if item.keypoints is not None and len(item.keypoints):
        joints[:] = item.keypoints[int(np.argmax(item.keypoint_areas))]
        joints[:] = np.concatenate([joints[:, :2] / CELL, joints[:, 2:] > 0], 1)
    sure = SemanticMap(semantic, np.ones(semantic.shape, np.float32), vocabulary.classes)
    return item.image, voted(sure, vocabulary.classes), instance, depth, joints


def synthetic(samples: Iterable[StoredSample], vocabulary: Vocabulary) -> StudentData:
    """The trusted ones of generated images."""
    read = [of_sample(sample, vocabulary) for sample in samples]
    rows = [row for row in read if row is not None]
    if not read:
        raise Refused("student: the run holds no image that is kept", "Name a run folder with samples.")
    if not rows:
        raise Refused(
            f"student: all of {len(read)} generated images are doubtful",
            "Their gallery shows why.",
        )
    return replace(_stacked(vocabulary, rows), left_out=len(read) - len(rows))


def lack(task: str, samples: Iterable[StoredSample], vocabulary: Vocabulary) -> str:
    """Why none of these generated images teaches a task, in words."""
    named = {name for sample in samples for name in sample.classes}.intersection(vocabulary.things)
    if task == "instance" and not named:
        return "no prompt names a class of the data"
    if task == "pose" and named and PERSON not in named:
        return f"no prompt names a {PERSON}"
    return "no image shows a label of it that the data names"


def of_sample(sample: StoredSample, vocabulary: Vocabulary) -> tuple[np.ndarray, ...] | None:
    """Image and labels of a generated sample, None where it is doubtful; doubtful pixels are ignored."""
    height, width = sample.image.shape[:2]
    if height % SIDE or height != width:
        raise Refused(
            f"sample {sample.id}: {width} x {height} pixels, expected a square whose side is a multiple of {SIDE}",
            f"Generate with --size {SIDE} times a number.",
        )
    if not sample.trust.is_trusted:
        return None
    named = [name for name in sample.classes if name in vocabulary.things]
    found = {"semantic": sample.semantic, "instance": sample.instances}
    found = {task: label for task, label in found.items() if label is not None}
    found = without_doubtful(sample.classes, found, sample.prompt, sample.class_table)
    semantic = np.full((CELLS, CELLS), IGNORED, np.uint8)
    if "semantic" in found:
        semantic = voted(found["semantic"], vocabulary.classes)
    instance, kinds = np.full((CELLS, CELLS), IGNORED, np.uint8), None
    if "instance" in found:
        instance, kinds = _instance_map(found["instance"], vocabulary, named)
        semantic = semantic if "semantic" in found else kinds.copy()
    if kinds is not None and "semantic" in found:
        numbers = [vocabulary.classes.index(name) for name in vocabulary.things]
        is_thing, is_found = np.isin(semantic, numbers), (instance > 0) & (instance != IGNORED)
        instance[(is_found & (kinds != semantic)) | (is_thing & ~is_found)] = IGNORED
    depth = np.zeros((CELLS, CELLS), np.float32) if sample.depth is None else _depth(sample.depth.metres)
    joints = np.zeros((len(vocabulary.joints), 3), np.float32)
    keypoints = sample.keypoints
    if keypoints is not None and len(keypoints.points) and (not named or PERSON in named):
        order = [keypoints.joints.index(name) if name in keypoints.joints else -1 for name in vocabulary.joints]
        person = int(keypoints.scores.argmax())
        points, seen = keypoints.points[person][order], keypoints.visibility[person][order] > 0
        joints[:, :2] = points[:, :2] * (CELLS / sample.image.shape[0])
        joints[:, 2] = seen & (points[:, 2] >= LEAST_JOINT_SCORE) & (np.array(order) >= 0)
    image = np.rint(_blocks(sample.image.astype(np.float32), SIDE).mean((1, 3))).astype(np.uint8)
    return image, semantic, instance, depth, joints


def _blocks(plane: np.ndarray, side: int) -> np.ndarray:
    """[side, f, side, f, ...] of a plane [side * f, side * f, ...]."""
    factor = plane.shape[0] // side
    return plane.reshape(side, factor, side, factor, *plane.shape[2:])


def covered(mask: np.ndarray) -> np.ndarray:
    """Cells of which a mask has at least half."""
    return _blocks(mask.astype(np.float32), CELLS).mean((1, 3)) >= 0.5


def _depth(metres: np.ndarray) -> np.ndarray:
    """Mean metres of each cell over the pixels where they are known."""
    known = _blocks((metres > 0).astype(np.float32), CELLS).sum((1, 3))
    return (_blocks(metres, CELLS).sum((1, 3)) / np.maximum(known, 1)).astype(np.float32)


def voted(found: SemanticMap, classes: Sequence[str]) -> np.ndarray:
    """Label map of cells in the numbers of `classes`, ignored where most of a cell is."""
    numbers = np.full(256, len(classes), np.int64)
    numbers[: len(found.classes)] = [classes.index(name) if name in classes else len(classes) for name in found.classes]
    votes = np.eye(len(classes) + 1, dtype=np.float32)[numbers[found.labels]] * found.confidence[..., None]
    votes = _blocks(votes, CELLS).mean((1, 3))
    best = votes.argmax(2)
    best[best == len(classes)] = IGNORED
    return best.astype(np.uint8)


def _instance_map(found: Instances, vocabulary: Vocabulary, wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Number and class of the best instance of each cell; where an unwanted one lies, both are ignored."""
    instance, kinds = np.zeros((CELLS, CELLS), np.uint8), np.zeros((CELLS, CELLS), np.uint8)
    for k in np.argsort(found.scores, kind="stable"):
        inside, name = covered(found.masks[k]), found.classes[found.class_ids[k]]
        is_wanted = name in wanted and name in vocabulary.classes
        instance[inside] = min(int(k) + 1, IGNORED - 1) if is_wanted else IGNORED
        kinds[inside] = vocabulary.classes.index(name) if is_wanted else IGNORED
    return instance, kinds


def _stacked(vocabulary: Vocabulary, rows: Sequence[tuple[np.ndarray, ...]]) -> StudentData:
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
    return StudentData(vocabulary, *columns, weights=torch.ones(len(rows)))
