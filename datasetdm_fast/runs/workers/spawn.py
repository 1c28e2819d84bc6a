"""Processes for one run on this machine, which meet in the queue alone; one that ends or hangs is replaced."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasetdm_fast.bug_report import report_bug
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import REFUSALS, Missing, Stop
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.result import Result, close_folder
from datasetdm_fast.runs.jobs.run import prepare_job
from datasetdm_fast.runs.run_folder import seal
from datasetdm_fast.runs.run_folder.document import LOCK, read_document
from datasetdm_fast.runs.run_folder.folder import clean
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.heartbeat import Silence
from datasetdm_fast.runs.workers.queue import DIED, Owner, WorkQueue
from datasetdm_fast.runs.workers.worker import Callbacks, Worker, join_run

MOST_DEATHS = 5  # in a row, with nothing committed in between, after which a place stays empty
LONGEST_WAIT = 30.0  # seconds before a process that has just died again is replaced
SECONDS_BETWEEN_POLLS = 0.1  # of queue and processes
SECONDS_TO_END = 1.0  # processes have once everything is committed
# The kernel is asked first to end the process with its parent (PR_SET_PDEATHSIG = 1, SIGKILL = 9).
WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); " if sys.platform == "linux" else ""
_BOOT = WITH_PARENT + "from datasetdm_fast.runs.workers.spawn import enter; enter()"


def run_spawned(places: Sequence[Place], spec: RunSpec, job: Job | None, callbacks: Callbacks) -> Result:
    """The run, made by one process a place."""
    folder, begin = spec.folder, time.perf_counter()
    if "torch" in sys.modules:  # engines that were compared before: the first process would lack their memory
        from datasetdm_fast.engine.engines.device import release

        release()
    storage.make_folder(folder / "state")
    with locks.hold_lock(folder / LOCK):
        clean(folder)
        try:
            with closing(WorkQueue(folder / seal.QUEUE)) as queue:
                supervisor = Supervisor(spec, places, callbacks, queue)
                supervisor.work()
        finally:  # a finished run that refuses other settings stays as it was
            clean(folder)
        return close_folder(folder, spec.number, supervisor.committed, begin)


@contextmanager
def reporting(queue: WorkQueue, owner: Owner) -> Iterator[None]:
    """Within the block a process of the run ends with whatever is refused, and its supervisor receives it."""
    try:
        yield
    except Stop as stop:
        queue.report(owner.slot, "refused", type(stop).__name__, stop.cause, stop.remedy)
        sys.exit(stop.exit_code)
    except Exception as error:
        sys.exit(report_bug(error))


@dataclass
class Rank:
    """A place and the process that fills it now."""

    slot: int
    owner: Owner | None = None
    process: Any = None
    starts: int = 0
    deaths: int = 0  # in a row
    next_start: float = 0.0  # when to start the next process
    is_ready: bool = False
    last_message: str = ""


class Supervisor:
    """Starts the processes of a run, receives what they report, replaces and ends them."""

    def __init__(self, spec: RunSpec, places: Sequence[Place], callbacks: Callbacks, queue: WorkQueue):
        self.spec, self.places, self.callbacks, self.queue = spec, places, callbacks, queue
        self.silence, self.ranks = Silence(callbacks.patience), [Rank(slot) for slot in range(len(places))]
        self.committed = 0
        self.was_ready = self.is_stopping = False

    def work(self) -> None:
        """Returns once every batch is committed, or when it is to stop, once every process has finished its batch."""
        queue = self.queue
        for rank in self.ranks:
            self._enter(rank)
        try:
            while not queue.is_complete() and (self._running() or not self.is_stopping):
                if self.callbacks.is_stopping():
                    self._stop()
                else:
                    self._fill_places()
                self._receive()
                self._end_silent()
                time.sleep(SECONDS_BETWEEN_POLLS)
            end = time.monotonic() + SECONDS_TO_END
            while self._running() and time.monotonic() < end:
                self._receive()
                self._end_silent()
                time.sleep(SECONDS_BETWEEN_POLLS)
        finally:
            for rank in self._running():
                rank.process.kill()
        with suppress(Stop):  # a commit may be reported after everything is committed
            self._read_reports()

    def _start(self, rank: Rank) -> SpawnedProcess:
        work = rank.owner, self.callbacks.describe, self.callbacks.on_start
        # the standard output of a command holds its result alone
        return start_process(_BOOT, self.places[rank.slot], self.spec, work, stdout=2)

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.process]

    def _enter(self, rank: Rank) -> None:
        """Adds a place's next process to the queue, where others see from then on that it will be there."""
        rank.starts, rank.is_ready = rank.starts + 1, False
        rank.owner = Owner(f"rank {rank.slot}, process {rank.starts}", rank.slot)
        self.queue.enter(rank.owner)

    def _fill_places(self) -> None:
        if all(rank.deaths == MOST_DEATHS for rank in self.ranks):
            words = "; ".join(dict.fromkeys(rank.last_message for rank in self.ranks))
            raise Missing(
                f"{self.spec.folder}: every process of the run ended {MOST_DEATHS} times in a row ({words})",
                "Fix that and run the same command again: it resumes.",
            )
        for rank in self.ranks:
            if not rank.process and rank.deaths < MOST_DEATHS and time.monotonic() >= rank.next_start:
                rank.process = self._start(rank)

    def _stop(self) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            self.queue.stop()
        for rank in self._running():
            if not rank.is_ready:  # it has nothing to finish
                rank.process.kill()

    def _receive(self) -> None:
        """Deals with what has been reported, and with processes that have ended."""
        endings = [(rank, rank.process.ending()) for rank in self._running()]
        self._read_reports()  # among it the last reports of these processes
        for rank, how in endings:
            if how is not None:
                self._leave(rank, how)

    def _read_reports(self) -> None:
        for slot, kind, *content in self.queue.reports():
            self.handle(self.ranks[slot], kind, *content)

    def handle(self, rank: Rank, kind: str, *content: Any) -> None:
        if kind == "ready":
            rank.is_ready = True
            if not self.was_ready:
                self.was_ready = True
                for line in content[0]:
                    self.callbacks.on_message(line)
        elif kind == "message":
            self.callbacks.on_message(*content)
        elif kind == "committed":
            rank.deaths = 0
            self.committed += content[0]
            self.callbacks.on_commit(content[0])
        elif kind == "refused":
            name, cause, remedy = content
            rank.last_message = cause
            # What keeps the first process from starting keeps all of them; a disk that is full is full for all. But a
            # GPU that has vanished concerns one.
            if name != "Missing" or rank.is_ready or not self.was_ready:
                raise REFUSALS[name](cause, remedy)

    def _leave(self, rank: Rank, how: str) -> None:
        rank.process, lost = None, self.queue.leave(rank.owner, DIED)
        if self.is_stopping or not how:
            return
        rank.deaths += 1
        rank.next_start = time.monotonic() + min(2.0 ** (rank.deaths - 1) - 1, LONGEST_WAIT)
        rank.last_message = rank.last_message or how
        then = f"is not replaced any more, after {MOST_DEATHS} deaths in a row"
        if rank.deaths < MOST_DEATHS:
            self._enter(rank)
            then = "is replaced"
        self.callbacks.on_message(f"rank {rank.slot} {how}, {lost} batches went back, it {then}")

    def _end_silent(self) -> None:
        """Ends processes that give no sign of life; they are then replaced like others that ended."""
        for owner, seconds in self.silence.too_long(self.queue.owners()).items():
            if process := self.ranks[owner.slot].process:
                self.callbacks.on_message(f"rank {owner.slot} has given no sign of life for {seconds:.0f} s")
                process.kill()


class SpawnedProcess(subprocess.Popen):
    """A process of the run on this machine."""

    def ending(self) -> str | Stop | None:
        code = self.poll()
        if not code:
            return None if code is None else ""
        if self.stdout and (content := self.stdout.read()):
            stop: Stop = pickle.loads(content)
            return stop
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        super().kill()
        self.wait()


def start_process(boot: str, place: Place, spec: RunSpec, work: tuple[Any, ...], *, stdout: int) -> SpawnedProcess:
    """A process at a place of this machine that runs `boot`, and reads the run and its work from standard input."""
    spec = replace(spec, engine=replace(spec.engine, threads=place.threads))
    path = os.pathsep.join(path for path in sys.path if path)
    process = SpawnedProcess(
        [sys.executable, "-P", "-c", boot],
        env={**os.environ, "PYTHONPATH": path, **place.environment},
        stdin=subprocess.PIPE,
        stdout=stdout,
    )
    with suppress(BrokenPipeError):  # it has just ended
        pickle.dump((spec, *work), process.stdin)
        process.stdin.flush()
    return process


def enter() -> None:
    """One process of the run, from its start to its end; its standard input lasts as long as its parent."""
    # a terminal sends them to all of the group; the parent alone decides
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    spec, owner, describe, on_start = pickle.load(sys.stdin.buffer)
    end_with_parent()
    if on_start:
        on_start()
    with closing(WorkQueue(spec.folder / seal.QUEUE)) as queue, reporting(queue, owner):
        job, folder = join_run(prepare_job(spec, read_document(spec.folder)), queue)
        with folder:
            queue.report(owner.slot, "ready", describe(job))
            Worker(job, folder, queue, owner, partial(queue.report, owner.slot, "committed")).work()


def end_with_parent() -> None:
    """Ends this process once its standard input is closed, as by the end of its parent."""
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os._exit(1)
