"""One run on a Ray cluster of this machine: the bytes are those of one process, whatever happens to its workers and to
the driver.
"""

import gc
import importlib.util
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torchless
from run_steps import prepare
from skips import long_test
from test_ranks import still_running, tree

from datasetdm_fast import audit as audit_command
from datasetdm_fast import convert, generate
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.data import Quarantined
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery import showing
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder import document, object_store, page_files, seal
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import RunFolder, write_samples
from datasetdm_fast.runs.run_folder.object_store import PublishingFolder
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import RunConfig, WorkerSettings
from datasetdm_fast.runs.workers import ray_connection
from datasetdm_fast.runs.workers.devices import pool_of
from datasetdm_fast.runs.workers.queue import DIED, Owner
from datasetdm_fast.runs.workers.ray_connection import address_of
from datasetdm_fast.runs.workers.ray_driver import Cluster, RayDriver
from datasetdm_fast.runs.workers.ray_worker import Coordinator
from datasetdm_fast.runs.workers.spawn import Rank
from datasetdm_fast.runs.workers.worker import Callbacks, Worker
from datasetdm_fast.version import __version__

SAMPLES, BATCH = 48, 2  # a worker that is slow to write its first batch has made some more by then
HERE = Path(__file__).parent
TOKEN = "0123456789abcdef" * 4

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def config(out: Path, **changes) -> RunConfig:
    return RunConfig(**{"out": str(out), "number": SAMPLES, "batch_size": BATCH, "quiet": True, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of a single process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        write_missing(prepare(config(out)))
    return out


@pytest.fixture(scope="module")
def surroundings():
    """The environment of everything here that has to do with Ray; its folder has a short name, as that of a socket is
    limited.
    """
    folder = tempfile.mkdtemp(prefix="ray")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {
        **kept,
        "PYTHONPATH": str(HERE),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head(surroundings):
    """A cluster of this machine alone, with two places for workers, that wants a token as `ray start` does by
    default.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    line = [
        sys.executable,
        "-c",
        "from ray.scripts.scripts import main; main()",
        "start",
        "--head",
        "--block",
        "--port",
        str(port),
        "--num-cpus",
        "2",
    ]
    options = [
        "--include-dashboard",
        "false",
        "--disable-usage-stats",
        "--object-store-memory",
        "100000000",
        "--temp-dir",
        surroundings["RAY_TMPDIR"],
    ]
    environment = {**surroundings, "RAY_AUTH_MODE": "token"}
    process = subprocess.Popen(
        [*line, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not answers(port):
        assert process.poll() is None and time.monotonic() < end, (
            process.stdout.read() if process.poll() is not None else "Ray did not start"
        )
        time.sleep(0.2)
    yield SimpleNamespace(address=f"ray://127.0.0.1:{port}", process=process)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


PROGRAM = """
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import troubled
from datasetdm_fast import generate
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.runs.workers import heartbeat, ray_driver

if __name__ == "__main__":
    run = ray_driver.run_on_cluster
    slow = {name: value for name, value in os.environ.items() if name.startswith("TROUBLED")}
    changes = {"on_start": partial(troubled.install, slow), "patience": heartbeat.Patience(start=120, least=3, times=0)}
    ray_driver.run_on_cluster = lambda *options: run(*options[:-1], replace(options[-1], **changes))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands on that it is ignored
    command = generate.main.__wrapped__
    sys.exit(run_command(lambda arguments: Path("begun").touch() or command(arguments)))
"""


@pytest.fixture
def command(tmp_path, surroundings):
    """Starts the generate command with stub workers, in a session of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = []

    def start(*arguments, **environment):
        line = [
            sys.executable,
            str(tmp_path / "program.py"),
            "--out",
            str(tmp_path / "run"),
            "--number",
            str(SAMPLES),
            "--batch-size",
            str(BATCH),
            *arguments,
        ]
        everything = {**surroundings, **environment}
        begun.append(
            subprocess.Popen(
                line,
                cwd=tmp_path,
                env=everything,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def pictures(out: Path) -> int:
    return len(list((out / "images").glob("0*.png")))


def wait_for(out: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while pictures(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {count} samples came to be in {out}"
        time.sleep(0.02)


def workers(parent: psutil.Process | subprocess.Popen) -> list[psutil.Process]:
    """The actors of the pool among the processes below this one."""
    return [
        process
        for process in psutil.Process(parent.pid).children(recursive=True)
        if "ray::RayWorker" in " ".join(process.cmdline())
    ]


@long_test
@with_ray
@pytest.mark.loopback
def test_interrupted_killed_and_with_a_worker_killed_a_run_ends_with_the_same_bytes(alone, head, command, tmp_path):
    """Ctrl-C, kill -9 of the driver and kill -9 of a worker, one after the other in one run; the same line goes on each
    time.
    """
    out, line = tmp_path / "run", ("--cluster", head.address, "--ranks", "2")
    process = command(*line, TROUBLED_SECONDS="1")
    wait_for(out, 2, process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (
        "samples are there; resume with: python -m datasetdm_fast.generate --out" in errors
        and "Traceback" not in errors
    )
    assert audit(out, threads=1).findings == [] and 2 <= pictures(out) < SAMPLES

    process = command(*line, TROUBLED_SECONDS="1")
    wait_for(out, pictures(out) + 2, process)
    process.kill()
    process.communicate()
    assert audit(out, threads=1).findings == [] and pictures(out) < SAMPLES

    process = command(*line, TROUBLED_SECONDS="1")
    wait_for(out, pictures(out) + 1, process)
    workers(head.process)[0].kill()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert tree(out) == tree(alone) and audit(out, threads=1).findings == []


PROMPTS = [f"a ball {k}" if k != 5 else "broken" for k in range(SAMPLES)]


@with_ray
@pytest.mark.loopback
def test_a_ray_of_its_own_fills_a_store_and_replaces_workers_that_hang(command, tmp_path):
    """The store ends with every byte of a run folder of one process, a sample that did not come out set aside as
    there; thumbnails and pictures, which need all images in one place, are drawn by the first look at a copy.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        write_missing(prepare(config(tmp_path / "alone", prompts=str(prompts))))
    line = ("--cluster", "ray", "--ranks", "2", "--prompts", prompts.name, "--store", f"file://{tmp_path}/store")
    process = command(*line, TROUBLED_SECONDS="0.4")
    wait_for(tmp_path / "store", 8, process)
    started = psutil.Process(process.pid).children(recursive=True)
    for worker in workers(process):
        worker.suspend()
    out, errors = process.communicate(timeout=180)
    assert (
        process.returncode == 4
        and "rank 0 has given no sign of life for" in errors
        and "rank 1 has given no sign of life for" in errors
        and "Ray listens on all addresses of this machine" in errors
        and f"1 of {SAMPLES} samples were quarantined" in errors
        and "look at them with: python -m datasetdm_fast.gallery " in errors
    ), errors
    store, alone = tree(tmp_path / "store"), tree(tmp_path / "alone")
    drawn = {
        page_files.SHEETS,
        page_files.sheet_name(0),
        *(name for name in alone if name.startswith("gallery/depth/")),
    }
    other = {name for name in store.keys() & alone.keys() if store[name] != alone[name]}
    assert alone.keys() - store.keys() == drawn and store.keys() <= alone.keys()
    assert other == {"gallery/run.js", seal.SEAL} and b'"sheet":null' in store["gallery/run.js"]
    assert audit(tmp_path / "store", threads=1).findings == []
    showing.show(tmp_path / "store")
    store = tree(tmp_path / "store")
    assert store.keys() == alone.keys()
    opened = {document.LEDGER, seal.SEAL}  # SQLite counts in its file how often that was written to
    assert {name for name in store if store[name] != alone[name]} <= opened
    assert not (tmp_path / "run" / "images").exists()
    with pytest.raises(Refused, match="its samples are in an object store"):
        audit(tmp_path / "run")
    with pytest.raises(Refused, match="--store not given: the samples of .* are at 'file://"):
        object_store.check_store(tmp_path / "run", "")
    assert still_running(started) == [], "Ray outlived its driver"


@pytest.mark.parametrize(
    ("version", "mode", "said"),
    [
        ("2.51.3", "token", "Ray 2.51.3 would take commands from everybody"),
        ("2.60.0", "disabled", "RAY_AUTH_MODE is 'disabled'"),
        ("2.52.0", "token", None),
    ],
)
def test_a_ray_of_its_own_asks_for_a_token(monkeypatch, version, mode, said):
    """It listens on all addresses of the machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises((Missing, Refused), match=said) if said else nullcontext():
        ray_connection._require_token("ray", version)


@pytest.mark.loopback
def test_an_address_nobody_answers_at_ends_the_command_at_once(command, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        begin = time.monotonic()
        process = command("--cluster", f"ray://127.0.0.1:{port}")
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and out == "" and time.monotonic() - begin < 30
    assert (
        errors.splitlines()[0] == f"--cluster ray://127.0.0.1:{port}: no head at 127.0.0.1:{port} (Connection refused)"
        and len(errors.splitlines()) == 2
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("answer", "told"),
    [(b"", "timed out"), (b"HTTP/1.0 400 Bad request\r\n", "what answers is no head of a Ray cluster")],
)
def test_a_port_of_something_else_is_no_head(monkeypatch, answer, told):
    monkeypatch.setattr(ray_connection, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            kept = server.accept()[0]
            kept.sendall(answer)
            kept.recv(1000)
            time.sleep(1)
            kept.close()

        threading.Thread(target=serve, daemon=True).start()
        with (
            pytest.raises(Missing, match=f"no head at 127.0.0.1:{port} .{told}"),
            ray_connection.join_cluster(f"ray://127.0.0.1:{port}", 0, Path("none")),
        ):
            pass


def test_without_ray_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert generate.main(["--cluster", "ray", "--out", str(tmp_path / "run")]) == 3
    out, errors = capsys.readouterr()
    assert (
        out == ""
        and len(errors.splitlines()) == 2
        and errors.splitlines()[1].endswith("pip install 'datasetdm-fast[ray]'")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "rey",
        "ray:/h",
        "ray://",
        "ray://:6379",
        "ray://h:0",
        "ray://h:99999",
        "ray://h:x",
        "ray://u@h",
        "ray://h/p",
        "http://h",
        "ray://h:10001",
    ],
)
def test_what_is_no_address_is_refused(text, tmp_path, capsys):
    assert generate.main(["--cluster", text, "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[0].startswith(f"--cluster {text}: ")


@pytest.mark.parametrize(
    ("text", "variable", "address"),
    [
        ("ray", "", None),
        ("ray", "local", None),
        ("ray", "10.0.0.1:7000", "10.0.0.1:7000"),
        ("ray", "ray://head:7000", "head:7000"),
        ("ray://head", "other:1", "head:6379"),
        ("ray://[::1]:7000", "", "[::1]:7000"),
    ],
)
def test_addresses(text, variable, address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address_of(text) == address


def pool_settings(device="auto", threads=0, **workers):
    return WorkerSettings(**workers), device, threads


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({}, [(8, 0)], (1, 0, 8, 8)),  # a worker a machine where there is no GPU
        ({"ranks": 2}, [(2, 0)], (2, 0, 1, 1)),
        ({"ranks": 4}, [(2, 0)], (4, 0, 0.5, 1)),
        ({"ranks": 3}, [(16, 0), (4, 0)], (3, 0, 4, 4)),  # fits into the smallest machine, and is a power of two
        ({}, [(4, 0), (96, 8), (96, 8)], (16, 1, 1, 8)),
        ({"gpus": "all"}, [(8, 1)], (1, 1, 1, 8)),
        ({"gpus": "800"}, [(4, 0)], (800, 1, 1, 4)),  # which the autoscaler brings
        ({"gpus": "800"}, [(96, 8)], (800, 1, 1, 8)),
        ({"gpus": "2"}, [(96, 8)], (2, 1, 1, 8)),
        ({"device": "cpu", "threads": 3}, [(96, 8)], (1, 0, 3, 3)),
    ],
)
def test_workers_for_the_machines_there_are(settings, nodes, expected):
    found = pool_of(
        *pool_settings(**settings),
        [{"CPU": float(cpus), "GPU": float(gpus)} if gpus else {"CPU": float(cpus)} for cpus, gpus in nodes],
    )
    assert (found.workers, found.gpus, found.cpus, found.threads) == expected


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"gpus": "0,2"}, Refused),
        ({"gpus": "0"}, Refused),
        ({"gpus": "2", "ranks": 2}, Refused),
        ({"gpus": "all"}, Missing),
    ],
)
def test_workers_that_cannot_be_are_refused(settings, kind):
    with pytest.raises(kind, match="--gpus"):
        pool_of(*pool_settings(**settings), [{"CPU": 4.0}])


@pytest.fixture
def made(monkeypatch, tmp_path):
    torchless.install(monkeypatch.setattr)
    return prepare(config(tmp_path / "none"))


def queue_of(batches: list[int], places: int = 1, died: Sequence[int] = ()) -> Coordinator:
    """A queue of so many places; a process died at the first of them while it made each batch of `died`."""
    queue = Coordinator()
    for slot in range(places):
        queue.enter(Owner(f"rank {slot}", slot))
    queue.open(batches, frozenset(range(SAMPLES)), {})
    for batch in died:
        queue.execute("INSERT INTO failures VALUES (?, 0, ?)", batch, DIED)
    return queue


def work(made: Job, queue: Coordinator, out: Path, slot: int = 0, present: set[int] = frozenset()) -> list:
    """The rows of a worker in this process, which ends where it would wait for others."""
    idle = []
    rows = partial(queue.report, slot, "rows")
    folder = PublishingFolder(out, "", made.document, lambda *ends: queue.required_indices(*ends) - present, rows)
    owner = Owner(f"rank {slot}", slot)
    callbacks = {"on_idle": lambda: idle.append(True), "is_stopping": lambda: bool(idle)}
    Worker(made, folder, queue, owner, **callbacks, has_ledger=False).work()
    assert owner not in queue.owners()
    return [row for _, kind, rows in queue.reports() if kind == "rows" for row in rows]


def test_what_ended_three_processes_is_set_aside_and_the_rest_is_made(made, tmp_path):
    queue = queue_of([0, 1, 2, 3], died=(1, 1, 3, 3, 3))
    rows = work(made, queue, tmp_path / "out", present={1, 3, 5, 7})
    assert [row.request.index for row in rows] == [0, 4, 2, 6]  # what was begun before comes last, alone
    assert [row.reason for row in rows] == ["", "", "", "3 processes ended while they made its batch"]
    pictures = [path.name for path in sorted((tmp_path / "out" / "images").iterdir())]
    assert queue.is_over() and pictures == ["00000000.png", "00000002.png", "00000004.png"]


@pytest.mark.parametrize(
    ("places", "asked", "kept"),
    [
        (1, [0], [2]),  # nobody else could say anything
        (2, [0, 1], [0, 2]),  # two places agree
        (2, [0, 0], [0, 0]),  # the other place may still come
    ],
)
def test_numbers_that_are_not_finite_are_made_again_elsewhere(monkeypatch, tmp_path, places, asked, kept):
    torchless.install(monkeypatch.setattr)
    made, queue = prepare(config(tmp_path / "none", prompts="broken", number=2)), queue_of([0], places)
    found = [work(made, queue, tmp_path / "out", slot) for slot in asked]
    assert all("not finite" in row.reason or "NaN" in row.reason for rows in found for row in rows)
    assert [len(rows) for rows in found] == kept and queue.failures(0, DIED) == []
    if not queue.is_over():
        queue.leave(Owner("rank 1", 1))  # no other is to be had
        assert len(work(made, queue, tmp_path / "out")) == 2


def test_a_place_that_was_at_fault_costs_a_second_attempt_and_nothing_else(monkeypatch, made, tmp_path):
    queue, generate = queue_of([0, 1], 2), driver.generate
    monkeypatch.setattr(
        driver,
        "generate",
        lambda batches, *rest: ((batch, [Quarantined(one, "NaN") for one in batch.requests]) for batch in batches),
    )
    assert work(made, queue, tmp_path / "out", 0) == []
    monkeypatch.setattr(driver, "generate", generate)
    assert [row.reason for row in work(made, queue, tmp_path / "out", 1)] == [""] * 4


def test_a_worker_that_is_told_to_stop_begins_nothing_more(made, tmp_path):
    queue = queue_of([0, 1], died=[1])
    queue.stop()
    assert work(made, queue, tmp_path / "out") == [] and queue.is_over() and not queue.is_complete()


@pytest.mark.parametrize(
    "asked, count",
    [
        ({"keep": "trusted", "number": 9}, 9),
        ({"accept": "presence >= 0.5", "per_class": 3, "classes": ("ball", "star")}, 6),
    ],
)
def test_samples_that_are_set_aside_are_made_up_for_round_by_round(monkeypatch, tmp_path, asked, count):
    """The driver adds batches once all are made, as the workers know no more of the run than their own samples."""
    torchless.install(monkeypatch.setattr)
    one, out = config(tmp_path / "one", task=("semantic", "instance"), **asked), tmp_path / "run"
    write_missing(prepare(one))
    settings = replace(one, out=str(out))
    cluster = Cluster(WorkerSettings(cluster="ray"))
    driver, queue = RayDriver(cluster, read_spec(settings), Callbacks(lambda made: [])), Coordinator()
    driver.queue, driver.ranks, driver.document = queue, [Rank(0), Rank(1)], None
    made, rounds = prepare(settings), 0
    driver.handle(driver.ranks[0], "planned", made, __version__, [])
    while not queue.is_complete():
        rounds += 1
        owner = Owner(f"rank {rounds % 2}", rounds % 2)
        folder = PublishingFolder(
            out, "", made.document, queue.required_indices, partial(queue.report, owner.slot, "rows")
        )
        stop = {"is_stopping": queue.is_all_made}
        Worker(made, folder, queue, owner, **stop, has_ledger=False).work()
        driver._receive()
    assert driver.finish(0).is_complete and driver.committed == count and rounds > 2
    driver.close()
    assert tree(out) == tree(tmp_path / "one") and audit(out, threads=1).findings == []


def test_a_worker_that_replaces_another_makes_what_that_had_begun_last():
    queue = queue_of([0, 1])
    before, after = Owner("before", 0), Owner("after", 0)
    queue.enter(before)
    assert queue.take(before) == 0 and queue.leave(before, DIED) == 1
    queue.enter(after)
    assert list(queue.owners()) == [after] and queue.failures(0, DIED) == [0] and queue.take(after) == 1
    assert queue.take(after, is_fresh=False) == 0
    assert queue.reports() == [[0, "message", "batch 0 is retried, as the process that had it has ended"]]


def test_one_process_at_work_makes_the_plan():
    queue, first, second = Coordinator(), Owner("first", 0), Owner("second", 1)
    for owner in (first, second):
        queue.enter(owner)
    assert [queue.is_planner(owner) for owner in (first, second, first)] == [True, False, False]
    queue.leave(first, DIED)
    assert queue.is_planner(second) and not queue.is_planner(second)


def test_a_store_is_a_place_all_processes_reach(tmp_path, capsys):
    for url, told in (
        ("memory://run", "processes do not share memory"),
        ("nothing://run", "Protocol not known"),
    ):
        with pytest.raises(Refused, match=told):
            object_store.ObjectStore(url)
    assert generate.main(["--out", str(tmp_path / "run"), "--store", "s3://bucket/run"]) == 2
    assert "only the workers of a cluster write there" in capsys.readouterr().err


def test_a_store_that_fsspec_reaches_holds_what_it_was_given(monkeypatch, made, tmp_path):
    """In memory, which is what fsspec offers for it: the same calls as for any bucket."""
    import fsspec

    monkeypatch.setattr(object_store.ObjectStore, "_protocols", ("bucket",))
    bucket = object_store.ObjectStore("memory://bucket/run")
    rows = write_samples([torchless.drawn(made.plan.request(0), made.recipe.tasks)], {}, made.document, bucket.publish)
    there = fsspec.filesystem("memory")
    for name, stored in rows[0].files.values():
        assert len(there.cat_file(f"/bucket/run/{name}")) == stored.size
    assert bucket.read("images/none.png") is None
    with RunFolder(made.folder, made.document) as folder:
        folder.add([torchless.drawn(made.plan.request(0), made.recipe.tasks)], {})
        finish_run(folder)
    bucket.complete(made.folder)
    for name in (document.DOCUMENT, document.LEDGER, seal.SEAL, *seal.rebuilt_files(made.folder, made.document)):
        assert bucket.read(name) == (made.folder / name).read_bytes(), name
    monkeypatch.setattr(type(there), "size", lambda self, path: 1)
    with pytest.raises(Missing, match="it is incomplete"):
        bucket.publish({"a": b"content"})
    there.rm("/bucket", recursive=True)


def test_a_misspelt_bucket_is_not_created(monkeypatch):
    import fsspec

    monkeypatch.setattr(object_store.ObjectStore, "_protocols", ("bucket",))
    bucket, there = object_store.ObjectStore("memory://buket/run"), fsspec.filesystem("memory")
    with pytest.raises(Refused, match="there is no bucket 'buket'") as stop:
        bucket.require_bucket(is_made=False)
    assert "--make-bucket" in stop.value.remedy and not there.exists("/buket")
    bucket.require_bucket(is_made=True)
    bucket.require_bucket(is_made=False)
    there.rmdir("/buket")


@pytest.mark.parametrize("url", ["file://{}/store/run", "memory://bucket/run"])
def test_a_new_run_does_not_replace_another_one_in_its_store(url, monkeypatch, tmp_path):
    import fsspec

    url, there = url.format(tmp_path), fsspec.filesystem("memory")
    if url.startswith("memory"):
        monkeypatch.setattr(object_store.ObjectStore, "_protocols", ("bucket",))
        there.mkdir("/bucket")
    cluster, new = Cluster(WorkerSettings(cluster="ray"), url), read_spec(config(tmp_path / "new"))
    RayDriver(cluster, new, Callbacks(list)).close()  # whose folder is not there yet
    object_store.ObjectStore(url).publish({"images/.00000000.png.1.part": b"half"})
    object_store.ObjectStore(url).publish({"images/00000000.png": b"of another"})
    with pytest.raises(Refused, match="it holds files of another run") as stop:
        RayDriver(cluster, new, Callbacks(list))
    assert "--out that this one was started with" in stop.value.remedy
    if url.startswith("memory"):
        there.rm("/bucket", recursive=True)


@pytest.mark.parametrize("place", ["url", "folder"])
def test_a_run_in_a_store_is_read_audited_and_converted_from_there(monkeypatch, made, tmp_path, capsys, place):
    import fsspec

    monkeypatch.setattr(object_store.ObjectStore, "_protocols", ("bucket",))
    url, there = "memory://bucket/my run", fsspec.filesystem("memory")
    bucket = object_store.ObjectStore(url)
    samples = [torchless.drawn(made.plan.request(k), made.recipe.tasks) for k in range(2)]
    with RunFolder(made.folder, made.document) as folder:
        rows = write_samples(samples, {}, made.document, bucket.publish)
        bucket.note(made.folder)
        folder.unseal()
        folder.ledger.commit(rows)
        finish_run(folder)
    bucket.complete(made.folder)
    name = url if place == "url" else str(made.folder)
    run = open_run(name)
    assert len(run) == 2 and not (made.folder / "images").exists()
    assert (run[1].image == samples[1].image).all() and run[0].label(made.recipe.tasks[0]) is not None
    assert (pickle.loads(pickle.dumps(run))[0].image == samples[0].image).all()
    assert audit_command.main([name, "--quiet"]) == 0 and f"{name}: whole, 2 of " in capsys.readouterr().out
    line = [name, "--to", "coco", "--out", str(tmp_path / "export"), "--quiet"]
    assert convert.main(line) == 0 and len(list((tmp_path / "export").rglob("*.png"))) >= 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "export").rglob("*")}
    assert convert.main(line) == 0 and {path: path.stat().st_mtime_ns for path in before} == before
    assert convert.main([url, "--to", "coco"]) == 2 and "--out is missing" in capsys.readouterr().err
    there.pipe_file("/bucket/my run/images/00000001.png", there.cat_file("/bucket/my run/images/00000001.png")[:-9])
    assert audit_command.main([name, "--quiet"]) == 4
    mended = "DIR --only 00000001 (DIR: the --out of the run, which keeps its ledger)\n"
    told = capsys.readouterr().out
    assert told.endswith(mended) if place == "url" else told.endswith(f"--out {made.folder} --only 00000001\n")
    there.rm("/bucket", recursive=True)
    with pytest.raises((Refused, Missing)):
        print(open_run(name)[0].image)
    copies = run.copies.folder
    del run
    gc.collect()
    assert not copies.exists()


def test_a_store_on_a_disk_keeps_nothing_of_workers_that_were_killed(made, tmp_path):
    left = tmp_path / "store" / "depth" / ".00000003.png.12345.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with RunFolder(made.folder, made.document) as folder:
        finish_run(folder)
    object_store.ObjectStore(f"file://{tmp_path}/store").complete(made.folder)
    assert not left.exists() and (tmp_path / "store" / seal.SEAL).is_file()


@with_ray
def test_the_cluster_of_the_readme_is_one_that_ray_accepts():
    import json

    import jsonschema
    import ray
    import yaml

    described = yaml.safe_load((HERE.parent / "docs" / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(
        described,
        json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8")),
    )
    assert described["head_node_type"] in described["available_node_types"]
