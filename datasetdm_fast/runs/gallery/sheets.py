"""Sheets of thumbnails, so that the page shows many samples at once, and pictures in place of files that a browser
cannot show, such as depth maps.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels.label_files import picture_bytes
from datasetdm_fast.engine.labels.pictures import encode_picture
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import QUARANTINE
from datasetdm_fast.runs.run_folder.ledger import Row, canonical
from datasetdm_fast.runs.run_folder.page_files import (
    SHEET_NAME,
    SHEET_SAMPLES,
    SHEETS,
    layer_with_picture,
    picture_name,
)
from datasetdm_fast.untrusted import documents, images

SIDE, COLUMNS, ROWS = 128, 10, SHEET_SAMPLES // 10  # pixels of a thumbnail's longer side, thumbnails of a sheet
QUALITY = 82  # of the JPEG
UNKNOWN = (
    ""  # digest of a sheet that does not show all of its images: it is drawn again by the next process that writes
)
LARGEST_SHOWN = 2**26  # bytes
BLOCK = 16  # sheets drawn and published together
Images = Mapping[int, tuple[str, StoredFile]]  # index -> path inside the run folder, what was written


def thumbnail_sides(height: int, width: int) -> tuple[int, int]:
    """Height and width of a thumbnail: the longer side has SIDE pixels, or fewer where the image has."""
    longest = max(height, width, SIDE)
    return max(height * SIDE // longest, 1), max(width * SIDE // longest, 1)


def read_shown(folder: Path) -> dict[str, str]:
    """Sheet -> digest of the images that it shows; empty where that is unknown, as all sheets are then drawn again."""
    try:
        return documents.read_object(folder / SHEETS, most=LARGEST_SHOWN) if (folder / SHEETS).exists() else {}
    except (Refused, Missing):
        return {}


def draw_sheets(folder: Path, groups: Mapping[int, Sequence[Row]], before: dict[str, str]) -> dict[str, str]:
    """Draws sheets, each of a group, apart from those that show the same images `before`; sheet -> digest of all."""
    images = {number: {row.request.index: row.files["image"] for row in rows} for number, rows in groups.items()}
    shown = {}
    for number, group in images.items():
        parts = [SIDE, COLUMNS, ROWS, QUALITY, [(index, stored.sha256) for index, (_, stored) in group.items()]]
        shown[str(number)] = hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]
    outdated = [
        number
        for number in images
        if before.get(str(number)) != shown[str(number)] or not (folder / SHEET_NAME.format(number)).exists()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(outdated), BLOCK):
            block = outdated[first : first + BLOCK]
            sheets = dict(zip(block, pool.map(partial(_draw_sheet, folder), (images[number] for number in block))))
            storage.publish({folder / SHEET_NAME.format(number): sheet for number, (sheet, _) in sheets.items()})
            shown |= {str(number): UNKNOWN for number, (_, is_whole) in sheets.items() if not is_whole}
    return shown


def _draw_sheet(folder: Path, group: Images) -> tuple[bytes, bool]:
    """A sheet, and whether it shows all of its images: one that is missing, or is no whole image, leaves its place
    empty, and `audit` names it. Where the disk fails to read one, the sheet is not made.
    """
    sheet, is_whole = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE)), True
    for index, (name, _) in group.items():
        try:
            content = storage.read(folder / name, images.LARGEST_IMAGE_FILE)
            image = images.decode_image(content, str(folder / name), least_side=SIDE).convert("RGB")
        except (Refused, Missing) as error:
            if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            is_whole = False
            continue
        height, width = thumbnail_sides(image.height, image.width)
        if image.width % width or image.height % height:
            image = image.resize((width, height), Image.Resampling.BOX)
        else:  # the same pixels, several times faster
            image = image.reduce((image.width // width, image.height // height))
        down, across = divmod(index % SHEET_SAMPLES, COLUMNS)
        sheet.paste(image, (across * SIDE, down * SIDE))
    return encode_picture(sheet, "JPEG", quality=QUALITY), is_whole


PICTURES_TOGETHER = 64  # pictures published together


def draw_missing(folder: Path, rows: Sequence[Row], role: str) -> None:
    """Draws the missing pictures of a role; a file that is missing or is no whole image gets none, `audit` names it."""
    existing = {path.name for path in (folder / "gallery" / role).glob("*.png")}
    missing = [row for row in rows if f"{row.request.id}.png" not in existing]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(missing), PICTURES_TOGETHER):
            block = missing[first : first + PICTURES_TOGETHER]
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
