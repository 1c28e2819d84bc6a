"""samples.jsonl: one line a sample, with its prompt, seed, files, digests and trust."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from datasetdm_fast.runs.run_folder.ledger import Ledger, Row, canonical


class IndexFile:
    """The bytes of one file, some rows at a time and by id; one reading of the ledger serves all files."""

    def __init__(self, document: Mapping[str, Any], ledger: Ledger):
        self.document, self.ledger = document, ledger

    def begin(self) -> Iterable[bytes]:
        """What stands before the first row."""
        return ()

    def add(self, rows: Sequence[Row]) -> Iterable[bytes]:
        """What stands there of these rows."""
        return ()

    def end(self) -> Iterable[bytes]:
        """What stands after the last row."""
        return ()


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
                **({"negative": request.negative} if request.negative else {}),
                **({"class_prompt": request.class_prompt} if request.class_prompt else {}),
                **({"picture": row.recipe["picture"]} if "picture" in row.recipe else {}),
                "files": files,
                "labels": labels,
            }
            if row.trust:  # without a distance where no decoder of the run has a domain
                trust = asdict(row.trust)
                line["trust"] = {name: value for name, value in trust.items() if name != "domain" or value is not None}
            line |= {name: row.recipe[name] for name in OF_SOURCE if name in row.recipe}
            yield (canonical(line) + "\n").encode()
