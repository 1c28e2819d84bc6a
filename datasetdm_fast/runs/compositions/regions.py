"""Regions of pictures that are drawn anew: from a file, a box, or the labels of a sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import by_kind, kind_of, mask_rle
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.runs.compositions.settings import EditChoice
from datasetdm_fast.runs.compositions.source import TileSource
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.indexes.coco import rows_with_ids
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.untrusted import images

WHITE = 128  # grey values from it on belong to the region of a mask file
LONGEST_MASK = 2**18  # letters of the run lengths of a mask file, which run.json holds
SQUARE = np.ones((3, 3), bool)  # a pixel and its neighbours
KINDS = ("class_", "instance", "mask", "box")


def find_kind(choice: EditChoice) -> str:
    """Which of the four flags names the region."""
    used = [name for name in KINDS if getattr(choice, name)]
    if len(used) != 1:
        flags = " and ".join(f"--{name.strip('_')}" for name in used)
        cause = f"{flags}: {len(used)} ways to name the region, expected one"
        raise Refused(
            cause if used else "the region to redraw is missing",
            "Use one of --class CLASS, --instance ID, --mask FILE and --box X0,Y0,X1,Y1.",
        )
    return used[0]


def read_mask(path: str, side: int) -> dict[str, Any]:
    """The run lengths of a mask file for pictures of side x side pixels."""
    storage.check_given(Path(path), "--mask", "Name a picture whose white pixels mark the area to redraw.")
    grey = np.asarray(images.read_image(Path(path)).convert("L"))
    if grey.shape != (side, side):
        raise Refused(
            f"--mask {path}: {grey.shape[1]} x {grey.shape[0]} pixels, the samples have {side} x {side}",
            "Give a mask of the size of the samples.",
        )
    if not (grey >= WHITE).any():
        raise Refused(
            f"--mask {path}: the mask is empty, no pixel has a value of {WHITE} or more",
            "Paint the area to redraw white.",
        )
    rle = mask_rle.encode((grey >= WHITE)[None]).rles[0]
    if len(rle["counts"]) > LONGEST_MASK:
        raise Refused(f"--mask {path}: has too many parts to be stored", "Give a mask of larger areas.")
    return dict(rle)


def read_box(text: str, side: int) -> np.ndarray:  # [side, side] bool
    """A box of pixels as a region."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise Refused(f"--box {text}: expected four whole numbers", "Write --box X0,Y0,X1,Y1, in pixels.") from None
    if not (0 <= left < right <= side and 0 <= top < bottom <= side):
        raise Refused(
            f"--box {text}: is empty or leaves the samples, which have {side} x {side} pixels",
            "Write --box X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1.",
        )
    region = np.zeros((side, side), bool)
    region[top:bottom, left:right] = True
    return region


def labels_of(source: TileSource, task: str) -> list[str]:
    """The labels of a run that decoders of this task made."""
    return [label for label in source.run.tasks if task_of_label(label) == task]


def class_task(source: TileSource, word: str) -> str:
    """The task whose labels locate a class, label maps before instances."""
    tables = {
        task: table["classes"]
        for task in sorted(by_kind(source.run.tasks), key=lambda task: not kind_of(task).is_map)
        if kind_of(task).can_mask and "classes" in (table := source.document["labels"][task])
    }
    if not tables:
        raise Refused(
            f"--class {word}: {source.path} has no labels that name classes, it has {', '.join(source.run.tasks)}",
            "Use --mask or --box, or generate with --task semantic.",
        )
    for task, classes in tables.items():
        if word in classes:
            return task
    known = list(dict.fromkeys(name for classes in tables.values() for name in classes))
    raise Refused(
        f"--class {word}: no label of {source.path} has this class{nearest(word, known)}",
        f"Choose from {', '.join(known)}.",
    )


def annotation_ids(source: TileSource, label: str) -> dict[int, list[int]]:
    """The ids in its file of COCO's form of every sample's instances, by the index of the sample."""
    with Ledger(source.path / LEDGER, read_only=True) as ledger:
        return {row.request.index: ids for row, ids in rows_with_ids(label, source.document, ledger)}


def grow(region: np.ndarray, pixels: int) -> np.ndarray:
    """The region with all pixels that are at most so many rows and columns away."""
    return ndimage.binary_dilation(region, SQUARE, pixels) if pixels else region


def weights(region: np.ndarray, feather: int) -> np.ndarray:  # [H, W] fp32
    """Share of the new image: 0 outside of the region, rising inside to 1 after `feather` pixels; beyond the picture
    nothing is outside.
    """
    inner, total = region, region.astype(np.float32)
    for _ in range(feather):
        inner = ndimage.binary_erosion(inner, SQUARE, border_value=1)
        total += inner
    return total / (feather + 1)


def to_cells(region: np.ndarray, pixels: int) -> np.ndarray:  # [h, w] bool
    """The latent cells, of `pixels` a side, of which any pixel is in the region."""
    height, width = (side // pixels for side in region.shape)
    return region.reshape(height, pixels, width, pixels).any((1, 3))


def describe(region: np.ndarray) -> dict[str, Any]:
    """The region in the row of a sample: its run lengths, and the SHA-256 of its pixels as bytes 0 and 1."""
    encoded = mask_rle.encode(np.ascontiguousarray(region)[None])
    digest = hashlib.sha256(np.ascontiguousarray(region, np.uint8).tobytes()).hexdigest()
    return {"segmentation": dict(encoded.rles[0]), "pixels": int(encoded.areas[0]), "sha256": digest}
