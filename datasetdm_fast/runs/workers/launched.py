"""Processes that torchrun or Slurm has started: ranks of one run in a folder they share, all alike."""

import time
from contextlib import ExitStack
from pathlib import Path

from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.writing import Result, close_folder, read_result
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK
from datasetdm_fast.runs.run_folder.folder import ENTRY_SECONDS, clean, share_folder
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import LaunchedProcess
from datasetdm_fast.runs.workers.worker import Callbacks, work_on_folder


def run_launched(peer: LaunchedProcess, spec: RunSpec, callbacks: Callbacks) -> Result:
    """This process's share of the run; returns once the whole run is committed, by this process and the others."""
    begin = time.perf_counter()
    journal = sqlite.IN_PLACE if peer.is_on_several_machines else sqlite.WRITE_AHEAD
    storage.make_folder(spec.folder / "state")
    with share_folder(spec.folder):
        made = work_on_folder(spec, callbacks, journal=journal)
    is_waiting = peer.rank == 0 and not callbacks.is_stopping()
    return leave(spec.folder, spec.number, made, begin, is_waiting=is_waiting)


def leave(folder: Path, number: int, made: int, begin: float, *, is_waiting: bool) -> Result:
    """The result; the last process to leave rebuilds the index files, and one that `is_waiting` is the last."""
    with ExitStack() as held:
        try:
            patience = ENTRY_SECONDS if is_waiting else storage.SECONDS_OF_A_LOOK
            held.enter_context(storage.hold_lock(folder / LOCK, patience=patience))
        except Refused:  # others work there; a refusal of the closing is raised
            return read_result(folder, number, made, begin)
        clean(folder)
        result = close_folder(folder, number, made, begin)
        sqlite.remove_log(folder / LEDGER)  # others may have read their results meanwhile
        return result
