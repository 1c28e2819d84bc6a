"""Records of one task in COCO's form as pycocotools reads it, written some rows at a time to save memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.runs.run_folder.document import sides
from datasetdm_fast.runs.run_folder.ledger import BLOCK, IndexFile, Ledger, Row, canonical


class AnnotationList(IndexFile):
    """Images, categories and annotations; a kind of one category leaves its number to us."""

    def __init__(self, label: str, document: Mapping[str, Any], ledger: Ledger):
        super().__init__(document, ledger)
        self._label = label
        self._categories = kind_of(label).categories(document["labels"][label])
        self._category = self._categories[0]["id"] if self._categories else 0
        self._number = first_number(label, document, ledger)
        self._is_empty = True

    def begin(self) -> Iterator[bytes]:
        info = {"description": "made by datasetdm_fast", "version": self.document["versions"]["datasetdm_fast"]}
        categories = canonical(self._categories)
        yield f'{{"info":{canonical(info)},\n"licenses":[],\n"categories":{categories},\n"images":['.encode()
        images = _encode_list(_image(self.document, row) for row in self.ledger.rows(parts=("files",)))
        yield from map(b"".join, in_blocks(images, BLOCK))
        yield b'],\n"annotations":['

    def add(self, rows: Sequence[Row]) -> Iterator[bytes]:
        chunk = b"".join(_encode_list(self._annotations(rows), self._is_empty))
        self._is_empty = self._is_empty and not chunk
        yield chunk

    def end(self) -> tuple[bytes]:
        return (b"]}\n",)

    def _annotations(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for row in rows:
            records = row.labels[self._label]
            for id, record in zip(ids_of(records, self._number), records, strict=True):
                fields = {"id": id, "image_id": row.request.index, "iscrowd": 0, "category_id": self._category}
                yield {**fields, **record}
            self._number += len(records)


def first_number(label: str, run: Mapping[str, Any], ledger: Ledger) -> int:
    """The annotations that stand in the run's other files in COCO's form: these go on after them, to be merged."""
    number = 0  # pycocotools takes annotation 0 for "no match", so ids start at 1
    for other in by_kind(run["labels"]):
        if other == label:
            break
        if kind_of(other).coco_file:
            number += ledger.last_record(other)
    return number


def ids_of(records: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """The ids of annotations: those of their records, else numbers that go on after `number`."""
    return [record.get("id", number + k) for k, record in enumerate(records, 1)]


def rows_with_ids(label: str, run: Mapping[str, Any], ledger: Ledger) -> Iterator[tuple[Row, list[int]]]:
    """Every row of a run with the ids of its annotations."""
    number = first_number(label, run, ledger)
    for row in ledger.rows(parts=("labels",)):
        yield row, ids_of(row.labels[label], number)
        number += len(row.labels[label])


def _image(run: Mapping[str, Any], row: Row) -> dict[str, Any]:
    height, width = sides(run, row.recipe)
    return {"id": row.request.index, "file_name": row.files["image"].path, "width": width, "height": height}


def _encode_list(items: Iterable[dict[str, Any]], is_first: bool = True) -> Iterator[bytes]:
    for item in items:
        yield (("" if is_first else ",") + "\n" + canonical(item)).encode()
        is_first = False
