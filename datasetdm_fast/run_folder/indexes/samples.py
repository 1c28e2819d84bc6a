"""samples.jsonl: one line a sample, with its prompt, seed, files, digests and trust."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from datasetdm_fast.run_folder.ledger import Ledger, canonical


def lines(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """The lines of samples.jsonl by id; records that the COCO files hold are given as counts."""
    for row in ledger.rows(parts=("files", "labels", "trust")):
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
            "files": files,
            "labels": labels,
            **({"trust": asdict(row.trust)} if row.trust else {}),
        }
        yield (canonical(line) + "\n").encode()
