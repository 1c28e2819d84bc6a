"""The page of a run at any time: finished, stopped or in progress."""

from pathlib import Path

from datasetdm_fast.disk import locks
from datasetdm_fast.errors import Refused
from datasetdm_fast.run_folder import gallery
from datasetdm_fast.run_folder.document import LEDGER, LOCK, described
from datasetdm_fast.run_folder.folder import RunFolder, refusing_rows
from datasetdm_fast.run_folder.ledger import DOUBTFUL, Ledger
from datasetdm_fast.run_folder.seal import ELSEWHERE, has_indexes, is_sealed


def show(folder: Path) -> tuple[Path, int, int]:
    """The page of a run folder, written anew where it does not show every committed sample; how many there are, and how
    many the run is to have. A run in progress is not disturbed: of it only the page is written.
    """
    document = described(folder)
    if (folder / ELSEWHERE).exists():
        raise Refused(f"{folder}: its samples are in an object store", "Copy them here, then look at the copy.")
    if not (folder / LEDGER).exists():
        raise Refused(f"{folder}: no sample is committed yet", "Wait for the first, then run the same line again.")
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        is_shown = is_sealed(folder) and has_indexes(folder, document, ledger)
    if not is_shown and is_held(folder):
        with gallery.held(folder), refusing_rows(folder):
            if not is_sealed(folder):
                with Ledger(folder / LEDGER, read_only=True) as ledger:
                    gallery.write(folder, document, ledger)
    elif not is_shown:
        with RunFolder(folder, document) as opened:
            opened.rebuild()
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        there = ledger.count() + ledger.count(DOUBTFUL)
    return folder / gallery.PAGE, there, document["plan"]["number"]


def is_held(folder: Path) -> bool:
    """Whether a process makes samples of the run."""
    try:
        with locks.locked(folder / LOCK):
            return False
    except Refused:
        return True
