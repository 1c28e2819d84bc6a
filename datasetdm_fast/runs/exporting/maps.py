"""Instances as maps: those of higher scores on top, none where the label map of the run is ignored."""

import numpy as np

from datasetdm_fast.runs.exporting.format import ExportPlan
from datasetdm_fast.runs.exporting.view import SampleView


def number_things(sample: SampleView) -> np.ndarray:  # [H, W] int32
    """0 where there is no instance, else its place among those of the sample, from 1 on."""
    places = np.zeros((sample.height, sample.width), np.int32)
    order = np.argsort([thing.score for thing in sample.things], kind="stable")
    for k in order.tolist():
        places[sample.things[k].mask] = k + 1
    places[sample.ignored] = 0
    return places


def class_map(sample: SampleView, plan: ExportPlan) -> np.ndarray:  # [H, W] uint8
    """The classes of the instances, elsewhere those of the semantic map; 0 = background."""
    below = sample.semantic if "semantic" in plan.tasks else np.zeros((sample.height, sample.width), np.uint8)
    if "instance" not in plan.tasks:
        return below
    numbers, places = plan.classes.numbers, number_things(sample)
    kinds = np.array([0, *(numbers[thing.name] for thing in sample.things)], np.uint8)
    return np.where(places > 0, kinds[places], below)
