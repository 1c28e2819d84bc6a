"""Maps of query words: a palette PNG, "background" = none of them."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.labels.colours import palette
from datasetdm_fast.engine.labels.kind import GalleryLayer, Table
from datasetdm_fast.engine.labels.semantic import ClassMap, shares


def colour_numbers(known: Sequence[str], words: Sequence[str]) -> list[int]:
    """The class number whose colour each query word takes in a run whose labels have no table in common: that of the
    semantic maps.
    """
    free = count(len(known))
    return [0] + [known.index(word) if word in known else next(free) for word in words[1:]]


class OpenVocabularyKind(ClassMap):
    attribute, title = "open_vocabulary", "Open-vocabulary classes"
    contents = (
        "`open_vocabulary/ID.png`: class numbers of the asked words as palette PNG, background = none of them; "
        "`open_vocabulary_confidence/ID.png`: 0..255"
    )
    roles = ("open_vocabulary", "open_vocabulary_confidence")
    layers = (
        GalleryLayer("open-vocabulary", "Open vocabulary", "map", role="open_vocabulary", values=shares),
        GalleryLayer("word-confidence", "Uncertainty of words", "uncertainty", role="open_vocabulary_confidence"),
    )
    layout = ("numbers", "has_confidence")

    def files(self, table: Table) -> tuple[str, ...]:
        return self.roles if table.get("has_confidence") else self.roles[:1]

    def encode(
        self, label: SemanticMap, labels: Mapping[str, Any], table: Table, colours: bytes = b""
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        if "semantic" in labels and "numbers" not in table:
            colours = palette(tuple(colour_numbers(labels["semantic"].classes, label.classes)))
        return super().encode(label, labels, table, colours)

    def table(self, config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
        return {"classes": ["background", *words], "has_confidence": True}

    def colours(self, table: Table, tables: Mapping[str, Table]) -> dict[str, int]:
        words, known = table["classes"], tables.get("semantic", {}).get("classes", [])
        if not known or "numbers" in table:
            return super().colours(table, tables)
        return dict(zip(words[1:], colour_numbers(known, words)[1:], strict=True))
