"""Signs of life of the processes of a run, and the one rule of how long each may be silent."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.workers.queue import DIED, Owner, WorkQueue

MOST_DEATHS = 5  # in a row, with nothing committed in between, after which a place stays empty
BEAT_SECONDS = 1.0  # between two signs of life
LONGEST_GAP = 2.5  # seconds between two looks at the processes; a longer gap is the fault of the process that looks


@dataclass(frozen=True)
class Patience:
    """When a process that gives no sign of life is taken to hang."""

    start: float = 1800.0  # seconds until its first call of a network: loading, compiling, recording
    least: float = 60.0  # seconds between later signs
    times: float = 20.0  # the longest time between two later signs of any process


USUAL = Patience()


class Silence:
    """How long each process has been silent, on a clock that stands still while the process that looks is itself held
    up. The time until a first sign is spent on loading: it may be long, and says nothing of the time between later
    ones.
    """

    def __init__(self, patience: Patience):
        self._patience, self._looked = patience, time.monotonic()
        self._clock, self._longest = 0.0, 0.0
        self._seen: dict[str, tuple[int, float]] = {}  # signs of life of each, and when the last of them was seen

    def too_long(self, beats_of: Mapping[Owner, int]) -> dict[Owner, float]:
        """Those that have been silent for longer than is allowed, with the seconds; `beats_of` are their signs of life
        so far.
        """
        now = time.monotonic()
        self._clock += min(now - self._looked, LONGEST_GAP)
        self._looked = now
        before, self._seen = self._seen, {}
        silent = {}
        for owner, beats in beats_of.items():
            seen, since = before.get(owner.name, (beats, self._clock))
            if beats != seen:
                if seen:
                    self._longest = max(self._longest, self._clock - since)
                since = self._clock
            self._seen[owner.name] = beats, since
            allowed = self._patience.start
            if beats and self._longest:  # a first call of a large network takes minutes on a CPU
                allowed = max(self._patience.least, self._patience.times * self._longest)
            if self._clock - since > allowed:
                silent[owner] = self._clock - since
        return silent


class QueueMonitor:
    """Leaves the batches of processes that have ended or hang to the others; for a run whose processes something else
    has started.
    """

    def __init__(self, queue: WorkQueue, patience: Patience, own: Owner | None = None):
        self._queue, self._patience, self._own = queue, patience, own
        self._begin, self._silence = time.monotonic(), Silence(patience)

    def look(self) -> tuple[set[Owner], dict[Owner, float]]:
        """The processes at work, and those taken out of the queue just now with the seconds they were silent."""
        owners = self._queue.owners()
        silent = self._silence.too_long(owners)
        lost = {owner: silent.get(owner, 0.0) for owner in owners if owner in silent or is_over(owner)}
        lost.pop(self._own, None)
        left = owners.keys() - lost.keys()
        for owner in lost:
            self._queue.leave(owner, DIED)
        empty = self._queue.slots() - {owner.slot for owner in left}
        if time.monotonic() - self._begin <= self._patience.start:  # others may still come
            empty &= {owner.slot for owner in lost}
        for slot in empty:
            self._queue.give_up(slot)
        return set(left), lost


def born(process: int) -> str:
    """When a process began, in the kernel's clock ticks: with its number this names it once and for all. Empty where
    that cannot be known.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_over(owner: Owner) -> bool:
    """Whether a process of this machine has ended; of other machines that is not known."""
    return owner.host == socket.gethostname() and bool(owner.born) and born(owner.process) != owner.born


class Heartbeat:
    """Called where work goes on; a thread turns the calls into signs of life, at once for the first and then at most
    one in BEAT_SECONDS.
    """

    def __init__(self, queue: WorkQueue, owner: Owner):
        self._queue, self._owner = queue, owner
        self._called, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __call__(self) -> None:
        self._called.set()

    def _beat(self) -> None:
        while self._called.wait() and not self._ending.is_set():
            self._called.clear()
            self._queue.beat(self._owner.name)
            self._ending.wait(BEAT_SECONDS)

    def __enter__(self) -> Heartbeat:
        self._queue.enter(self._owner)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._called.set()
        self._thread.join()
