"""state/kept.json: which samples of a run a filter keeps, and why it leaves out the others."""

import json
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.errors import quote, refusing_form
from datasetdm_fast.untrusted import documents

KEPT = "state/kept.json"
LARGEST_KEPT = 2**28  # bytes
KEPT_FORM = {"where": str, "kept": [str], "left_out": dict}


@dataclass(frozen=True)
class Kept:
    """What a filter decided; a sample that was made after it is in neither list."""

    where: str
    kept: tuple[int, ...]  # indices of samples
    left_out: dict[int, str]  # index -> reason

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        value = {
            "where": self.where,
            "kept": [f"{index:08d}" for index in self.kept],
            "left_out": {f"{index:08d}": reason for index, reason in self.left_out.items()},
        }
        return (json.dumps(value, indent=0, ensure_ascii=False) + "\n").encode()


def read_kept(folder: Path) -> Kept | None:
    """What the filter of a run folder decided, None where there is none."""
    path = folder / KEPT
    if not path.exists():
        return None
    remedy = f"Run python -m datasetdm_fast.filter {quote(folder)} --undo, then filter again."
    with refusing_form(path, "filter", remedy):
        value = documents.read_object(path, most=LARGEST_KEPT)
        documents.check_form(value, KEPT_FORM)
        documents.check_form(list(value["left_out"].values()), [str])
        return Kept(
            value["where"],
            tuple(map(int, value["kept"])),
            {int(id): reason for id, reason in value["left_out"].items()},
        )
