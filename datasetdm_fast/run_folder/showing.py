"""The page and the index files of a run at any time: finished, stopped or in progress."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.run_folder import gallery
from datasetdm_fast.run_folder.document import LEDGER, LOCK, described
from datasetdm_fast.run_folder.folder import RunFolder, refusing_rows
from datasetdm_fast.run_folder.indexes import writers
from datasetdm_fast.run_folder.ledger import DOUBTFUL, Ledger
from datasetdm_fast.run_folder.seal import ELSEWHERE, has_indexes, is_sealed

MOST_SHARE = 0.01  # of a run's time that is spent on pages of what it has so far


def show(folder: Path) -> tuple[Path, int, int]:
    """The page of a run folder, written anew where it does not show every committed sample; how many there are, and how
    many the run is to have. A run in progress is not disturbed: its page and index files are written, nothing else.
    """
    document = described(folder)
    if (folder / ELSEWHERE).exists():
        raise Refused(f"{folder}: its samples are in an object store", "Copy them here, then look at the copy.")
    if not (folder / LEDGER).exists():
        raise Refused(f"{folder}: no sample is committed yet", "Wait for the first, then run the same line again.")
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        is_shown = is_sealed(folder) and has_indexes(folder, document, ledger)
    if not is_shown and is_held(folder):
        write_so_far(folder)
    elif not is_shown:
        with RunFolder(folder, document) as opened:
            opened.rebuild()
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        there = ledger.count() + ledger.count(DOUBTFUL)
    return folder / gallery.PAGE, there, document["plan"]["number"]


def write_so_far(folder: Path) -> None:
    """Writes page and index files of the samples that a run in progress has committed; not where it has just ended."""
    document = described(folder)
    with gallery.held(folder), refusing_rows(folder):
        if is_sealed(folder):
            return
        with Ledger(folder / LEDGER, read_only=True) as ledger, ledger.snapshot():
            files = {folder / name: chunks(document, ledger) for name, chunks in writers(document).items()}
            storage.publish(files)
            gallery.write(folder, document, ledger, has_samples=not (folder / ELSEWHERE).exists())


class ShownSoFar(AbstractContextManager):
    """Within the block page and index files of a run in progress are written anew every so many minutes, in a thread;
    where they take long, less often, so that they cost no more than MOST_SHARE of the time.
    """

    def __init__(self, folder: Path, minutes: float, on_message: Callable[[str], None]):
        """`on_message` hears why they could not be written; 0 minutes write nothing."""
        self._folder, self._seconds, self._on_message = folder, 60 * minutes, on_message
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write, name="page", daemon=True)

    def __enter__(self) -> "ShownSoFar":
        if self._seconds:
            self._thread.start()
        return self

    def _write(self) -> None:
        seconds = self._seconds
        while not self._is_over.wait(seconds):
            begin = time.monotonic()
            try:
                if (self._folder / LEDGER).exists():
                    write_so_far(self._folder)
            except (Refused, Missing) as stop:  # the run itself goes on, and its end tells what then still stands
                self._on_message(f"the page of the samples so far was not written: {stop.cause}")
            seconds = max(self._seconds, (time.monotonic() - begin) / MOST_SHARE)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._seconds:
            self._thread.join()


def is_held(folder: Path) -> bool:
    """Whether a process makes samples of the run."""
    try:
        with locks.locked(folder / LOCK):
            return False
    except Refused:
        return True
