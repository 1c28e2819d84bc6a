"""Pictures that the page shows in place of files that a browser cannot show, such as depth maps."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.label_files import picture_bytes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import QUARANTINE
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.page_files import layer_with_picture, picture_name
from datasetdm_fast.untrusted import images

BLOCK = 64  # pictures published together


def draw_missing(folder: Path, rows: Sequence[Row], role: str) -> None:
    """Draws the missing pictures of a role; a file that is missing or is no whole image gets none, `audit` names it."""
    existing = {path.name for path in (folder / "gallery" / role).glob("*.png")}
    missing = [row for row in rows if f"{row.request.id}.png" not in existing]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(missing), BLOCK):
            block = missing[first : first + BLOCK]
            pictures = zip(block, pool.map(partial(_picture_of_sample, folder, role), block), strict=True)
            storage.publish(
                {folder / picture_name(role, row.request.id): picture for row, picture in pictures if picture}
            )


def _picture_of_sample(folder: Path, role: str, row: Row) -> bytes:
    """The picture of a sample's file, empty where that is missing or is no whole image."""
    try:
        return picture_of(role, storage.read(folder / row.files[role][0], images.LARGEST_IMAGE_FILE))
    except (Refused, Missing) as error:
        if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return b""


def picture_of(role: str, content: bytes) -> bytes:
    """The picture that the page shows in place of a file."""
    return picture_bytes(layer_with_picture(role).picture(np.array(images.decode_image(content, role))))


def fetch_or_draw(fetch: Callable[[str], Path | None], folder: Path, name: str) -> Path | None:
    """A file of a run in an object store, which has no pictures: these are drawn of the files that they stand for."""
    place, _, file = name.rpartition("/")
    role = place.removeprefix("gallery/")
    if not place.startswith("gallery/") or layer_with_picture(role) is None:
        return fetch(name)
    source = fetch(f"{role}/{file}") or fetch(f"{QUARANTINE}{role}/{file}")
    if source is None:
        return None
    storage.publish({folder / name: picture_of(role, source.read_bytes())})
    return folder / name
