"""Edges between classes: a palette PNG, 1 where another class begins to the right or below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.labels import GalleryLayer, Table
from datasetdm_fast.engine.labels.label_files import index_png
from datasetdm_fast.engine.labels.semantic import ClassMap, count_pixels

CLASSES = ("background", "edge")


def edges_of(classes: np.ndarray) -> np.ndarray:
    """[H, W] uint8, 1 where the class of the pixel is not that of its right or lower neighbour."""
    found = np.zeros(classes.shape, np.uint8)
    found[:, :-1] |= classes[:, 1:] != classes[:, :-1]
    found[:-1] |= classes[1:] != classes[:-1]
    return found


class EdgesKind(ClassMap):
    """Where one class ends and another begins."""

    attribute, title = "edges", "Edges"
    contents = "`edges/ID.png`: an edge where another class begins to the right or below"
    roles = ("edges",)
    layers = (GalleryLayer("edges", "Class edges", "map", role="edges"),)

    def encode(self, label: SemanticMap, _: Mapping[str, Any], table: Table) -> tuple[dict[str, bytes], dict[str, Any]]:
        numbers = self.file_numbers(label.labels, table)
        return {"edges": index_png(numbers)}, {"pixels": count_pixels(numbers)}

    def table(self, config: Any, _: int, __: Sequence[str]) -> dict[str, Any]:
        return {"classes": list(config.classes)}
