"""instances.json and keypoints.json as pycocotools reads them, written line by line to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasetdm_fast.run_folder.ledger import Ledger, Row, canonical


def instances(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """COCO instances with compressed RLE masks, scores, and categories from 1."""
    categories = [
        {"id": k, "name": name, "supercategory": ""}
        for k, name in enumerate(document["labels"]["instance"]["classes"], 1)
    ]
    return _document(document, ledger, categories, lambda row: row.labels["instance"])


def keypoints(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """COCO keypoints of one category, person; joints count from 1 in its skeleton."""
    table = document["labels"]["pose"]
    skeleton = [[a + 1, b + 1] for a, b in table["limbs"]]
    person = {"id": 1, "name": "person", "supercategory": "", "keypoints": table["joints"], "skeleton": skeleton}
    return _document(
        document, ledger, [person], lambda row: [{"category_id": 1, **record} for record in row.labels["pose"]]
    )


def _document(
    document: Mapping[str, Any], ledger: Ledger, categories: list[dict], records: Callable[[Row], list[dict]]
) -> Iterator[bytes]:
    info = {"description": "made by datasetdm_fast", "version": document["versions"]["datasetdm_fast"]}
    yield f'{{"info":{canonical(info)},\n"licenses":[],\n"categories":{canonical(categories)},\n"images":['.encode()
    yield from _listed(_image(document, row) for row in ledger.rows())
    yield b'],\n"annotations":['
    yield from _listed(_annotations(ledger, records))
    yield b"]}\n"


def _image(document: Mapping[str, Any], row: Row) -> dict[str, Any]:
    size = document["sampling"]["size"]
    return {"id": row.request.index, "file_name": row.files["image"][0], "width": size, "height": size}


def _annotations(ledger: Ledger, records: Callable[[Row], list[dict]]) -> Iterator[dict[str, Any]]:
    number = 0  # pycocotools takes annotation 0 for "no match", so ids start at 1
    for row in ledger.rows():
        for record in records(row):
            number += 1
            yield {"id": number, "image_id": row.request.index, "iscrowd": 0, **record}


def _listed(items: Iterator[dict]) -> Iterator[bytes]:
    for k, item in enumerate(items):
        yield (("" if k == 0 else ",") + "\n" + canonical(item)).encode()
