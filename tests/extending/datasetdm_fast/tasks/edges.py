"""Edges between classes, read by a segmentation decoder of two classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.labels import LABEL_KINDS
from datasetdm_fast.labels.edges import CLASSES, edges_of
from datasetdm_fast.tasks.semantic import SMALL, postprocess
from datasetdm_fast.tasks.task import Task, Teaching
from datasetdm_fast.truth.labelled import Labelled, LabelledSource


def _truth(_: LabelledSource, item: Labelled) -> SemanticMap:
    found = edges_of(item.semantic)
    return SemanticMap(found, np.ones(found.shape, np.float32), CLASSES)


def _target(_: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
    found = edges_of(item.semantic)
    return {"classes": np.array([0, 1]), "masks": np.stack([found == 0, found == 1])}


def _is_shown(_: LabelledSource, target: Mapping[str, np.ndarray]) -> bool:
    return bool(target["masks"][1].any())


def _decoder(_: LabelledSource, is_small: bool, __: str) -> dict[str, Any]:
    return {"kind": "segmentation", "classes": CLASSES, **(SMALL if is_small else {})}


TASK = Task(
    LABEL_KINDS["edges"],
    postprocess,
    Teaching(
        needs=("semantic",),
        wanted="an edge between two classes",
        truth=_truth,
        target=_target,
        is_shown=_is_shown,
        decoder=_decoder,
        small={"batch_size": 12, "points": 512, "steps": 900},
        large={},
    ),
)
