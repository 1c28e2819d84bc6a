"""How true edges between classes are."""

from __future__ import annotations

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.labels.edges import edges_of
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.training.evaluation.meter import Meter


class Edges(Meter):
    """F1 of edge pixels over all images."""

    figure = held_out_figure = "f1"

    def __init__(self, source: LabelledSource):
        self.rows: list[tuple[int, int, int]] = []  # an image: edge pixels of both, of the answer, of the truth

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, truth: Labelled, found: SemanticMap) -> None:
        real, said = edges_of(truth.semantic) == 1, found.labels == 1
        self.rows.append((int((real & said).sum()), int(said.sum()), int(real.sum())))

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        both, said, real = (weights @ np.array(self.rows, float)).T
        return {"f1": 2 * both / np.maximum(said + real, 1)}
