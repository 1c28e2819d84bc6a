"""Maps of class words read from attention: a palette PNG, "background" = none of them, 255 = uncertain."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasetdm_fast.data import IGNORE, SemanticMap
from datasetdm_fast.engine.labels.kind import GalleryLayer, Table
from datasetdm_fast.engine.labels.open_vocabulary import OpenVocabularyKind
from datasetdm_fast.engine.labels.semantic import shares

OTHERS = ("semantic", "open-vocabulary")  # maps of decoders that it can be compared with


def agreement(label: SemanticMap, other: SemanticMap) -> float | None:
    """Share of the pixels certain in both on which two maps tell the same of the words that both know."""
    shared = [word for word in label.classes[1:] if word in other.classes]
    ours, theirs = (
        sum((k + 1) * (label_map.labels == label_map.classes.index(word)) for k, word in enumerate(shared))
        for label_map in (label, other)
    )
    is_certain = (label.labels != IGNORE) & (other.labels != IGNORE)
    return round(float((ours == theirs)[is_certain].mean()), 4) if shared and is_certain.any() else None


class AttentionKind(OpenVocabularyKind):
    attribute, title = "attention", "Classes read from attention"
    contents = (
        "`attention/ID.png`: class numbers of the asked words as palette PNG, background = none, 255 = uncertain; "
        "`attention_confidence/ID.png`: 0..255"
    )
    roles = ("attention", "attention_confidence")
    layers = (
        GalleryLayer("attention", "Attention", "map", role="attention", values=shares),
        GalleryLayer("attention-confidence", "Uncertainty of attention", "uncertainty", role="attention_confidence"),
    )

    def encode(
        self, label: SemanticMap, labels: Mapping[str, Any], table: Table, colours: bytes = b""
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        files, record = super().encode(label, labels, table, colours)
        agreements = {task: agreement(label, labels[task]) for task in OTHERS if task in labels}
        known = {task: share for task, share in agreements.items() if share is not None}
        return files, {**record, **({"agreement": known} if known else {})}

    def table(self, config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
        return {**super().table(config, size, words), "ignore": IGNORE}

    def count(self, record: Any) -> Mapping[Any, float]:
        """Pixels by class, and the sum and number of its agreements with the maps of other tasks."""
        agreements = record.get("agreement", {})
        sums = {("sum", task): share for task, share in agreements.items()}
        return {**super().count(record), **sums, **{("number", task): 1 for task in agreements}}

    def section(self, table: Table, counts: Mapping[Any, float]) -> Iterator[str]:
        yield from super().section(table, {name: count for name, count in counts.items() if isinstance(name, int)})
        for task in OTHERS:
            if number := counts.get(("number", task)):
                share = counts["sum", task] / number
                yield f"On {share:.1%} of their certain pixels these maps agree with those of the {task} decoder.\n"

    def words(self, record: Any, table: Table, least: float) -> list[str]:
        return super().words({"pixels": record["pixels"]}, table, least)
