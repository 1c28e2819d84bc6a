"""Runs in shards on a Ray cluster of this machine: the bytes are those of one process, whatever happens to its nodes
and to the driver. And run folders in an object store.
"""

import importlib.util
import os
import pwd
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torchless
from run_steps import prepare
from skips import long_test
from test_ranks import still_running, tree

from datasetdm_fast import generate
from datasetdm_fast.command_line.run_settings import complete_settings, read_spec
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder import shard_places
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, shard_place
from datasetdm_fast.runs.run_settings import RunConfig, WorkerSettings
from datasetdm_fast.runs.workers import ray_ranks
from datasetdm_fast.runs.workers.devices import pool_of
from datasetdm_fast.runs.workers.ray_ranks import address_of
from datasetdm_fast.runs.workers.shard_worker import ShardRank, work_on_shards
from datasetdm_fast.runs.workers.worker import Callbacks

SAMPLES, SIZE, BATCH = 40, 4, 2
HERE = Path(__file__).parent
SHORT_PLACE = tempfile.gettempdir()  # before conftest.py names a longer one
TOKEN = "0123456789abcdef" * 4
LINE = ("--number", str(SAMPLES), "--shard-size", str(SIZE), "--batch-size", str(BATCH))

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def config(out: Path, **changes) -> RunConfig:
    return RunConfig(**{"out": str(out), "number": SAMPLES, "batch_size": BATCH, "quiet": True, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    spec = read_spec(complete_settings(config(out, cluster="ray", shard_size=SIZE), {"out"}))
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        work_on_shards(spec, shard_place(out), ShardRank(), Callbacks())
    return out


@pytest.fixture(scope="module")
def surroundings():
    """The environment of everything here that has to do with Ray; its folder has a short name, as that of a socket is
    limited.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir=SHORT_PLACE)
    names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {
        **names,
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_AUTH_MODE": "token",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start_node(surroundings):
    """Starts a node of one core: the head at a port, and those that join it."""
    nodes = []

    def start(port: int, *, is_head: bool = False) -> psutil.Process:
        place = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir"]
        place = [*place, surroundings["RAY_TMPDIR"]] if is_head else ["--address", f"127.0.0.1:{port}"]
        options = ["--num-cpus", "1", "--disable-usage-stats", "--object-store-memory", "100000000", "--block"]
        line = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *place, *options]
        nodes.append(psutil.Popen(line, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        end = time.monotonic() + 60
        while is_head and not answers(port):
            assert nodes[-1].poll() is None and time.monotonic() < end, "Ray did not start"
            time.sleep(0.2)
        return nodes[-1]

    yield start
    for node in nodes:
        end_node(node)


def end_node(node: psutil.Process) -> None:
    """Kills a node with everything on it at once."""
    if node.is_running():
        for one in [node, *node.children(recursive=True)]:
            one.kill()
        node.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


PROGRAM = """
import os
import signal
import sys
from dataclasses import replace
from functools import partial
import troubled
from datasetdm_fast import generate
from datasetdm_fast.command_line import sharded_run
from datasetdm_fast.command_line.ending import run_command

class Deadly:
    def __reduce__(self):
        return os._exit, (9,)

if __name__ == "__main__":
    run = sharded_run.run_on_cluster
    slow = {name: value for name, value in os.environ.items() if name.startswith("TROUBLED")}
    changes = {"on_start": Deadly() if slow.get("TROUBLED_BY") == "arguments" else partial(troubled.install, slow)}
    sharded_run.run_on_cluster = lambda *options: run(*options[:-1], replace(options[-1], **changes))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands on that it is ignored
    sys.exit(run_command(generate.main.__wrapped__))
"""


@pytest.fixture
def command(tmp_path, surroundings):
    """Starts the generate command with stub workers, in a session of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = []

    def start(*arguments, **environment):
        line = [sys.executable, str(tmp_path / "program.py"), "--out", str(tmp_path / "run"), *LINE, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        begun.append(subprocess.Popen(line, cwd=tmp_path, env={**surroundings, **environment}, **pipes))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def shards(out: Path, folder: str = "manifest") -> int:
    return len(shard_place(out).names(folder))


def wait_for(out: Path, count: int, process: subprocess.Popen, folder: str = "manifest") -> None:
    end = time.monotonic() + 120
    while shards(out, folder) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {count} shards came to be in {out}"
        time.sleep(0.02)


def workers(parent: psutil.Process | subprocess.Popen) -> list[psutil.Process]:
    """The actors of the run among the processes below this one."""
    found = []
    for process in psutil.Process(parent.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie among them
            if "ray::RayWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@with_ray
@pytest.mark.loopback
def test_a_ray_of_its_own_restarts_a_worker_that_is_killed_and_ends_with_the_run(alone, command, tmp_path):
    process = command("--cluster", "ray", "--ranks", "1", TROUBLED_BY="waits", TROUBLED_SIGN=tmp_path / "sign")
    wait_for(tmp_path / "run", 1, process, "claims")  # the worker is in a shard
    started = psutil.Process(process.pid).children(recursive=True)
    workers(process)[0].kill()  # nobody else can make the rest
    (tmp_path / "sign").touch()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors and out.strip() == str(tmp_path / "run"), errors
    assert "Ray listens on all addresses of this machine" in errors
    assert tree(tmp_path / "run") == tree(alone)
    assert still_running(started) == [], "Ray outlived its driver"


@long_test
@with_ray
@pytest.mark.loopback
@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("arguments", "worker 0 ended (The actor"),  # before its first call
        ("start", "worker 0 ended (The actor"),
        ("raises", "RuntimeError('planted')"),
    ],
)
def test_workers_that_always_fail_end_the_run_with_a_sentence(command, tmp_path, trouble, told):
    process = command("--cluster", "ray", "--ranks", "1", TROUBLED_BY=trouble)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 3 and out == "" and "Traceback" not in errors, errors
    assert told in errors and "the same command resumes the run" in errors
    assert list((tmp_path / "run").glob("claims/*")) == []


@long_test
@with_ray
@pytest.mark.loopback
def test_nodes_that_end_and_join_and_a_driver_that_is_stopped_and_killed_change_no_byte(
    alone, start_node, command, tmp_path
):
    """Three nodes of a core each, of which two are killed and another joins. The line that resumes is always the same:
    DATASETDM_LONG_TESTS=1 python -m pytest tests/test_ray.py -k nodes
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    out, line = tmp_path / "run", ("--cluster", f"ray://127.0.0.1:{port}")
    start_node(port, is_head=True)
    second, third = start_node(port), start_node(port)
    process = command(*line, TROUBLED_SECONDS="1")
    wait_for(out, 1, process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "resume with: python -m datasetdm_fast.generate --out" in errors, errors

    process = command(*line, TROUBLED_SECONDS="1")
    wait_for(out, shards(out) + 1, process)
    process.kill()
    process.communicate()

    process = command(*line, TROUBLED_SECONDS="3")
    wait_for(out, shards(out) + 1, process)
    end_node(second)
    end_node(third)
    fourth, begin = start_node(port), time.monotonic()
    while not workers(fourth):
        assert process.poll() is None and time.monotonic() < begin + 30
        time.sleep(0.1)
    errors = process.communicate(timeout=180)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert tree(out) == tree(alone)


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
        ray_ranks._require_token("ray", version)


def test_who_has_no_home_has_no_token_in_it(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert not runpy.run_path(ray_ranks.__file__)["TOKEN_FILE"].exists()


@pytest.mark.loopback
def test_an_address_nobody_answers_at_ends_the_command_at_once(command, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        process = command("--cluster", f"ray://127.0.0.1:{port}")
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and out == ""
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
    monkeypatch.setattr(ray_ranks, "CONNECT_SECONDS", 60 if answer else 0.5)
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
            ray_ranks.join_cluster(f"ray://127.0.0.1:{port}", 0, "none"),
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


def test_the_extra_for_ray_holds_what_runs_in_shards_of_parquet_ask_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras["hf"]) <= set(extras["ray"])


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
        ({"ranks": 2}, [(30, 0), (4, 0)], (2, 0, 4, 4)),
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


@pytest.mark.parametrize(("gpus", "expected"), [(0, 3), (1, 4)])
def test_workers_that_nobody_counted_are_as_many_as_there_is_room_for(gpus, expected):
    machines = {"a": {"CPU": 8.0, "GPU": 3.0}, "b": {"CPU": 0.5, "GPU": 1.0}, "c": {"CPU": 1.0}, "d": {"CPU": 2.0}}
    workers = SimpleNamespace(ranks=0, gpus="all" if gpus else "")
    assert ray_ranks._count(SimpleNamespace(gpus=gpus, workers=2), workers, machines) == expected
    assert ray_ranks._count(SimpleNamespace(gpus=gpus, workers=9), workers, machines) == 9
    for asked in (SimpleNamespace(ranks=2, gpus=""), SimpleNamespace(ranks=0, gpus="2")):
        assert ray_ranks._count(SimpleNamespace(gpus=gpus, workers=2), asked, machines) == 2


@dataclass(eq=False)
class Call:
    rank: int


class Failing(Exception):
    """What a call to an actor that has ended raises."""


def test_workers_that_end_are_replaced_by_their_number_until_one_of_all_is_done(monkeypatch, tmp_path):
    """Worker 0 ends three times and is given up, while worker 1 makes five samples and finds nothing left."""
    begun, said, committed, killed = [], [], [], []
    answers = {0: [Failing("it died")] * 3, 1: [5, None]}

    def actor(spec, where, rank, on_start, version):
        begun.append((rank.rank, rank.world, rank.name, where))
        return SimpleNamespace(make_next=SimpleNamespace(remote=lambda: Call(rank.rank)))

    def get(call):
        if isinstance(answer := answers[call.rank].pop(0), Exception):
            raise answer
        return answer

    fake = SimpleNamespace(
        remote=lambda **options: lambda kind: SimpleNamespace(remote=actor),
        wait=lambda calls, timeout: ([min(calls, key=lambda call: call.rank)], []),
        get=get,
        kill=killed.append,
        nodes=lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0}}, {"NodeID": "b", "Alive": False}],
        exceptions=SimpleNamespace(RayError=Failing),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_ranks, "join_cluster", lambda *_: nullcontext())
    spec = read_spec(RunConfig(out=str(tmp_path)))
    callbacks = Callbacks(on_message=said.append, on_commit=committed.append)
    ray_ranks._run(WorkerSettings(ranks=2, cluster="ray://head"), spec, ShardFolder(tmp_path), callbacks, "run")
    assert begun == [(number, 2, "run", str(tmp_path)) for number in (0, 1, 0, 0)] and len(killed) == 3
    replaced = "worker 0 ended again and again, it is replaced"
    assert said == [replaced, replaced, "worker 0 ended (it died); the others go on"]
    assert committed == [5] and not answers[1]
    answers[0], answers[1] = [Failing("it died")] * 3, [Failing("it died")] * 3
    with pytest.raises(Missing, match="worker 1 ended .it died."):
        ray_ranks._run(WorkerSettings(ranks=2, cluster="ray://head"), spec, ShardFolder(tmp_path), callbacks, "run")


def test_a_head_is_looked_for_at_its_bare_address(monkeypatch):
    asked = []

    def refuse(address, seconds):
        asked.append(address)
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(ray_ranks.socket, "create_connection", refuse)
    for address, place in (("[::1]:7000", ("::1", 7000)), ("head:6379", ("head", 6379))):
        with pytest.raises(Missing, match="Connection refused"):
            ray_ranks._knock("ray://head", address)
        assert asked.pop() == place


@pytest.mark.parametrize(
    ("error", "has_made", "expected"),
    [
        (Refused("it", "Do."), True, Refused),
        (Missing("it", "Do."), True, SystemExit),  # another process is started in its place
        (ValueError("it"), True, SystemExit),
        (Refused("it", "Do."), False, Refused),
        (ValueError("it"), False, Missing),
    ],
)
def test_what_ends_a_worker_and_what_it_answers(error, has_made, expected, monkeypatch):
    def shards():
        if has_made:
            yield 5
        raise error

    monkeypatch.setattr(ray_ranks, "_make_shards", shards)
    monkeypatch.setattr(ray_ranks.os, "_exit", sys.exit)
    worker = ray_ranks.RayWorker()
    assert not has_made or worker.make_next() == 5
    with pytest.raises(SystemExit) if expected is SystemExit else nullcontext():
        assert type(worker.make_next()) is expected


def test_a_store_is_a_place_all_processes_reach(tmp_path, capsys):
    for url, told in (
        ("memory://run", "processes do not share memory"),
        ("nothing://run", "Protocol not known"),
    ):
        with pytest.raises(Refused, match=told):
            shard_places.ShardBucket(url)
    assert generate.main(["--out", str(tmp_path / "run"), "--store", "s3://bucket/run", "--layout", "folder"]) == 2
    assert "only a run in shards is written there" in capsys.readouterr().err
    line = ["--cluster", "ray", "--layout", "folder", "--out", str(tmp_path / "run")]
    assert generate.main(line) == 2 and "a cluster makes runs in shards" in capsys.readouterr().err


def test_a_run_folder_that_a_cluster_began_is_continued_without_one(tmp_path, capsys):
    with RunFolder(tmp_path / "run", prepare(config(tmp_path / "run")).document):
        pass
    assert generate.main(["--cluster", "ray", "--out", str(tmp_path / "run")]) == 2
    assert "Continue it without --layout shards and --cluster" in capsys.readouterr().err


def test_a_misspelt_bucket_is_not_created(monkeypatch):
    import fsspec

    monkeypatch.setattr(shard_places.ShardBucket, "_protocols", ("bucket",))
    bucket, there = shard_places.ShardBucket("memory://buket/run"), fsspec.filesystem("memory")
    with pytest.raises(Refused, match="there is no bucket 'buket'") as stop:
        bucket.require_bucket(is_made=False)
    assert "--make-bucket" in stop.value.remedy and not there.exists("/buket")
    bucket.require_bucket(is_made=True)
    bucket.require_bucket(is_made=False)
    there.rmdir("/buket")


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


def test_an_error_of_ray_is_one_line_without_colours():
    assert (
        ray_ranks.first_line(RuntimeError("\n\x1b[36m(pid=7)\x1b[0m the node died\n  at line 3"))
        == "(pid=7) the node died"
    )
    assert ray_ranks.first_line(TimeoutError()) == "TimeoutError"
