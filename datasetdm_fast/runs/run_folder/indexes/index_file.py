"""The form of every file that is made of the rows of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasetdm_fast.runs.run_folder.ledger import Ledger, Row


class IndexFile:
    """The bytes of one file, from run.json and the rows of the data set, some at a time and in the order of their ids.

    So that one reading of the ledger serves all files, `add` takes rows with all their parts.
    """

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
