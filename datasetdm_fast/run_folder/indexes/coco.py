"""Records of one task in COCO's form as pycocotools reads it, written line by line to save memory."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasetdm_fast.labels import by_kind, kind_of
from datasetdm_fast.run_folder.document import sides
from datasetdm_fast.run_folder.ledger import Ledger, Row, canonical


def document(task: str, run: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """Images, categories and annotations; a kind of one category leaves its number to us."""
    info = {"description": "made by datasetdm_fast", "version": run["versions"]["datasetdm_fast"]}
    categories = kind_of(task).categories(run["labels"][task])
    yield f'{{"info":{canonical(info)},\n"licenses":[],\n"categories":{canonical(categories)},\n"images":['.encode()
    yield from _listed(_image(run, row) for row in ledger.rows(parts=("files",)))
    yield b'],\n"annotations":['
    yield from _listed(_annotations(task, run, ledger, categories[0]["id"] if categories else 0))
    yield b"]}\n"


def _image(run: Mapping[str, Any], row: Row) -> dict[str, Any]:
    height, width = sides(run, row.recipe)
    return {"id": row.request.index, "file_name": row.files["image"][0], "width": width, "height": height}


def _annotations(task: str, run: Mapping[str, Any], ledger: Ledger, category: int) -> Iterator[dict[str, Any]]:
    for row, ids in numbered(task, run, ledger):
        for id, record in zip(ids, row.labels[task], strict=True):
            yield {"id": id, "image_id": row.request.index, "iscrowd": 0, "category_id": category, **record}


def numbered(task: str, run: Mapping[str, Any], ledger: Ledger) -> Iterator[tuple[Row, list[int]]]:
    """Every row of a run with the ids of its annotations: those of its records, else numbers in order, which go on
    after those of the run's other files in COCO's form, so that these can be merged.
    """
    number = 0  # pycocotools takes annotation 0 for "no match", so ids start at 1
    for label in by_kind(run["labels"]) if "classes" in run else ():
        if label == task:
            break
        if kind_of(label).coco_file:
            number += ledger.last_record(label)
    for row in ledger.rows(parts=("labels",)):
        records = row.labels[task]
        yield row, [record.get("id", number + k) for k, record in enumerate(records, 1)]
        number += len(records)


def _listed(items: Iterator[dict]) -> Iterator[bytes]:
    for k, item in enumerate(items):
        yield (("" if k == 0 else ",") + "\n" + canonical(item)).encode()
