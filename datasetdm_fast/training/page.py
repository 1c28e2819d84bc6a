"""The page of a training: its figures and held-out pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from datasetdm_fast.data import Annotation
from datasetdm_fast.labels import label_files
from datasetdm_fast.labels.pictures import _masks, _painted, _skeletons, depth_picture
from datasetdm_fast.lessons.targets import target
from datasetdm_fast.readers import Labelled
from datasetdm_fast.training.loop import TrainingViews

SHOWN = 12  # images of the page


def page(
    task: str,
    lessons: TrainingViews,
    found: Sequence[Annotation],
    facts: Mapping[str, object],
    figures: Mapping[str, object],
) -> bytes:
    """One HTML file: image, truth and answer of some held-out images, and the figures; it needs nothing else."""
    rows = []
    for view in range(min(lessons.count, SHOWN)):
        item = lessons.views.item(view)
        cells = "".join(
            f'<img src="{_address(picture)}" alt="">'
            for picture in (item.image, truth_picture(task, lessons, item), answer_picture(item, found[view]))
        )
        rows.append(
            f"<figure>{cells}<figcaption>{html.escape(item.id)} &middot; "
            f"{html.escape(item.caption)}</figcaption></figure>"
        )
    table = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_plainly(value))}</td></tr>"
        for name, value in {**facts, **figures}.items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 "
        "1rem;background:#fff;color:#222}"
        "img{width:32%;image-rendering:pixelated;margin-right:1%}figure{margin:0 0 1.5rem}figcaption{color:#666}"
        "th{text-align:left;padding-right:2rem;font-weight:normal;color:#666;vertical-align:top}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{task} decoder</title><style>{style}</style>'
        f"<h1>{task} decoder</h1><table>{table}</table><p>Image, truth and answer, on images it was not taught "
        f"from.</p>{''.join(rows)}</html>\n"
    ).encode()


def _plainly(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _address(pixels: np.ndarray | Image.Image) -> str:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def truth_picture(task: str, lessons: TrainingViews, item: Labelled) -> Image.Image:
    if task == "semantic":
        return _painted(item.semantic)
    if task == "depth":
        return depth_picture((item.depth * label_files.MILLIMETRES).astype(np.int32))
    if task == "pose":
        people = [(person[:, :2], person[:, 2] > 0) for person in item.keypoints]
        return _skeletons(item.image, people, lessons.views.source.limbs)
    truth = target(lessons.views.source, item, task)
    masks, classes = truth.masks.numpy(), truth.classes.numpy()
    if task == "instance":
        return _masks(item.image, masks, classes)
    words = np.zeros(item.image.shape[:2], np.uint8)  # as the answer has them: 0 = none, 1 + k = word k
    for mask, k in zip(masks, classes):
        words[mask] = (k + 1) % 256
    return _painted(words)


def answer_picture(item: Labelled, found: Annotation) -> Image.Image:
    if hasattr(found, "labels"):
        return _painted(found.labels)
    if hasattr(found, "metres"):
        return depth_picture((found.metres * label_files.MILLIMETRES).astype(np.int32))
    if hasattr(found, "points"):
        return _skeletons(
            item.image, [(points[:, :2], seen > 0) for points, seen in zip(found.points, found.visibility)], found.limbs
        )
    sure = found.scores >= 0.4
    return _masks(item.image, found.masks[sure], found.class_ids[sure])
