"""review/corrections.json: instances that a reviewer of a run removed or renamed, and regions that nobody can judge.

The rows of a run stay as they are; exports and trainings on corrected samples read their labels through this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import kind_of, mask_rle
from datasetdm_fast.engine.labels.instance import InstanceKind
from datasetdm_fast.errors import refusing_form
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.untrusted import documents

CORRECTIONS = "review/corrections.json"  # inside the run
LARGEST = 2**28  # bytes
FIELDS = ("removed", "renamed", "ignored")
MOST_IGNORED = 0.5  # share of an instance in ignored regions from which on it is left out


@dataclass(frozen=True)
class Correction:
    """What was corrected of one sample; instances go by their label and their place in its record."""

    removed: tuple[tuple[str, int], ...] = ()
    renamed: tuple[tuple[str, int, str], ...] = ()
    ignored: tuple[tuple[int, int, int, int], ...] = ()  # x0, y0, x1, y1 in pixels of the picture

    @classmethod
    def parse(cls, value: Any) -> Correction:
        """The correction that JSON describes; a ValueError where it is none."""
        if not isinstance(value, dict) or not value.keys() <= set(FIELDS):
            raise ValueError(f"{documents.quote(value)} is no correction")
        removed, renamed, ignored = (value.get(name, []) for name in FIELDS)
        if not (
            _are_rows(removed, [str, int])
            and _are_rows(renamed, [str, int, str])
            and _are_rows(ignored, [int] * 4)
            and all(left < right and top < bottom for left, top, right, bottom in ignored)
        ):
            raise ValueError(f"{documents.quote(value)} is no correction")
        return cls(*(tuple(map(tuple, rows)) for rows in (removed, renamed, ignored)))

    def facts(self) -> dict[str, Any]:
        """As JSON, without what is empty."""
        fields = {"removed": self.removed, "renamed": self.renamed, "ignored": self.ignored}
        return {name: [list(each) for each in value] for name, value in fields.items() if value}

    def correct_row(self, row: Row, tables: Mapping[str, Any]) -> Row:
        """The row with corrected records of instances."""
        labels = {
            label: self._correct_record(label, record, tables[label])
            if isinstance(kind_of(label), InstanceKind)
            else record
            for label, record in row.labels.items()
        }
        return replace(row, labels=labels)

    def _correct_record(self, label: str, record: list[dict[str, Any]], table: Mapping[str, Any]) -> list[Any]:
        numbers = {name: number for number, name in kind_of(label).names(table).items()}
        removed = {place for name, place in self.removed if name == label}
        renamed = {place: word for name, place, word in self.renamed if name == label}
        return [
            item | ({"category_id": numbers[renamed[place]]} if renamed.get(place) in numbers else {})
            for place, item in enumerate(record)
            if place not in removed and not (self.ignored and self._is_ignored(item))
        ]

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
