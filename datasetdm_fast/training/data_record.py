"""Digests of the pictures and labels a decoder is taught from, by which a training that is resumed notices a change.

FOLDER/training/data.json   a list of items, each with its name, its sides and the digest of everything it holds, and
                            the version of what is taught of them
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
PERSON = "person"  # the framing of items that each show one person of a picture
VERSION = 2  # before, captions made of the labels were of the whole picture, and words of crowds were taught as absent
FORM = {"items": [{"name": str, "sides": [int]}]}
KINDS = {  # what a change is called -> the fields of an item that tell it
    "other labels": ("semantic", "things", "depth", "joints"),
    "another picture": ("image",),
    "another caption": ("caption",),
}
TOGETHER = {  # fields that are there together
    "things": ("masks", "mask_classes", "crowds", "crowd_classes"),
    "joints": ("keypoints", "keypoint_boxes", "keypoint_areas"),
}


def record(source: LabelledSource, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Every item of a data set at its own size, in order; nothing of scenes, which their address alone decides."""
    found = []
    for index in () if source.is_rendered else range(len(source)):
        found.append(_item(source, index))
        progress(index + 1)
    return {"version": VERSION, "items": found}


def _item(source: LabelledSource, index: int) -> dict[str, Any]:
    number, item = source.order[index], _whole(source, index)
    fields = {"image": (item.image,), "caption": (item.caption,), "semantic": (item.semantic,), "depth": (item.depth,)}
    fields |= {name: tuple(getattr(item, part) for part in parts) for name, parts in TOGETHER.items()}
    said = {name: _digest(parts) for name, parts in fields.items() if parts[0] is not None}
    return {"name": source.name(number), "sides": [item.image.shape[1], item.image.shape[0]], **said}


def _whole(source: LabelledSource, index: int) -> Picture | Labelled:
    """An item at its own size, where it has one, with the caption of all of it."""
    if not hasattr(source, "picture"):
        return source[index]
    picture = source.guarded(source.picture, source.order[index])
    return picture if picture.named is None else replace(picture, caption=source.photo_of(picture.named))


def _digest(parts: tuple[Any, ...]) -> str:
    """Of text, arrays, and lists of masks or of what makes them, one at a time."""
    digest = hashlib.sha256()
    for part in parts:
        for one in part if isinstance(part, (list, tuple)) else (part,):
            value = one() if callable(one) else one
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype.str}{value.shape}".encode())
                digest.update(np.ascontiguousarray(value).data)
            else:
                digest.update(f"{value}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:DIGITS]


def seen_in_training(decoder: str, source: LabelledSource, labels: Iterable[str]) -> dict[str, int]:
    """How many pictures of a data set were there when the decoder of each label was trained, where its folder says it.

    Nothing is known of scenes and of decoders of earlier versions and other projects.
    """
    if source.is_rendered:
        return {}
    try:
        folders = find_decoders(decoder)
    except (Missing, Refused):  # a checkpoint of DatasetDM
        return {}
    files = {label: folders[label] / "training" / NAME for label in labels if label in folders}
    known = {label: _pictures(file) for label, file in files.items() if file.exists()}
    there = _seen(source, len(source)) if any(known.values()) else []
    return {label: sum(picture in pictures for picture in there) for label, pictures in known.items()}


def shared(judged: LabelledSource, learnt: LabelledSource, count: int) -> int:
    """How many pictures of a data set are among the first `count` of another, whatever their addresses."""
    if judged.is_rendered or learnt.is_rendered:
        return 0
    known = {*_seen(learnt, count)}
    return sum(picture in known for picture in _seen(judged, len(judged)))


def _seen(source: LabelledSource, count: int) -> list[str]:
    """The digests of the first pictures of a data set, of those that can be read: others are refused where needed."""
    found = []
    for index in range(count):
        with suppress(Refused):
            found.append(_digest((_whole(source, index).image,)))
    return found


def _pictures(file: Path) -> set[str]:
    try:
        before = json.loads(storage.read(file, LARGEST_RECORD))
        documents.check_form(before, FORM)
    except (Refused, ValueError):
        return set()
    return {item["image"] for item in before["items"] if "image" in item}


def below(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record with names that say nothing of the folder in which the data are."""
    return {**found, "items": [{**item, "name": item["name"].removeprefix(f"{folder}/")} for item in found["items"]]}


def check(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume the training of a folder that was begun on other pictures or labels."""
    if said := changes(before["items"], now["items"]):
        raise Refused(
            f"--out: {folder} was trained on other data: {said}",
            "Restore the data, or choose another --out for a training on the data as they are.",
        )


def check_version(folder: Path, before: Mapping[str, Any], taught_anew: Callable[[], str]) -> None:
    """Refuses to resume the training of a version that taught something else of a picture; `taught_anew` finds one."""
    if before.get("version") != VERSION and (name := taught_anew()):
        raise Refused(
            f"--out: {folder} was begun by an earlier version, which taught another caption or other words of {name}",
            "Choose another --out.",
        )


def changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """What of the data changed, in words, empty where nothing did; what only one of them read is not compared."""
    names, later = ([item["name"] for item in items] for items in (before, now))
    if names != later:
        gone, new = _listed(set(names) - set(later)), _listed(set(later) - set(names))
        moved = [f"{what} {said}" for what, said in (("without", gone), ("with", new)) if said]
        return f"now {' and '.join(moved)}" if moved else "the same images in another order"
    found = []
    for kind, fields in KINDS.items():
        pairs = zip(before, now, strict=True)
        changed = {
            old["name"]
            for old, new in pairs
            if any(old[name] != new[name] for name in fields if name in old and name in new)
        }
        found += [f"{kind} of {_listed(changed)}"] if changed else []
    return "; ".join(found)


def _listed(names: set[str]) -> str:
    """The first of some names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {count_noun(len(ordered) - 1, 'more image')}" if len(ordered) > 1 else ""
    return f"{documents.one_line(ordered[0])}{more}" if ordered else ""


def as_json(found: Mapping[str, Any]) -> bytes:
    """The record as a file, one item a line."""
    lines = ",\n".join(json.dumps(item) for item in found["items"])
    return f'{{"version": {VERSION}, "items": [\n{lines}\n]}}\n'.encode()


def framing(found: Mapping[str, Any], pictures: int, size: int, rule: str) -> dict[str, Any]:
    """How the pictures are brought to the model's size, and of how many that changes something."""
    sides = [item["sides"] for item in found["items"]]
    is_person = rule == PERSON  # in a square of its own, whatever the sides of its picture
    return {
        "pixels_a_side": size,
        "framing": rule,
        "pictures": pictures,
        "scaled": sum(is_person or each != [size, size] for each in sides),
        "cut_to_a_square": sum(is_person or width != height for width, height in sides),
    }


def framed(framing: Mapping[str, Any]) -> str:
    """The same in words, empty where all pictures have the model's size."""
    scaled, cut, pictures = (framing[name] for name in ("scaled", "cut_to_a_square", "pictures"))
    if not scaled:
        return ""
    if framing["framing"] == PERSON:
        each = "each in the middle of a square" if pictures > 1 else "in the middle of a square"
        return f"{count_noun(pictures, 'person')}, {each} that is cut out and scaled to that"
    of_all = count_noun(pictures, "picture")
    which = f"all {of_all} are" if scaled == pictures > 1 else f"{scaled} of {of_all} {'is' if scaled == 1 else 'are'}"
    square = "a square that DatasetDM's rule draws" if framing["framing"] == "upstream" else "the square in the middle"
    some = f", {cut} of them cut to {square}" if cut else ""
    return f"{which} scaled to that{f' and cut to {square}' if cut == scaled else some}"
