"""run:RUN[SPLIT,LABEL]: the samples of a run folder, with the labels that were made with them taken for truth."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import Instances, SemanticMap
from datasetdm_fast.engine.labels import SHOWN_SCORE, LabelName, task_of_label
from datasetdm_fast.engine.labels.trust import without_doubtful
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Picture
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.gallery.review import Review
from datasetdm_fast.runs.run_folder.corrections import read_corrections
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LEDGER
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.selections import origins, read_split
from datasetdm_fast.training.truth.picture_source import MOST_SEMANTIC, PictureSource
from datasetdm_fast.training.truth.shapes import Things
from datasetdm_fast.untrusted import documents

# the first that a run has is the class map, where LABEL names none
MAPS = ("semantic", "open-vocabulary", ATTENTION)
ALL, TRAIN, CORRECTED = "all", "train", "corrected"


def _split_and_label(text: str) -> tuple[str, str]:
    """The part of the run and the class map that the brackets of an address name, the latter perhaps empty; the name of
    a decoder follows its task after a dot.
    """
    words, labels = text.split(","), []
    for word in words:
        with suppress(ValueError):
            labels += [(word, str(label))] if (label := LabelName.of_stem(word)).task in MAPS else []
    if not labels or len(words) > 2:
        return text, ""
    word, label = labels[-1]
    words.remove(word)
    return "".join(words) or TRAIN, label


class RunSamples(PictureSource):
    """The samples that the last filter keeps and that are not doubtful, with doubtful pixels ignored; with [all], every
    sample as it is stored, and with [corrected] those that a reviewer corrected or marked as good, whose corrected
    labels are the truth. Where the run is split, SPLIT is one of its parts. LABEL is the class map to take; of
    several decoders of another task, the first of the run is the truth. Instances of low score are ignored.
    """

    rule = "coco"

    def __init__(self, path: Path | str, split: str, size: int, tasks: tuple[str, ...]):
        split, chosen = _split_and_label(split)
        self.path, self.is_all = path, split in (ALL, CORRECTED)
        self.run = Run(path, kept=not self.is_all)
        folder = self.run.path
        parts = None if self.is_all else read_split(folder)
        self.is_corrected = split == CORRECTED  # and so the truth, however sure the decoder was
        self.corrections = read_corrections(folder) if self.is_corrected else {}
        reviewed = {int(id) for id, mark in Review(path).read().items() if mark == "good"} | {*self.corrections}
        if parts and split not in (ALL, *parts.parts):
            raise Refused(
                f"{path}: no part {split!r}, it is split into {', '.join(parts.parts)}",
                f"Name one of these, as in run:{path}[{next(iter(parts.parts))}], or [all] for every sample.",
            )
        if not parts and split not in (ALL, TRAIN, CORRECTED):
            raise Refused(
                f"{path}: no split {split!r}",
                f"Leave the brackets out, or split it first with: python -m datasetdm_fast.split {quote(path)}",
            )
        self.labels: dict[str, str] = {}  # task -> the label of the run that is its truth
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
        count = 0
        for position, row in enumerate(self.run.rows(("files", "trust"))):
            if parts and parts.part_of(folder, row) != split:
                continue
            if self.is_corrected and row.request.index not in reviewed:
                continue
            count += 1
            # trust of samples that were written without it is computed now, from their labels
            if self.is_all or (row.trust or self.run[position].trust).is_trusted:
                self.records.append((position, row.request.id, self._origins(row)))
        part = f"[{split}]" if parts or self.is_all else ""
        if not count and self.is_corrected:
            raise Refused(
                f"--data run:{path}[{CORRECTED}]: no sample was corrected or marked as good",
                f"Correct some with: python -m datasetdm_fast.gallery {quote(path)} --serve",
            )
        if not count:
            raise Refused(
                f"--data run:{path}{part}: no sample is left",
                f"Let its filter and its split keep some, or restore dropped ones; run:{path}[all] takes every sample.",
            )
        if not self.records:
            raise Refused(
                f"--data run:{path}{part}: {'the one sample' if count == 1 else f'all {count} samples'} that it keeps "
                f"{'is' if count == 1 else 'are'} doubtful",
                f"Look at them in its gallery; run:{path}[all] takes them as they are.",
            )
        super().__init__(size, len(self.records))

    def _name_classes(self, tasks: tuple[str, ...]) -> None:
        """Takes the names in the tables of run.json, for the requested tasks."""
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
                raise reading.bad(self.run.path / DOCUMENT, "a limb that joins no two joints")
        has_truth = {
            "semantic": bool(self.classes),
            "instance": "instance" in self.labels,
            "open-vocabulary": bool(self.thing_classes),
            "depth": "depth" in self.labels,
            "pose": "pose" in self.labels,
        }
        self.tasks = tuple(task for task, has_task in has_truth.items() if has_task)
        self.requested = {task for task in self.tasks if not tasks or task in tasks}

    def _origins(self, row: Row) -> tuple[str, ...]:
        """The pictures that a sample was made of, which it shares with others."""
        try:
            names = list(origins(self.run.document, row))
            documents.check_form(names, [str], "origins")
        except (ValueError, TypeError, KeyError) as error:
            raise reading.bad(
                self.run.path / LEDGER, f"the row of sample {row.request.id} is damaged ({error})"
            ) from error
        return tuple(names)

    def name(self, record: int) -> str:
        return f"{self.path}: sample {self.records[record][1]}"

    def path_of(self, record: int) -> str:
        return self.records[record][1]

    def origins(self, record: int) -> tuple[str, ...]:
        return self.records[record][2]

    def picture(self, record: int) -> Picture:
        sample = self.run[self.records[record][0]]
        row, tables = sample.row, self.run.document["labels"]
        correction = self.corrections.get(row.request.index)
        if correction:
            sample = replace(sample, row=correction.correct_row(row, tables))
        fields: dict[str, Any] = {}
        labels = self._class_labels(sample)
        if not self.is_all:
            labels = without_doubtful(sample.classes, labels, sample.prompt, sample.class_table)
        image = sample.image
        for label in labels.values():
            fields |= self._class_fields(label, record, image.shape[:2])
        if correction and "semantic" in fields:
            fields["semantic"] = correction.correct_map(fields["semantic"], dict(enumerate(self.classes)), row, tables)
        if correction and correction.ignored and "masks" in fields:
            fields["crowds"] = [*fields["crowds"], partial(np.array, correction.region(image.shape))]
            fields["crowd_classes"] = [*fields["crowd_classes"], EVERY_CLASS]
        if "depth" in self.requested:
            fields["depth"] = sample.label(self.labels["depth"]).metres
            self._check_sides(record, fields["depth"].shape, image.shape[:2])
        if "pose" in self.requested:
            fields |= self._persons(sample, record)
        return Picture(sample.id, image, sample.prompt, **fields)

    def _class_labels(self, sample: StoredSample) -> dict[str, SemanticMap | Instances]:
        if not self.requested & {"semantic", "instance", "open-vocabulary"}:
            return {}
        labels = filter(None, (self.map, self.labels.get("instance")))
        return {name: label for name in labels if (label := sample.label(name)) is not None}

    def _class_fields(self, label: SemanticMap | Instances, record: int, sides: tuple[int, ...]) -> dict[str, Any]:
        """The fields of an image from a label: instances of high score are masks, the others crowds."""
        if isinstance(label, SemanticMap):
            self._check_sides(record, label.labels.shape, sides)
            reading.check_numbers(self.name(record), label.labels, len(self.classes))
            return {"semantic": label.labels}
        if len(label.masks):
            self._check_sides(record, label.masks.shape[1:], sides)
        things = Things()
        for mask, class_id, score in zip(label.masks, label.class_ids.tolist(), label.scores, strict=True):
            if not 0 <= class_id < len(self.thing_classes):
                raise reading.bad(self.name(record), f"an instance of the unknown category {class_id + 1}")
            is_unsure = score < SHOWN_SCORE and not self.is_corrected
            things.add(partial(np.array, mask), class_id, is_crowd=is_unsure)
        return things.fields

    def _check_sides(self, record: int, shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
        if shape != sides:
            raise reading.bad(self.name(record), f"labels of {list(shape)} pixels on an image of {list(sides)}")

    def _persons(self, sample: StoredSample, record: int) -> dict[str, Any]:
        name = self.labels["pose"]
        label, people = sample.label(name), sample.row.labels[name]
        try:
            documents.check_form(people, [{"bbox": [float], "area": float}])
            boxes = np.array([person["bbox"] for person in people], np.float32).reshape(len(people), 4)
        except ValueError as error:
            raise reading.bad(self.name(record), f"a person without a box ({error})") from error
        return {
            "keypoints": np.concatenate([label.points[..., :2], label.visibility[..., None]], -1).astype(np.float32),
            "keypoint_boxes": boxes,
            "keypoint_areas": np.array([max(person["area"], 1) for person in people], np.float32),
        }
