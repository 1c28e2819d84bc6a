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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.command_line.ending import report
from datasetdm_fast.config import RunConfig
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import REFUSALS, GateFailed, Missing, Refused
from datasetdm_fast.generation.job import Job, prepare
from datasetdm_fast.generation.result import Result, close
from datasetdm_fast.generation.settings import count_images
from datasetdm_fast.run_folder import seal
from datasetdm_fast.run_folder.document import LOCK
from datasetdm_fast.run_folder.folder import clean
from datasetdm_fast.workers.heartbeat import MOST_DEATHS, USUAL, Pulse
from datasetdm_fast.workers.queue import DIED, Leases, Owner
from datasetdm_fast.workers.worker import Share, join

if TYPE_CHECKING:
    from datasetdm_fast.workers.devices import Place
    from datasetdm_fast.workers.heartbeat import Patience

LONGEST_WAIT = 30.0  # seconds before a process that has just died again is replaced
SECONDS_BETWEEN_POLLS = 0.25  # seconds between two looks at the processes
FAREWELL = 1.0  # seconds processes have to end once everything is committed
# Before anything that takes time the kernel is told to end the process with its parent (PR_SET_PDEATHSIG = 1, SIGKILL =
# 9).
_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); " if sys.platform == "linux" else ""
_BOOT = _WITH_PARENT + "import sys; from datasetdm_fast.workers.spawn import enter; enter(int(sys.argv[1]))"


@dataclass(frozen=True)
class WorkerSetup:
    """What a process of a run is told at its start."""

    config: RunConfig
    owner: Owner
    parent: int
    describe: Callable[[Job], list[str]]  # lines about the job, told by the first that is ready
    first: Callable[[], None] | None  # called before anything else


def run(
    config: RunConfig,
    places: Sequence[Place],
    *,
    describe: Callable[[Job], list[str]],
    on_message: Callable[[str], None] = lambda line: None,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
    patience: Patience = USUAL,
    first: Callable[[], None] | None = None,
) -> Result:
    """The run, made by one process a place; `on_message` hears what happens to them, `on_commit` of every commit."""
    folder, begin, new = Path(config.out), time.perf_counter(), 0

    def count(samples: int) -> None:
        nonlocal new
        new += samples
        on_commit(samples)

    storage.make_folder(folder / "state")
    with locks.locked(folder / LOCK):
        clean(folder)
        with (
            Leases(folder / seal.QUEUE) as queue,
            Supervisor(config, places, queue, patience, describe, on_message, count, first) as crew,
        ):
            crew.work(is_stopping)
        seconds = time.perf_counter() - begin
        clean(folder)
        return close(folder, count_images(config), new, seconds)


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
    again: float = 0.0  # when to start the next process
    is_ready: bool = False
    is_told: bool = False  # to stop
    beats: int = 0
    changed: float = 0.0  # when the last sign of life was seen
    last_words: str = ""


class Supervisor:
    """The processes of a run, watched from outside: started, listened to, replaced, ended."""

    def __init__(
        self,
        config: RunConfig,
        places: Sequence[Place],
        queue: Leases,
        patience: Patience,
        describe: Callable[[Job], list[str]],
        on_message: Callable[[str], None],
        on_commit: Callable[[int], None],
        first: Callable[[], None] | None,
    ):
        self.config, self.queue, self.patience = config, queue, patience
        self.describe, self.on_message, self.on_commit, self.first = describe, on_message, on_commit, first
        self.ranks = [Rank(slot, place) for slot, place in enumerate(places)]
        queue.expect(range(len(places)))
        self.longest = 0.0  # seconds between two signs of life
        self.was_ready = False

    def work(self, is_stopping: Callable[[], bool]) -> None:
        """Returns once every batch is committed, or, when it is to stop, once every process has finished what it had
        begun.
        """
        looked = time.monotonic()
        while not self.queue.is_over:
            stopping = is_stopping()
            for rank in self.ranks:
                if (
                    rank.process is None
                    and not stopping
                    and rank.deaths < MOST_DEATHS
                    and time.monotonic() >= rank.again
                ):
                    self._start(rank)
            alive = [rank for rank in self.ranks if rank.process]
            if not alive and (stopping or all(rank.deaths >= MOST_DEATHS for rank in self.ranks)):
                break
            self._listen(alive)
            now = time.monotonic()
            if (
                now - looked > 10 * SECONDS_BETWEEN_POLLS
            ):  # this process itself was held up; the others may have been, too
                for rank in alive:
                    rank.changed = now
            looked = now
            self._watch(alive, now)
            if stopping:
                self._ask_to_stop(alive)
        if not self.queue.is_over and not is_stopping():
            words = "; ".join(dict.fromkeys(rank.last_words for rank in self.ranks if rank.last_words))
            raise Missing(
                f"{self.config.out}: every process of the run ended {MOST_DEATHS} times in a row ({words})",
                "Mend that and run the same line again: it goes on where it stopped.",
            )

    def _start(self, rank: Rank) -> None:
        rank.starts += 1
        rank.owner = Owner(f"rank {rank.slot}, process {rank.starts}", rank.slot, socket.gethostname())
        config = replace(self.config, threads=rank.place.threads, quiet=True, gpus="", ranks=0)
        setup = WorkerSetup(config, rank.owner, os.getpid(), self.describe, self.first)
        rank.link, far = Pipe()
        with far:
            rank.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(far.fileno())],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    **rank.place.environment,
                },
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the standard output of a command holds its result alone
            )
        rank.link.send(setup)
        rank.is_ready, rank.is_told, rank.beats, rank.changed = False, False, 0, time.monotonic()

    def _listen(self, alive: Sequence[Rank]) -> None:
        """Waits a little for anything to happen, and deals with it."""
        connection.wait([rank.link for rank in alive], SECONDS_BETWEEN_POLLS)
        for rank in alive:
            try:
                while rank.link.poll():
                    self._hear(rank, *rank.link.recv())
            except (EOFError, OSError):
                pass  # its last words have been heard
            if rank.process.poll() is not None:
                self._bury(rank)

    def _hear(self, rank: Rank, kind: str, *content: Any) -> None:
        if kind == "ready":
            rank.is_ready = True
            if not self.was_ready:
                self.was_ready = True
                for line in content[0]:
                    self.on_message(line)
        elif kind == "made":
            rank.deaths = 0
            self.on_commit(content[0])
        elif kind == "refused":
            name, cause, remedy = content
            rank.last_words = cause
            # What keeps the first process from starting keeps all of them; a disk that is full is full for all. But a
            # GPU that has vanished concerns one.
            if name != "Missing" or rank.is_ready or not self.was_ready:
                raise REFUSALS[name](cause, remedy)

    def _bury(self, rank: Rank) -> None:
        code = rank.process.returncode
        rank.link.close()
        rank.process = rank.link = None
        if code == 0 and (rank.is_told or self.queue.is_over):
            self.queue.leave(rank.owner)
            return
        lost = self.queue.leave(rank.owner, DIED)
        rank.deaths += 1
        rank.again = time.monotonic() + min(2.0 ** (rank.deaths - 1) - 1, LONGEST_WAIT)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        rank.last_words = rank.last_words or how
        then = "is replaced"
        if rank.deaths == MOST_DEATHS:
            self.queue.give_up(rank.slot)
            then = f"is not replaced any more, after {MOST_DEATHS} deaths in a row"
        self.on_message(f"rank {rank.slot} {how}, {lost} batches went back, it {then}")

    def _watch(self, alive: Sequence[Rank], now: float) -> None:
        """Ends processes that give no sign of life; they are then replaced like others that ended."""
        beats = {owner.name: count for owner, count in self.queue.owners().items()}
        for rank in alive:
            if not rank.process:
                continue
            count = beats.get(rank.owner.name, 0)
            if count > rank.beats:
                if rank.beats:
                    self.longest = max(self.longest, now - rank.changed)
                rank.beats, rank.changed = count, now
            allowed = (
                max(self.patience.least, self.patience.times * self.longest) if rank.beats else self.patience.start
            )
            if now - rank.changed > allowed:
                self.on_message(f"rank {rank.slot} has given no sign of life for {now - rank.changed:.0f} s")
                rank.process.kill()

    def _ask_to_stop(self, alive: Sequence[Rank]) -> None:
        for rank in alive:
            if not rank.process or rank.is_told:
                continue
            rank.is_told = True
            if not rank.is_ready:  # it has nothing to finish
                rank.process.kill()
                continue
            try:
                rank.link.send("stop")
            except OSError:
                pass  # it has just ended

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        end = time.monotonic() + (FAREWELL if kind is None else 0)
        for rank in self.ranks:
            if rank.process:
                with suppress(subprocess.TimeoutExpired):
                    rank.process.wait(max(end - time.monotonic(), 0))
                rank.process.kill()
                rank.process.wait()
                rank.link.close()


def enter(handle: int) -> None:
    """One process of the run, from its start to its end; `handle` is its end of the pipe to its parent."""
    link = connection.Connection(handle)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal sends them to all of the group; the parent alone decides
        signal.signal(number, signal.SIG_IGN)
    setup = link.recv()
    if os.getppid() != setup.parent:  # it ended before the kernel knew
        os._exit(1)
    stopping = threading.Event()
    threading.Thread(target=_obey, args=(link, stopping), name="orders", daemon=True).start()
    if setup.first:
        setup.first()
    try:
        job = prepare(setup.config)
        with Leases(job.folder / seal.QUEUE) as queue, Pulse(queue, setup.owner) as pulse:
            job, folder = join(job, queue)
            with folder:
                link.send(("ready", setup.describe(job)))
                share = Share(
                    job,
                    folder,
                    queue,
                    setup.owner,
                    pulse=pulse,
                    on_commit=lambda count: link.send(("made", count)),
                    is_stopping=stopping.is_set,
                )
                share.work()
    except (Refused, Missing, GateFailed) as stop:
        link.send(("refused", type(stop).__name__, stop.cause, stop.remedy))
        sys.exit(stop.exit_code)
    except Exception as error:
        sys.exit(report(error))


def _obey(link: connection.Connection, stopping: threading.Event) -> None:
    """Waits for the order to stop; a parent that is gone closes the pipe."""
    try:
        while True:
            link.recv()
            stopping.set()
    except (EOFError, OSError):
        os._exit(1)
