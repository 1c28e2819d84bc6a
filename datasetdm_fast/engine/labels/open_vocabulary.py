"""Maps of query words: a palette PNG, "background" = none of them."""

from collections.abc import Sequence
from typing import Any

from datasetdm_fast.engine.labels.kind import GalleryLayer
from datasetdm_fast.engine.labels.semantic import ClassMap, shares


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

    def table(self, config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
        return {"classes": ["background", *words], "has_confidence": True}
