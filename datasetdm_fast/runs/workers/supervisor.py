"""Starts the processes of a run, replaces those that end or hang, and counts what they commit."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from datasetdm_fast.errors import Missing, Stop
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.processes import SpawnedProcess
from datasetdm_fast.runs.workers.worker import Callbacks

MOST_DEATHS = 5  # in a row, without progress, after which a place stays empty
LONGEST_WAIT = 30.0  # seconds before a process that has just died again is replaced
SECONDS_BETWEEN_POLLS = 0.25  # of processes
LOOKS_SHARE = 0.05  # of the time that is spent on reading what they have committed
SECONDS_TO_END = 1.0  # processes have once nothing is missing


class SharedRun(Protocol):
    """What processes make together."""

    place: str  # of the run, for messages
    is_finishing: bool  # whether processes that are to stop finish what they make
    places: Sequence[Place]  # of one process each

    def begin(self, rank: int, name: str) -> SpawnedProcess:
        """Starts a process, whose claims have this name."""

    def count_new(self) -> int:
        """Samples that were committed since the last call."""

    def is_complete(self) -> bool:
        """Whether nothing was missing at that call."""

    def claims(self) -> dict[str, list[bytes]]:
        """The claims of each process by its name; none where hanging processes are not ended."""

    def free(self, name: str, *, died: bool) -> int:
        """Frees what a process that has ended was making, and counts its death; how many parts that were."""


@dataclass
class Rank:
    """A place and the process that fills it now."""

    process: SpawnedProcess | None = None
    name: str = ""
    is_done: bool = False  # whether a process found nothing left to do
    deaths: int = 0  # in a row
    next_start: float = 0.0  # when to start the next process
    committed: int = 0  # samples of the run when the process began
    sign: list[bytes] | None = None  # its last claims
    since: float = 0.0  # when these were first seen
    how: str | Stop = ""  # its last process ended

    @property
    def is_over(self) -> bool:
        """Whether no other process will fill it."""
        return self.is_done or self.deaths == MOST_DEATHS


class Supervisor:
    """Fills the places of a run with processes until nothing is missing."""

    def __init__(self, run: SharedRun, callbacks: Callbacks):
        self.run, self.callbacks = run, callbacks
        self.ranks = [Rank() for _ in run.places]
        self.committed, self.next_look = 0, 0.0

    def work(self) -> None:
        """Returns once nothing is missing, or when it is to stop, once no process works any more."""
        was_complete = self.run.is_complete()  # then the processes check the settings
        try:
            while not self.callbacks.is_stopping() and (was_complete or not self.run.is_complete()):
                self._fill_places()
                self._watch()
                if all(rank.is_over for rank in self.ranks) and any(rank.is_done for rank in self.ranks):
                    break
            if self.callbacks.is_stopping() and self.run.is_finishing:
                self._finish()
            end = time.monotonic() + SECONDS_TO_END * self.run.is_complete()
            while self._running() and time.monotonic() < end:
                self._watch(is_ending=True)
        finally:
            for rank in self._running():
                rank.process.kill()
                self.run.free(rank.name, died=False)
        self._look()

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.process]

    def _fill_places(self) -> None:
        if all(rank.deaths == MOST_DEATHS for rank in self.ranks):
            for how in (rank.how for rank in self.ranks):
                if isinstance(how, Stop):
                    raise how
            words = "; ".join(dict.fromkeys(str(rank.how) for rank in self.ranks))
            raise Missing(
                f"{self.run.place}: every process of the run ended {MOST_DEATHS} times in a row ({words})",
                "Fix that and run the same command again: it resumes.",
            )
        for number, rank in enumerate(self.ranks):
            if not rank.process and not rank.is_over and time.monotonic() >= rank.next_start:
                rank.name, rank.sign, rank.committed = uuid.uuid4().hex, None, self.committed
                rank.process = self.run.begin(number, rank.name)

    def _watch(self, *, is_ending: bool = False) -> None:
        """Waits a little, counts what was committed, and deals with processes that have ended or hang."""
        time.sleep(SECONDS_BETWEEN_POLLS)
        endings = [(rank, rank.process.ending()) for rank in self._running()]
        if time.monotonic() > self.next_look:
            self._look()
            self._end_silent()
        for number, rank in enumerate(self.ranks):
            for how in (how for other, how in endings if other is rank and how is not None):
                rank.process, rank.is_done = None, how == ""
                if how and not is_ending:
                    self._note_death(number, rank, how)

    def _look(self) -> None:
        begin = time.monotonic()
        if new := self.run.count_new():
            self.committed += new
            self.callbacks.on_commit(new)
        now = time.monotonic()
        self.next_look = now + (now - begin) / LOOKS_SHARE

    def _end_silent(self) -> None:
        """Ends processes that have not renewed their claims; they are then replaced like others that ended."""
        claims, now = self.run.claims(), time.monotonic()
        for number, rank in enumerate(self.ranks):
            sign = claims.get(rank.name, [])
            if sign != rank.sign:
                rank.sign, rank.since = sign, now
            elif sign and rank.process and now - rank.since > self.callbacks.patience:
                self.callbacks.on_message(f"rank {number} has given no sign of life for {now - rank.since:.0f} s")
                rank.process.kill()

    def _note_death(self, number: int, rank: Rank, how: str | Stop) -> None:
        """Decides whether a process that ended is replaced; what keeps the first from starting keeps all of them."""
        self._look()
        was_working = self.run.free(rank.name, died=True) and self.committed > rank.committed
        if isinstance(how, Stop) and not (isinstance(how, Missing) and self.committed):
            raise how
        rank.deaths, rank.how = 1 if was_working else rank.deaths + 1, how
        rank.next_start = time.monotonic() + min(2.0 ** (rank.deaths - 1) - 1, LONGEST_WAIT)
        words = f"refuses ({how.cause})" if isinstance(how, Stop) else how
        then = f"not replaced any more, after {MOST_DEATHS} deaths in a row"
        self.callbacks.on_message(f"rank {number} {words}, it is {'replaced' if rank.deaths < MOST_DEATHS else then}")

    def _finish(self) -> None:
        """Waits until every process has finished what it makes; one that makes nothing is ended."""
        claims = self.run.claims()
        for rank in self._running():
            rank.process.stop()
            if rank.name not in claims:
                rank.process.kill()
        while self._running():
            self._watch(is_ending=True)
