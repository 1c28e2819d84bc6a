"""A sample's image and labels as bytes of files and records, and back; they depend on the sample alone."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import Sample
from datasetdm_fast.engine.labels import LABEL_KINDS, Table, kind_of, task_of_label
from datasetdm_fast.engine.labels.class_tables import PALETTE

if TYPE_CHECKING:
    from torch import Tensor


HEADER_BYTES = 33  # of a PNG: its signature and the chunk of its sides
JPEG = {"subsampling": 0, "optimize": False}
QUALITY = 95  # of the JPEG files of a run


def image_bytes(image: np.ndarray, image_format: str, quality: int = QUALITY) -> bytes:
    """A PNG or JPEG of an image [H, W, 3] uint8, without metadata."""
    if image_format == "png":
        return _C.png_encode(np.ascontiguousarray(image))
    return encode_picture(Image.fromarray(image), "JPEG", quality=quality, **JPEG)


def encode_picture(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A picture as the bytes of a file of this form, with Pillow's options."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def index_png(labels: np.ndarray, colours: bytes = b"") -> bytes:
    """A palette PNG whose pixel values are the labels [H, W] uint8, in the colours of our palette or of another."""
    return _C.png_encode(np.ascontiguousarray(labels, np.uint8), colours or PALETTE)


def with_text(png: bytes, name: str, text: str) -> bytes:
    """A PNG with a note of Latin letters before its pixels, which image viewers show and readers may ignore."""
    note = b"tEXt" + name.encode("latin-1") + b"\0" + text.encode("latin-1")
    chunk = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    return png[:HEADER_BYTES] + chunk + png[HEADER_BYTES:]


def picture_bytes(picture: Image.Image) -> bytes:
    """A PNG of a picture drawn for a page; of a palette picture in a tenth of Pillow's time."""
    if picture.mode == "P":
        return _C.png_encode(np.ascontiguousarray(picture), bytes(picture.getpalette("RGB")))
    return encode_picture(picture, "PNG", compress_level=9)


Files = dict[str, tuple[str, bytes]]  # role -> path inside the run folder, content


def encode(
    sample: Sample, image_format: str, tables: Mapping[str, Table], folder: str = ""
) -> tuple[Files, dict[str, Any]]:
    """The files of a sample below a `folder/`, and its records by task; `tables` are run.json's."""
    id = sample.request.id
    files: Files = {"image": (f"{folder}images/{id}.{image_format}", image_bytes(sample.image, image_format))}
    records = {}
    for task, annotation in sorted(sample.annotations.items()):
        contents, records[task] = LABEL_KINDS.guard(
            task_of_label(task),
            partial(kind_of(task).encode, annotation, sample.annotations, tables[task]),
            "cannot store a label",
        )
        files |= {role: (f"{folder}{role}/{id}.png", content) for role, content in contents.items()}
    return files, records


OF_THINGS = "scores"  # what labels of things have, and labels of pixels have not


def image_tensor(image: np.ndarray) -> Tensor:  # [3, H, W] float32, 0..1
    import torch

    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def label_tensors(task: str, label: Any, table: Table) -> Tensor | dict[str, Tensor]:
    """A label whose classes have the numbers of a run's files, which its table holds."""
    import torch

    parts = kind_of(task).arrays(label, table)
    if isinstance(parts, np.ndarray):
        return torch.from_numpy(parts)
    return {name: torch.from_numpy(value) for name, value in parts.items()}


def stack(values: Sequence[Any]) -> Any:
    """A batch: what has one shape in all pairs is stacked, what has not, such as the masks of instances, is a list."""
    import torch

    first = values[0]
    if isinstance(first, dict) and OF_THINGS in first:
        return list(values)  # images have different numbers of them
    if isinstance(first, dict):
        return {name: stack([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(stack(column) for column in zip(*values, strict=True))
    if isinstance(first, torch.Tensor) and len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    return list(values)
