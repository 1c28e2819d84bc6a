"""Sheets of thumbnails: the page shows many samples at once without loading the image of each."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

from PIL import Image

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents, images
from datasetdm_fast.run_folder.document import pretty
from datasetdm_fast.run_folder.ledger import Row, canonical

SIDE, COLUMNS, ROWS = 128, 10, 5  # pixels of a thumbnail's longer side, thumbnails of a sheet
GROUP = COLUMNS * ROWS  # samples of a sheet: those of the indices GROUP * k to GROUP * (k + 1) - 1
QUALITY = 82  # of the JPEG
SHOWN = "gallery/sheets.json"  # sheet -> digest of the images that it shows
UNKNOWN = ""  # in its place for a sheet that does not show all of its images: it is drawn anew by the next who writes
LARGEST_SHOWN = 2**26  # bytes
AT_ONCE = 16  # sheets drawn and published together


def sheet_name(number: int) -> str:
    return f"gallery/sheets/{number:06d}.jpg"


def thumbnail_sides(height: int, width: int) -> tuple[int, int]:
    """Height and width of a thumbnail: the longer side has SIDE pixels, or fewer where the image has."""
    longest = max(height, width, SIDE)
    return max(height * SIDE // longest, 1), max(width * SIDE // longest, 1)


def read_shown(folder: Path) -> dict[str, str]:
    """What the sheets of a folder show; nothing where that is not known, as they are then drawn anew."""
    try:
        return documents.read_object(folder / SHOWN, most=LARGEST_SHOWN) if (folder / SHOWN).exists() else {}
    except (Refused, Missing):
        return {}


def draw(folder: Path, rows: Sequence[Row], before: dict[str, str]) -> dict[str, str]:
    """What the sheets of these rows show, all rows of a sheet among them; a sheet that shows the same already stays."""
    found: dict[str, str] = {}
    wanted: list[tuple[int, list[Row]]] = []
    for number, group in grouped(rows):
        found[str(number)] = digest = _digest(group)
        if before.get(str(number)) != digest or not (folder / sheet_name(number)).exists():
            wanted.append((number, group))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            drawn = list(pool.map(partial(_drawn, folder), (group for _, group in some)))
            storage.publish({folder / sheet_name(number): sheet for (number, _), (sheet, _) in zip(some, drawn)})
            found |= {str(number): UNKNOWN for (number, _), (_, is_whole) in zip(some, drawn) if not is_whole}
    return found


def write_shown(folder: Path, shown: dict[str, str]) -> None:
    storage.publish({folder / SHOWN: pretty(shown)})


def grouped(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """The rows of each sheet, with its number."""
    for number, group in groupby(rows, lambda row: row.request.index // GROUP):
        yield number, list(group)


def _digest(rows: Sequence[Row]) -> str:
    shown = [(row.request.index, row.files["image"][1].sha256) for row in rows]
    return hashlib.sha256(canonical([SIDE, COLUMNS, ROWS, QUALITY, shown]).encode()).hexdigest()[:32]


def _drawn(folder: Path, rows: Sequence[Row]) -> tuple[bytes, bool]:
    """A sheet, and whether it shows all of its images: one that is not there, or is no whole image, leaves its place
    empty, and `audit` names it. Where the disk fails to read one, the sheet is not made.
    """
    sheet, is_whole = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE)), True
    for row in rows:
        try:
            image = images.read_image(folder / row.files["image"][0])
        except (Refused, Missing) as error:
            if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            is_whole = False
            continue
        height, width = thumbnail_sides(image.height, image.width)
        down, across = divmod(row.request.index % GROUP, COLUMNS)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        sheet.paste(small, (across * SIDE, down * SIDE))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue(), is_whole
