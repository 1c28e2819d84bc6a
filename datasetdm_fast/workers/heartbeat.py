"""Signs of life, and how long a process may be silent."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.workers.queue import DIED, Leases, Owner


class PeerWatch:
    """Notices peers that have ended or give no sign of life, and leaves what they had to the others."""

    def __init__(self, queue: Leases, owner: Owner, patience: Patience):
        self.queue, self.owner, self.patience = queue, owner, patience
        self.begin, self.longest = time.monotonic(), 0.0
        self.seen: dict[str, tuple[int, float]] = {}  # signs of life of each, and when the last of them was seen

    def look(self) -> None:
        now, owners = time.monotonic(), self.queue.owners()
        for owner, beats in owners.items():
            before, since = self.seen.get(owner.name, (beats, now))
            if beats > before:
                self.longest = max(self.longest, now - since)
                before, since = beats, now
            self.seen[owner.name] = (before, since)
            allowed = max(self.patience.least, self.patience.times * self.longest) if beats else self.patience.start
            if owner.name != self.owner.name and (is_over(owner) or now - since > allowed):
                self.queue.leave(owner, DIED)
                self.queue.give_up(owner.slot)
        if now - self.begin > self.patience.start:
            for slot in self.queue.slots() - {owner.slot for owner in owners}:  # it was expected and never came
                self.queue.give_up(slot)


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


MOST_DEATHS = 5  # in a row, with nothing committed in between, after which a place stays empty


@dataclass(frozen=True)
class Patience:
    """When a process that gives no sign of life is taken to hang."""

    start: float = 1800.0  # seconds until its first call of a network: loading, compiling, recording
    least: float = 60.0  # seconds between later signs
    times: float = 20.0  # the longest time between two signs of any process


USUAL = Patience()
BEAT = 1.0  # seconds between two signs of life


class Pulse:
    """Called where work goes on; a thread turns the calls into signs of life, at once for the first and then one a
    beat.
    """

    def __init__(self, queue: Leases, owner: Owner):
        self._queue, self._owner = queue, owner
        self._called, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __call__(self) -> None:
        self._called.set()

    def _beat(self) -> None:
        while self._called.wait() and not self._ending.is_set():
            self._called.clear()
            self._queue.beat(self._owner.name)
            self._ending.wait(BEAT)

    def __enter__(self) -> Pulse:
        self._queue.enter(self._owner)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._called.set()
        self._thread.join()
