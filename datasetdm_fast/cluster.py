"""One run on a Ray cluster: the frozen plan as Ray Data `map_batches`, an actor a GPU; workers publish the files, this process alone commits the rows."""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from datasetdm_fast import __version__, driver
from datasetdm_fast.command_line.ending import report
from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import Batch, Sample, SetAside
from datasetdm_fast.driver import Result
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.job import Job, adopt, check_room, compose, count_images, count_rows
from datasetdm_fast.leases import MOST_FAILURES
from datasetdm_fast.prompts import Source, read_source
from datasetdm_fast.ranks import MOST_DEATHS, USUAL, Patience, Refusals, cores, look
from datasetdm_fast.run_folder import object_store
from datasetdm_fast.run_folder.document import read_document
from datasetdm_fast.run_folder.folder import RunFolder, clean, write_samples
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.share import BEAT

PORT = 6379  # of a head node, where none is named
CLIENT_PORT = 10001  # of Ray's client, which Ray Data does not run through
CONNECT_SECONDS = 10.0
HTTP2_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty frame; its fourth byte says what it is, and each side begins with one
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS
TOKEN, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"
LOOK = 0.25  # seconds between two looks at what the workers say
STORE_BYTES = 2**28  # of shared memory for a Ray of our own: only rows travel through it
LARGEST_BLOCK = 8  # batches a worker is handed at once; it samples one while it labels the one before
BLOCKS = 16  # a worker is handed at least, so that none is waited for long
MOST_ROUNDS = 3  # without a single commit, after which the run ends
ENDED = f"{MOST_FAILURES} processes ended while they made its batch"
NOTHING_HERE = "Install it on every machine of the cluster: pip install datasetdm_fast[ray]"


@dataclass(frozen=True)
class Order:
    """What a worker hears when it is about to make a batch."""

    deaths: int  # of processes that had begun it
    is_stopping: bool


@dataclass
class Desk:
    """The one place all workers report to; it runs beside the driver and computes nothing."""

    deaths: dict[int, int] = field(default_factory=dict)  # batch -> processes that began it and have not ended it
    doubts: dict[int, list[str]] = field(default_factory=dict)  # batch -> places where its numbers were not finite
    starts: int = 0  # of workers, since a batch was last ended
    beats: int = 0
    is_stopping: bool = False
    refusal: tuple[str, str, str] | None = None  # its kind, cause and remedy
    lines: list[str] = field(default_factory=list)

    def enter(self) -> int:
        self.starts += 1
        return self.starts

    def begin(self, batch: int, is_alone: bool) -> Order:
        """Whether and how to make the batch; one that was begun before is only begun again with nothing beside it."""
        deaths = self.deaths.get(batch, 0)
        if not self.is_stopping and (is_alone or not deaths):
            self.deaths[batch] = deaths + 1
            if deaths:
                self.lines.append(f"batch {batch} is begun again, the process that had it has ended")
        self.beats += 1
        return Order(deaths, self.is_stopping)

    def end(self, batch: int) -> None:
        self.deaths.pop(batch, None)
        self.starts = 0
        self.beats += 1

    def doubt(self, batch: int, place: str) -> bool:
        """Whether numbers that are not finite may be the fault of a place, so that another one is to make the batch, in the next round."""
        before = self.doubts.setdefault(batch, [])
        if set(before) - {place} or len(before) == MOST_ROUNDS - 1:
            return False
        before.append(place)
        self.lines.append(f"batch {batch} has numbers that are not finite, it is made again")
        return True

    def beat(self) -> None:
        self.beats += 1

    def refuse(self, kind: str, cause: str, remedy: str) -> None:
        self.refusal = self.refusal or (kind, cause, remedy)

    def stop(self) -> None:
        self.is_stopping = True

    def told(self) -> Told:
        lines, self.lines = self.lines, []
        return Told(self.beats, lines, self.refusal, self.deaths, self.doubts)


class Told(NamedTuple):
    """What the driver hears."""

    beats: int  # signs of life so far
    lines: list[str]  # for the screen, since it last asked
    refusal: tuple[str, str, str] | None  # why a worker cannot go on
    deaths: dict[int, int]
    doubts: dict[int, list[str]]


@dataclass(frozen=True)
class Setup:
    """What a worker is told at its start."""

    config: RunConfig
    source: Source
    most: int  # workers there may be
    places: int  # devices, or machines without one, that they are on
    desk: Any
    document: Mapping[str, Any] | None = None  # run.json, once it is known
    first: Callable[[], None] | None = None  # called before anything else
    where: str = field(default_factory=os.getcwd)  # from where relative paths are meant

    def begin(self) -> None:
        """To be called first of all on the worker's machine."""
        with suppress(OSError):  # a machine without that folder needs paths that are not relative to it
            os.chdir(self.where)
        if self.first:
            self.first()


class Worker:
    """An actor of the pool: it makes the batches of a block, publishes their files and returns their rows."""

    def __init__(self, setup: Setup):
        import ray

        setup.begin()
        self.desk, self.beaten, self.places = setup.desk, 0.0, setup.places
        here = ray.get_runtime_context()
        self.place = "/".join([here.get_node_id(), *here.get_accelerator_ids().get("GPU", ())])
        starts = ray.get(self.desk.enter.remote())
        if starts > setup.most * MOST_DEATHS:
            raise RuntimeError(f"{starts} processes have started, and none has made a batch")
        try:
            self.job = adopt(compose(setup.config, setup.source, setup.document), setup.document)
            self.publish = object_store.publisher(setup.config)
        except (Refused, Missing, GateFailed) as stop:
            self._refuse(stop)
            raise

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        rows: list[Row] = []
        try:
            wanted = {int(batch): {int(index) for index in indices} for batch, indices in zip(block["batch"], block["wanted"], strict=True)}
            for batch, results in self._results(list(wanted)):
                kept = [] if self._is_doubtful(batch.index, results) else [result for result in results if result.request.index in wanted[batch.index]]
                rows += write_samples(kept, driver.facts_of(self.job.recipe, batch), self.job.config.image_format, self.publish)
                self.desk.end.remote(batch.index)
        except (Refused, Missing, GateFailed) as stop:
            self._refuse(stop)
            raise
        except Exception as error:  # a CUDA context that has failed once never works again: the process ends, and Ray starts another
            report(error)
            os._exit(1)
        found = np.empty(1, object)
        found[0] = rows
        return {"rows": found}

    def _results(self, batches: Sequence[int]) -> Iterator[tuple[Batch, list[Sample | SetAside]]]:
        """Batches nobody has failed together, the others one by one, so that another failure has one reason."""
        plan, engine, recipe, begun_before = self.job.plan, self.job.engine, self.job.recipe, []

        def fresh() -> Iterator[Batch]:
            for batch in batches:
                order = self._begin(batch)
                if order.is_stopping:
                    return
                if order.deaths:
                    begun_before.append(batch)
                else:
                    yield plan.batch(batch)

        yield from driver.generate(fresh(), engine, recipe, self._pulse)
        for number in begun_before:
            batch, order = plan.batch(number), self._begin(number, is_alone=True)
            if order.is_stopping:
                return
            if order.deaths >= MOST_FAILURES:
                yield batch, [SetAside(request, ENDED) for request in batch.requests]
            else:
                yield from driver.generate([batch], engine, recipe, self._pulse)

    def _is_doubtful(self, batch: int, results: Sequence[Sample | SetAside]) -> bool:
        is_whole = not any(isinstance(result, SetAside) and result.reason != ENDED for result in results)
        return not is_whole and self.places > 1 and self._doubt(batch)

    def _doubt(self, batch: int) -> bool:
        import ray

        return ray.get(self.desk.doubt.remote(batch, self.place))

    def _begin(self, batch: int, *, is_alone: bool = False) -> Order:
        import ray

        return ray.get(self.desk.begin.remote(batch, is_alone))

    def _pulse(self) -> None:
        now = time.monotonic()
        if now - self.beaten > BEAT:
            self.beaten = now
            self.desk.beat.remote()

    def _refuse(self, stop: Refused | Missing | GateFailed) -> None:
        import ray

        ray.get(self.desk.refuse.remote(type(stop).__name__, stop.cause, stop.remedy))


@dataclass(frozen=True)
class Pool:
    """How many workers there are, at least and at most, and what each of them asks the cluster for."""

    least: int
    most: int
    gpus: int
    cpus: float
    threads: int
    places: int  # devices, or machines without one

    @property
    def resources(self) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def pool_of(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """The workers a configuration asks for, on machines with these resources."""
    gpus, hosts = sum(int(node.get("GPU", 0)) for node in nodes), [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    if config.gpus and config.ranks:
        raise Refused(f"--gpus {config.gpus} --ranks {config.ranks}: there is one process a GPU", "Give one of the two.")
    if config.device != "cpu" and (config.gpus or gpus and not config.ranks):
        if config.gpus not in ("", "all") and not (config.gpus.isdecimal() and int(config.gpus)):
            raise Refused(f"--gpus {config.gpus}: a cluster chooses the GPUs itself", "Give their number, or all.")
        most = int(config.gpus) if config.gpus.isdecimal() else gpus
        if not most:
            raise Missing(f"--gpus {config.gpus}: the cluster has no GPU now", "Say how many it may bring up: --gpus N")
        return Pool(max(min(gpus, most), 1), most, 1, 1, config.threads or _power_of_two(sum(hosts) // max(gpus, 1)), most)
    workers = config.ranks or len(hosts)
    threads = config.threads or _power_of_two(min(sum(hosts) // workers, *hosts))
    return Pool(workers, workers, 0, threads if workers * threads <= sum(hosts) else sum(hosts) / workers, threads, min(workers, len(hosts)))


def _power_of_two(cores: int) -> int:
    """As work divided into equal parts rounds alike for most numbers of threads."""
    return 1 << max(cores, 1).bit_length() - 1


def address_of(text: str) -> str | None:
    """HOST:PORT that --cluster, or RAY_ADDRESS where --cluster names none, stands for; None for a Ray of our own."""
    named = text if text != "ray" else os.environ.get("RAY_ADDRESS", "")
    if named in ("", "local"):
        return None
    wrong = Refused(f"--cluster {text}: {named!r} is no address of a Ray cluster", "Write ray, or ray://HEAD:PORT with what `ray start --head` printed.")
    try:
        parts = urlsplit(named if text != "ray" or "://" in named else f"ray://{named}")
        host, port = parts.hostname, PORT if parts.port is None else parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme != "ray" or not host or not port or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise wrong
    if port == CLIENT_PORT:
        raise Refused(f"--cluster {text}: {port} is the port of Ray's client, which is no part of this", f"Name the head's own port, {PORT} as a rule.")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def joined(config: RunConfig) -> Iterator[list[dict[str, float]]]:
    """Within the block this process is a driver on the cluster; the resources of its machines."""
    address = address_of(config.cluster)
    if address:
        _knock(config, address)
    # Read by Ray when it is imported or started: nothing is reported to anybody, and a head that does not answer is not waited for long.
    # Nor does what is left of one round start a Ray of its own.
    os.environ.update(RAY_ENABLE_AUTO_CONNECT="0", RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1", RAY_BACKEND_LOG_LEVEL="fatal")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a Ray of our own would give its workers what every other process leaves over
    if address and (any(name in os.environ for name in TOKEN) or TOKEN_FILE.exists()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` asks for it by default, but Ray itself looks only where no address is given
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise Missing(f"--cluster {config.cluster}: {error}", "pip install datasetdm_fast[ray]") from error
    is_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    own = {"num_cpus": max(cores(), config.ranks), "object_store_memory": STORE_BYTES, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        with muted():
            ray.init(address or "local", logging_level=logging.CRITICAL, log_to_driver=False, **({} if address else own))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except Exception as error:
        ray.shutdown()
        raise _not_joined(config, address, error) from error
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # a batch may take as long as it takes; what hangs is found by its silence
        context.max_consecutive_actor_init_deaths = MOST_DEATHS
        yield nodes
    finally:
        ray.shutdown()


def _not_joined(config: RunConfig, address: str | None, error: BaseException) -> Missing:
    said = [str(error)]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
        said.append(str(error))
    if "AuthToken" in "".join(said):
        return Missing(f"--cluster {config.cluster}: the cluster wants another token", "Put what `ray get-auth-token` prints on its head into RAY_AUTH_TOKEN.")
    return Missing(
        f"--cluster {config.cluster}: {_first_line(said[0])}",
        "Run this on a machine of the cluster, with the Python and the Ray it runs." if address else "See what Ray says in /tmp/ray/session_latest/logs.",
    )


@contextmanager
def muted() -> Iterator[None]:
    """Within the block nothing reaches the screen, which Ray's native parts write to past Python."""
    sys.stderr.flush()
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def _knock(config: RunConfig, address: str) -> None:
    """Refuses an address where nothing answers as a head does, before Ray waits for it for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as door:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            door.sendall(HTTP2_GREETING)
            if len(answer := door.recv(len(HTTP2_SETTINGS))) > 3 and answer[3:4] == HTTP2_SETTINGS[3:4]:
                return
            why = "what answers is no head of a Ray cluster"
    except (OSError, UnicodeError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise Missing(
        f"--cluster {config.cluster}: no head at {address} ({why})",
        "Start one there with `ray start --head`, or name the one that runs; --cluster ray starts one here.",
    )


def _first_line(said: str) -> str:
    """What Ray says, without the colours and the stack it says it in."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    return (lines or ["Ray gives no reason"])[0][:300]


def run(
    config: RunConfig,
    *,
    describe: Callable[[Job], list[str]],
    told: Callable[[str], None] = lambda line: None,
    made: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
    patience: Patience = USUAL,
    first: Callable[[], None] | None = None,
) -> Result:
    """The run, made by the workers of a cluster; `told` hears what happens to them, `made` of every commit."""
    begin, office = time.perf_counter(), Office(config, describe, told, made, is_stopping, patience, first)
    with office:
        while office.is_open:
            with joined(config) as nodes:
                office.work(pool_of(config, nodes))
        return office.close(time.perf_counter() - begin)


class Office:
    """The driver's side of a run: it hands out what is lacking, round after round, and commits what comes back."""

    def __init__(
        self,
        config: RunConfig,
        describe: Callable[[Job], list[str]],
        told: Callable[[str], None],
        made: Callable[[int], None],
        is_stopping: Callable[[], bool],
        patience: Patience,
        first: Callable[[], None] | None,
    ):
        self.config, self.source = config, read_source(config)
        self.store = object_store.Store(config.store) if config.store else None
        self.describe, self.told, self.made, self.is_stopping, self.patience, self.first = describe, told, made, is_stopping, patience, first
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

        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote(dict(self.deaths), dict(self.doubts))
        config = replace(self.config, out=os.path.abspath(self.config.out), threads=pool.threads, quiet=True, gpus="", ranks=0)
        setup = Setup(config, self.source, pool.most, pool.places, desk, first=self.first)
        if self.folder is None and not self._open(setup, pool):
            return
        before = self.new
        self._listen(dataset(self._items(), replace(setup, document=self.folder.document), pool), desk)
        self.in_vain = 0 if self.new > before else self.in_vain + 1
        if self.wanted and not self.is_stopping() and self.in_vain == MOST_ROUNDS:
            raise Missing(
                f"{self.config.out}: the workers fell silent {MOST_ROUNDS} times in a row without a sample",
                "See their logs in /tmp/ray/session_latest/logs, then run the same line again: it goes on where it stopped.",
            )

    def _open(self, setup: Setup, pool: Pool) -> bool:
        """Lets a worker make the plan and opens the run folder with it; False where it is to stop before that."""
        import ray

        stored = read_document(Path(self.config.out))
        asked = ray.remote(max_retries=MOST_DEATHS, **pool.resources)(plan).remote(setup, stored, self.describe)
        with self._explained(setup.desk):
            while not ray.wait([asked], timeout=LOOK)[0]:
                if self.is_stopping():
                    return False
            kind, *content = ray.get(asked)
        if kind == "refused":
            name, cause, remedy = content
            raise Refusals[name](cause, remedy)
        job, lines, version = content
        if version != __version__:
            raise Missing(f"--cluster {self.config.cluster}: its machines have datasetdm_fast {version}, this one {__version__}", NOTHING_HERE)
        job = replace(job, config=self.config)
        if stored is not None:
            job = replace(adopt(job, stored), done=count_rows(self.config))
        if not self.store:
            check_room(job)
        for line in lines:
            self.told(line)
        self.job, self.folder = job, RunFolder(job.folder, job.document)
        if self.store:
            self.store.note(job.folder)
        self.wanted = driver.lacking(self.folder.ledger, job.plan.number, self.config.limit)
        self.folder.unseal()
        return True

    def _items(self) -> list[dict[str, Any]]:
        """Every batch that lacks samples, with these."""
        size, found = self.job.plan.batch_size, {}
        for index in sorted(self.wanted):
            found.setdefault(index // size, []).append(index)
        return [{"batch": batch, "wanted": found[batch]} for batch in driver.in_order(self.wanted, size)]

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
                    self.told(f"no worker has given a sign of life for {now - changed:.0f} s, they are replaced")
                    return
            self._hear(desk)

    def _hear(self, desk: Any) -> int:
        """Takes over what the workers have reported, and tells the signs of life they have given so far."""
        import ray

        found = ray.get(desk.told.remote())
        self.deaths, self.doubts = found.deaths, found.doubts
        for line in found.lines:
            self.told(line)
        return found.beats

    def _commit(self, rows: list[Row]) -> None:
        kept = [row for row in rows if row.request.index in self.wanted]
        if kept:
            self.folder.ledger.commit(kept)
            self.wanted -= {row.request.index for row in kept}
            self.new += len(kept)
            self.made(len(kept))

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
                raise Refusals[name](cause, remedy) from error
            if "No module named 'datasetdm_fast'" in str(error):
                raise Missing(f"--cluster {self.config.cluster}: its machines have no datasetdm_fast", NOTHING_HERE) from error
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
        return driver.result_of(folder, number, self.folder.ledger, self.new, seconds)

    def __enter__(self) -> Office:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.close()


def plan(setup: Setup, stored: Mapping[str, Any] | None, describe: Callable[[Job], list[str]]) -> tuple:
    """The job as a machine of the cluster has it, with lines about it and our version there; a refusal comes back as what it says."""
    setup.begin()
    try:
        job = compose(setup.config, setup.source, stored)
        return "ready", replace(job, engine=None), describe(job), __version__
    except (Refused, Missing, GateFailed) as stop:
        return "refused", type(stop).__name__, stop.cause, stop.remedy


def dataset(items: list[dict[str, Any]], setup: Setup, pool: Pool) -> Any:
    """Rows of these batches, to be made where it is iterated over; Ray starts the workers, restarts them and repeats what they had."""
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
            rows = arrived.get(timeout=LOOK)
        except queue.Empty:
            yield None
            continue
        if isinstance(rows, StopIteration):
            return
        if isinstance(rows, BaseException):
            raise rows
        yield rows
