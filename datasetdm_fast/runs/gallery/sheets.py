"""Sheets of thumbnails: the page shows many samples at once without loading the image of each.

A sample's thumbnail is made when the sample is written, and lies in a file of its own until the run is closed; where
there is none, it is made of the image file, with the same bytes. A sheet is drawn as soon as all of its samples are
committed, and lies beside the thumbnails under the digest of what it shows: the end of a run takes it from there.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import pretty
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, Ledger, Row, canonical
from datasetdm_fast.untrusted import documents, images

SIDE, COLUMNS, ROWS = 128, 10, 5  # pixels of a thumbnail's longer side, thumbnails of a sheet
GROUP = COLUMNS * ROWS  # samples of a sheet: those of the indices GROUP * k to GROUP * (k + 1) - 1
QUALITY = 82  # of the JPEG
THUMBNAILS, THUMBNAIL_QUALITY = "gallery/thumbnails", 90  # of the samples that are in no sheet yet
SHOWN = "gallery/sheets.json"  # sheet -> digest of the images that it shows
UNKNOWN = ""  # in its place for a sheet that does not show all of its images: it is drawn anew by the next who writes
LARGEST_SHOWN = 2**26  # bytes
PNG = b"\x89PNG"  # the first bytes of such a file
AT_ONCE = 16  # sheets drawn and published together


def sheet_name(number: int) -> str:
    return f"gallery/sheets/{number:06d}.jpg"


def thumbnail_sides(height: int, width: int) -> tuple[int, int]:
    """Height and width of a thumbnail: the longer side has SIDE pixels, or fewer where the image has."""
    longest = max(height, width, SIDE)
    return max(height * SIDE // longest, 1), max(width * SIDE // longest, 1)


def thumbnail_name(id: str) -> str:
    return f"{THUMBNAILS}/{id}.jpg"


def is_thumbnail(name: str) -> bool:
    """Whether a file is the thumbnail of one sample, which its image gives again."""
    return name.startswith(f"{THUMBNAILS}/")


def _early_name(digest: str) -> str:
    """Where the sheet that shows the images of a digest lies, drawn before the run is closed."""
    return f"{THUMBNAILS}/{digest}.jpg"


def thumbnail(pixels: np.ndarray, content: bytes) -> bytes:
    """The thumbnail of an image [H, W, 3] uint8, as the content of its file would show it."""
    return _small(Image.fromarray(pixels) if content.startswith(PNG) else _decoded(content, "the image"))


def _decoded(content: bytes, name: str) -> Image.Image:
    return images.decode_image(content, name, least_side=SIDE)


def _small(image: Image.Image) -> bytes:
    height, width = thumbnail_sides(image.height, image.width)
    image = image.convert("RGB")
    if image.width % width or image.height % height:
        small = image.resize((width, height), Image.Resampling.BOX)
    else:  # the same, several times faster
        small = image.reduce((image.width // width, image.height // height))
    return _jpeg(small, THUMBNAIL_QUALITY)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def remove_thumbnails(folder: Path) -> None:
    """Removes the thumbnails of single samples, which the sheets show by now, for good."""
    place = folder / THUMBNAILS
    if place.is_dir():
        for path in place.iterdir():
            storage.remove(path)
        with storage.refusing(place):
            storage.sync_folder(place)
            place.rmdir()
            storage.sync_folder(place.parent)


def read_shown(folder: Path) -> dict[str, str]:
    """What the sheets of a folder show; nothing where that is not known, as they are then drawn anew."""
    try:
        return documents.read_object(folder / SHOWN, most=LARGEST_SHOWN) if (folder / SHOWN).exists() else {}
    except (Refused, Missing):
        return {}


def draw_early(folder: Path, ledger: Ledger, committed: Sequence[Row]) -> None:
    """Draws the full sheets whose last samples are the rows that were just committed."""
    for number in sorted({row.request.index // GROUP for row in committed}):
        first = GROUP * number
        if len(ledger.within(first, first + GROUP)) < GROUP:
            continue
        rows = ledger.rows_within(first, first + GROUP, DONE, DOUBTFUL)
        sheet, is_whole = _drawn(folder, rows)
        if rows and is_whole:
            storage.publish({folder / _early_name(_digest(rows)): sheet})


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
            drawn = list(pool.map(partial(_sheet, folder), (group for _, group in some)))
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


def _sheet(folder: Path, rows: Sequence[Row]) -> tuple[bytes, bool]:
    """A sheet, and whether it shows all of its images, from the file that was drawn early where there is one."""
    early = folder / _early_name(_digest(rows))
    return (storage.read(early, images.LARGEST_IMAGE_FILE), True) if early.exists() else _drawn(folder, rows)


def _drawn(folder: Path, rows: Sequence[Row]) -> tuple[bytes, bool]:
    """A sheet, and whether it shows all of its images: one that is not there, or is no whole image, leaves its place
    empty, and `audit` names it. Where the disk fails to read one, the sheet is not made.
    """
    sheet, is_whole = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE)), True
    for row in rows:
        try:
            small = _thumbnail_in(folder, row)
        except (Refused, Missing) as error:
            if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            is_whole = False
            continue
        down, across = divmod(row.request.index % GROUP, COLUMNS)
        sheet.paste(small, (across * SIDE, down * SIDE))
    return _jpeg(sheet, QUALITY), is_whole


def _thumbnail_in(folder: Path, row: Row) -> Image.Image:
    """The thumbnail of a sample, from its file where there is a whole one."""
    path, name = folder / thumbnail_name(row.request.id), row.files["image"][0]
    if path.exists():
        with suppress(Refused):
            small = images.read_image(path, most_pixels=SIDE**2)
            if small.mode == "RGB" and max(small.size) <= SIDE:
                return small
    content = storage.read(folder / name, images.LARGEST_IMAGE_FILE)
    return images.decode_image(_small(_decoded(content, str(folder / name))), name)
