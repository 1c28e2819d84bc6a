"""A sample's image and labels as files and records, and back; the bytes depend on the sample alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import Annotation, DepthMap, Instances, Keypoints, Sample, SemanticMap
from datasetdm_fast.labels import mask_rle
from datasetdm_fast.labels.colours import palette

IGNORE = 255
MILLIMETRES = 1000.0
JPEG = {"quality": 95, "subsampling": 0, "optimize": False}

Files = dict[str, tuple[str, bytes]]  # role -> path inside the run folder, content
Labels = Mapping[str, Annotation]  # by task


def encode(sample: Sample, image_format: str) -> tuple[Files, dict[str, Any]]:
    """The files of a sample and its records by task."""
    id = sample.request.id
    files: Files = {"image": (f"images/{id}.{image_format}", image_bytes(sample.image, image_format))}
    records = {}
    for task, annotation in sorted(sample.annotations.items()):
        more, records[task] = ENCODERS[task](id, annotation, sample.annotations)
        files |= more
    return files, records


def image_bytes(image: np.ndarray, image_format: str) -> bytes:
    """A PNG or JPEG of an image [H, W, 3] uint8, without metadata."""
    if image_format == "png":
        return _C.png_encode(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **JPEG)
    return buffer.getvalue()


def colour_numbers(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """The class number whose colour each asked word takes: its own in the semantic maps of the same run."""
    free = count(len(known))
    return [0] + [known.index(word) if word in known else next(free) for word in asked[1:]]


def index_png(labels: np.ndarray, numbers: Sequence[int] = ()) -> bytes:
    """A palette PNG of labels [H, W] uint8; label k has the colour of class numbers[k], of k itself beyond them."""
    return _C.png_encode(np.ascontiguousarray(labels, np.uint8), _palette(tuple(numbers)))


_palette = cache(palette)


def count_pixels(labels: np.ndarray) -> dict[str, int]:
    """Pixels of each number of a label map."""
    return {
        str(value): count
        for value, count in enumerate(_C.count_bytes(np.ascontiguousarray(labels, np.uint8)).tolist())
        if count
    }


def _encode_semantic(id: str, label: SemanticMap, _: Labels) -> tuple[Files, dict[str, Any]]:
    confidence = (np.minimum(np.fmax(label.confidence, 0), 1) * 255 + 0.5).astype(np.uint8)  # fmax takes a NaN for 0
    files = {
        "semantic": (f"semantic/{id}.png", index_png(label.labels)),
        "confidence": (f"confidence/{id}.png", _C.png_encode(confidence)),
    }
    return files, {"pixels": count_pixels(label.labels), "mean_confidence": round(float(confidence.mean()) / 255, 4)}


def _encode_open_vocabulary(id: str, label: SemanticMap, labels: Labels) -> tuple[Files, dict[str, Any]]:
    numbers = colour_numbers(labels["semantic"].classes, label.classes) if "semantic" in labels else ()
    return {"open_vocabulary": (f"open_vocabulary/{id}.png", index_png(label.labels, numbers))}, {
        "pixels": count_pixels(label.labels)
    }


def _encode_instances(id: str, label: Instances, _: Labels) -> tuple[Files, list[dict[str, Any]]]:
    if not len(label.masks):
        return {}, []
    encoded = mask_rle.encode(np.asarray(label.masks, bool))
    return {}, [
        {
            "category_id": int(kind) + 1,
            "score": _rounded(score, 6),
            "area": int(area),
            "bbox": [_rounded(side) for side in box],
            "segmentation": dict(rle),
        }
        for kind, score, area, box, rle in zip(
            label.class_ids, label.scores, encoded.areas, encoded.boxes, encoded.rles, strict=True
        )
    ]


def _encode_depth(id: str, label: DepthMap, _: Labels) -> tuple[Files, dict[str, Any]]:
    millimetres = np.multiply(label.metres, MILLIMETRES, dtype=np.float64)
    millimetres = np.clip(np.rint(millimetres, out=millimetres), 0, 65535, out=millimetres).astype(np.uint16)
    return {"depth": (f"depth/{id}.png", _C.png_encode_words(millimetres))}, depth_figures(millimetres)


def depth_figures(millimetres: np.ndarray) -> dict[str, float]:
    """Nearest, mean and farthest depth of a map, in metres."""
    return {
        name: _rounded(value / MILLIMETRES)
        for name, value in (("min", millimetres.min()), ("mean", millimetres.mean()), ("max", millimetres.max()))
    }


def _encode_keypoints(id: str, label: Keypoints, _: Labels) -> tuple[Files, list[dict[str, Any]]]:
    people = []
    for points, visibility, score in zip(label.points, label.visibility, label.scores, strict=True):
        seen = visibility > 0
        flat = [
            value
            for (x, y, _), v in zip(points, visibility, strict=True)
            for value in ((_rounded(x), _rounded(y), int(v)) if v else (0, 0, 0))
        ]
        low, high = (points[seen, :2].min(0), points[seen, :2].max(0)) if seen.any() else (np.zeros(2), np.zeros(2))
        width, height = high - low
        people.append(
            {
                "keypoints": flat,
                "keypoint_scores": [_rounded(value, 6) for value in points[:, 2]],
                "num_keypoints": int(seen.sum()),
                "score": _rounded(score, 6),
                "bbox": [_rounded(value) for value in (*low, width, height)],
                "area": _rounded(width * height),
            }
        )
    return {}, people


# task -> files and record of one label, given the id and all labels of the sample
ENCODERS: dict[str, Callable[[str, Any, Labels], tuple[Files, Any]]] = {
    "semantic": _encode_semantic,
    "instance": _encode_instances,
    "depth": _encode_depth,
    "pose": _encode_keypoints,
    "open-vocabulary": _encode_open_vocabulary,
}


def _rounded(value: float, digits: int = 3) -> float:
    """A short decimal that survives JSON unchanged, and never -0.0."""
    return round(float(value), digits) + 0.0


def read_image(file: Path | BinaryIO) -> np.ndarray:
    """The pixels of an image file of a run folder, in the type it was written with."""
    with Image.open(file, formats=("PNG", "JPEG")) as image:
        return np.array(image)


def decode(task: str, folder: Path, files: Mapping[str, str], record: Any, table: Mapping[str, Any]) -> Annotation:
    """The label of one task; `files` maps roles to paths inside `folder`, `table` names classes, joints and ranges."""
    if task == "semantic":
        confidence = read_image(folder / files["confidence"]).astype(np.float32) / 255
        return SemanticMap(read_image(folder / files["semantic"]), confidence, tuple(table["classes"]))
    if task == "open-vocabulary":
        labels = read_image(folder / files["open_vocabulary"])
        return SemanticMap(labels, np.ones(labels.shape, np.float32), tuple(table["classes"]))
    if task == "depth":
        return DepthMap(
            (read_image(folder / files["depth"]) / MILLIMETRES).astype(np.float32), float(table["max_depth"])
        )
    if task == "instance":
        masks = (
            np.stack([mask_rle.decode(item["segmentation"]) for item in record])
            if record
            else np.zeros((0, *table["size"]), bool)
        )
        ids, scores = [item["category_id"] - 1 for item in record], [item["score"] for item in record]
        return Instances(masks, np.array(ids, np.int64), np.array(scores, np.float32), tuple(table["classes"]))
    return _decode_keypoints(record, table)


def _decode_keypoints(record: Any, table: Mapping[str, Any]) -> Keypoints:
    joints = tuple(table["joints"])
    flat = np.array([item["keypoints"] for item in record], np.float32).reshape(-1, len(joints), 3)
    sure = np.array([item["keypoint_scores"] for item in record], np.float32).reshape(-1, len(joints), 1)
    points = np.concatenate([flat[..., :2], sure], -1)
    return Keypoints(
        points,
        flat[..., 2].astype(np.int64),
        np.array([item["score"] for item in record], np.float32),
        joints,
        _limbs(table),
    )


def _limbs(table: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in table["limbs"])
