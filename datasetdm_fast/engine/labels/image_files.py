"""Images and label maps as the bytes of image files, and back."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.colours import palette

HEADER_BYTES = 33  # of a PNG: its signature and the chunk of its sides
JPEG = {"subsampling": 0, "optimize": False}
QUALITY = 95  # of the JPEG files of a run


def image_bytes(image: np.ndarray, image_format: str, quality: int = QUALITY) -> bytes:
    """A PNG or JPEG of an image [H, W, 3] uint8, without metadata."""
    if image_format == "png":
        return _C.png_encode(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, **JPEG)
    return buffer.getvalue()


def index_png(labels: np.ndarray, colours: bytes = b"") -> bytes:
    """A palette PNG whose pixel values are the labels [H, W] uint8, in the colours of our palette or of another."""
    return _C.png_encode(np.ascontiguousarray(labels, np.uint8), colours or palette())


def with_text(png: bytes, name: str, text: str) -> bytes:
    """A PNG with a note of Latin letters before its pixels, which image viewers show and readers may ignore."""
    note = b"tEXt" + name.encode("latin-1") + b"\0" + text.encode("latin-1")
    chunk = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    return png[:HEADER_BYTES] + chunk + png[HEADER_BYTES:]


def picture_bytes(picture: Image.Image) -> bytes:
    """A PNG of a picture drawn for a page; of a palette picture in a tenth of Pillow's time."""
    if picture.mode == "P":
        return _C.png_encode(np.ascontiguousarray(picture), bytes(picture.getpalette("RGB")))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()
