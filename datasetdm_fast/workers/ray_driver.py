"""One run on a Ray cluster: the frozen plan as Ray Data `map_batches`, an actor a GPU; workers publish the files, this
process alone commits the rows.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import RunConfig
from datasetdm_fast.errors import REFUSALS, GateFailed, Missing, Refused
from datasetdm_fast.generation import result
from datasetdm_fast.generation.job import Job, adopt, check_room, count_rows
from datasetdm_fast.generation.prompts import read_source
from datasetdm_fast.generation.result import Result, look
from datasetdm_fast.generation.run import in_order, lacking
from datasetdm_fast.generation.settings import count_images
from datasetdm_fast.run_folder import object_store
from datasetdm_fast.run_folder.document import read_document
from datasetdm_fast.run_folder.folder import RunFolder, clean
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.version import __version__
from datasetdm_fast.workers.devices import pool_of
from datasetdm_fast.workers.heartbeat import BEAT, MOST_DEATHS, USUAL, Patience
from datasetdm_fast.workers.ray_connection import CONNECT_SECONDS, _first_line, joined
from datasetdm_fast.workers.ray_worker import MOST_ROUNDS, Coordinator, RayWorkerSetup, Worker, plan

if TYPE_CHECKING:
    from datasetdm_fast.workers.devices import Pool

SECONDS_BETWEEN_POLLS = 0.25  # seconds between two looks at what the workers say
LARGEST_BLOCK = 8  # batches a worker is handed at once; it samples one while it labels the one before
BLOCKS = 16  # a worker is handed at least, so that none is waited for long
NOTHING_HERE = "Install it on every machine of the cluster: pip install datasetdm_fast[ray]"


def run(
    config: RunConfig,
    *,
    describe: Callable[[Job], list[str]],
    on_message: Callable[[str], None] = lambda line: None,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
    patience: Patience = USUAL,
    first: Callable[[], None] | None = None,
) -> Result:
    """The run, made by the workers of a cluster; `on_message` hears what happens to them, `on_commit` of every
    commit.
    """
    begin, office = (
        time.perf_counter(),
        RayDriver(config, describe, on_message, on_commit, is_stopping, patience, first),
    )
    with office:
        while office.is_open:
            with joined(config) as nodes:
                office.work(pool_of(config, nodes))
        return office.close(time.perf_counter() - begin)


class RayDriver:
    """The driver's side of a run: it hands out what is lacking, round after round, and commits what comes back."""

    def __init__(
        self,
        config: RunConfig,
        describe: Callable[[Job], list[str]],
        on_message: Callable[[str], None],
        on_commit: Callable[[int], None],
        is_stopping: Callable[[], bool],
        patience: Patience,
        first: Callable[[], None] | None,
    ):
        self.config, self.source = config, read_source(config)
        self.store = object_store.ObjectStore(config.store) if config.store else None
        self.describe, self.on_message, self.on_commit, self.is_stopping, self.patience, self.first = (
            describe,
            on_message,
            on_commit,
            is_stopping,
            patience,
            first,
        )
        self.folder: RunFolder | None = None
        self.wanted: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.doubts: dict[int, list[str]] = {}
        self.new, self.in_vain = 0, 0

    @property
    def is_open(self) -> bool:
        return not self.is_stopping() and (self.folder is None or bool(self.wanted))

    def work(self, pool: Pool) -> None:
        """One round: normally the only one; another where workers fell silent, with those that the cluster has then."""
        import ray

        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Coordinator).remote(
            dict(self.deaths), dict(self.doubts)
        )
        config = replace(
            self.config, out=os.path.abspath(self.config.out), threads=pool.threads, quiet=True, gpus="", ranks=0
        )
        setup = RayWorkerSetup(config, self.source, pool.most, pool.places, desk, first=self.first)
        if self.folder is None and not self._open(setup, pool):
            return
        before = self.new
        self._listen(dataset(self._items(), replace(setup, document=self.folder.document), pool), desk)
        self.in_vain = 0 if self.new > before else self.in_vain + 1
        if self.wanted and not self.is_stopping() and self.in_vain == MOST_ROUNDS:
            raise Missing(
                f"{self.config.out}: the workers fell silent {MOST_ROUNDS} times in a row without a sample",
                "See their logs in /tmp/ray/session_latest/logs, then run the same line again: it goes on where it "
                "stopped.",
            )

    def _open(self, setup: RayWorkerSetup, pool: Pool) -> bool:
        """Lets a worker make the plan and opens the run folder with it; False where it is to stop before that."""
        import ray

        stored = read_document(Path(self.config.out))
        asked = ray.remote(max_retries=MOST_DEATHS, **pool.resources)(plan).remote(setup, stored, self.describe)
        with self._explained(setup.desk):
            while not ray.wait([asked], timeout=SECONDS_BETWEEN_POLLS)[0]:
                if self.is_stopping():
                    return False
            kind, *content = ray.get(asked)
        if kind == "refused":
            name, cause, remedy = content
            raise REFUSALS[name](cause, remedy)
        job, lines, version = content
        if version != __version__:
            raise Missing(
                f"--cluster {self.config.cluster}: its machines have datasetdm_fast {version}, this one {__version__}",
                NOTHING_HERE,
            )
        job = replace(job, config=self.config)
        if stored is not None:
            job = replace(adopt(job, stored), done=count_rows(self.config))
        if not self.store:
            check_room(job)
        for line in lines:
            self.on_message(line)
        self.job, self.folder = job, RunFolder(job.folder, job.document)
        if self.store:
            self.store.note(job.folder)
        self.wanted = lacking(self.folder.ledger, job.plan.number, self.config.limit)
        self.folder.unseal()
        return True

    def _items(self) -> list[dict[str, Any]]:
        """Every batch that lacks samples, with these."""
        size, found = self.job.plan.batch_size, {}
        for index in sorted(self.wanted):
            found.setdefault(index // size, []).append(index)
        return [{"batch": batch, "wanted": found[batch]} for batch in in_order(self.wanted, size)]

    def _listen(self, found: Any, desk: Any) -> None:
        """Commits what the workers make until they are done, or have been silent for too long."""
        beats, changed, longest, asked, is_told = 0, time.monotonic(), 0.0, 0.0, False
        with self._explained(desk):
            for rows in received(found):
                if rows:
                    self._commit(rows)
                now = time.monotonic()
                if self.is_stopping() and not is_told:
                    is_told = True
                    desk.stop.remote()
                if now - asked < BEAT:
                    continue
                asked = now
                count = self._hear(desk)
                if count > beats:
                    longest = max(longest, now - changed) if beats else 0.0
                    beats, changed = count, now
                allowed = max(self.patience.least, self.patience.times * longest) if beats else self.patience.start
                if now - changed > allowed:
                    self.on_message(f"no worker has given a sign of life for {now - changed:.0f} s, they are replaced")
                    return
            self._hear(desk)

    def _hear(self, desk: Any) -> int:
        """Takes over what the workers have reported, and tells the signs of life they have given so far."""
        import ray

        found = ray.get(desk.told.remote())
        self.deaths, self.doubts = found.deaths, found.doubts
        for line in found.lines:
            self.on_message(line)
        return found.beats

    def _commit(self, rows: list[Row]) -> None:
        kept = [row for row in rows if row.request.index in self.wanted]
        if kept:
            self.folder.ledger.commit(kept)
            self.wanted -= {row.request.index for row in kept}
            self.new += len(kept)
            self.on_commit(len(kept))

    @contextmanager
    def _explained(self, desk: Any) -> Iterator[None]:
        """What a worker refused is told as it said it; what Ray says, in a sentence."""
        import ray

        try:
            yield
        except (Refused, Missing, GateFailed):
            raise
        except Exception as error:
            if self.is_stopping():
                return
            refusal = None
            with suppress(Exception):
                refusal = ray.get(desk.told.remote(), timeout=CONNECT_SECONDS).refusal
            if refusal:
                name, cause, remedy = refusal
                raise REFUSALS[name](cause, remedy) from error
            if "No module named 'datasetdm_fast'" in str(error):
                raise Missing(
                    f"--cluster {self.config.cluster}: its machines have no datasetdm_fast", NOTHING_HERE
                ) from error
            raise Missing(
                f"{self.config.out}: Ray ended the run ({type(error).__name__}: {_first_line(str(error))})",
                "Run the same line again: it goes on where it stopped.",
            ) from error

    def close(self, seconds: float) -> Result:
        """The result, once the index files are there."""
        folder, number = Path(self.config.out), count_images(self.config)
        if self.folder is None:
            return look(folder, number, 0, seconds)
        clean(folder)  # what workers that were killed had half-written
        self.folder.rebuild()
        if self.store:
            self.store.complete(folder)
        return result.result_of(folder, number, self.folder.ledger, self.new, seconds)

    def __enter__(self) -> RayDriver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.close()


def dataset(items: list[dict[str, Any]], setup: RayWorkerSetup, pool: Pool) -> Any:
    """Rows of these batches, to be made where it is iterated over; Ray starts the workers, restarts them and repeats
    what they had.
    """
    import ray.data

    each = min(max(len(items) // (BLOCKS * pool.most), 1), LARGEST_BLOCK)
    size = {"size": pool.most} if pool.least == pool.most else {"min_size": pool.least, "max_size": pool.most}
    crew = ray.data.ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=2)
    blocks = ray.data.from_items(items, override_num_blocks=-(-len(items) // each))
    return blocks.map_batches(Worker, fn_constructor_args=(setup,), batch_size=None, compute=crew, **pool.resources)


def received(found: Any) -> Iterator[list[Row] | None]:
    """The rows of every block as it comes, and None after a while without one; an error of the workers is raised."""
    arrived: queue.Queue[Any] = queue.Queue()

    def receive() -> None:
        try:
            for block in found.iter_batches(batch_size=None, prefetch_batches=0):
                for rows in block["rows"]:
                    arrived.put(rows)
            arrived.put(StopIteration())
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=receive, name="rows", daemon=True).start()
    while True:
        try:
            rows = arrived.get(timeout=SECONDS_BETWEEN_POLLS)
        except queue.Empty:
            yield None
            continue
        if isinstance(rows, StopIteration):
            return
        if isinstance(rows, BaseException):
            raise rows
        yield rows
