"""Claims: which process makes which part of a run, a shard or a batch, told by files that are renewed."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.runs.run_folder.document import CLAIMS
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace

SECONDS_BETWEEN_BEATS = 15.0  # renewals of a claim
LEASE_SECONDS = 180.0  # without a renewal, after which others may take a part


def claim_name(part: int) -> str:
    return f"{CLAIMS}/{part:05d}"


class Claims:
    """The parts that this process makes, and how many processes died while they made them before."""

    def __init__(self, place: ShardPlace, name: str = "", files_of: Callable[[int], Iterable[str]] = lambda part: ()):
        """`name` is known to whatever started the process; `files_of` a part are removed where half-written."""
        self._place, self._name, self._files_of = place, name, files_of
        self._beats, self._last = 0, time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {}  # what a claim of another was, and since when
        self._lock = threading.Lock()
        self.deaths: dict[int, int] = {}  # of the parts that are claimed here

    def _content(self, part: int) -> bytes:
        owner = {"name": self._name, "host": host(), "process": os.getpid()}
        return json.dumps({**owner, "deaths": self.deaths[part], "beats": self._beats}).encode()

    def take_new(self, part: int) -> bool:
        """Whether the part, which nobody has claimed before, is this process's to make."""
        self.deaths[part] = 0
        if self._place.read(claim_name(part)) is None and self._place.create(claim_name(part), self._content(part)):
            return True
        del self.deaths[part]
        return False

    def take(self, part: int) -> bool:
        """Whether the part is this process's to make, that of a process that has ended among them."""
        if self.take_new(part):
            return True
        claim = self._place.read(claim_name(part)) or b"{}"
        died = _count_deaths(claim)
        if died is None:
            content, since = self._seen.get(part, (b"", 0.0))
            if content != claim:
                self._seen[part] = claim, time.monotonic()
            if content != claim or time.monotonic() - since <= LEASE_SECONDS:  # its process has renewed it
                return False
        self.deaths[part] = _number(claim, "deaths") if died is None else died
        self._place.replace(claim_name(part), self._content(part))
        self._place.remove_parts(*self._files_of(part), claim_name(part))
        return True

    def renew(self) -> None:
        """A sign of life, to be given often."""
        if time.monotonic() - self._last > SECONDS_BETWEEN_BEATS:
            self._last, self._beats = time.monotonic(), self._beats + 1
            with self._lock:
                for part in self.deaths:
                    self._place.replace(claim_name(part), self._content(part))

    def release(self, part: int) -> None:
        with self._lock:
            self.deaths.pop(part, None)
            self._place.remove_parts(claim_name(part))  # of processes that were killed while they claimed it
            self._place.remove(claim_name(part))

    def release_left(self, parts: Iterable[int]) -> None:
        """Removes the claims of processes that were killed once they had made one of these parts."""
        for part in read_claims(self._place).keys() & set(parts):
            if self.take(part):
                self.release(part)


def read_claims(place: ShardPlace) -> dict[int, bytes]:
    """The content of each claim."""
    contents = {int(name): place.read(f"{CLAIMS}/{name}") for name in place.names(CLAIMS) if name.isdecimal()}
    return {part: content for part, content in contents.items() if content}


def claims_by_name(place: ShardPlace) -> dict[str, list[bytes]]:
    """The claims of each process, by the name that it was started under."""
    claims: dict[str, list[bytes]] = {}
    for content in read_claims(place).values():
        claims.setdefault(str(_parse(content).get("name", "")), []).append(content)
    return claims


def free_claims(place: ShardPlace, name: str, files_of: Callable[[int], Iterable[str]], *, died: bool) -> int:
    """Frees the parts of a process that has ended, each with its death where it `died`; how many they were."""
    claims = {part: content for part, content in read_claims(place).items() if name.encode() in content}
    for part, content in claims.items():
        if died:
            place.replace(claim_name(part), json.dumps({"deaths": _number(content, "deaths") + 1}).encode())
        else:
            place.remove(claim_name(part))
        place.remove_parts(*files_of(part), claim_name(part))
    return len(claims)


def _count_deaths(claim: bytes) -> int | None:
    """How many processes died while they made a part, with that of the claim; None where that may be at work."""
    value = _parse(claim)
    if "process" not in value:
        return _number(claim, "deaths")
    return _number(claim, "deaths") + 1 if is_over(value.get("host"), value["process"]) else None


def _number(claim: bytes, name: str) -> int:
    number = _parse(claim).get(name, 0)
    return number if isinstance(number, int) else 0


def _parse(claim: bytes) -> dict[str, Any]:
    """The content of a claim, nothing of one that cannot be read."""
    with suppress(ValueError):
        value = json.loads(claim)
        if isinstance(value, dict):
            return value
    return {"process": None}


def host() -> str:
    """The machine or container where the number of a process means this process; names may be shared."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # where there is no such file, as outside Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def is_over(machine: Any, process: Any) -> bool:
    """Whether a process that this one can see has ended; of others that is not known."""
    return machine == host() and isinstance(process, int) and not storage.is_alive(process)
