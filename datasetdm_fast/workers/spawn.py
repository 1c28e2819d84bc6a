"""Several processes for one run: a GPU each, or a share of the cores. They only meet in the queue, so one that ends or
hangs is replaced alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import report
from datasetdm_fast.config import RunConfig
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import REFUSALS, GateFailed, Missing, Refused
from datasetdm_fast.generation.job import prepare
from datasetdm_fast.generation.result import Result, close
from datasetdm_fast.generation.settings import count_images
from datasetdm_fast.run_folder import seal
from datasetdm_fast.run_folder.document import LOCK
from datasetdm_fast.run_folder.folder import clean
from datasetdm_fast.workers.devices import Place
from datasetdm_fast.workers.heartbeat import MOST_DEATHS, Silence
from datasetdm_fast.workers.queue import DIED, Owner, SqliteQueue
from datasetdm_fast.workers.worker import Callbacks, Worker, join

LONGEST_WAIT = 30.0  # seconds before a process that has just died again is replaced
SECONDS_BETWEEN_POLLS = 0.25  # of the processes
SECONDS_TO_END = 1.0  # processes have once everything is committed
# Before anything that takes time the kernel is told to end the process with its parent (PR_SET_PDEATHSIG = 1, SIGKILL =
# 9).
_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); " if sys.platform == "linux" else ""
_BOOT = _WITH_PARENT + "import sys; from datasetdm_fast.workers.spawn import enter; enter(int(sys.argv[1]))"


def run(config: RunConfig, places: Sequence[Place], callbacks: Callbacks) -> Result:
    """The run, made by one process a place."""
    folder, begin = Path(config.out), time.perf_counter()
    storage.make_folder(folder / "state")
    with locks.locked(folder / LOCK):
        clean(folder)
        with (
            closing(SqliteQueue(folder / seal.QUEUE)) as queue,
            Supervisor(config, places, queue, callbacks) as supervisor,
        ):
            supervisor.work()
        seconds = time.perf_counter() - begin
        clean(folder)
        return close(folder, count_images(config), supervisor.committed, seconds)


@dataclass
class Rank:
    """A place and the process that fills it now."""

    slot: int
    place: Place
    process: subprocess.Popen | None = None
    link: connection.Connection | None = None
    owner: Owner | None = None
    starts: int = 0
    deaths: int = 0  # in a row
    next_start: float = 0.0  # when to start the next process
    is_ready: bool = False
    is_told_to_stop: bool = False
    last_words: str = ""


class Supervisor:
    """Starts the processes of a run, receives what they report, replaces and ends them."""

    def __init__(self, config: RunConfig, places: Sequence[Place], queue: SqliteQueue, callbacks: Callbacks):
        self.config, self.queue, self.callbacks, self.silence = config, queue, callbacks, Silence(callbacks.patience)
        self.ranks = [Rank(slot, place) for slot, place in enumerate(places)]
        queue.expect(range(len(places)))
        self.committed = 0
        self.was_ready = False  # one of the processes, at any time

    def work(self) -> None:
        """Returns once every batch is committed, or, when it is to stop, once every process has finished what it had
        begun.
        """
        stopping = False
        while not self.queue.is_over():
            stopping, now = self.callbacks.is_stopping(), time.monotonic()
            for rank in self.ranks:
                if not stopping and not rank.process and rank.deaths < MOST_DEATHS and now >= rank.next_start:
                    self._start(rank)
            alive = [rank for rank in self.ranks if rank.process]
            if not alive and (stopping or all(rank.deaths >= MOST_DEATHS for rank in self.ranks)):
                break
            self._receive(alive)
            self._end_silent()
            if stopping:
                self._ask_to_stop()
        if not self.queue.is_over() and not stopping:
            words = "; ".join(dict.fromkeys(rank.last_words for rank in self.ranks if rank.last_words))
            raise Missing(
                f"{self.config.out}: every process of the run ended {MOST_DEATHS} times in a row ({words})",
                "Mend that and run the same line again: it goes on where it stopped.",
            )

    def _start(self, rank: Rank) -> None:
        rank.starts += 1
        rank.owner = Owner(f"rank {rank.slot}, process {rank.starts}", rank.slot, socket.gethostname())
        config = replace(self.config, threads=rank.place.threads, quiet=True, gpus="", ranks=0)
        path = os.pathsep.join(path for path in sys.path if path)
        rank.link, far = Pipe()
        with far:
            rank.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(far.fileno())],
                env={**os.environ, "PYTHONPATH": path, **rank.place.environment},
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the standard output of a command holds its result alone
            )
        rank.link.send((config, rank.owner, os.getpid(), self.callbacks.describe, self.callbacks.on_start))
        rank.is_ready = rank.is_told_to_stop = False

    def _receive(self, alive: Sequence[Rank]) -> None:
        """Waits a little for anything to happen, and deals with it."""
        connection.wait([rank.link for rank in alive], SECONDS_BETWEEN_POLLS)
        for rank in alive:
            self._read(rank)
            if rank.process.poll() is not None:
                self._ended(rank)

    def _read(self, rank: Rank) -> None:
        with suppress(EOFError, OSError):  # its last message has been received
            while rank.link.poll():
                self._handle(rank, *rank.link.recv())

    def _handle(self, rank: Rank, kind: str, *content: Any) -> None:
        if kind == "ready":
            rank.is_ready = True
            if not self.was_ready:
                self.was_ready = True
                for line in content[0]:
                    self.callbacks.on_message(line)
        elif kind == "committed":
            rank.deaths = 0
            self.committed += content[0]
            self.callbacks.on_commit(content[0])
        elif kind == "refused":
            name, cause, remedy = content
            rank.last_words = cause
            # What keeps the first process from starting keeps all of them; a disk that is full is full for all. But a
            # GPU that has vanished concerns one.
            if name != "Missing" or rank.is_ready or not self.was_ready:
                raise REFUSALS[name](cause, remedy)

    def _ended(self, rank: Rank) -> None:
        code = rank.process.returncode
        rank.link.close()
        rank.process = rank.link = None
        if code == 0 and (rank.is_told_to_stop or self.queue.is_over()):
            return
        lost = self.queue.leave(rank.owner, DIED)
        rank.deaths += 1
        rank.next_start = time.monotonic() + min(2.0 ** (rank.deaths - 1) - 1, LONGEST_WAIT)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        rank.last_words = rank.last_words or how
        then = "is replaced"
        if rank.deaths == MOST_DEATHS:
            self.queue.give_up(rank.slot)
            then = f"is not replaced any more, after {MOST_DEATHS} deaths in a row"
        self.callbacks.on_message(f"rank {rank.slot} {how}, {lost} batches went back, it {then}")

    def _end_silent(self) -> None:
        """Ends processes that give no sign of life; they are then replaced like others that ended."""
        rank_of, beats_of = {rank.owner: rank for rank in self.ranks if rank.process}, self.queue.owners()
        for owner, seconds in self.silence.too_long({owner: beats_of.get(owner, 0) for owner in rank_of}).items():
            self.callbacks.on_message(f"rank {owner.slot} has given no sign of life for {seconds:.0f} s")
            rank_of[owner].process.kill()

    def _ask_to_stop(self) -> None:
        for rank in self.ranks:
            if rank.process and not rank.is_told_to_stop:
                rank.is_told_to_stop = True
                if not rank.is_ready:  # it has nothing to finish
                    rank.process.kill()
                else:
                    with suppress(OSError):  # it has just ended
                        rank.link.send("stop")

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        end = time.monotonic() + (SECONDS_TO_END if kind is None else 0)
        for rank in self.ranks:
            if rank.process:
                with suppress(subprocess.TimeoutExpired):
                    rank.process.wait(max(end - time.monotonic(), 0))
                rank.process.kill()
                rank.process.wait()
                if kind is None:
                    with suppress(*REFUSALS.values()):  # a commit may be reported after the queue is over
                        self._read(rank)
                rank.link.close()


def enter(handle: int) -> None:
    """One process of the run, from its start to its end; `handle` is its end of the pipe to its parent."""
    link = connection.Connection(handle)
    # a terminal sends them to all of the group; the parent alone decides
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config, owner, parent, describe, on_start = link.recv()
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)
    stopping = threading.Event()
    threading.Thread(target=_wait_for_stop, args=(link, stopping), name="parent", daemon=True).start()
    if on_start:
        on_start()

    def on_commit(count: int) -> None:
        link.send(("committed", count))

    try:
        job = prepare(config)
        with closing(SqliteQueue(job.folder / seal.QUEUE)) as queue:
            job, folder = join(job, queue)
            with folder:
                link.send(("ready", describe(job)))
                Worker(job, folder, queue, owner, queue.last, on_commit, is_stopping=stopping.is_set).work()
    except (Refused, Missing, GateFailed) as stop:
        link.send(("refused", type(stop).__name__, stop.cause, stop.remedy))
        sys.exit(stop.exit_code)
    except Exception as error:
        sys.exit(report(error))


def _wait_for_stop(link: connection.Connection, stopping: threading.Event) -> None:
    """Waits until the parent asks to stop; a parent that is gone closes the pipe."""
    try:
        while True:
            link.recv()
            stopping.set()
    except (EOFError, OSError):
        os._exit(1)
