"""Maps of the words asked for: a palette PNG, 0 = none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.labels import semantic
from datasetdm_fast.labels.image_files import index_png
from datasetdm_fast.labels.kind import CardPart, GalleryLayer, LabelKind, Pixels, Table


def colour_numbers(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """The class number whose colour each asked word takes: its own in the semantic maps, so that one word has one
    colour in a run.
    """
    free = count(len(known))
    return [0] + [known.index(word) if word in known else next(free) for word in asked[1:]]


def encode(label: SemanticMap, labels: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    numbers = colour_numbers(labels["semantic"].classes, label.classes) if "semantic" in labels else ()
    return {"open_vocabulary": index_png(label.labels, numbers)}, {"pixels": semantic.count_pixels(label.labels)}


def decode(pixels: Pixels, _: Any, table: Table) -> SemanticMap:
    labels = pixels["open_vocabulary"]
    return SemanticMap(labels, np.ones(labels.shape, np.float32), tuple(table["classes"]))


def check(record: Any, pixels: Pixels, table: Table, side: int) -> Iterator[str]:
    yield from semantic.check_map(record, pixels["open_vocabulary"], len(table["classes"]))


def colours(table: Table, tables: Mapping[str, Table]) -> dict[str, int]:
    asked, known = table["classes"], tables.get("semantic", {}).get("classes", [])
    if not known:
        return semantic.colours(table, tables)
    return dict(zip(asked[1:], colour_numbers(known, asked)[1:], strict=True))


def _table(config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
    return {"classes": ["background", *words]}


KIND = LabelKind(
    attribute="open_vocabulary",
    roles=("open_vocabulary",),
    encode=encode,
    decode=decode,
    arrays=semantic.arrays,
    picture=semantic.picture,
    table=_table,
    table_form={"classes": [str]},
    pixel_bytes=1,
    check=check,
    card=CardPart(
        "`open_vocabulary/ID.png`: class numbers of the asked words as palette PNG, 0 = none of them",
        semantic.pixel_counts,
        lambda table, counts: semantic.shares("Open-vocabulary classes", table, counts),
    ),
    layers=(GalleryLayer("open-vocabulary", "Open vocabulary", "map", role="open_vocabulary"),),
    distance=semantic.distance,
    gates=semantic.GATES,
    words=semantic.words,
    colours=colours,
)
