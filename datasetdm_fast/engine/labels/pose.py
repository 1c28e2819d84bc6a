"""Joints of persons: COCO keypoints with a score each.

Files count places from the middle of the first pixel, as COCO does, and `Keypoints` from its outer edge.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import Instances, Keypoints
from datasetdm_fast.engine.labels import (
    SAME,
    SHOWN_SCORE,
    GalleryLayer,
    Gates,
    LabelKind,
    Pixels,
    Table,
    class_tables,
    mask_rle,
    mean_score,
    round_float,
)
from datasetdm_fast.engine.labels.pictures import draw_skeletons

PERSON = "person"  # the class of every figure
MIDDLE = "middle of the first pixel"
TO_EDGE = 0.5  # pixels from there to its outer edge
FROM_EDGE = (TO_EDGE, TO_EDGE, 0)  # added to a joint as files have it
ROUNDING = 0.0015  # of boxes, which the ledger rounds to three digits, and of a difference of two such numbers
WIDENED = 0.125  # of its longer side: by so much the box of a person's joints is moved out at every side,
LEAST_WIDENED = 2.0  # and by so many pixels at least, so that it is never empty
MOST_JOINTS = 0.5  # share of a person's joints that must lie on an instance for it to be that person's


def _box(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corner and sides of the box around the joints that are seen."""
    if not seen.any():
        return np.zeros(2), np.zeros(2)
    low = points[seen, :2].min(0)
    return low, points[seen, :2].max(0) - low


def _masks_of(label: Keypoints, labels: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """Place of a person -> the mask of the instance on which most of the seen joints lie, none taken twice."""
    words = persons()
    masks = [
        mask
        for instances in labels.values()
        if isinstance(instances, Instances)
        for mask, kind, score in zip(instances.masks, instances.class_ids, instances.scores, strict=True)
        if instances.classes[kind].lower() in words and score >= SHOWN_SCORE
    ]
    shares = []
    for person, (points, visibility) in enumerate(zip(label.points, label.visibility, strict=True)):
        for k, mask in enumerate(masks if (visibility > 0).any() else ()):
            share = _inside(points, visibility, mask).sum() / (visibility > 0).sum()
            shares += [(-share, person, k)] if share >= MOST_JOINTS else []
    taken: dict[int, int] = {}
    for _, person, k in sorted(shares):
        if person not in taken and k not in taken.values():
            taken[person] = k
    return {person: masks[k] for person, k in taken.items()}


@cache
def persons() -> frozenset[str]:
    """The class names that mean a person."""
    known = next(word for word in class_tables.builtin_table("coco").classes if word.name == PERSON)
    return frozenset((PERSON, *known.words))


def _matches(first: Keypoints, second: Keypoints) -> dict[int, int]:
    """Place of a person in the first label -> place of the same person in the second, by the boxes of their joints."""
    matches: dict[int, int] = {}
    for a, (points, seen) in enumerate(zip(first.points, first.visibility)):
        for b, (others, known) in enumerate(zip(second.points, second.visibility)):
            if b not in matches.values() and _box_iou(_box(points, seen > 0), _box(others, known > 0)) >= SAME:
                matches[a] = b
                break
    return matches


def _box_iou(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    low, high = np.maximum(first[0], second[0]), np.minimum(first[0] + first[1], second[0] + second[1])
    common = float(np.prod(np.maximum(high - low, 0)))
    union = float(np.prod(first[1]) + np.prod(second[1])) - common
    return common / union if union else 0.0


def _inside(points: np.ndarray, visibility: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Which joints [J] are seen on a pixel of a region."""
    columns, rows = (
        np.clip(np.floor(points[:, axis]).astype(int), 0, side - 1) for axis, side in enumerate(region.shape[::-1])
    )
    return np.asarray((visibility > 0) & region[rows, columns])


def people(record: Any, table: Table, traced: Any) -> list[list[float]]:
    """Places and visibility of each person's joints, in pixels of the picture."""
    places = [np.array(item["keypoints"], np.float64).reshape(-1, 3) for item in record if item["num_keypoints"]]
    return [[round(value, 1) for value in (joints + FROM_EDGE).flatten().tolist()] for joints in places]


class PoseKind(LabelKind):
    attribute, title = "keypoints", "People with joints"
    contents = (
        "`keypoints.json`: COCO keypoints with visibility and scores; `box_from` says whether box and area are "
        "those of the person's instance mask or of its joints, widened"
    )
    layers = (GalleryLayer("pose", "Pose", "skeletons", values=people),)
    gates = Gates(exact=(1e-2, 1e-1), free_exact=(5e-2, 0.5), rounded=(0.5, 2.0), free_rounded=(1.0, 8.0))
    table_form = {"joints": [str], "limbs": [[int]]}
    pixel_bytes = 0
    coco_file = "keypoints.json"
    only_class = PERSON

    def encode(
        self, label: Keypoints, labels: Mapping[str, Any], table: Table
    ) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        people = []
        from_middle, masks = label.points.astype(np.float64) - FROM_EDGE, _masks_of(label, labels)
        for k, (points, visibility, score) in enumerate(zip(from_middle, label.visibility, label.scores, strict=True)):
            if not visibility.any():  # the place of that person is unknown
                continue
            flat = [
                value
                for (x, y, _), v in zip(points, visibility, strict=True)
                for value in ((round_float(x, 6), round_float(y, 6), int(v)) if v else (0, 0, 0))
            ]
            people.append(
                {
                    "keypoints": flat,
                    "keypoint_scores": [round_float(value, 6) for value in points[:, 2]],
                    "num_keypoints": int((visibility > 0).sum()),
                    "score": round_float(score, 6),
                    **self._extent(points + FROM_EDGE, visibility > 0, table, masks.get(k)),
                }
            )
        return {}, people

    def _extent(
        self, points: np.ndarray, seen: np.ndarray, table: Table, mask: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Box and area of a person by the mask of the instance, or else its joints, counted from the first edge."""
        if mask is not None:
            encoded = mask_rle.encode(mask[None])
            box = encoded.boxes[0].tolist()
            area: float = int(encoded.areas[0])
        else:
            most = np.array(table["size"][::-1], np.float64)
            low, extent = _box(np.clip(points[:, :2], 0, most), seen)
            margin = max(table["widened"] * extent.max(), LEAST_WIDENED)
            corner = np.clip(low - margin, 0, most)
            box = [*corner.tolist(), *(np.clip(low + extent + margin, 0, most) - corner).tolist()]
            area = round_float(box[2] * box[3])
        return {
            "bbox": [round_float(value) for value in box],
            "area": area,
            "box_from": "joints" if mask is None else "instance",
        }

    def decode(self, _: Pixels, record: Any, table: Table) -> Keypoints:
        joints = tuple(table["joints"])
        flat = np.array([item["keypoints"] for item in record], np.float32).reshape(-1, len(joints), 3)
        sure = np.array([item["keypoint_scores"] for item in record], np.float32).reshape(-1, len(joints), 1)
        seen = flat[..., 2:] > 0
        points = np.concatenate([np.where(seen, flat[..., :2] + np.float32(TO_EDGE), 0), sure], -1)
        return Keypoints(
            points,
            flat[..., 2].astype(np.int64),
            np.array([item["score"] for item in record], np.float32),
            joints,
            tuple((int(a), int(b)) for a, b in table["limbs"]),
        )

    def arrays(self, label: Keypoints, _: Table) -> dict[str, np.ndarray]:
        seen = label.visibility[..., None]
        joints = np.concatenate([np.where(seen > 0, label.points[..., :2], 0), seen], -1).astype(np.float32)
        is_placed = label.visibility.any(1)  # the others are in no file
        return {"keypoints": joints[is_placed], "scores": label.scores[is_placed]}

    def picture(self, label: Keypoints, image: np.ndarray) -> Image.Image:
        people = [(points[:, :2], seen > 0) for points, seen in zip(label.points, label.visibility)]
        return draw_skeletons(image, people, label.limbs)

    def check(self, record: Any, _: Pixels, table: Table, sides: tuple[int, int]) -> Iterator[str]:
        for k, person in enumerate(record):
            points = np.array(person["keypoints"], np.float64).reshape(len(table["joints"]), 3)
            seen = points[:, 2] > 0
            if not (
                np.isin(points[:, 2], (0, 1, 2)).all()
                and len(person["keypoint_scores"]) == len(points)
                and 0 <= person["score"] <= 1
            ):
                yield f"person {k} has joints that are no joints"
            if person["num_keypoints"] != int(seen.sum()):
                yield f"person {k} has {int(seen.sum())} joints, the ledger says {person['num_keypoints']}"
            if person.get("box_from") == "instance":  # whose mask the record of a person does not hold
                x, y, width, height = person["bbox"]
                is_inside = min(x, y) >= 0 and x + width <= sides[1] + ROUNDING and y + height <= sides[0] + ROUNDING
                if not is_inside or not 0 < person["area"] <= width * height + ROUNDING * (width + height + 1):
                    yield f"person {k} cannot fill {person['area']} pixels in {person['bbox']}"
                continue
            extent = self._extent(points + FROM_EDGE, seen, {**table, "size": sides})
            box, area = np.array(extent["bbox"]), extent["area"]
            is_near = np.abs(box - person["bbox"]).max() <= ROUNDING and abs(area - person["area"]) <= ROUNDING * (
                box[2] + box[3] + 1
            )
            if not is_near or person.get("box_from") != extent.get("box_from"):
                yield f"person {k} fills {box.tolist()}, the ledger says {person['bbox']} and {person['area']} pixels"

    def certainty(self, record: Any) -> float | None:
        return mean_score(record)

    def figures(self, record: Any) -> dict[str, float]:
        return self.count(record)

    def count(self, record: Any) -> dict[str, float]:
        return {"people": sum(item["num_keypoints"] > 0 for item in record)}

    def section(self, table: Table, counts: Mapping[Any, float]) -> list[str]:
        return [f"## {self.title}\n", f"{counts.get('people', 0)} in all samples.\n"]

    def distance(self, predicted: Keypoints, truth: Keypoints) -> float:
        """Mean distance in pixels of the joints that either sees, infinite where one found a person and the other none:
        the place of a joint that neither sees is written nowhere, and leaps about.
        """
        if predicted.points.shape != truth.points.shape:
            return float("inf")
        apart = np.linalg.norm(predicted.points[..., :2] - truth.points[..., :2], axis=-1)
        apart = apart[(predicted.visibility > 0) | (truth.visibility > 0)]
        return float(apart.mean()) if apart.size else 0.0

    def merge(self, old: Keypoints, new: Keypoints, region: np.ndarray) -> Keypoints:
        """Persons keep joints outside of the region and take new ones inside; who is found there alone is added."""
        people, same = list[tuple[np.ndarray, np.ndarray, float]](), _matches(old, new)
        for k in range(len(old.points)):
            points, seen, match = old.points[k].copy(), old.visibility[k].copy(), same.get(k)
            seen[_inside(points, seen, region)] = 0
            if match is not None:
                is_new = _inside(new.points[match], new.visibility[match], region) & (seen == 0)
                points[is_new], seen[is_new] = new.points[match][is_new], new.visibility[match][is_new]
            people.append((points, seen, old.scores[k]))
        for k in sorted(set(range(len(new.points))) - set(same.values())):
            inside = _inside(new.points[k], new.visibility[k], region)
            if 2 * inside.sum() >= (new.visibility[k] > 0).sum():
                people.append((new.points[k], np.where(inside, new.visibility[k], 0), new.scores[k]))
        left = [person for person in people if (person[1] > 0).any()]  # of whom a joint is left
        shape = (len(left), len(old.joints))
        return replace(
            old,
            points=np.array([points for points, _, _ in left], np.float32).reshape(*shape, 3),
            visibility=np.array([seen for _, seen, _ in left], np.int64).reshape(shape),
            scores=np.array([score for _, _, score in left], np.float32),
        )

    def table(self, config: Any, size: int, _: Sequence[str]) -> dict[str, Any]:
        limbs = [list(limb) for limb in config.limbs]
        sides = {"size": [size, size], "widened": WIDENED}
        return {"joints": list(config.joints), "limbs": limbs, "origin": MIDDLE, **sides}

    def with_numbers(self, table: Table, order: Mapping[str, int]) -> dict[str, Any]:
        return {**table, "category": order[PERSON]}

    def categories(self, table: Table) -> list[dict[str, Any]]:
        skeleton = [[a + 1, b + 1] for a, b in table["limbs"]]  # COCO counts joints from 1
        return [
            {
                "id": table["category"],
                "name": PERSON,
                "supercategory": "",
                "keypoints": table["joints"],
                "skeleton": skeleton,
            }
        ]
