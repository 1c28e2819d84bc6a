"""Data sets out, one writer a file; the index files of a run folder, each rebuilt from the ledger alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.runs.run_folder.indexes import card, coco, samples
from datasetdm_fast.runs.run_folder.indexes.samples import IndexFile
from datasetdm_fast.runs.run_folder.ledger import Ledger

IndexWriter = Callable[[Mapping[str, Any], Ledger], IndexFile]
INDEXES: dict[str, IndexWriter] = {  # of every run
    "samples.jsonl": samples.Lines,
    "README.md": card.Card,
}


def writers(document: Mapping[str, Any]) -> dict[str, IndexWriter]:
    """The index files of a run by name, those in COCO's form after the others."""
    kinds = {label: kind_of(label) for label in by_kind(document["config"]["task"])}
    listed = {kind.coco_file: label for label, kind in kinds.items() if kind.coco_file}
    if not listed:
        return INDEXES
    images = coco.Images()
    return INDEXES | {name: partial(coco.AnnotationList, label, images) for name, label in listed.items()}
