"""Image files of unknown origin: bounded in bytes and pixels, decoded in full or refused."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import GET_AGAIN, reason_of

LARGEST_IMAGE_FILE = 64 * 2**20
BIT_DEPTH = 24  # the byte of a PNG file that tells the bits of a pixel's channel
TIFF = (b"II*\0", b"MM\0*")  # first bytes of what `datasets` makes of pictures with a palette or 16 bits
MOST_PIXELS = 2**24  # of one image: 4096 x 4096
MOST_PARTS = 2**16  # chunks of a PNG file or segments of a JPEG file, and bytes between these
MOST_SCANS = 100  # of a JPEG file: each takes as long as a whole image, and progressive ones have ten
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of those that begin a segment of a JPEG file, or end it


def read_image(path: Path, *, most_pixels: int = MOST_PIXELS, holds_numbers: bool = False) -> Image.Image:
    """The decoded image of a complete PNG or JPEG file; its size is checked before its pixels are decoded.

    An image that `holds_numbers` has its pixels as they are stored: Pillow stretches grey values of 2 or 4 bits to 8.
    """
    data = storage.read(path, LARGEST_IMAGE_FILE)
    return decode_image(data, str(path), most_pixels=most_pixels, holds_numbers=holds_numbers)


def decode_image(
    data: bytes,
    name: str,
    *,
    most_pixels: int = MOST_PIXELS,
    least_side: int = 0,
    holds_numbers: bool = False,
    may_be_tiff: bool = False,
) -> Image.Image:
    """The decoded image of bytes in memory; with `least_side` a larger JPEG is decoded at a smaller size, which takes
    less time. A TIFF is decoded if it `may_be_tiff`, and only without compression.
    """
    if not data:
        raise Refused(f"{name}: empty, expected a PNG or JPEG file", GET_AGAIN)
    if not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *(TIFF if may_be_tiff else ()))):
        raise Refused(f"{name}: neither a PNG nor a JPEG file", "Convert it to PNG or JPEG, or get it again.")
    try:
        if data.startswith(b"\x89PNG"):
            check_png(data)  # Pillow fills up one that was cut off near its end
        elif data.startswith(b"\xff\xd8"):
            _check_jpeg(data)
        image = _open(io.BytesIO(data), may_be_tiff)
        if image.format == "TIFF" and image.info.get("compression") != "raw":
            raise ValueError("a TIFF with compression")
        width, height = image.size
        if width * height > most_pixels:
            raise Refused(f"{name}: {width} x {height} pixels, at most {most_pixels:,} are decoded", "Make it smaller.")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo with others behind it, as phones take
            raise Refused(f"{name}: it is an animation", "Save one of its pictures.")
        if least_side:
            image.draft("RGB", (least_side, least_side))
        image.load()
    except Refused:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything
        raise Refused(f"{name}: not a complete image ({reason_of(error)})", GET_AGAIN) from error
    if holds_numbers and image.format == "PNG" and image.mode == "L" and data[BIT_DEPTH] in (2, 4):
        step = 255 // (2 ** data[BIT_DEPTH] - 1)
        image = image.point([value // step for value in range(256)])
    return image


def sides_of(path: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG or JPEG file; its pixels are not decoded."""
    try:
        with path.open("rb") as file:
            return _open(file).size
    except Exception as error:  # Pillow's readers raise nearly anything
        raise Refused(f"{path}: not a complete image ({reason_of(error)})", GET_AGAIN) from error


def _open(file: BinaryIO, may_be_tiff: bool = False) -> ImageFile.ImageFile:
    """Not by Image.open: it warns of large images and refuses larger ones, by a limit that any program can change, and
    filters of warnings are those of all threads.
    """
    start = file.read(4)
    file.seek(0)
    if may_be_tiff and start in TIFF:
        return TiffImagePlugin.TiffImageFile(file)
    return PngImagePlugin.PngImageFile(file) if start == b"\x89PNG" else JpegImagePlugin.jpeg_factory(file)


def check_png(data: bytes) -> None:
    """Raises ValueError for a PNG file that is truncated or modified; bytes after its end are none of it."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("no PNG file")
    place, kind, parts = 8, b"", 0
    while kind != b"IEND":
        parts += 1
        if parts > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} chunks")
        if place + 12 > len(data):
            raise ValueError("cut off")
        length, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            raise ValueError("cut off")
        if zlib.crc32(data[place + 4 : place + 8 + length]) != struct.unpack_from(">I", data, place + 8 + length)[0]:
            raise ValueError(f"checksum of the chunk at byte {place} does not hold")
        place += 12 + length


def _check_jpeg(data: bytes) -> None:
    """Raises ValueError for a JPEG file that takes hours however few bytes or pixels it has."""
    place, segments, scans, between = 2, 0, 0, 0
    while True:
        marker = _MARKER.search(data, place)
        if not scans:  # up to which Pillow reads what lies between segments byte by byte
            between += (marker.start() if marker else len(data)) - place
        if marker is None or marker[1] == b"\xd9":
            break
        segments, scans = segments + 1, scans + (marker[1] == b"\xda")
        if segments > MOST_PARTS or scans > MOST_SCANS:
            raise ValueError(f"more than {MOST_PARTS} segments or {MOST_SCANS} scans")
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    if not scans or between > MOST_PARTS:
        raise ValueError(f"without a scan, or more than {MOST_PARTS} bytes between segments")
