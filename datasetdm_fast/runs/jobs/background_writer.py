"""Files and rows of a run, written in threads beside the sampler, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.runs.run_folder.ledger import Row

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.folder import RunFolder

WRITERS = 2  # threads that encode and write, a batch each


class BackgroundWriter(AbstractContextManager):
    """Encodes and writes batches in threads and commits their rows in order; `on_commit` is called after every commit.

    Leaving the block waits for all of it; after an error nothing more is begun.
    """

    def __init__(self, folder: RunFolder, on_commit: Callable[[list[Row]], None]):
        folder.unseal()
        self._folder, self._on_commit = folder, on_commit
        self._writers, self._committer = ThreadPoolExecutor(WRITERS, "writer"), ThreadPoolExecutor(1, "committer")
        self._waiting: deque[Future] = deque()
        self._is_whole = True

    def put(self, results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any]) -> None:
        """Hands over one batch, waiting where too many are under way already."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > WRITERS + 1):
            self._waiting.popleft().result()
        written = self._writers.submit(self._folder.write, results, recipe)
        self._waiting.append(self._committer.submit(self._commit, written))

    def _commit(self, written: Future[list[Row]]) -> None:
        is_whole, self._is_whole = self._is_whole, False
        rows = written.result()
        if is_whole:  # after a batch that could not be written nothing more is added
            self._folder.commit(rows)
            self._on_commit(rows)
            self._is_whole = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            for pool in (self._writers, self._committer):
                pool.shutdown(cancel_futures=True)
