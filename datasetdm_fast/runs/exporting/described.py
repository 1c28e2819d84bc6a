"""A sample as one JSON object, and its maps as files, for formats that prescribe no layout."""

import json
from collections.abc import Iterator
from typing import Any

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.depth import UNITS, unit_of
from datasetdm_fast.engine.labels.label_files import index_png
from datasetdm_fast.runs.exporting.classes import IGNORED
from datasetdm_fast.runs.exporting.format import Content, ExportPlan
from datasetdm_fast.runs.exporting.view import SampleView


def describe_sample(sample: SampleView, plan: ExportPlan) -> dict[str, Any]:
    """Prompt, seed and the labels that are no maps; classes are the numbers of the export."""
    numbers = plan.classes.numbers
    record: dict[str, Any] = {
        "id": sample.name,
        "prompt": sample.prompt,
        "seed": sample.stored.seed,
        "width": sample.width,
        "height": sample.height,
    }
    if "instance" in plan.tasks:
        record["objects"] = {
            "category": [numbers[thing.name] for thing in sample.things],
            "bbox": [list(map(float, thing.box)) for thing in sample.things],
            "area": [thing.area for thing in sample.things],
            "score": [thing.score for thing in sample.things],
            "rle": [thing.rle["counts"] for thing in sample.things],
        }
    if "pose" in plan.tasks:
        record["people"] = {
            "bbox": [list(map(float, person.box)) for person in sample.people],
            "area": [round(float(person.area), 3) for person in sample.people],
            "score": [person.score for person in sample.people],
            "keypoints": [person.joints.ravel().tolist() for person in sample.people],
        }
    return record


def map_files(sample: SampleView, plan: ExportPlan, *, has_colours: bool) -> Iterator[tuple[str, Content]]:
    """Name and PNG of each map: class numbers of the export, with a palette or grey, and depth in the table's unit."""
    if "semantic" in plan.tasks:
        yield "semantic", index_png(sample.semantic) if has_colours else _C.png_encode(sample.semantic)
    if "depth" in plan.tasks:
        yield "depth", sample.depth_file(UNITS[unit_of(plan.max_depth)])


def table_files(plan: ExportPlan) -> dict[str, list[bytes]]:
    """Files that define the numbers, by name."""
    names = {str(number): name for name, number in plan.classes.numbers.items()}
    id2label = {"0": "background", **names}
    table: dict[str, Any] = {"id2label": id2label}
    if "instance" in plan.tasks:
        table["things"] = list(plan.classes.things)
    if "semantic" in plan.tasks:
        table["ignore"] = IGNORED
    if "depth" in plan.tasks:
        table |= {"depth_steps_of_a_metre": UNITS[unit_of(plan.max_depth)], "max_depth": plan.max_depth}
    if "pose" in plan.tasks:
        table |= {"joints": list(plan.joints), "limbs": [list(limb) for limb in plan.limbs]}
    files = {"classes.json": table, "id2label.json": id2label}
    written = {name: [json.dumps(value, ensure_ascii=False).encode()] for name, value in files.items()}
    return written | ({"max_depth.txt": [f"{plan.max_depth:g}\n".encode()]} if "depth" in plan.tasks else {})
