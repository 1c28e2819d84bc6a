"""Instance masks: COCO annotations with compressed run lengths."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import Instances
from datasetdm_fast.engine.labels import (
    SAME,
    SHOWN_SCORE,
    GalleryLayer,
    Gates,
    LabelKind,
    Pixels,
    Table,
    iou,
    markdown_cell,
    mask_rle,
    mean_score,
    round_float,
)
from datasetdm_fast.engine.labels.pictures import bounds, outline, paint_masks

LEAST_LEFT = 0.1  # share of an instance that must be left of it where the rest was drawn anew


def trace_outlines(record: Any) -> list[str]:
    """The outline of every instance, as the path of an SVG."""
    return [outline(mask_rle.decode(item["segmentation"])) for item in record]


def outline_values(record: Any, table: Table, paths: list[str]) -> list[list[Any]]:
    names = InstanceKind().names(table)
    return [
        [names[item["category_id"]], round(item["score"], 3), path] for item, path in zip(record, paths, strict=True)
    ]


def _matches(first: Instances, second: Instances, least: float = SAME) -> dict[int, int]:
    """Place of an instance in the first label -> place of the same thing in the second, the most alike pairs first."""
    pairs = [
        (iou(mask, other), a, b)
        for a, mask in enumerate(first.masks)
        for b, other in enumerate(second.masks)
        if first.class_ids[a] == second.class_ids[b]
    ]
    matches: dict[int, int] = {}
    for like, a, b in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        if like >= least and a not in matches and b not in matches.values():
            matches[a] = b
    return matches


class InstanceKind(LabelKind):
    attribute, title = "instances", "Instances"
    contents = "`instances.json`: COCO instances, compressed RLE with all parts and holes, scores"
    layers = (GalleryLayer("instance", "Instances", "outlines", values=outline_values, trace=trace_outlines),)
    gates = Gates(exact=(1e-3, 1e-2), free_exact=(1e-2, 1e-1), rounded=(2e-2, 0.1), free_rounded=(5e-2, 0.4))
    first_number = 1
    table_form = {"classes": [str], "size": [int]}
    pixel_bytes = 0.5
    can_mask = can_be_masked = can_be_tiled = True
    coco_file = "instances.json"

    def encode(
        self, label: Instances, _: Mapping[str, Any], table: Table
    ) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        if not len(label.masks):
            return {}, []
        encoded, numbers = mask_rle.encode(np.asarray(label.masks, bool)), self.numbers(table)
        record: list[dict[str, Any]] = [
            {
                "category_id": numbers[kind],
                "score": round_float(score, 6),
                "area": int(area),
                "bbox": [round_float(side) for side in box],
                "segmentation": dict(rle),
            }
            for kind, score, area, box, rle in zip(
                label.class_ids, label.scores, encoded.areas, encoded.boxes, encoded.rles, strict=True
            )
        ]
        if label.ids is not None:
            for thing, id in zip(record, label.ids, strict=True):
                thing["id"] = int(id)
        return {}, record

    def decode(self, _: Pixels, record: Any, table: Table) -> Instances:
        masks = (
            np.stack([mask_rle.decode(item["segmentation"]) for item in record])
            if record
            else np.zeros((0, *table["size"]), bool)
        )
        numbers = self.numbers(table)
        ids, scores = [numbers.index(item["category_id"]) for item in record], [item["score"] for item in record]
        has_ids = any("id" in item for item in record)
        stored_ids = np.array([item["id"] for item in record], np.int64) if has_ids else None
        return Instances(
            masks, np.array(ids, np.int64), np.array(scores, np.float32), tuple(table["classes"]), stored_ids
        )

    def arrays(self, label: Instances, table: Table) -> dict[str, np.ndarray]:
        boxes = np.array([bounds(mask) for mask in label.masks], np.float32).reshape(-1, 4)
        categories = np.array(self.numbers(table), np.int64)[label.class_ids]
        return {"masks": label.masks, "boxes": boxes, "labels": categories, "scores": label.scores}

    def follow_colours(self, label: Instances, image: np.ndarray) -> Instances:
        """Each mask for itself, as masks may overlap."""
        masks = [_C.outlines_of_labels(mask.astype(np.uint8), image).astype(bool) for mask in label.masks]
        return replace(label, masks=np.stack(masks)) if masks else label

    def picture(self, label: Instances, image: np.ndarray) -> Image.Image:
        sure = label.scores >= SHOWN_SCORE
        return paint_masks(image, label.masks[sure], label.class_ids[sure])

    def check(self, record: Any, _: Pixels, table: Table, sides: tuple[int, int]) -> Iterator[str]:
        numbers = self.numbers(table)
        for k, item in enumerate(record):
            rle = item["segmentation"]
            if rle["size"] != list(sides):
                yield f"mask {k} is {rle['size']}, expected {list(sides)}"
                continue
            # a ValueError where the runs do not add up to the picture
            encoded = mask_rle.encode(mask_rle.decode(rle)[None])
            if encoded.rles[0]["counts"] != rle["counts"]:
                yield f"mask {k} is not written in the shortest way"
            if item["area"] != int(encoded.areas[0]) or item["bbox"] != [float(value) for value in encoded.boxes[0]]:
                yield (
                    f"mask {k} covers {int(encoded.areas[0])} pixels in {encoded.boxes[0].tolist()}, the ledger says "
                    f"{item['area']} in {item['bbox']}"
                )
            if not (item["category_id"] in numbers and 0 <= item["score"] <= 1):
                yield f"mask {k} has the category {item['category_id']} and the score {item['score']}"

    def certainty(self, record: Any) -> float | None:
        return mean_score(record)

    def mask_of(self, label: Instances, word: str) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of the class's instances that pictures show, all of them with the confidence 1."""
        sides = label.masks.shape[1:]
        chosen = (label.class_ids == label.classes.index(word)) & (label.scores >= SHOWN_SCORE)
        inside = label.masks[chosen].any(0) if chosen.any() else np.zeros(sides, bool)
        return inside, np.ones(sides, np.float32)

    def within(self, label: Instances, inside: np.ndarray, _: np.ndarray) -> Instances:
        """The instances cut to the mask, without those that it leaves no pixel."""
        masks = label.masks & inside
        left = masks.any((1, 2))
        return Instances(masks[left], label.class_ids[left], label.scores[left], label.classes)

    def words(self, record: Any, table: Table, least: float) -> list[str]:
        names = self.names(table)
        return [names[item["category_id"]] for item in record]

    def things(
        self, record: Any, table: Table, sides: tuple[int, int]
    ) -> Iterator[tuple[str, float, float, float, float]]:
        (height, width), names = sides, self.names(table)
        for item in record:
            x, y, wide, high = item["bbox"]
            middle = ((x + wide / 2) / width, (y + high / 2) / height)
            word = names[item["category_id"]]
            yield word, item["score"], item["area"] / (height * width), *middle

    def count(self, record: Any) -> Counter[int]:
        return Counter(item["category_id"] for item in record)

    def section(self, table: Table, counts: Mapping[Any, float]) -> Iterator[str]:
        yield f"## {self.title}\n\n| category | class | instances |\n|---:|---|---:|"
        for number, name in sorted(self.names(table).items()):
            yield f"| {number} | {markdown_cell(name)} | {counts.get(number, 0)} |"
        yield ""

    def distance(self, predicted: Instances, truth: Instances) -> float:
        """The share of the scores that the two do not have in common: a pair of one class has that of its masks' IoU.

        So a sure thing that only one of them has counts much, a doubtful one little.
        """
        common = sum(
            iou(predicted.masks[a], truth.masks[b]) * min(float(predicted.scores[a]), float(truth.scores[b]))
            for a, b in _matches(predicted, truth, least=0.0).items()
        )
        total = float(predicted.scores.sum() + truth.scores.sum())
        return (total - 2 * common) / max(total, 1.0)

    def overlap(self, predicted: Instances, truth: Instances) -> float:
        """Mean over the instances of `truth` of the IoU with the one of their class that is most like them."""
        best = [
            max([iou(mask, other) for other in predicted.masks[predicted.class_ids == kind]], default=0.0)
            for mask, kind in zip(truth.masks, truth.class_ids)
        ]
        return float(np.mean(best)) if best else 1.0

    def merge(self, old: Instances, new: Instances, region: np.ndarray) -> Instances:
        """Instances keep their pixels outside of the region, their order and their ids.

        One that was found again goes on inside. One that was not, and of which less than a tenth is left, is dropped.
        Any other instance of `new`, at least half of it inside, is added with the id 0.
        """
        same = _matches(old, new)
        masks, scores, left = old.masks & ~region, old.scores.copy(), []
        for k, whole in enumerate(old.masks):
            if (match := same.get(k)) is not None:
                inside = new.masks[match] & region
                scores[k] = new.scores[match] if inside.sum() > masks[k].sum() else scores[k]
                masks[k] |= inside
            if masks[k].any() and masks[k].sum() >= LEAST_LEFT * whole.sum():
                left.append(k)
        areas = new.masks.sum((1, 2))
        is_added = 2 * (new.masks & region).sum((1, 2)) >= np.maximum(areas, 1)
        added = [k for k in range(len(new.masks)) if is_added[k] and k not in same.values()]
        ids = None if old.ids is None else np.concatenate([old.ids[left], np.zeros(len(added), np.int64)])
        return Instances(
            np.concatenate([masks[left], new.masks[added] & region]),
            np.concatenate([old.class_ids[left], new.class_ids[added]]),
            np.concatenate([scores[left], new.scores[added]]),
            old.classes,
            ids,
        )

    def table(self, config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
        return {"classes": list(words if config.is_open else config.classes), "size": [size, size]}

    def categories(self, table: Table) -> list[dict[str, Any]]:
        names = sorted(self.names(table).items())
        return [{"id": number, "name": name, "supercategory": ""} for number, name in names]
