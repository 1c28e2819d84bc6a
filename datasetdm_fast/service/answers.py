"""Samples as the answers of the service hold them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from datasetdm_fast.data import Sample
from datasetdm_fast.engine.labels import kind_of, label_files
from datasetdm_fast.engine.labels.pictures import encode_picture


def encode_sample(sample: Sample, tables: Mapping[str, Any], has_previews: bool) -> dict[str, Any]:
    """The image as OpenAI's clients read it, and each label with the bytes and records of a run folder."""
    files, records = label_files.encode(sample, "png", tables)
    request = sample.request
    labels: dict[str, Any] = {}
    answer = {"b64_json": _base64(files["image"][1]), "seed": request.seed, "prompt": request.prompt, "labels": labels}
    if sample.trust is not None:
        answer["doubts"] = list(sample.trust.reasons)
    for task, record in records.items():
        kind, table = kind_of(task), tables[task]
        label: dict[str, Any] = {"files": {role: _base64(files[role][1]) for role in kind.files(table)}}
        labels[task] = label
        if kind.coco_file:
            label["coco"] = _coco(sample, record, kind.categories(table))
        else:
            label |= {"classes": {str(number): name for number, name in kind.names(table).items()}, "record": record}
        if has_previews:
            picture = kind.picture(sample.annotations[task], sample.image)
            label["preview"] = _base64(encode_picture(picture, "PNG"))
    return answer


def _coco(sample: Sample, record: list[dict[str, Any]], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """A file in COCO's form of this image alone."""
    height, width, _ = sample.image.shape
    annotations = [{"id": number, "image_id": 1, "iscrowd": 0, **each} for number, each in enumerate(record, 1)]
    image = {"id": 1, "width": width, "height": height, "file_name": f"{sample.request.id}.png"}
    return {"images": [image], "annotations": annotations, "categories": categories}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
