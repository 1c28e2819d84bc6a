"""captions.tsv: the image file and the prompt of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasetdm_fast.run_folder.ledger import Ledger


def lines(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """The lines of captions.tsv by id."""
    for row in ledger.rows():
        yield f"{row.files['image'][0]}\t{' '.join(row.request.prompt.split())}\n".encode()
