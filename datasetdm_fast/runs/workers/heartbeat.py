"""How long a process of a run may give no sign of life."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.runs.workers.queue import Owner

LONGEST_GAP = 2.5  # seconds between two checks of the processes; a longer gap is the fault of the supervisor


@dataclass(frozen=True)
class Patience:
    """When a process that gives no sign of life is taken to hang."""

    start: float = 1800.0  # seconds until its first call of a network: loading, compiling, recording
    least: float = 60.0  # seconds between later signs
    times: float = 20.0  # the longest time between two later signs of any process that had work


USUAL = Patience()


class Silence:
    """How long each process has been silent, on a clock that stops while the supervisor itself is held up. The time
    until a first sign is spent on loading: it may be long, and does not predict the time between later ones. Nor do the
    signs of processes that have nothing to do, which come every second.
    """

    def __init__(self, patience: Patience):
        self._patience, self._looked = patience, time.monotonic()
        self._clock, self._longest = 0.0, 0.0
        self._seen: dict[str, tuple[int, float]] = {}  # signs of life of each, and when the last of them was seen

    def too_long(self, beats_of: Mapping[Owner, int]) -> dict[Owner, float]:
        """Those silent for longer than is allowed, with the seconds; `beats_of` is WorkQueue.owners()."""
        now = time.monotonic()
        self._clock += min(now - self._looked, LONGEST_GAP)
        self._looked = now
        before, self._seen = self._seen, {}
        silent = {}
        for owner, beats in beats_of.items():
            seen, since = before.get(owner.name, (beats, self._clock))
            if beats != seen:
                if seen > 0 and beats > 0:
                    self._longest = max(self._longest, self._clock - since)
                since = self._clock
            self._seen[owner.name] = beats, since
            allowed = self._patience.start
            if beats and self._longest:  # a first call of a large network takes minutes on a CPU
                allowed = max(self._patience.least, self._patience.times * self._longest)
            if self._clock - since > allowed:
                silent[owner] = self._clock - since
        return silent


def host() -> str:
    """The machine or container where the number of a process means this process; names may be shared."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # where there is no such file, as outside Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def is_over(owner: Owner) -> bool:
    """Whether a process that this one can see has ended; of others that is not known."""
    if owner.host != host():
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
