"""Processes of a run in shards on a Ray cluster, which is joined or started here: Ray places an actor a GPU or a
machine, and restarts one that ends.
"""

import logging
import os
import re
import socket
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.cores import count_cores
from datasetdm_fast.engine.backbones.fitting import first_line
from datasetdm_fast.errors import Missing, Refused, Stop
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, is_url, shard_place
from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.claims import free_claims
from datasetdm_fast.runs.workers.devices import Pool, pool_of
from datasetdm_fast.runs.workers.shard_worker import ShardRank, ShardWorker, files_of_shard, open_shards
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.version import __version__

RETRIES = 2  # by Ray of an actor and a call; a machine may use them up before Ray knows it ended; another actor follows
MOST_ACTORS = 3  # in a row without a shard, after which a place stays empty
SECONDS_BETWEEN_POLLS = 0.25
ALL_ADDRESSES = "Ray listens on all addresses of this machine until the run ends, and obeys only who has its token"
SEE_LOGS = "See Ray's logs of its workers; the same command resumes the run."
INSTALL = "Install it on every machine of the cluster: pip install 'datasetdm-fast[ray]'"


def run_on_cluster(workers: WorkerSettings, spec: RunSpec, place: ShardPlace, callbacks: Callbacks) -> None:
    """Returns as run_ranks does; Ray is called in a thread, so that the main one receives a signal at any moment."""
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(1, "ray") as thread:
        try:
            thread.submit(_run, workers, spec, place, callbacks, name).result()
        except Stop:
            if not callbacks.is_stopping():
                raise
        finally:  # Ray has ended the actors of this driver
            free_claims(place, name, files_of_shard, died=False)


def _run(workers: WorkerSettings, spec: RunSpec, place: ShardPlace, callbacks: Callbacks, name: str) -> None:
    with join_cluster(workers.cluster, workers.ranks, place.name):
        import ray

        if address_of(workers.cluster) is None:
            callbacks.on_message(ALL_ADDRESSES)
        pool = pool_of(workers, spec.engine.device, spec.engine.threads, list(_machines().values()))
        spec = replace(spec, engine=replace(spec.engine, threads=pool.threads))
        where = place.name if is_url(place.name) else str(Path(place.name).absolute())
        options = {"scheduling_strategy": "SPREAD", "max_restarts": RETRIES, "max_task_retries": RETRIES}
        worker = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, **options)(RayWorker)
        seen: Mapping[str, Mapping[str, float]] = {}
        calls: dict[Any, tuple[Any, int, int]] = {}
        begun = committed = 0

        def begin(number: int, deaths: int = 0) -> None:
            rank = ShardRank(number, max(_count(pool, workers, seen), number + 1), name)
            actor = worker.remote(spec, where, rank, callbacks.on_start, __version__)
            calls[actor.make_next.remote()] = actor, number, deaths

        while not callbacks.is_stopping():
            machines = _machines()
            for machine in seen.keys() - machines:  # its actors may wait long for room, and others have it now
                callbacks.on_message("a machine has left the cluster: what it made is made again")
                free_claims(place, machine, files_of_shard, died=False)
            seen = machines
            while begun < _count(pool, workers, seen):
                begin(begun)
                begun += 1
            for call in ray.wait(list(calls), timeout=SECONDS_BETWEEN_POLLS)[0]:
                (actor, number, deaths), result = calls.pop(call), _read(call)
                if result is None:
                    return
                if isinstance(result, int):
                    committed += result
                    callbacks.on_commit(result)
                    calls[actor.make_next.remote()] = actor, number, 0
                    continue
                ray.kill(actor)  # as the next one needs its room
                if isinstance(result, str) and deaths + 1 < MOST_ACTORS:
                    callbacks.on_message(f"worker {number} ended again and again, it is replaced")
                    begin(number, deaths + 1)
                    continue
                stop = Missing(f"worker {number} {result}", SEE_LOGS) if isinstance(result, str) else result
                if not (isinstance(stop, Missing) and calls and (committed or deaths)):
                    raise stop
                callbacks.on_message(f"{stop.cause}; the others go on")


def _machines() -> dict[str, dict[str, float]]:
    """The resources of the machines of the cluster."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _count(pool: Pool, workers: WorkerSettings, machines: Mapping[str, Mapping[str, float]]) -> int:
    """The actors that were asked for, or that the cluster has room for now."""
    if workers.ranks or workers.gpus.isdecimal():
        return pool.workers
    room = (int(each.get("GPU", 0)) if pool.gpus else each.get("CPU", 0) >= 1 for each in machines.values())
    return max(pool.workers, sum(room))


def _read(call: Any) -> int | Stop | str | None:
    """What a call returned, or how its actor ended."""
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayError as error:
        if "No module named 'datasetdm_fast'" in str(error):
            return Missing("a machine of the cluster has no datasetdm_fast", INSTALL)
        return f"ended ({first_line(error)})"


class RayWorker:
    """An actor that makes shards."""

    def __init__(self, *arguments: Any):
        self._shards, self._has_made = _make_shards(*arguments), False

    def make_next(self) -> int | Stop | None:
        """The samples of a shard that it has made, what it refuses, or None once nothing is missing."""
        try:
            made = next(self._shards, None)
        except Exception as error:
            traceback.print_exc()
            if self._has_made and (isinstance(error, Missing) or not isinstance(error, Stop)):
                os._exit(1)  # it has worked before, so Ray starts another process in its place
            return error if isinstance(error, Stop) else Missing(f"{socket.gethostname()}: {error!r}", SEE_LOGS)
        self._has_made = True
        return made


def _make_shards(
    spec: RunSpec, where: str, rank: ShardRank, on_start: Callable[[], None] | None, version: str
) -> Iterator[int]:
    import ray

    if on_start:
        on_start()
    if version != __version__:
        raise Missing(f"a machine of the cluster has datasetdm_fast {__version__}, the driver {version}", INSTALL)
    place, machine = shard_place(where), ray.get_runtime_context().get_node_id()
    rank = replace(rank, name=f"{rank.name} {machine}")
    yield from ShardWorker(open_shards(spec, place), place, rank, Callbacks()).work()


PORT = 6379  # of a head node, where none is named
CLIENT_PORT = 10001  # of Ray's client, through which no run goes
CONNECT_SECONDS = 10.0
HTTP2_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty frame; its fourth byte is its type, and each side begins with one
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS
TOKEN, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path(os.path.expanduser("~/.ray/auth_token"))
FIRST_WITH_TOKEN = (2, 52)  # version of Ray
STORE_BYTES = 2**28  # of shared memory for a Ray of our own: only rows travel through it


def address_of(text: str) -> str | None:
    """HOST:PORT that --cluster, or RAY_ADDRESS where --cluster names none, stands for; None for a Ray of our own."""
    named = text if text != "ray" else os.environ.get("RAY_ADDRESS", "")
    if named in ("", "local"):
        return None
    written = named if text != "ray" or "://" in named else f"ray://{named}"
    match = re.fullmatch(r"ray://(\[[\da-fA-F:.]+\]|[^\s/?#@:\[\]]+)(?::(\d{1,5}))?/?", written)
    port = int(match[2] or PORT) if match else 0
    if not 0 < port < 2**16:
        raise Refused(
            f"--cluster {text}: {named!r} is not the address of a Ray cluster",
            "Write ray, or ray://HEAD:PORT with what `ray start --head` printed.",
        )
    if port == CLIENT_PORT:
        raise Refused(
            f"--cluster {text}: {port} is the port of Ray's client, which this package does not use",
            f"Name the head's own port, {PORT} as a rule.",
        )
    return f"{match[1]}:{port}"


@contextmanager
def join_cluster(cluster: str, ranks: int, place: str) -> Iterator[None]:
    """Within the block this process is a driver on the cluster, and Ray's threads cannot write to standard output."""
    address = address_of(cluster)
    if address:
        _knock(cluster, address)
    # Read by Ray when it is imported or started: nothing is reported to anybody, a head that does not answer is not
    # waited for long, a call that comes too late does not start a Ray of its own, and a signal prints no stack.
    os.environ.update(RAY_ENABLE_AUTO_CONNECT="0", RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
    # a Ray of our own would give its workers what every other process leaves over
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not address or any(name in os.environ for name in TOKEN) or TOKEN_FILE.exists():
        # a Ray of our own listens on all addresses of the machine; `ray start` asks for a token by default
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise Missing(f"--cluster {cluster}: {error}", "Install it with: pip install 'datasetdm-fast[ray]'") from error
    if not address:
        _require_token(cluster, ray.__version__)
    options = {"num_cpus": max(count_cores(), ranks), "object_store_memory": STORE_BYTES, "include_dashboard": False}
    options = {} if address else options
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            try:
                with mute_stderr():
                    ray.init(address or "local", logging_level=logging.CRITICAL, log_to_driver=False, **options)
            except Exception as error:
                raise _refusal(cluster, address, error) from error
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            yield
        except ray.exceptions.RayError as error:
            raise Missing(
                f"{place}: Ray ended the run ({type(error).__name__}: {first_line(error)})",
                "Run the same command again: it resumes.",
            ) from error
        finally:
            ray.shutdown()


def _require_token(cluster: str, version: str) -> None:
    """Refuses to start a Ray that anybody in the network could send commands to."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < FIRST_WITH_TOKEN:
        raise Missing(
            f"--cluster {cluster}: Ray {version} would take commands from everybody in the network",
            "Install Ray 2.52 or newer, which asks for a token: pip install 'datasetdm-fast[ray]'",
        )
    if os.environ["RAY_AUTH_MODE"] != "token":
        raise Refused(
            f"--cluster {cluster}: RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}, so that everybody in the network "
            "could send commands",
            "Unset it, or start a cluster with `ray start --head` and name its address.",
        )


def _refusal(cluster: str, address: str | None, error: Exception) -> Missing:
    if "AuthToken" in "".join(traceback.format_exception(error)):
        return Missing(
            f"--cluster {cluster}: the cluster wants another token",
            "Put what `ray get-auth-token` prints on its head into RAY_AUTH_TOKEN.",
        )
    on_head = "Run this on a machine of the cluster, with the Python and the Ray it runs."
    remedy = on_head if address else "See what Ray says in /tmp/ray/session_latest/logs."
    return Missing(f"--cluster {cluster}: {first_line(error)}", remedy)


@contextmanager
def mute_stderr() -> Iterator[None]:
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


def _knock(cluster: str, address: str) -> None:
    """Refuses an address where nothing answers as a head does, before Ray waits for it for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as door:
            if os.environ.get("RAY_USE_TLS") != "1":
                door.sendall(HTTP2_GREETING)
                if door.recv(len(HTTP2_SETTINGS))[3:4] != HTTP2_SETTINGS[3:4]:
                    raise OSError("what answers is no head of a Ray cluster")
    except (OSError, UnicodeError, OverflowError) as error:
        raise Missing(
            f"--cluster {cluster}: no head at {address} ({getattr(error, 'strerror', None) or error})",
            "Start one there with `ray start --head`, or name the one that runs; --cluster ray starts one here.",
        ) from error
