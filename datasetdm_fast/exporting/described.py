"""A sample as one JSON object, and its maps as files: what formats without a layout of their own have in common."""

from collections.abc import Iterator
from typing import Any

from datasetdm_fast.exporting.format import Content, ExportPlan
from datasetdm_fast.exporting.view import SampleView
from datasetdm_fast.labels.depth import UNITS, unit_of
from datasetdm_fast.labels.image_files import index_png


def described(sample: SampleView, plan: ExportPlan) -> dict[str, Any]:
    """Prompt, seed and the labels that are no maps; classes are the numbers of the export."""
    numbers = plan.classes.numbers
    found: dict[str, Any] = {
        "id": sample.name,
        "prompt": sample.prompt,
        "seed": sample.stored.seed,
        "width": sample.width,
        "height": sample.height,
    }
    if "instance" in plan.tasks:
        found["objects"] = {
            "category": [numbers[thing.name] for thing in sample.things],
            "bbox": [list(map(float, thing.box)) for thing in sample.things],
            "area": [thing.area for thing in sample.things],
            "score": [thing.score for thing in sample.things],
            "rle": [thing.rle["counts"] for thing in sample.things],
        }
    if "pose" in plan.tasks:
        found["people"] = {
            "bbox": [list(map(float, person.box)) for person in sample.people],
            "score": [person.score for person in sample.people],
            "keypoints": [person.joints.ravel().tolist() for person in sample.people],
        }
    return found


def maps(sample: SampleView, plan: ExportPlan) -> Iterator[tuple[str, Content]]:
    """Name and PNG of each map: class numbers of the export, depth in the unit that the table names."""
    if "semantic" in plan.tasks:
        yield "semantic", index_png(sample.semantic)
    if "depth" in plan.tasks:
        yield "depth", sample.depth_file(UNITS[unit_of(plan.max_depth)])


def table(plan: ExportPlan) -> dict[str, Any]:
    """What the numbers mean."""
    names = {str(number): name for name, number in plan.classes.numbers.items()}
    found: dict[str, Any] = {"id2label": {"0": "background", **names}}
    if "semantic" in plan.tasks:
        found["ignore"] = 255
    if "depth" in plan.tasks:
        found |= {"depth_steps_of_a_metre": UNITS[unit_of(plan.max_depth)], "max_depth": plan.max_depth}
    if "pose" in plan.tasks:
        found |= {"joints": list(plan.joints), "limbs": [list(limb) for limb in plan.limbs]}
    return found
