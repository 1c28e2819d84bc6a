"""Things painted into maps: the surest of them on top, none where the label map of the run is to be ignored."""

import numpy as np

from datasetdm_fast.runs.exporting.format import ExportPlan
from datasetdm_fast.runs.exporting.view import SampleView


def numbered_things(sample: SampleView) -> np.ndarray:  # [H, W] int32
    """0 where there is nothing, else the place of the instance, from 1 on."""
    found = np.zeros((sample.height, sample.width), np.int32)
    order = np.argsort([thing.score for thing in sample.things], kind="stable")
    for k in order.tolist():
        found[sample.things[k].mask] = k + 1
    found[sample.ignored] = 0
    return found


def class_map(sample: SampleView, plan: ExportPlan) -> np.ndarray:  # [H, W] uint8
    """The classes of the instances, elsewhere those of the semantic map; 0 = background."""
    below = sample.semantic if "semantic" in plan.tasks else np.zeros((sample.height, sample.width), np.uint8)
    if "instance" not in plan.tasks:
        return below
    numbers, places = plan.classes.numbers, numbered_things(sample)
    kinds = np.array([0, *(numbers[thing.name] for thing in sample.things)], np.uint8)
    return np.where(places > 0, kinds[places], below)
