"""captions.tsv: the image file and the prompt of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from datasetdm_fast.runs.run_folder.ledger import IndexFile, Row


class Captions(IndexFile):
    """The lines of captions.tsv by id."""

    def add(self, rows: Sequence[Row]) -> Iterator[bytes]:
        for row in rows:
            yield f"{row.files['image'].path}\t{' '.join(row.request.prompt.split())}\n".encode()
