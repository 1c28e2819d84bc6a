"""Edges between classes: a palette PNG, 1 where another class begins to the right or below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.labels import semantic
from datasetdm_fast.labels.image_files import index_png
from datasetdm_fast.labels.kind import CardPart, GalleryLayer, LabelKind, Pixels, Table

CLASSES = ("background", "edge")


def edges_of(classes: np.ndarray) -> np.ndarray:
    """[H, W] uint8, 1 where the class of the pixel is not that of its right or lower neighbour."""
    found = np.zeros(classes.shape, np.uint8)
    found[:, :-1] |= classes[:, 1:] != classes[:, :-1]
    found[:-1] |= classes[1:] != classes[:-1]
    return found


def encode(label: SemanticMap, _: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    return {"edges": index_png(label.labels)}, {"pixels": semantic.count_pixels(label.labels)}


def decode(pixels: Pixels, _: Any, table: Table) -> SemanticMap:
    return SemanticMap(pixels["edges"], np.ones(pixels["edges"].shape, np.float32), tuple(table["classes"]))


def check(record: Any, pixels: Pixels, table: Table, _: int) -> Iterator[str]:
    return semantic.check_map(record, pixels["edges"], len(table["classes"]))


def _table(config: Any, _: int, __: Sequence[str]) -> dict[str, Any]:
    return {"classes": list(config.classes)}


KIND = LabelKind(
    attribute="edges",
    roles=("edges",),
    encode=encode,
    decode=decode,
    arrays=semantic.arrays,
    picture=semantic.picture,
    table=_table,
    table_form={"classes": [str]},
    pixel_bytes=1,
    check=check,
    card=CardPart("`edges/ID.png`: 1 where another class begins to the right or below"),
    layers=(GalleryLayer("edges", "Class edges", "map", role="edges"),),
    distance=semantic.distance,
    gates=semantic.GATES,
)
