"""run:RUN[SPLIT,LABEL]: the samples of a run folder, with the labels that were made with them taken for truth."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import Instances, SemanticMap
from datasetdm_fast.engine.labels.kind import SHOWN_SCORE
from datasetdm_fast.engine.labels.names import LabelName, task_of_label
from datasetdm_fast.engine.labels.trust import without_doubtful
from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.engine.pictures.pictures import MOST_SEMANTIC, PictureSource
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LEDGER
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.split import origins, part_of, read_split
from datasetdm_fast.untrusted import documents

# the first that a run has tells the class of every pixel, where LABEL names none
MAPS = ("semantic", "open-vocabulary", ATTENTION)
ALL, TRAIN = "all", "train"


def _split_and_label(text: str) -> tuple[str, str]:
    """The part of the run and the map of classes that the brackets of an address name, the latter perhaps empty; the
    name of a decoder follows its task after a dot.
    """
    words, labels = text.split(","), []
    for word in words:
        try:
            label = LabelName.of_stem(word)
        except ValueError:
            continue
        if label.task in MAPS:
            labels.append((word, str(label)))
    if not labels or len(words) > 2:
        return text, ""
    word, label = labels[-1]
    words.remove(word)
    return "".join(words) or TRAIN, label


class RunSamples(PictureSource):
    """What the last filter keeps and nothing calls doubtful, doubtful pixels ignored; with [all], every sample as it is
    stored. Where the run is split, SPLIT is one of its parts. LABEL is the map of classes to take; of several decoders
    of another task, the first of the run tells the truth; instances whose score is low are neither right nor wrong to
    find.
    """

    rule = framing.RULES["coco"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        split, chosen = _split_and_label(split)
        self.path, self.is_all = path, split == ALL
        self.run = Run(path, kept=not self.is_all)
        found = None if self.is_all else read_split(path)
        if found and split not in (ALL, *found.parts):
            raise Refused(
                f"{path}: no part {split!r}, it is split into {', '.join(found.parts)}",
                f"Name one of these, as in run:{path}[{next(iter(found.parts))}], or [all] for every sample.",
            )
        if not found and split not in (ALL, TRAIN):
            raise Refused(
                f"{path}: no split {split!r}",
                f"Leave the brackets out, or split it first with: python -m datasetdm_fast.split {quote(path)}",
            )
        parts = found.names() if found else {}
        self.labels: dict[str, str] = {}  # task -> the label of the run that tells its truth
        for label in self.run.tasks:
            self.labels.setdefault(task_of_label(label), label)
        if chosen not in ("", *self.run.tasks):
            raise Refused(
                f"--data run:{path}[{chosen}]: the run has no labels of this name",
                f"It has {', '.join(self.run.tasks)}.",
            )
        self.map = chosen or next((self.labels[task] for task in MAPS if task in self.labels), "")
        self._name_classes(tasks)
        # position in the run, id, and what the sample has in common with others
        self.records: list[tuple[int, str, tuple[str, ...]]] = []
        kept = 0
        for position, row in enumerate(self.run.rows(("files", "trust"))):
            if found and part_of(path, parts, row) != split:
                continue
            kept += 1
            if self.is_all or self._trusted(position, row):
                self.records.append((position, row.request.id, self._origins(row)))
        part = f"[{split}]" if found or self.is_all else ""
        if not kept:
            raise Refused(
                f"--data run:{path}{part}: no sample is left",
                f"Let its filter and its split keep some, or restore dropped ones; run:{path}[all] takes every sample.",
            )
        if not self.records:
            raise Refused(
                f"--data run:{path}{part}: {'the one sample' if kept == 1 else f'all {kept} samples'} that it keeps "
                f"{'is' if kept == 1 else 'are'} doubtful",
                f"Look at them in its gallery; run:{path}[all] takes them as they are.",
            )
        super().__init__(size, len(self.records))

    def _name_classes(self, tasks: tuple[str, ...]) -> None:
        """What the tables of run.json name, for the tasks that are wanted."""
        tables = self.run.document["labels"]
        if self.map:
            self.classes = tuple(tables[self.map]["classes"])
            self.thing_classes = reading.without_background(self.classes)
        if "instance" in self.labels:
            self.thing_classes = tuple(tables[self.labels["instance"]]["classes"])
            if not self.map and len(self.thing_classes) < MOST_SEMANTIC:
                self.classes = ("background", *self.thing_classes)
        if "depth" in self.labels:
            self.max_depth = float(tables[self.labels["depth"]]["max_depth"])
        if "pose" in self.labels:
            table = tables[self.labels["pose"]]
            self.joints, self.limbs = tuple(table["joints"]), tuple(map(tuple, table["limbs"]))
            if any(len(limb) != 2 or not all(0 <= end < len(self.joints) for end in limb) for limb in self.limbs):
                raise reading.bad(self.path / DOCUMENT, "a limb that joins no two joints")
        there = {
            "semantic": bool(self.classes),
            "instance": "instance" in self.labels,
            "open-vocabulary": bool(self.thing_classes),
            "depth": "depth" in self.labels,
            "pose": "pose" in self.labels,
        }
        self.tasks = tuple(task for task, is_there in there.items() if is_there)
        self.wanted = {task for task in self.tasks if not tasks or task in tasks}

    def _trusted(self, position: int, row: Row) -> bool:
        # samples that were written before any was judged are judged now, from their labels
        return (row.trust or self.run[position].trust).is_trusted

    def _origins(self, row: Row) -> tuple[str, ...]:
        """What a sample has in common with the others that were made of the same picture."""
        try:
            found = list(origins(self.run.document, row))
            documents.check_form(found, [str], "origins")
        except (ValueError, TypeError, KeyError) as error:
            raise reading.bad(self.path / LEDGER, f"the row of sample {row.request.id} is damaged ({error})") from error
        return tuple(found)

    def name(self, record: int) -> str:
        return f"{self.path}: sample {self.records[record][1]}"

    def path_of(self, record: int) -> str:
        return self.records[record][1]

    def origins(self, record: int) -> tuple[str, ...]:
        return self.records[record][2]

    def picture(self, record: int) -> Picture:
        sample = self.run[self.records[record][0]]
        fields: dict[str, Any] = {}
        found = self._class_labels(sample)
        if not self.is_all:
            found = without_doubtful(sample.classes, found, sample.prompt, sample.class_table)
        image = sample.image
        for label in found.values():
            fields |= self._of(label, record, image.shape[:2])
        if "depth" in self.wanted:
            fields["depth"] = sample.label(self.labels["depth"]).metres
            self._check_sides(record, fields["depth"].shape, image.shape[:2])
        if "pose" in self.wanted:
            fields |= self._persons(sample, record)
        return Picture(sample.id, image, sample.prompt, **fields)

    def _class_labels(self, sample: StoredSample) -> dict[str, SemanticMap | Instances]:
        if not self.wanted & {"semantic", "instance", "open-vocabulary"}:
            return {}
        labels = filter(None, (self.map, self.labels.get("instance")))
        return {label: found for label in labels if (found := sample.label(label)) is not None}

    def _of(self, label: SemanticMap | Instances, record: int, sides: tuple[int, ...]) -> dict[str, Any]:
        """The fields of a picture that come of a label: the sure instances are masks, the others crowds."""
        if isinstance(label, SemanticMap):
            self._check_sides(record, label.labels.shape, sides)
            reading.check_numbers(self.name(record), label.labels, len(self.classes))
            return {"semantic": label.labels}
        if len(label.masks):
            self._check_sides(record, label.masks.shape[1:], sides)
        found: dict[str, Any] = {"masks": [], "mask_classes": [], "crowds": [], "crowd_classes": []}
        for mask, kind, score in zip(label.masks, label.class_ids.tolist(), label.scores, strict=True):
            if not 0 <= kind < len(self.thing_classes):
                raise reading.bad(self.name(record), f"an instance of the unknown category {kind + 1}")
            which = ("masks", "mask_classes") if score >= SHOWN_SCORE else ("crowds", "crowd_classes")
            found[which[0]].append(partial(np.array, mask))
            found[which[1]].append(kind)
        return found

    def _check_sides(self, record: int, found: tuple[int, ...], sides: tuple[int, ...]) -> None:
        if found != sides:
            raise reading.bad(self.name(record), f"labels of {list(found)} pixels on an image of {list(sides)}")

    def _persons(self, sample: StoredSample, record: int) -> dict[str, Any]:
        label = self.labels["pose"]
        found, people = sample.label(label), sample.row.labels[label]
        try:
            documents.check_form(people, [{"bbox": [float], "area": float}])
            boxes = np.array([person["bbox"] for person in people], np.float32).reshape(len(people), 4)
        except ValueError as error:
            raise reading.bad(self.name(record), f"a person without a box ({error})") from error
        return {
            "keypoints": np.concatenate([found.points[..., :2], found.visibility[..., None]], -1).astype(np.float32),
            "keypoint_boxes": boxes,
            "keypoint_areas": np.array([max(person["area"], 1) for person in people], np.float32),
        }
