"""Digests of the images and labels of a training, by which one that is resumed notices a change of its data.

FOLDER/training/data.json   a list of items, each with its name, its sides and the digest of everything it holds
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.folders import find_decoders
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, Picture
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.untrusted import documents

NAME = "data.json"
LARGEST_RECORD = 2**28  # bytes
DIGITS = 16  # of a digest
VERSION = 2  # of what is learnt from an item; a training that was begun with another one is not resumed
FORM = {"items": [{"name": str, "sides": [int]}]}
KINDS = {  # name of a change -> the fields of an item that show it
    "other labels": ("semantic", "things", "depth", "joints"),
    "another picture": ("image",),
    "another caption": ("caption",),
}
GROUPS = {  # fields with one digest
    "image": ("image",),
    "caption": ("caption",),
    "semantic": ("semantic",),
    "depth": ("depth",),
    "things": ("masks", "mask_classes", "crowds", "crowd_classes"),
    "joints": ("keypoints", "keypoint_boxes", "keypoint_areas"),
}


def record_data(source: LabelledSource, on_item: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Every item of a data set at its original size, in order; no item of rendered scenes, which the address alone
    decides.
    """
    items = []
    for index in () if source.is_rendered else range(len(source)):
        items.append(_record_item(source, index))
        on_item(index + 1)
    return {"version": VERSION, "items": items}


def _record_item(source: LabelledSource, index: int) -> dict[str, Any]:
    number, item = source.order[index], _whole_item(source, index)
    values = {name: tuple(getattr(item, field) for field in fields) for name, fields in GROUPS.items()}
    digests = {name: _digest(parts) for name, parts in values.items() if parts[0] is not None}
    return {"name": source.name(number), "sides": [item.image.shape[1], item.image.shape[0]], **digests}


def _whole_item(source: LabelledSource, index: int) -> Picture | Labelled:
    """An item at its original size, where it has one, with the caption of all of it."""
    if not hasattr(source, "picture"):
        return source[index]
    picture = source.guard(source.picture, source.order[index])
    return picture if picture.named is None else replace(picture, caption=source.photo_of(picture.named))


def _digest(parts: tuple[Any, ...]) -> str:
    """Of text, arrays, and lists of masks or of functions that make them, one at a time."""
    digest = hashlib.sha256()
    for part in parts:
        for entry in part if isinstance(part, (list, tuple)) else (part,):
            value = entry() if callable(entry) else entry
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype.str}{value.shape}".encode())
                digest.update(np.ascontiguousarray(value).data)
            else:
                digest.update(f"{value}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:DIGITS]


def count_seen_in_training(decoder: str, source: LabelledSource, labels: Iterable[str]) -> dict[str, int]:
    """How many images of a data set each label's decoder was trained on, where its folder records them."""
    if source.is_rendered:
        return {}
    try:
        folders = find_decoders(decoder)
    except (Missing, Refused):  # a checkpoint of DatasetDM
        return {}
    files = {label: folders[label] / "training" / NAME for label in labels if label in folders}
    known = {label: _recorded_images(file) for label, file in files.items() if file.exists()}
    images = _image_digests(source, len(source)) if any(known.values()) else []
    return {label: sum(image in trained_on for image in images) for label, trained_on in known.items()}


def count_shared(scored: LabelledSource, trained_on: LabelledSource, count: int) -> int:
    """How many images of a data set are among the first `count` of another, whatever their addresses."""
    if scored.is_rendered or trained_on.is_rendered:
        return 0
    known = {*_image_digests(trained_on, count)}
    return sum(image in known for image in _image_digests(scored, len(scored)))


def _image_digests(source: LabelledSource, count: int) -> list[str]:
    """The digests of the first images of a data set that can be read."""
    digests = []
    for index in range(count):
        with suppress(Refused):
            digests.append(_digest((_whole_item(source, index).image,)))
    return digests


def _recorded_images(file: Path) -> set[str]:
    try:
        stored = json.loads(storage.read(file, LARGEST_RECORD))
        documents.check_form(stored, FORM)
    except (Refused, ValueError):
        return set()
    return {item["image"] for item in stored["items"] if "image" in item}


def find_changes(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> str:
    """The changes of the data in words, empty where nothing changed; fields that only one of them has do not count."""
    before, now = list(before), list(now)
    names, names_now = ([item["name"] for item in items] for items in (before, now))
    if names != names_now:
        removed, added = _list_names(set(names) - set(names_now)), _list_names(set(names_now) - set(names))
        moves = [f"{what} {images}" for what, images in (("without", removed), ("with", added)) if images]
        return f"now {' and '.join(moves)}" if moves else "the same images in another order"
    changes = []
    for kind, fields in KINDS.items():
        changed = {
            old["name"]
            for old, new in zip(before, now, strict=True)
            if any(old[name] != new[name] for name in fields if name in old and name in new)
        }
        changes += [f"{kind} of {_list_names(changed)}"] if changed else []
    return "; ".join(changes)


def _list_names(names: set[str]) -> str:
    """The first of some names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {count_noun(len(ordered) - 1, 'more image')}" if len(ordered) > 1 else ""
    return f"{documents.one_line(ordered[0])}{more}" if ordered else ""


def with_names_below(items: Iterable[Mapping[str, Any]], folder: Path | None) -> list[dict[str, Any]]:
    """Items whose names do not depend on where the data set lies."""
    return [{**item, "name": item["name"].removeprefix(f"{folder}/")} for item in items]


def as_json(record: Mapping[str, Any]) -> bytes:
    """The record as a file, one item a line."""
    lines = ",\n".join(json.dumps(item) for item in record["items"])
    return f'{{"version": {VERSION}, "items": [\n{lines}\n]}}\n'.encode()
