"""Processes that torchrun or Slurm started, as ranks of one run without a parent of ours."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import troubled
from skips import IS_LONG, long_test
from test_ranks import BATCH, LONGEST, SAMPLES, alone, arithmetic, check_equal, wait_for_rows  # noqa: F401

from datasetdm_fast.command_line import sharded_run
from datasetdm_fast.command_line.interruption import ENDED
from datasetdm_fast.command_line.run_report import print_run
from datasetdm_fast.command_line.run_settings import check_judged, read_spec
from datasetdm_fast.command_line.sharded_run import generate_shards
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs import writing
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.writing import Result
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK
from datasetdm_fast.runs.run_folder.folder import SEAL
from datasetdm_fast.runs.run_settings import RunConfig, WorkerSettings
from datasetdm_fast.runs.workers import devices, launched
from datasetdm_fast.runs.workers.devices import LaunchedProcess
from datasetdm_fast.runs.workers.shard_worker import ShardRank
from datasetdm_fast.runs.workers.worker import Callbacks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3"}


@pytest.mark.parametrize(
    ("environment", "peer"),
    [
        (TORCHRUN, LaunchedProcess(3, 8, 1, 2)),
        (STEP, LaunchedProcess(5, 7, 1, 4)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NUM_TASKS": "8"}, LaunchedProcess(5, 8, 1, 2)),
        (STEP | {"SLURM_CPUS_ON_NODE": "64"}, LaunchedProcess(5, 7, 1, 4, 64)),
        (TORCHRUN | STEP | {"SLURM_CPUS_ON_NODE": "64"}, LaunchedProcess(3, 8, 1, 2)),  # torchrun within a step
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # a batch script
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),
        ({}, None),
    ],
)
def test_who_this_process_is(environment, peer):
    assert devices.find_peer(environment) == peer


def test_machines_are_counted():
    assert LaunchedProcess(0, 8, 0, 4).is_on_several_machines and not LaunchedProcess(0, 8, 0, 8).is_on_several_machines


@pytest.mark.parametrize(("told", "visible"), [("", ["0", "1"]), ("4, 7", ["4", "7"]), ("4,5,6", ["4", "5"])])
def test_visible_gpus_are_named_as_the_environment_does(monkeypatch, told, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices.visible_gpus() == visible


@pytest.mark.parametrize(
    ("visible", "local_rank", "chosen"), [(["0", "1"], 1, "1"), (["4", "5"], 2, "4"), (["7"], 1, None), ([], 0, None)]
)
def test_each_peer_takes_a_gpu_of_its_own(monkeypatch, visible, local_rank, chosen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "visible_gpus", lambda: visible)
    devices.take_share(LaunchedProcess(local_rank, 4, local_rank, 4), WorkerSettings(), "auto", 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == chosen
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_peers_start_no_ranks():
    with pytest.raises(Refused, match="one of 2 processes"):
        devices.take_share(LaunchedProcess(0, 2, 0, 2), WorkerSettings(ranks=2), "auto", 0)


def test_what_one_process_must_judge_first_is_refused_where_several_start_together():
    for config, is_begun, said in (
        (RunConfig(verify=2), True, "--verify 2: several machines or processes"),
        (RunConfig(speed="fast25"), False, "--speed fast25: several machines or processes .* must judge its labels"),
    ):
        with pytest.raises(Refused, match=said):
            check_judged(config, is_begun)
    check_judged(RunConfig(speed="fast25"), is_begun=True)
    check_judged(RunConfig(), is_begun=False)


def test_a_cluster_is_asked_by_one_process_alone(tmp_path):
    config = RunConfig(cluster="auto", layout="shards", out=str(tmp_path / "run"), number=2)
    with pytest.raises(Refused, match="--cluster auto: this is one of 2 processes that were started together"):
        generate_shards(config, read_spec(config), LaunchedProcess(0, 2, 0, 2), "")
    assert not (tmp_path / "run").exists()


def test_the_images_that_a_peer_counts_are_called_its_own(tmp_path, capsys):
    result = Result(tmp_path, 4, 4, 2, 0, seconds=2.0, is_complete=True)
    job = SimpleNamespace(plan=SimpleNamespace(number=10), done=3)
    for limit, left in ((0, 7), (4, 4), (9, 7)):
        job.limit = limit
        assert Job.images_left.fget(job) == left
    ended = Result(tmp_path, 4, 4, 2, 1, seconds=2.0, closing_seconds=0.5, doubtful=3)  # more may take their places
    wanted = {"number": 4, "done": 4, "made": 2, "set_aside": 1, "complete": False, "doubtful": 3}
    assert {name: ended.facts()[name] for name in wanted} == wanted and ended.facts()["closing_seconds"] == 0.5
    print_run(RunConfig(), result, "", by=" by this process")
    said = capsys.readouterr().err
    assert "2 images by this process in 2.0 s, 1 images per second\n" in said and "gallery" not in said
    print_run(RunConfig(), replace(result, closing_seconds=0.5), "")
    page = f"; look at {tmp_path}/gallery/index.html\n"
    said = capsys.readouterr().err
    assert "2 images in 2.0 s (0.5 s of it for index files and gallery), 1 images per second" + page in said
    told = Result(tmp_path, 8, 5, 2, 0, doubtful=3, accept="score >= 0.5").trust_message
    assert told == f"accepted: 5 samples; not accepted, in {tmp_path}/doubtful/: 3"


@pytest.mark.parametrize(
    ("peer", "is_stopping", "journal", "is_waiting"),
    [
        (LaunchedProcess(0, 4, 0, 4), False, sqlite.WRITE_AHEAD, True),
        (LaunchedProcess(0, 4, 0, 4), True, sqlite.WRITE_AHEAD, False),
        (LaunchedProcess(1, 4, 1, 4), False, sqlite.WRITE_AHEAD, False),
        (LaunchedProcess(2, 4, 0, 2), False, sqlite.IN_PLACE, False),  # which no memory shares between machines
    ],
)
def test_ranks_of_several_machines_write_in_place_and_the_first_of_all_waits_for_the_others(
    monkeypatch, tmp_path, peer, is_stopping, journal, is_waiting
):
    seen = []
    monkeypatch.setattr(launched, "work_on_folder", lambda *_, journal: seen.append(journal) or 7)
    monkeypatch.setattr(launched, "leave", lambda *given, is_waiting: seen.extend([given[2], is_waiting]))
    spec = read_spec(RunConfig(out=str(tmp_path / "run"), number=2))
    launched.run_launched(peer, spec, Callbacks(is_stopping=lambda: is_stopping))
    assert seen == [journal, 7, is_waiting]


def test_what_the_last_to_leave_cannot_write_is_said(tmp_path, monkeypatch):
    """Only a folder that others hold is left to them."""
    (tmp_path / "state").mkdir()

    def refused(*_):
        raise Refused("a filter file is damaged", "Undo it.")

    monkeypatch.setattr(launched, "close_folder", refused)
    with pytest.raises(Refused, match="a filter file is damaged"):
        launched.leave(tmp_path, 1, 1, 0.0, is_waiting=False)
    with storage.hold_lock(tmp_path / LOCK, is_shared=True):
        assert launched.leave(tmp_path, 1, 1, 0.0, is_waiting=False).done == 0
    monkeypatch.setattr(launched, "close_folder", lambda folder, *_: folder)
    held = ExitStack()
    held.enter_context(storage.hold_lock(tmp_path / LOCK, is_shared=True))
    threading.Timer(3 * storage.SECONDS_OF_A_LOOK, held.close).start()
    assert launched.leave(tmp_path, 1, 1, 0.0, is_waiting=True) == tmp_path  # once it is the last


def test_a_peer_that_reads_its_result_while_another_closes_leaves_no_log(alone, tmp_path, monkeypatch):  # noqa: F811
    run, finish = shutil.copytree(alone, tmp_path / "run"), writing.finish_run
    (run / SEAL).write_text("{}\n")
    reading = f"import sqlite3; ledger = sqlite3.connect('file:{run / LEDGER}?mode=ro', uri=True); "
    reading += "ledger.execute('SELECT * FROM notes').fetchall(); print(flush=True); input()"

    def finish_while_another_reads(folder):
        finish(folder)
        peer = subprocess.Popen([sys.executable, "-c", reading], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        peer.stdout.readline()
        threading.Timer(0.5, peer.communicate, (b"\n",)).start()

    monkeypatch.setattr(writing, "finish_run", finish_while_another_reads)
    assert launched.leave(run, SAMPLES, 0, 0.0, is_waiting=True).is_complete
    check_equal(run, alone)


def test_a_peer_on_another_machine_that_comes_late_leaves_a_finished_run_as_it_is(alone, arithmetic, tmp_path):  # noqa: F811
    run = shutil.copytree(alone, tmp_path / "run")
    spec = read_spec(RunConfig(out=str(run), number=SAMPLES, batch_size=BATCH))
    result = launched.run_launched(LaunchedProcess(1, 2, 0, 1), spec, Callbacks())
    assert result.is_complete and result.made == 0
    check_equal(run, alone)


def test_a_look_whether_a_folder_is_held_keeps_no_command_out(tmp_path, monkeypatch):
    path, look = tmp_path / "lock", ExitStack()
    look.enter_context(storage.hold_lock(path))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: look.close())
    with storage.hold_lock(path):
        assert storage.is_locked(path)
    assert not storage.is_locked(path)


# Without GPUs, as arithmetic needs none, and each peer would import torch to count them.
PROGRAM = """
import sys, troubled
troubled.install()
from datasetdm_fast import generate
from datasetdm_fast.runs.workers import devices
devices.visible_gpus = list
code = generate.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Starts peers of a world, as torchrun would."""
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = []

    def start(rank, world=2, machines=1, seconds="0.05", **environment):
        variables = {
            "RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world // machines,
            troubled.SECONDS: seconds,
            **environment,
        }
        line = [
            sys.executable,
            str(tmp_path / "program.py"),
            "--out",
            str(tmp_path / "run"),
            "--number",
            str(SAMPLES),
            "--batch-size",
            str(BATCH),
        ]
        whole = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
            **{name: str(value) for name, value in variables.items()},
        }
        begun.append(
            subprocess.Popen([*line, "--quiet"], env=whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("machines", [1, 2] if IS_LONG else [2])
def test_peers_make_the_bytes_of_one_process(alone, start, tmp_path, machines):  # noqa: F811
    world = [start(rank, machines=machines) for rank in range(2)]
    ends = [(*process.communicate(timeout=LONGEST), process.returncode) for process in world]
    assert ends == [(f"{tmp_path / 'run'}\n", "", 0), ("", "", 0)]
    check_equal(tmp_path / "run", alone)
    again = start(1)
    assert again.communicate(timeout=LONGEST) == ("", "") and again.returncode == 0


@long_test
def test_a_peer_that_is_killed_costs_its_speed_and_nothing_else(alone, start, tmp_path):  # noqa: F811
    sign = {troubled.SIGN: tmp_path / "sign"}  # the others begin after the trouble
    world = [start(0, 3, **sign), start(1, 3, **{troubled.TROUBLE: "dies"}, **sign), start(2, 3, **sign)]
    assert world[1].wait(LONGEST) == -signal.SIGKILL
    assert [process.wait(LONGEST) for process in (world[0], world[2])] == [0, 0]
    check_equal(tmp_path / "run", alone)


def test_a_signal_to_all_peers_finishes_their_batches(alone, start, tmp_path):  # noqa: F811
    world = [start(rank, **{troubled.TROUBLE: "waits"}) for rank in range(2)]
    wait_for_rows(tmp_path / "run", 4)
    for process in world:
        process.send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=LONGEST)[1] for process in world]
    assert [process.returncode for process in world] == [143, 143]
    assert "resume with" in errors[0] and not list((tmp_path / "run").rglob("*.part"))
    assert errors[1] in ("", f"{ENDED}\n")
    assert [process.wait(LONGEST) for process in [start(rank) for rank in range(2)]] == [0, 0]
    check_equal(tmp_path / "run", alone)


@pytest.mark.parametrize("seed", range(20 if IS_LONG else 1))
def test_a_killed_world_goes_on(alone, start, tmp_path, seed):  # noqa: F811
    chance = random.Random(seed)
    world = [start(rank) for rank in range(2)]
    time.sleep(chance.uniform(0.5, 3))
    for process in world:
        process.kill()
        process.wait()
    assert [process.wait(LONGEST) for process in [start(rank) for rank in range(2)]] == [0, 0]
    check_equal(tmp_path / "run", alone)


def test_a_single_process_does_not_enter_where_peers_are(start, tmp_path):
    first = start(0, seconds="5")
    wait_for_rows(tmp_path / "run", 2)
    other = start(0, world=1)
    assert other.wait(LONGEST) == 2 and "another process is writing to this run folder" in other.stderr.read()
    assert first.poll() is None


def test_a_process_takes_the_gpu_and_the_cores_of_its_place_on_its_machine(monkeypatch):
    """Not of its place among the processes of all machines."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["4", "5"])
    monkeypatch.setattr(devices, "count_cores", lambda: 12)
    peer = LaunchedProcess(rank=2, world=6, local_rank=1, local_world=3)
    assert devices.take_share(peer, WorkerSettings(), "cuda", 0) == 4
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize(
    ("cores", "shared", "threads"),
    [(8, 32, 8), (32, 32, 8), (16, 32, 8), (1, 4, 1), (16, 0, 4), (2, 0, 1)],
)
def test_a_task_that_was_started_on_cores_of_its_own_uses_them_all(monkeypatch, cores, shared, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "count_cores", lambda: cores)
    assert devices.take_share(LaunchedProcess(0, 4, 0, 4, shared), WorkerSettings(), "cpu", 0) == threads


def test_parts_of_a_gpu_have_a_process_each_though_cuda_counts_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    for count, visible in ((1, ["MIG-a", "MIG-b"]), (0, [])):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert devices.visible_gpus() == visible


@pytest.mark.parametrize(("rank", "reports"), [(0, 1), (2, 0)])
def test_one_process_of_all_machines_reports_a_run_in_shards(tmp_path, monkeypatch, rank, reports):
    reported, begun, shares = [], [], []
    monkeypatch.setattr(sharded_run, "work_on_shards", lambda spec, place, rank, callbacks: begun.append(rank))
    monkeypatch.setattr(
        sharded_run, "ImageProgress", lambda images, quiet: shares.append(images) or nullcontext(Mock())
    )
    monkeypatch.setattr(sharded_run, "_report", lambda *given: reported.append(given))
    config = RunConfig(layout="shards", out=str(tmp_path / "run"), number=9, quiet=True)
    assert generate_shards(config, read_spec(config), LaunchedProcess(rank, 4, 0, 2), "") == 0
    assert len(reported) == reports and begun == [ShardRank(rank, 4)] and shares == [3]
