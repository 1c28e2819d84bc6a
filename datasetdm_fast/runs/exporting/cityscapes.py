"""cityscapes: leftImg8bit and gtFine with labelIds, labelTrainIds, instanceIds, color and polygons.json."""

import json
from typing import Any

import numpy as np

from datasetdm_fast import _C
from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.runs.exporting.format import Entry, ExportPlan, Files, Format, SampleView, class_map
from datasetdm_fast.runs.exporting.rings import group_parts, join_rings, on_pixels, rings

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # by train id
WORDS = {word.name: (k, LABEL_IDS[k], word.colour) for k, word in enumerate(builtin_table("cityscapes").classes)}
FIRST_THING = 24  # label id: those of things begin here
CITY = "synthetic"
UNLABELLED = 0
MOST_THINGS = 1000  # of a class in a picture: an instance is its label id times 1000 and its number


class CityscapesFormat(Format):
    """Pixels of none of the 19 classes with a train id are unlabelled, 255 among train ids."""

    needs = (("semantic",), ("instance",))
    forms = ("png",)
    known = tuple(WORDS)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        stem = f"{CITY}_000000_{sample.number:06d}"
        _, image = sample.picture(self.forms)
        place = f"gtFine/{sample.split}/{CITY}/{stem}_gtFine"
        table = np.array([(UNLABELLED, IGNORE, 0, 0, 0)] * 256, np.uint8)  # of the class numbers of the export
        for name, number in plan.classes.numbers.items():
            if name in WORDS and number < IGNORE:
                train_id, label_id, colour = WORDS[name]
                table[number] = (label_id, train_id, *colour)
        ids, train_ids, *colours = np.ascontiguousarray(np.moveaxis(table[class_map(sample, plan)], 2, 0))
        files: Files = {
            f"leftImg8bit/{sample.split}/{CITY}/{stem}_leftImg8bit.png": image,
            f"{place}_labelIds.png": _C.png_encode(ids),
            f"{place}_labelTrainIds.png": _C.png_encode(train_ids),
            f"{place}_color.png": _C.png_encode(np.stack(colours, 2)),
            f"{place}_polygons.json": json.dumps(_polygons(sample, plan, ids)).encode(),
        }
        if "instance" in plan.tasks:
            files[f"{place}_instanceIds.png"] = _C.png_encode_words(_instances(sample, ids))
        return files, {}


def _instances(sample: SampleView, label_ids: np.ndarray) -> np.ndarray:  # [H, W] uint16
    """The label id of each pixel, of things its thousandfold and a number within the class."""
    ids, counts = label_ids.astype(np.uint16), dict.fromkeys(range(256), 0)
    places = sample.number_things()
    for k, thing in enumerate(sample.things, 1):
        label_id = WORDS[thing.name][1] if thing.name in WORDS else UNLABELLED
        if label_id >= FIRST_THING and counts[label_id] < MOST_THINGS:
            inside = places == k
            if inside.any():
                ids[inside] = label_id * 1000 + counts[label_id]
                counts[label_id] += 1
    return ids


def _polygons(sample: SampleView, plan: ExportPlan, label_ids: np.ndarray) -> dict[str, Any]:
    """A closed line for each part of the area of a class, and one for the visible part of each thing; painted one after
    another as cityscapesScripts does, border pixels included, they are the map of label ids. Pixels of a class of
    things that belong to no instance are a group, as in Cityscapes. Things in several parts come first: what else lies
    under the lines between these is painted over them.
    """
    has_things = "instance" in plan.tasks
    places = sample.number_things() if has_things else np.zeros(label_ids.shape, np.int32)
    joined, objects = [], []
    for name, (_, label_id, _) in WORDS.items():
        area = label_ids == label_id
        if has_things and label_id >= FIRST_THING:
            area, name = area & (places == 0), f"{name}group"
        objects += [(name, _paintable_line(area, part)) for part in group_parts(rings(area))]
    for k, thing in enumerate(sample.things if has_things else (), 1):
        if thing.name in WORDS and WORDS[thing.name][1] >= FIRST_THING:
            area = places == k
            lines = [_paintable_line(area, part) for part in group_parts(rings(area))]
            if lines:
                (joined if len(lines) > 1 else objects).append((thing.name, join_rings(lines)))
    return {
        "imgHeight": sample.height,
        "imgWidth": sample.width,
        "objects": [
            {"label": name, "polygon": [[int(x), int(y)] for x, y in line]} for name, line in (*joined, *objects)
        ],
    }


def _paintable_line(area: np.ndarray, part: list[np.ndarray]) -> np.ndarray:
    """A closed line [n, 2] of x, y through the outermost pixels of a part of an area [H, W] bool. Each hole is reached
    from straight above, through pixels of the area, so that a painted line covers no others.
    """
    line, *holes = map(on_pixels, part)
    for hole in sorted(holes, key=lambda ring: int(ring[:, 1].min())):  # so what is above a hole is part of the line
        hole = np.roll(hole, -int(hole[:, 1].argmin()), axis=0)
        x, y = hole[0]
        while y and area[y - 1, x]:
            y -= 1
        following = np.roll(line, -1, axis=0)
        left, right = np.sort([line[:, 0], following[:, 0]], axis=0)
        is_above = (line[:, 1] == y) & (following[:, 1] == y) & (left <= x) & (x <= right)
        at = int((is_above | (line == (x, y)).all(1)).argmax())
        line = np.concatenate([line[: at + 1], [(x, y)], hole, hole[:1], [(x, y)], line[at + 1 :]])
    return line
