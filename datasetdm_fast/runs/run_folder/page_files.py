"""The files of a run folder's page in gallery/, by name; runs.gallery writes them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LABEL_KINDS, GalleryLayer, kind_of
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, Ledger
from datasetdm_fast.runs.run_folder.selections import Filter
from datasetdm_fast.untrusted import documents

PAGE = "gallery/index.html"
FIXED = ("gallery.css", "logic.js", "gallery.js", "index.html")  # the same for every run, the page itself last
RUN, LEFT_OUT = "gallery/run.js", "gallery/left-out.js"
SHEETS = "gallery/sheets.json"  # sheet -> digest of the images that it shows
PAGE_LOCK = "gallery/lock"  # held while the page is written, by the process that finishes a run or one that shows it
SINGLE_FILES = (*(f"gallery/{name}" for name in FIXED), RUN, LEFT_OUT, PAGE_LOCK, SHEETS)
PAGE_SAMPLES = 1000  # of a page: those of the indices PAGE_SAMPLES * k to PAGE_SAMPLES * (k + 1) - 1
SHEET_SAMPLES = 50  # of a sheet of thumbnails, and of a file of details
PAGE_NAME, DETAILS_NAME = "gallery/pages/{:06d}.js", "gallery/details/{:06d}.js"  # by number
SHEET_NAME = "gallery/sheets/{:06d}.jpg"


def picture_name(role: str, id: str) -> str:
    """Where the picture lies that the page shows in place of a sample's file of this role."""
    return f"gallery/{role}/{id}.png"


def layer_with_picture(role: str) -> GalleryLayer | None:
    """The layer whose picture the page shows in place of files of a role, None where it shows the files themselves."""
    layers = (layer for kind in LABEL_KINDS.values() for layer in kind.layers)
    return next((layer for layer in layers if layer.picture and layer.role == role.partition(".")[0]), None)


def picture_roles(document: Mapping[str, Any]) -> list[str]:
    """The roles of a run's files in whose place the page shows pictures."""
    return [
        role
        for label in document["config"]["task"]
        for role in kind_of(label).files(document["labels"][label])
        if any(layer.picture and layer.role == role for layer in kind_of(label).layers)
    ]


def page_folders(roles: list[str]) -> list[str]:
    """The folders with a number of files that grows with the samples."""
    return ["gallery/pages", "gallery/details", "gallery/sheets", *(f"gallery/{role}" for role in roles)]


def expected_files(document: Mapping[str, Any], ledger: Ledger) -> set[str]:
    """The files of a complete page."""
    indices = ledger.indices(DONE, DOUBTFUL)
    sheets = {index // SHEET_SAMPLES for index in indices}
    names = {PAGE_NAME.format(index // PAGE_SAMPLES) for index in indices}
    names |= {name.format(sheet) for sheet in sheets for name in (DETAILS_NAME, SHEET_NAME)}
    pictures = {picture_name(role, f"{index:08d}") for role in picture_roles(document) for index in indices}
    return names | set(SINGLE_FILES) | pictures


def existing_files(folder: Path, document: Mapping[str, Any]) -> list[str]:
    """The files of the page that exist."""
    names = [name for name in SINGLE_FILES if (folder / name).exists()]
    for name in page_folders(picture_roles(document)):
        if (folder / name).is_dir():
            names += [f"{name}/{path.name}" for path in (folder / name).iterdir() if not storage.is_temporary(path)]
    return sorted(names)


def script(kind: str, number: int, value: Any) -> bytes:
    """A script that hands a value to the page; no string in it can end the script or be taken for a tag."""
    text = documents.encodable(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    escaped = re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return f'receive("{kind}",{number},{escaped});\n'.encode()


def left_out_script(decided: Filter | None) -> bytes:
    """Index and reason of every sample that a filter left out."""
    return script("leftOut", 0, list(decided.left_out.items()) if decided else [])


def mark_left_out(folder: Path, decided: Filter | None) -> None:
    """Tells the page, if it exists, which samples a filter left out."""
    if (folder / RUN).exists():
        storage.publish({folder / LEFT_OUT: left_out_script(decided)})
