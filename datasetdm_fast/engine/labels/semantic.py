"""Maps of classes, of query words, and of words read from attention: PNGs of numbers and of confidences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import IGNORE, SemanticMap
from datasetdm_fast.engine.labels import (
    BACKGROUND,
    GalleryLayer,
    Gates,
    LabelKind,
    Pixels,
    Table,
    iou,
    markdown_cell,
    round_float,
)
from datasetdm_fast.engine.labels.class_tables import CUSTOM, OURS, PALETTE, colour, official_palette
from datasetdm_fast.engine.labels.label_files import index_png
from datasetdm_fast.engine.labels.pictures import paint_map

PLACES = 256  # labels of one map that 8 bits tell apart


def count_pixels(labels: np.ndarray) -> dict[str, int]:
    counts = _C.count_bytes(np.ascontiguousarray(labels, np.uint8)).tolist()
    return {str(value): count for value, count in enumerate(counts) if count}


def mean_confidence(sure: np.ndarray) -> float:
    """Of a confidence file [H, W] uint8, 0..1."""
    return round(float(sure.mean()) / 255, 4)


def shares(record: Any, table: Table, _: Any) -> list[Any]:
    """Shares of the pixels that are background and that are ignored, and of the other classes by number."""
    names, counts = SemanticKind().names(table), SemanticKind().count(record)
    rest = {number: round_float(count / sum(counts.values())) for number, count in counts.items()}
    background = sum(rest.pop(number, 0) for number, name in names.items() if name == BACKGROUND)
    return [background, rest.pop(IGNORE, 0), rest]


class ClassMap(LabelKind):
    """A map of class numbers in the first of its roles, and in the second, where there is one, its confidence."""

    is_map = can_mask = can_be_masked = can_be_tiled = True
    gates = Gates(exact=(1e-4, 1e-3), free_exact=(1e-3, 1e-2), rounded=(5e-3, 2e-2), free_rounded=(2e-2, 0.1))
    table_form = {"classes": [str]}
    pixel_bytes = 2

    def file_numbers(self, labels: np.ndarray, table: Table) -> np.ndarray:
        """The numbers in files [H, W] uint8 of places in `classes`."""
        numbers = np.arange(256, dtype=np.uint8)
        numbers[: len(table["classes"])] = self.numbers(table)
        return np.asarray(numbers[labels])

    def places(self, pixels: np.ndarray, table: Table) -> np.ndarray:
        """Places in `classes` [H, W] uint8 of the numbers in a file; what is no number of a class is ignored."""
        numbers = self.numbers(table)
        place = np.full(256, IGNORE, np.uint8)
        place[numbers] = range(len(numbers))
        return np.asarray(place[pixels])

    def palette(self, table: Table) -> bytes:
        """The colours of its files, by number."""
        name = table.get("palette", OURS)
        if name == CUSTOM:
            official = dict(zip(self.numbers(table), map(tuple, table["colours"]), strict=True))
            return bytes(value for number in range(256) for value in official.get(number, colour(number)))
        return PALETTE if name == OURS else official_palette(name, tuple(self.names(table).items()))

    def ignored_colour(self, table: Table) -> tuple[int, ...]:
        return tuple(self.palette(table)[-3:])

    def encode(self, label: SemanticMap, _: Any, table: Table) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The map and its confidence."""
        numbers = self.file_numbers(label.labels, table)
        contents = {self.roles[0]: index_png(numbers, self.palette(table))}
        record: dict[str, Any] = {"pixels": count_pixels(numbers)}
        for role in self.roles[1:]:
            sure = (np.minimum(np.fmax(label.confidence, 0), 1) * 255 + 0.5).astype(np.uint8)  # fmax takes a NaN for 0
            contents[role], record["mean_confidence"] = _C.png_encode(sure), mean_confidence(sure)
        return contents, record

    def decode(self, pixels: Pixels, _: Any, table: Table) -> SemanticMap:
        labels = self.places(pixels[self.roles[0]], table)
        sure: np.ndarray = np.ones(labels.shape, np.float32)
        for role in self.roles[1:]:
            sure = pixels[role].astype(np.float32) / 255
        return SemanticMap(labels, sure, tuple(table["classes"]))

    def arrays(self, label: SemanticMap, table: Table) -> np.ndarray:
        return self.file_numbers(label.labels, table).astype(np.int64)

    def picture(self, label: SemanticMap, _: np.ndarray) -> Image.Image:
        return paint_map(label.labels)

    def check(self, record: Any, pixels: Pixels, table: Table, sides: tuple[int, int]) -> Iterator[str]:
        counts, known = count_pixels(pixels[self.roles[0]]), self.names(table)
        if record["pixels"] != counts:
            yield f"its map has the pixels {counts}, the ledger says {record['pixels']}"
        strange = [number for number in map(int, counts) if number not in known and number != IGNORE]
        if strange:
            yield f"its map holds the number {strange[0]}, which none of its {len(known)} classes has"
        for role in self.roles[1:]:
            if record["mean_confidence"] != (sure := mean_confidence(pixels[role])):
                yield f"the mean confidence is {sure}, the ledger says {record['mean_confidence']}"

    def certainty(self, record: Any) -> float | None:
        return record.get("mean_confidence")

    def distance(self, predicted: SemanticMap, truth: SemanticMap) -> float:
        """Share of pixels that differ."""
        return float((predicted.labels != truth.labels).mean())

    def follow_colours(self, label: SemanticMap, image: np.ndarray) -> SemanticMap:
        if label.labels.dtype == np.uint8:
            return replace(label, labels=_C.outlines_of_labels(label.labels, image))
        shown, places = np.unique(label.labels, return_inverse=True)
        if len(shown) > PLACES:
            return label
        followed = _C.outlines_of_labels(places.reshape(label.labels.shape).astype(np.uint8), image)
        return replace(label, labels=shown[followed])

    def mask_of(self, label: SemanticMap, word: str) -> tuple[np.ndarray, np.ndarray]:
        return label.labels == label.classes.index(word), label.confidence

    def within(self, label: SemanticMap, inside: np.ndarray, confidence: np.ndarray) -> SemanticMap:
        """Outside, the background where there is such a class, else 255, and the confidence of the mask."""
        outside = label.classes.index(BACKGROUND) if BACKGROUND in label.classes else IGNORE
        return SemanticMap(
            np.where(inside, label.labels, np.uint8(outside)),
            np.where(inside, label.confidence, confidence),
            label.classes,
        )

    def overlap(self, predicted: SemanticMap, truth: SemanticMap) -> float:
        """Mean IoU of the classes that `truth` shows, over the pixels that it does not ignore."""
        shown = [number for number in np.unique(truth.labels) if number != IGNORE]
        is_known = truth.labels != IGNORE
        ious = [iou((predicted.labels == number) & is_known, truth.labels == number) for number in shown]
        return float(np.mean(ious)) if ious else 1.0

    def merge(self, old: SemanticMap, new: SemanticMap, region: np.ndarray) -> SemanticMap:
        labels = np.where(region, new.labels, old.labels)
        return replace(old, labels=labels, confidence=np.where(region, new.confidence, old.confidence))

    def count(self, record: Any) -> Mapping[Any, float]:
        return {int(value): count for value, count in record.get("pixels", {}).items()}

    def section(self, table: Table, counts: Mapping[Any, float]) -> Iterator[str]:
        if total := sum(counts.values()):
            yield f"## {self.title}\n\n| number | class | share of pixels |\n|---:|---|---:|"
            for number, name in sorted(self.names(table).items()):
                yield f"| {number} | {markdown_cell(name)} | {counts.get(number, 0) / total:.2%} |"
            yield ""

    def words(self, record: Any, table: Table, least: float) -> list[str]:
        names = self.names(table)
        return [names[number] for number, count in self.count(record).items() if number in names and count >= least]


class SemanticKind(ClassMap):
    attribute, title = "semantic", "Semantic classes"
    contents = "`semantic/ID.png`: class numbers as palette PNG, 255 = ignore; `confidence/ID.png`: 0..255"
    roles: tuple[str, ...] = ("semantic", "confidence")
    layers = (
        GalleryLayer("semantic", "Semantic", "map", role="semantic", values=shares),
        GalleryLayer("confidence", "Uncertainty", "uncertainty", role="confidence"),
    )

    def table(self, config: Any, size: int, _: Sequence[str]) -> dict[str, Any]:
        return {"classes": list(config.classes), "ignore": IGNORE}

    def figures(self, record: Any) -> dict[str, float]:
        return {"confidence": record["mean_confidence"]}


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
        self, label: SemanticMap, labels: Mapping[str, Any], table: Table
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        files, record = super().encode(label, labels, table)
        agreements = {task: agreement(label, labels[task]) for task in OTHERS if task in labels}
        known = {task: share for task, share in agreements.items() if share is not None}
        if known:
            record["agreement"] = known
        return files, record

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
