"""review/good.txt and review/bad.txt: the samples that a reviewer of a run marked, one id per line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import in_turn
from datasetdm_fast.errors import Missing
from datasetdm_fast.runs.run_folder.corrections import (
    CORRECTIONS,
    Correction,
    change_corrections,
    format_corrections,
    parse_corrections,
    read_corrections,
)
from datasetdm_fast.runs.run_folder.object_store import ObjectStore
from datasetdm_fast.untrusted import documents

LISTS = {mark: f"review/{mark}.txt" for mark in ("good", "bad")}  # inside the run
LARGEST_LIST = 2**28  # bytes
ID = re.compile(r"\d{8,15}")


class Review(Protocol):
    """The marks and corrections of a run; an empty one removes that of a sample."""

    def read(self) -> dict[str, str]: ...
    def change(self, marks: Mapping[str, str]) -> None: ...
    def read_corrections(self) -> dict[int, Correction]: ...
    def correct(self, corrections: Mapping[int, Correction]) -> None: ...


@dataclass(frozen=True)
class FolderReview:
    """The marks of a run in a folder, which several servers may change."""

    folder: Path

    def read(self) -> dict[str, str]:
        paths = {mark: self.folder / name for mark, name in LISTS.items()}
        return parse_lists({mark: storage.read(path, LARGEST_LIST) for mark, path in paths.items() if path.exists()})

    def change(self, marks: Mapping[str, str]) -> None:
        self._check()
        with in_turn(self.folder):
            lists = format_lists({**self.read(), **marks})
            storage.publish({self.folder / name: content for name, content in lists.items()})

    def read_corrections(self) -> dict[int, Correction]:
        return read_corrections(self.folder)

    def correct(self, corrections: Mapping[int, Correction]) -> None:
        self._check()
        with in_turn(self.folder):
            change_corrections(self.folder, corrections)

    def _check(self) -> None:
        if not self.folder.is_dir():  # moved or deleted: the marks would be in a new folder of its name
            raise Missing(f"{self.folder}: no such folder", "Serve the run where it is now.")


@dataclass(frozen=True)
class StoredReview:
    """The marks of a run in an object store, which cannot be locked: one server at a time should change them."""

    store: ObjectStore

    def read(self) -> dict[str, str]:
        return parse_lists({mark: self.store.read(name) or b"" for mark, name in LISTS.items()})

    def change(self, marks: Mapping[str, str]) -> None:
        self.store.publish(format_lists({**self.read(), **marks}))

    def read_corrections(self) -> dict[int, Correction]:
        content = self.store.read(CORRECTIONS)
        return parse_corrections(documents.parse_json(content.decode(), CORRECTIONS)) if content else {}

    def correct(self, corrections: Mapping[int, Correction]) -> None:
        self.store.publish({CORRECTIONS: format_corrections({**self.read_corrections(), **corrections})})


def parse_lists(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Id -> mark, from the lists of the marks."""
    lines = {mark: content.decode("ascii", "replace").split() for mark, content in contents.items()}
    return {line: mark for mark in LISTS for line in lines.get(mark, ()) if ID.fullmatch(line)}


def format_lists(marks: Mapping[str, str]) -> dict[str, bytes]:
    """The files of the lists, from id -> mark."""
    ids = {mark: sorted(id for id, other in marks.items() if other == mark) for mark in LISTS}
    return {LISTS[mark]: "".join(f"{id}\n" for id in ids[mark]).encode() for mark in LISTS}


def parse_sent_corrections(value: Any) -> dict[int, Correction]:
    """The corrections that a page sends beside its marks, none where it sends none."""
    sent = value.get("corrections", {}) if isinstance(value, dict) else {}
    if not isinstance(sent, dict) or not all(ID.fullmatch(id) for id in sent):
        raise ValueError(f"{documents.quote(sent)} are no corrections")
    return parse_corrections(sent)


def parse_marks(value: Any) -> dict[str, str]:
    """The marks that a page sends, empty for a sample without one; a ValueError where they are none."""
    documents.check_form(value, {"marks": [[str]]})
    for pair in value["marks"]:
        if len(pair) != 2 or not ID.fullmatch(pair[0]) or pair[1] not in ("", *LISTS):
            raise ValueError(f"{documents.quote(pair)} is no id and mark")
    return dict(value["marks"])
