"""review/good.txt and review/bad.txt: the samples that a reviewer of a run marked, one id per line."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing
from datasetdm_fast.runs.run_folder.corrections import CORRECTIONS, Correction, format_corrections, parse_corrections
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, shard_place
from datasetdm_fast.untrusted import documents

LISTS = {mark: f"review/{mark}.txt" for mark in ("good", "bad")}  # inside the run
ID = re.compile(r"[0-9]{8,15}")


class Review:
    """The marks and corrections of a run, of which an empty one removes that of its sample. Several servers may change
    those of a folder; an object store cannot be locked.
    """

    def __init__(self, place: str | Path):
        self._place = shard_place(place)

    def read(self) -> dict[str, str]:
        """The mark of each sample that has one, by its id."""
        lists = {mark: self._place.read(name) or b"" for mark, name in LISTS.items()}
        ids = {mark: content.decode("ascii", "replace").split() for mark, content in lists.items()}
        return {id: mark for mark in LISTS for id in ids[mark] if ID.fullmatch(id)}

    def change(self, marks: Mapping[str, str]) -> None:
        with self._alone():
            marks = {**self.read(), **marks}
            ids = {mark: sorted(id for id, other in marks.items() if other == mark) for mark in LISTS}
            self._publish({LISTS[mark]: "".join(f"{id}\n" for id in ids[mark]).encode() for mark in LISTS})

    def read_corrections(self) -> dict[int, Correction]:
        content = self._place.read(CORRECTIONS)
        return parse_corrections(documents.parse_json(content.decode(), CORRECTIONS)) if content else {}

    def correct(
        self, corrections: Mapping[int, Correction], before: Mapping[int, Correction] = MappingProxyType({})
    ) -> None:
        """Stores corrections of samples; of those that were made of an earlier one, only what has changed since."""
        with self._alone():
            stored = self.read_corrections()
            changed = {
                index: each.onto(stored.get(index, Correction()), before[index]) if index in before else each
                for index, each in corrections.items()
            }
            self._publish({CORRECTIONS: format_corrections({**stored, **changed})})

    def _alone(self) -> AbstractContextManager[None]:
        if not isinstance(self._place, ShardFolder):
            return nullcontext()
        if not self._place.path.is_dir():  # moved or deleted: the marks would be in a new folder of its name
            raise Missing(f"{self._place.path}: no such folder", "Serve the run where it is now.")
        return storage.in_turn(self._place.path)

    def _publish(self, files: Mapping[str, bytes]) -> None:
        if isinstance(self._place, ShardFolder):  # all or none
            storage.publish({self._place.path / name: content for name, content in files.items()})
        else:
            for name, content in files.items():
                self._place.replace(name, content)


def parse_sent_corrections(value: Any, name: str = "corrections") -> dict[int, Correction]:
    """The corrections that a page sends beside its marks, none where it sends none; `before` are those that it knew."""
    sent = value.get(name, {}) if isinstance(value, dict) else {}
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
