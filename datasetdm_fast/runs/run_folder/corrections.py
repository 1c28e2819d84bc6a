"""review/corrections.json: instances that a reviewer of a run removed or renamed, and regions that nobody can judge.

The rows of a run stay as they are; exports and trainings on corrected samples read their labels through this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import kind_of, mask_rle
from datasetdm_fast.engine.labels.instance import InstanceKind
from datasetdm_fast.engine.labels.pose import PoseKind
from datasetdm_fast.errors import refusing_form
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.untrusted import documents

CORRECTIONS = "review/corrections.json"  # inside the run
LARGEST = 2**28  # bytes
FIELDS: dict[str, list[type]] = {"removed": [str, int], "renamed": [str, int, str], "ignored": [int] * 4}
MOST_IGNORED = 0.5  # share of an instance, or of a person's joints, in ignored regions from which on it is left out


@dataclass(frozen=True)
class Correction:
    """What was corrected of one sample; instances go by their label and their place in its record."""

    removed: tuple[tuple[str, int], ...] = ()
    renamed: tuple[tuple[str, int, str], ...] = ()
    ignored: tuple[tuple[int, int, int, int], ...] = ()  # x0, y0, x1, y1 in pixels of the picture

    @classmethod
    def parse(cls, value: Any) -> Correction:
        """The correction that JSON describes; a ValueError where it is none."""
        if not (
            isinstance(value, dict)
            and all(name in FIELDS and _are_rows(rows, FIELDS[name]) for name, rows in value.items())
            and all(left < right and top < bottom for left, top, right, bottom in value.get("ignored", ()))
        ):
            raise ValueError(f"{documents.quote(value)} is no correction")
        return cls(**{name: tuple(map(tuple, rows)) for name, rows in value.items()})

    def facts(self) -> dict[str, Any]:
        """As JSON, without what is empty."""
        return {name: [list(each) for each in rows] for name in FIELDS if (rows := getattr(self, name))}

    def onto(self, now: Correction, before: Correction) -> Correction:
        """What `now` becomes by the change from `before` to this one: what others corrected in the meantime stays."""
        rows: dict[str, tuple[Any, ...]] = {}
        for name in FIELDS:
            old, new = getattr(before, name), getattr(self, name)
            added, gone = [row for row in new if row not in old], {*old} - {*new}
            instances = {row[:2] for row in added} if name == "renamed" else set()  # each has one class, the last
            others = [row for row in getattr(now, name) if row not in {*gone, *added} and row[:2] not in instances]
            rows[name] = (*others, *added)
        return Correction(**rows)

    def correct_row(self, row: Row, tables: Mapping[str, Any]) -> Row:
        """The row with corrected records of instances, and without people that these or the regions leave out."""
        things = list(self._things(row, tables))
        labels: dict[str, Any] = {**row.labels, **{label: [] for label, *_ in things}}
        changed = []  # box and area of what is no longer there, or another class
        for label, item, before, after in things:
            is_left = after is not None and not (self.ignored and self._is_ignored(item))
            if is_left:
                labels[label].append(item)
            if not is_left or after != before:
                changed.append((item.get("bbox"), item.get("area")))
        for label, record in row.labels.items():
            if isinstance(kind_of(label), PoseKind):
                labels[label] = [person for person in record if not self._leaves_out(person, changed)]
        return replace(row, labels=labels)

    def _leaves_out(self, person: Mapping[str, Any], changed: Sequence[tuple[Any, Any]]) -> bool:
        """Whether a person goes with its instance, or has most of its joints in ignored regions where it has none."""
        if person.get("box_from") == "instance":
            return (person["bbox"], person["area"]) in changed
        joints = np.array(person["keypoints"], np.float64).reshape(-1, 3)
        x, y = np.rint(joints[joints[:, 2] > 0, :2]).T
        inside = np.zeros(x.shape, bool)
        for left, top, right, bottom in self.ignored:
            inside |= (left <= x) & (x < right) & (top <= y) & (y < bottom)
        return bool(inside.sum() > MOST_IGNORED * len(inside))

    def _things(self, row: Row, tables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str | None]]:
        """Label and corrected item of each instance, the class that it had and the corrected one, None if removed."""
        for label in (label for label in row.labels if isinstance(kind_of(label), InstanceKind)):
            names = kind_of(label).names(tables[label])
            numbers = {name: number for number, name in names.items()}
            renamed = {place: word for name, place, word in self.renamed if name == label and word in numbers}
            for place, item in enumerate(row.labels[label]):
                before = names.get(item["category_id"], "")
                after = renamed.get(place, before)
                corrected = item | {"category_id": numbers.get(after, item["category_id"])}
                yield label, corrected, before, None if (label, place) in self.removed else after

    def correct_map(self, labels: np.ndarray, names: Mapping[int, str], row: Row, tables: Mapping[str, Any]) -> Any:
        """[H, W] uint8: a class map of the stored row with corrected classes, 255 where things are gone or ignored; an
        unchanged thing keeps what it shows of its class.
        """
        corrected, numbers = labels.copy(), {name: number for number, name in names.items()}
        concerned = {label for label, *_ in (*self.removed, *self.renamed)}  # things of other labels restore nothing
        things = [each for each in self._things(row, tables) if each[0] in concerned]
        things.sort(key=lambda each: each[2] == each[3])
        for number in {numbers.get(before, -1) for _, _, before, after in things if after != before}:
            corrected[labels == number] = IGNORE  # also at their border, which masks do not hold
        for _, item, before, after in things:
            if after is not None:
                shown = mask_rle.decode(item["segmentation"]) & (labels == numbers.get(before, -1))
                corrected[shown] = numbers.get(after, IGNORE)
        corrected[self.region(labels.shape)] = IGNORE
        return corrected

    def _is_ignored(self, item: Mapping[str, Any]) -> bool:
        mask = mask_rle.decode(item["segmentation"])
        return bool((mask & self.region(mask.shape)).sum() > MOST_IGNORED * mask.sum())

    def region(self, sides: tuple[int, ...]) -> np.ndarray:
        """[H, W] bool: the ignored pixels of a picture of these sides."""
        region = np.zeros(sides[:2], bool)
        for left, top, right, bottom in self.ignored:
            region[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
        return region


def _are_rows(value: Any, kinds: list[type]) -> bool:
    """Whether a value is a list of lists of these types."""
    return isinstance(value, list) and all(isinstance(row, list) and list(map(type, row)) == kinds for row in value)


def read_corrections(folder: Path) -> dict[int, Correction]:
    """The corrections of a run by the index of their sample, none where there is no such file."""
    path = folder / CORRECTIONS
    with refusing_form(path, "corrections", "Delete it, or mend it by hand."):
        content = storage.read_if_there(path, LARGEST)
        return {} if content is None else parse_corrections(documents.parse_object(content, str(path)))


def parse_corrections(values: Mapping[str, Any]) -> dict[int, Correction]:
    """Index -> correction, from id -> JSON; a ValueError where an id is no number or a value is none."""
    if wrong := [id for id in values if not id.isdecimal()]:
        raise ValueError(f"{documents.quote(wrong[0])} is no number of a sample")
    return {int(id): Correction.parse(value) for id, value in values.items()}


def format_corrections(corrections: Mapping[int, Correction]) -> bytes:
    """The file, a sample a line."""
    lines = [
        f"{json.dumps(f'{index:08d}')}: {json.dumps(facts, ensure_ascii=False)}"
        for index, correction in sorted(corrections.items())
        if (facts := correction.facts())
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
