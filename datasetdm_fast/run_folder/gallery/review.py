"""review/good.txt and review/bad.txt: the samples that somebody who looked at a run marked, one id per line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import in_turn
from datasetdm_fast.foreign import documents

MARKS = ("good", "bad")
LARGEST_LIST = 2**28  # bytes
ID = re.compile(r"\d{8,15}")


def path_of(folder: Path, mark: str) -> Path:
    return folder / "review" / f"{mark}.txt"


def read(folder: Path) -> dict[str, str]:
    """Id -> mark of every sample that has one."""
    found = {}
    for mark in MARKS:
        path = path_of(folder, mark)
        lines = storage.read(path, LARGEST_LIST).decode("ascii", "replace").split() if path.exists() else []
        found |= {line: mark for line in lines if ID.fullmatch(line)}
    return found


def parse(value: Any) -> dict[str, str]:
    """The marks that a page sends, an empty one where a sample has none any more; a ValueError where they are none."""
    documents.check_form(value, {"marks": [[str]]})
    found = {}
    for pair in value["marks"]:
        if len(pair) != 2 or not ID.fullmatch(pair[0]) or pair[1] not in ("", *MARKS):
            raise ValueError(f"{documents.quoted(pair)} is no id and mark")
        found[pair[0]] = pair[1]
    return found


def change(folder: Path, marks: Mapping[str, str]) -> None:
    """Writes down these marks beside those that are there, also where two reviewers serve the same run."""
    with in_turn(folder):
        found = {id: mark for id, mark in {**read(folder), **marks}.items() if mark}
        lists = {mark: sorted(id for id, other in found.items() if other == mark) for mark in MARKS}
        contents = {path_of(folder, mark): "".join(f"{id}\n" for id in ids).encode() for mark, ids in lists.items()}
        storage.publish(contents)
