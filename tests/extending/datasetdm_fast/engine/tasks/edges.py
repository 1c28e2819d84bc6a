"""Edges between classes, read by a segmentation decoder of two classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.labels.edges import CLASSES, edges_of
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.tasks.semantic import SemanticTask


class EdgesTask(SemanticTask):
    """Where one class ends and another begins."""

    names = ""
    requirement = "an edge between two classes"
    small = {"batch_size": 12, "points": 512, "steps": 900}

    def truth(self, _: LabelledSource, item: Labelled) -> SemanticMap:
        found = edges_of(item.semantic)
        return SemanticMap(found, np.ones(found.shape, np.float32), CLASSES)

    def target(self, _: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        found = edges_of(item.semantic)
        return {"classes": np.array([0, 1]), "masks": np.stack([found == 0, found == 1])}

    def is_shown(self, _: LabelledSource, target: Mapping[str, np.ndarray]) -> bool:
        return bool(target["masks"][1].any())

    def decoder(self, source: LabelledSource, is_small: bool, head: str) -> dict[str, Any]:
        return {**super().decoder(source, is_small, head), "classes": CLASSES}
