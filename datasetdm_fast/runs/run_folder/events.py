"""state/events.jsonl: what happened to a run folder and when, one JSON object a line; it decides nothing."""

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.runs.run_folder.ledger import QUARANTINED, Ledger, Row, canonical
from datasetdm_fast.version import __version__

EVENTS = "state/events.jsonl"
FORMAT = 1  # of its lines; every start names it
SECONDS_BETWEEN = 10.0  # lines of progress of one process


class EventLog:
    """The events of one process; it writes nothing before `begin`.

    Every line is appended in one piece and names its process, as several may work on a run.
    """

    def __init__(self, folder: Path):
        self._path, self._is_begun, self._last, self._made = folder / EVENTS, False, time.monotonic(), 0

    def begin(self, document: Mapping[str, Any], ledger: Ledger) -> None:
        """How the process was started and what is to be made, before the first change of the folder."""
        if self._is_begun:
            return
        self._is_begun = True
        versions = {"datasetdm_fast": __version__, "python": platform.python_version()}
        self._add("start", format=FORMAT, program=sys.argv[0], arguments=sys.argv[1:], versions=versions)
        self._add("plan", number=document["plan"]["number"], done=ledger.count(), engine=document["engine"])

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Samples that this process has just committed."""
        self._made += len(rows)
        for row in rows:
            if row.status == QUARANTINED:
                self._add("warning", sample=row.request.id, reason=row.reason)
        if time.monotonic() - self._last >= SECONDS_BETWEEN:
            self._last = time.monotonic()
            self._add("progress", made=self._made)

    def end(self, ledger: Ledger) -> None:
        """What the folder holds once its index files show it."""
        if self._is_begun:
            counts = {"set_aside": ledger.count(QUARANTINED), "doubtful": ledger.count_doubtful()}
            self._add("done", made=self._made, done=ledger.count(), **counts)
            self._is_begun = False

    def _add(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "process": f"{platform.node()}:{os.getpid()}", **facts}
        storage.append(self._path, (canonical(line) + "\n").encode())
