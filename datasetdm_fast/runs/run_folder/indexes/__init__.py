"""Data sets out, one writer a file; the index files of a run folder, each rebuilt from the ledger alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.runs.run_folder.indexes import card, coco
from datasetdm_fast.runs.run_folder.ledger import IndexFile, Ledger, Row, canonical

# of a row of a run made from another: the id of its source there, what all images of one source have in common (no
# split of a data set may separate them), the domain it was moved to, how much of the geometry is left, and the run and
# the id of a merged sample
OF_SOURCE = ("source", "group", "domain", "consistency", "merged")


class Lines(IndexFile):
    """The lines of samples.jsonl by id; records that the COCO files hold are given as counts."""

    def add(self, rows: Sequence[Row]) -> Iterator[bytes]:
        for row in rows:
            files = {
                role: {"path": path, "sha256": stored.sha256, "bytes": stored.size}
                for role, (path, stored) in row.files.items()
            }
            labels = {task: len(record) if isinstance(record, list) else record for task, record in row.labels.items()}
            request = row.request
            line = {
                "id": request.id,
                "prompt": request.prompt,
                "seed": request.seed,
                "classes": request.classes,
                "files": files,
                "labels": labels,
            }
            if row.trust:  # without a distance where no decoder of the run has a domain
                trust = asdict(row.trust)
                line["trust"] = {name: value for name, value in trust.items() if name != "domain" or value is not None}
            texts = {"negative": request.negative, "class_prompt": request.class_prompt}
            line |= {name: text for name, text in texts.items() if text}
            line |= {name: row.recipe[name] for name in ("picture", *OF_SOURCE) if name in row.recipe}
            yield (canonical(line) + "\n").encode()


IndexWriter = Callable[[Mapping[str, Any], Ledger], IndexFile]
INDEXES: dict[str, IndexWriter] = {  # of every run
    "samples.jsonl": Lines,
    "README.md": card.Card,
}


def writers(document: Mapping[str, Any]) -> dict[str, IndexWriter]:
    """The index files of a run by name, those in COCO's form after the others."""
    names = {label: kind_of(label).coco_file for label in by_kind(document["config"]["task"])}
    return INDEXES | {name: partial(coco.AnnotationList, label) for label, name in names.items() if name}
