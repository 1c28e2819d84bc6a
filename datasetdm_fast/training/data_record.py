"""Digests of the images and labels of a training, by which one that is resumed notices a change of its data.

FOLDER/training/data.json   a list of items, each with its name, its sides and the digest of everything it holds
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.config import find_decoders
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, Picture
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import list_names
from datasetdm_fast.training.readers import RENDERED_KINDS, open_data
from datasetdm_fast.untrusted import documents

LEAST_SIDE = 64  # pixels of scenes of which no more than their names is asked
NAME = "data.json"
LARGEST_RECORD = 2**28  # bytes
DIGITS = 16  # of a digest
VERSION = 2  # of the targets; a training that was begun with another version is not resumed
FORM = {"items": [{"name": str, "sides": [int]}]}
GROUPS = {  # fields with one digest
    "image": ("image",),
    "caption": ("caption",),
    "semantic": ("semantic",),
    "depth": ("depth",),
    "things": ("masks", "mask_classes", "crowds", "crowd_classes"),
    "joints": ("keypoints", "keypoint_boxes", "keypoint_areas"),
    "searched": ("searched", "not_exhausted"),
}


def record_data(
    source: LabelledSource, on_item: Callable[[int, Picture | Labelled], None] = lambda count, item: None
) -> dict[str, Any]:
    """Every item of a data set at its original size, in order; no item of rendered scenes, which the address alone
    decides. `on_item` is called with the number of items so far and the last one.
    """
    items = []
    for index in () if source.is_rendered else range(len(source)):
        item = _whole_item(source, index)
        values = {name: tuple(getattr(item, field) for field in fields) for name, fields in GROUPS.items()}
        digests = {name: _digest(parts) for name, parts in values.items() if parts[0] is not None}
        items.append({"name": source.name(source.order[index]), "sides": [*item.image.shape[1::-1]], **digests})
        on_item(index + 1, item)
    return {"version": VERSION, "items": items}


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
    try:
        folders = find_decoders(decoder)
    except (Missing, Refused):  # a checkpoint of DatasetDM
        return {}
    if source.is_rendered:
        scenes = {label: _recorded_scenes(folders[label] / "training") for label in labels if label in folders}
        shown = [source.name(record) for record in source.order]
        return {label: sum(name in trained_on for name in shown) for label, trained_on in scenes.items() if trained_on}
    files = {label: folders[label] / "training" / NAME for label in labels if label in folders}
    known = {label: _recorded_images(file) for label, file in files.items() if file.exists()}
    images = image_digests(source, len(source)) if any(known.values()) else []
    return {label: sum(image in trained_on for image in images) for label, trained_on in known.items()}


def image_digests(source: LabelledSource, count: int) -> list[str]:
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
    except (ValueError, RecursionError):
        return set()
    return {item["image"] for item in stored["items"] if "image" in item}


def _recorded_scenes(folder: Path) -> set[str]:
    """The names of the rendered scenes that the address in a training's settings stands for, at most."""
    try:
        stored = json.loads(storage.read(folder / "settings.json", LARGEST_RECORD))
        documents.check_form(stored, {"data": str, "images": int, "held_out_images": int})
        source = open_data(stored["data"], LEAST_SIDE) if stored["data"].partition(":")[0] in RENDERED_KINDS else None
    except (ValueError, RecursionError, OSError, Missing, Refused):
        return set()
    names = [source.name(record) for record in source.order] if source else []
    is_chosen = any(stored.get(name) for name in ("select", "limit_per_class", "min_area", "only_classes", "listed"))
    return {*names} if is_chosen else {*names[: stored["images"] + stored["held_out_images"]]}


def find_changes(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> str:
    """The changes of the data in words, empty where nothing changed; fields that only one of them has do not count."""
    old, new = ({item["name"]: item for item in items} for items in (before, now))
    changed = {
        name
        for name in old.keys() & new.keys()
        if any(old[name][field] != new[name][field] for field in GROUPS if field in old[name] and field in new[name])
    }
    kinds = {
        "without": old.keys() - new.keys(),
        "with": new.keys() - old.keys(),
        "with other pixels, labels or captions of": changed,
    }
    changes = [
        f"{kind} {list_names(sorted(map(documents.one_line, names)), 1)}" for kind, names in kinds.items() if names
    ]
    if not changes and list(old) != list(new):
        return "the same images in another order"
    return f"now {' and '.join(changes)}" if changes else ""


def with_names_below(
    items: Iterable[Mapping[str, Any]], address: tuple[str, Path, str | None] | None
) -> list[dict[str, Any]]:
    """Items whose names do not depend on where the data set lies: a folder, maybe of exports, FILE.json or
    FILE.json:PICTURES.
    """
    kind, place, _ = address or ("", Path(), None)
    file, _, pictures = str(place).partition(".json:")
    root = os.path.expanduser(pictures) or (os.path.dirname(file) if file.endswith(".json") else file)
    prefix = re.compile(f"({re.escape(root)}[/:])?({kind}[/:])?")
    return [{**item, "name": prefix.sub("", item["name"], 1)} for item in items]


def as_json(record: Mapping[str, Any]) -> bytes:
    """The record as a file, one item a line."""
    lines = ",\n".join(json.dumps(item) for item in record["items"])
    return f'{{"version": {VERSION}, "items": [\n{lines}\n]}}\n'.encode()
