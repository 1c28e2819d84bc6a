"""Maps of classes: a palette PNG of class numbers and a grey one of confidences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import SemanticMap
from datasetdm_fast.labels.image_files import index_png
from datasetdm_fast.labels.kind import CardPart, GalleryLayer, Gates, LabelKind, Pixels, Table, markdown_cell
from datasetdm_fast.labels.pictures import painted

IGNORE = 255
GATES = Gates(exact=(1e-4, 1e-3), free_exact=(1e-3, 1e-2), rounded=(5e-3, 2e-2), free_rounded=(2e-2, 0.1))


def count_pixels(labels: np.ndarray) -> dict[str, int]:
    """Pixels of each number of a label map."""
    return {
        str(value): count
        for value, count in enumerate(_C.count_bytes(np.ascontiguousarray(labels, np.uint8)).tolist())
        if count
    }


def encode(label: SemanticMap, _: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    confidence = (np.minimum(np.fmax(label.confidence, 0), 1) * 255 + 0.5).astype(np.uint8)  # fmax takes a NaN for 0
    files = {"semantic": index_png(label.labels), "confidence": _C.png_encode(confidence)}
    return files, {"pixels": count_pixels(label.labels), "mean_confidence": round(float(confidence.mean()) / 255, 4)}


def decode(pixels: Pixels, _: Any, table: Table) -> SemanticMap:
    return SemanticMap(pixels["semantic"], pixels["confidence"].astype(np.float32) / 255, tuple(table["classes"]))


def arrays(label: SemanticMap) -> np.ndarray:
    return label.labels.astype(np.int64)


def picture(label: SemanticMap, _: np.ndarray) -> Image.Image:
    return painted(label.labels)


def check(record: Any, pixels: Pixels, table: Table, side: int) -> Iterator[str]:
    yield from check_map(record, pixels["semantic"], len(table["classes"]))
    sure = round(float(pixels["confidence"].mean()) / 255, 4)
    if record["mean_confidence"] != sure:
        yield f"the mean confidence is {sure}, the ledger says {record['mean_confidence']}"


def check_map(record: Any, labels: np.ndarray, classes: int) -> Iterator[str]:
    """What is wrong with a map of class numbers."""
    pixels = count_pixels(labels)
    if record["pixels"] != pixels:
        yield f"its map has the pixels {pixels}, the ledger says {record['pixels']}"
    strange = [number for number in map(int, pixels) if number >= classes and number != IGNORE]
    if strange:
        yield f"its map holds the number {strange[0]}, but there are {classes} classes"


def pixel_counts(record: Any) -> dict[int, int]:
    return {int(value): count for value, count in record.get("pixels", {}).items()}


def shares(title: str, table: Table, counts: Mapping[int, int]) -> Iterator[str]:
    """A table of the share of pixels that each class has."""
    if total := sum(counts.values()):
        yield f"## {title}\n\n| number | class | share of pixels |\n|---:|---|---:|"
        for number, name in enumerate(table["classes"]):
            yield f"| {number} | {markdown_cell(name)} | {counts.get(number, 0) / total:.2%} |"
        yield ""


def words(record: Any, table: Table, least: float) -> list[str]:
    """The classes that fill at least so many pixels of a map."""
    names = table.get("classes", [])
    return [names[k] for k, count in pixel_counts(record).items() if k < len(names) and count >= least]


def colours(table: Table, _: Mapping[str, Table]) -> dict[str, int]:
    return {name: number for number, name in enumerate(table["classes"])}


def distance(found: SemanticMap, truth: SemanticMap) -> float:
    """Share of pixels that differ."""
    return float((found.labels != truth.labels).mean())


def _table(config: Any, size: int, _: Sequence[str]) -> dict[str, Any]:
    return {"classes": list(config.classes), "ignore": IGNORE}


KIND = LabelKind(
    attribute="semantic",
    roles=("semantic", "confidence"),
    encode=encode,
    decode=decode,
    arrays=arrays,
    picture=picture,
    table=_table,
    table_form={"classes": [str]},
    pixel_bytes=2,
    check=check,
    card=CardPart(
        "`semantic/ID.png`: class numbers as palette PNG, 255 = ignore; `confidence/ID.png`: 0..255",
        pixel_counts,
        lambda table, counts: shares("Semantic classes", table, counts),
    ),
    layers=(
        GalleryLayer("semantic", "Semantic", "map", role="semantic"),
        GalleryLayer("confidence", "Confidence", "map", role="confidence"),
    ),
    distance=distance,
    gates=GATES,
    words=words,
    colours=colours,
)
