"""review/good.txt and review/bad.txt: the samples that somebody who looked at a run marked, one id per line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import in_turn
from datasetdm_fast.errors import Missing
from datasetdm_fast.untrusted import documents

MARKS = ("good", "bad")
LARGEST_LIST = 2**28  # bytes
ID = re.compile(r"\d{8,15}")


def path_of(folder: Path, mark: str) -> Path:
    return folder / "review" / f"{mark}.txt"


class Review(Protocol):
    """The marks of those who look at a run."""

    def read(self) -> dict[str, str]:
        """Id -> mark of every sample that has one."""
        ...

    def change(self, marks: Mapping[str, str]) -> None:
        """Writes down these marks beside those that are there; an empty one removes that of a sample."""
        ...


@dataclass(frozen=True)
class FolderReview:
    """The marks of a run in a folder."""

    folder: Path

    def read(self) -> dict[str, str]:
        return read(self.folder)

    def change(self, marks: Mapping[str, str]) -> None:
        if not self.folder.is_dir():  # moved or deleted: the marks would be in a new folder of its name
            raise Missing(f"{self.folder}: no such folder", "Serve the run where it is now.")
        change(self.folder, marks)


def read(folder: Path) -> dict[str, str]:
    """Id -> mark of every sample that has one."""
    paths = {mark: path_of(folder, mark) for mark in MARKS}
    return of_lists({mark: storage.read(path, LARGEST_LIST) for mark, path in paths.items() if path.exists()})


def of_lists(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Id -> mark, from the lists of the marks."""
    lines = {mark: contents.get(mark, b"").decode("ascii", "replace").split() for mark in MARKS}
    return {line: mark for mark in MARKS for line in lines[mark] if ID.fullmatch(line)}


def lists_of(found: Mapping[str, str]) -> dict[str, bytes]:
    """The list of every mark, from id -> mark."""
    ids = {mark: sorted(id for id, other in found.items() if other == mark) for mark in MARKS}
    return {mark: "".join(f"{id}\n" for id in ids[mark]).encode() for mark in MARKS}


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
        storage.publish({path_of(folder, mark): content for mark, content in lists_of(found).items()})
