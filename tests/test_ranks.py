"""Several processes for one run: the bytes are those of one process, whatever happens to them."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torchless
import troubled
from run_steps import find_result, prepare
from skips import IS_LONG, long_test

from datasetdm_fast.command_line.run_report import describe_start
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.runs.jobs import writing
from datasetdm_fast.runs.jobs.writing import batches_of, write_missing
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import CLAIMS, LEDGER
from datasetdm_fast.runs.run_settings import RunConfig, WorkerSettings
from datasetdm_fast.runs.workers import devices, spawn
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.worker import Callbacks

SAMPLES, BATCH = 26, 2  # thirteen batches
LONGEST = 300  # seconds that a process may need on a busy machine


def config(out: Path, **changes) -> RunConfig:
    return RunConfig(**{"out": str(out), "number": SAMPLES, "batch_size": BATCH, "quiet": True, **changes})


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a run folder, the ledger among them, with its bytes."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def shared(settings: RunConfig, environments: list[dict[str, str]], **options):
    places = [Place({"OMP_NUM_THREADS": "1", **environment}, 1) for environment in environments]
    return spawn.run_spawned(
        places, read_spec(settings), Callbacks(describe_start, on_start=troubled.install, **options)
    )


@pytest.fixture
def arithmetic(monkeypatch):
    torchless.install(monkeypatch.setattr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of a single process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        write_missing(prepare(config(out)))
    return out


def check_equal(out: Path, alone: Path) -> None:
    found, expected = tree(out), tree(alone)
    assert [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)] == []
    assert audit(out, threads=1).findings == []


@pytest.mark.parametrize("count", [1, 2, 3, 8] if IS_LONG else [3])
def test_any_number_of_ranks_makes_the_same_bytes(alone, tmp_path, count, capfd):
    heard = []
    result = shared(config(tmp_path / "run"), [{}] * count, on_commit=heard.append)
    assert (result.done, result.made, result.quarantined, sum(heard)) == (SAMPLES, SAMPLES, 0, SAMPLES)
    assert "Fatal" not in capfd.readouterr().err  # each has ended by itself, without a core dump
    check_equal(tmp_path / "run", alone)


@pytest.mark.parametrize("seed", range(3 if IS_LONG else 1))
def test_any_order_of_batches_makes_the_same_bytes(arithmetic, alone, tmp_path, monkeypatch, seed):
    def shuffled(wanted, size):
        batches = sorted({index // size for index in wanted})
        random.Random(seed).shuffle(batches)
        return batches

    monkeypatch.setattr(writing, "batches_of", shuffled)
    write_missing(prepare(config(tmp_path / "run")))
    check_equal(tmp_path / "run", alone)


def test_a_run_goes_on_with_other_numbers_of_ranks(arithmetic, alone, tmp_path):
    out = tmp_path / "run"
    write_missing(prepare(config(out, limit=5)))  # in the middle of a batch
    assert shared(config(out, limit=4), [{}] * 2).made == 4
    assert shared(config(out), [{}]).done == SAMPLES
    check_equal(out, alone)


@pytest.mark.parametrize("trouble", ["dies", "hangs", pytest.param("start", marks=long_test)])
def test_a_rank_in_trouble_costs_its_speed_and_nothing_else(alone, tmp_path, trouble):
    lines, sign = [], {troubled.SIGN: str(tmp_path / "sign")}  # the other begins after the trouble
    result = shared(
        config(tmp_path / "run"),
        [{troubled.TROUBLE: trouble, **sign}, sign],
        patience=3.0 if trouble == "hangs" else 60.0,
        on_message=lines.append,
    )
    assert (result.done, result.quarantined) == (SAMPLES, 0)
    check_equal(tmp_path / "run", alone)
    said = {
        "dies": "rank 0 was ended by SIGKILL",
        "hangs": "rank 0 has given no sign of life",
        "start": "rank 0 ended with exit code 9",
    }
    assert any(line.startswith(said[trouble]) for line in lines)


def test_what_kills_every_process_is_set_aside_and_the_rest_is_made(tmp_path):
    prompts = "\n".join("poison" if k == 7 else f"a ball {k}" for k in range(12))
    result = shared(config(tmp_path / "run", prompts=prompts, number=12), [{}, {}])
    assert (result.done, result.quarantined) == (10, 2)
    with sqlite3.connect(tmp_path / "run" / LEDGER) as connection:
        assert connection.execute("SELECT \"index\", reason FROM samples WHERE status != 'done'").fetchall() == [
            (6, "3 processes ended while they made its batch"),
            (7, "3 processes ended while they made its batch"),
        ]
    with pytest.raises(GateFailed, match=r"2 of 12 samples .* \(3 processes ended while they made its batch\)"):
        result.check()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Quarantined (`3 processes ended while they made its batch`): `00000006`, `00000007`." in card


def test_numbers_that_are_not_finite_anywhere_are_set_aside_as_by_one_process(arithmetic, tmp_path):
    settings = {"prompts": "a ball\nbroken", "number": 6}
    write_missing(prepare(config(tmp_path / "alone", **settings)))
    result = shared(config(tmp_path / "run", **settings), [{}] * 2)
    assert (result.done, result.quarantined) == (3, 3)
    check_equal(tmp_path / "run", tmp_path / "alone")


def test_a_place_where_every_process_dies_ends_the_run_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(spawn, "LONGEST_WAIT", 0.1)
    with pytest.raises(Missing, match="ended 5 times in a row .ended with exit code 9"):
        shared(config(tmp_path / "run"), [{troubled.TROUBLE: "start"}])


def test_a_refusal_is_told_once_and_ends_the_run(tmp_path):
    with pytest.raises(Refused, match="92 tokens"):
        shared(config(tmp_path / "run", prompts="x " * 90), [{}] * 2)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(Refused, match="holds a run with other settings .*seed: 0 there, 5 asked for"):
        shared(config(tmp_path / "run"), [{}])
        find_result(config(tmp_path / "run", seed=5))
    with pytest.raises(Refused, match="92 tokens"):
        shared(config(tmp_path / "run", number=SAMPLES + 1, prompts="x " * 90), [{}])
    assert not (tmp_path / "run/state/claims").exists() and audit(tmp_path / "run", threads=1).findings == []
    (tmp_path / "run/state/claims").mkdir()
    (tmp_path / "run/state/leases.sqlite").write_bytes(b"of a process of 0.2 that was killed")
    assert audit(tmp_path / "run", threads=1).findings == []


@pytest.mark.parametrize(
    ("asked", "visible", "chosen"),
    [
        ("all", "0 1", "0 1"),
        ("2", "4 5 6", "4 5"),
        ("0,2", "a b c", "a c"),
        ("2,", "a b c", "c"),
        (" 1 , 0 ", "a b", "b a"),
    ],
)
def test_gpus_are_chosen_among_those_that_are_visible(asked, visible, chosen):
    assert devices.select_gpus(asked, visible.split()) == chosen.split()


@pytest.mark.parametrize(
    ("asked", "visible", "kind"),
    [
        ("3", "0 1", Missing),
        ("all", "", Missing),
        ("0,0", "0 1", Refused),
        ("x", "0", Refused),
        ("0", "0", Refused),
        ("-1", "0", Refused),
    ],
)
def test_gpus_that_are_not_there_are_refused(asked, visible, kind):
    with pytest.raises(kind, match="--gpus"):
        devices.select_gpus(asked, visible.split())


def test_gpus_and_ranks_are_not_mixed():
    with pytest.raises(Refused, match="there is one per GPU"):
        devices.find_places(WorkerSettings(gpus="2", ranks=2), "auto", 0)


def test_each_gpu_has_a_process_with_its_share_of_cores(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["4", "5"])
    monkeypatch.setattr(devices, "count_cores", lambda: 6)
    for device, threads, share in (("auto", 0, 3), ("cuda", 2, 2)):
        found = devices.find_places(WorkerSettings(gpus="all"), device, threads)
        environments = [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(share)} for gpu in "45"]
        assert found == [devices.Place(each, share) for each in environments]
    with pytest.raises(Refused, match="--gpus 1 --device cpu: they name different devices"):
        devices.find_places(WorkerSettings(gpus="1"), "cpu", 0)


@pytest.mark.parametrize(("ranks_asked", "cores", "threads"), [(1, 2, 2), (2, 2, 1), (3, 16, 4), (8, 4, 1)])
def test_cores_are_shared(monkeypatch, ranks_asked, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "count_cores", lambda: cores)
    assert [place.threads for place in devices.find_places(WorkerSettings(ranks=ranks_asked), "auto", 0)] == [
        threads
    ] * ranks_asked
    assert devices.find_places(WorkerSettings(ranks=ranks_asked), "auto", 3)[0].threads == 3


# The whole command ----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from dataclasses import replace
import troubled
from datasetdm_fast import generate
from datasetdm_fast.runs.workers import spawn

if __name__ == "__main__":
    run = spawn.run_spawned
    spawn.run_spawned = lambda *arguments: run(*arguments[:-1], replace(arguments[-1], on_start=troubled.install))
    sys.exit(generate.main())
"""


@pytest.fixture
def command(tmp_path):
    """Starts the generate command with stub ranks, in a session of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = []

    def start(*arguments, seconds="0", trouble=""):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
            troubled.SECONDS: seconds,
            troubled.TROUBLE: trouble,
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
            *arguments,
        ]
        begun.append(
            subprocess.Popen(
                line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_rows(out: Path, count: int) -> None:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if len(list((out / "images").glob("0*.png"))) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {count} samples came to be in {out}")


@pytest.mark.parametrize(("number", "code"), [pytest.param(signal.SIGINT, 130, marks=long_test), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_what_is_begun(alone, command, tmp_path, number, code):
    process = command("--ranks", "2", trouble="waits")
    wait_for_rows(tmp_path / "run", 4)
    os.killpg(process.pid, number)  # as a terminal does: to the ranks as well
    out, err = process.communicate(timeout=LONGEST)
    assert (
        process.returncode == code
        and "samples are there; resume with: python -m datasetdm_fast.generate --out" in err
        and "Traceback" not in err
    )
    assert not list((tmp_path / "run").rglob("*.part")) and audit(tmp_path / "run", threads=1).findings == []
    assert command("--ranks", "2").wait(LONGEST) == 0
    check_equal(tmp_path / "run", alone)


def test_the_second_signal_ends_at_once_and_leaves_nobody_behind(alone, command, tmp_path):
    process = command("--ranks", "2", seconds=str(2 * LONGEST))
    while not list((tmp_path / "run/state" / CLAIMS).glob("0*")):  # a rank has begun a batch
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert any("once more ends at once" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONGEST) == 143
    assert still_running(children) == []


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end; one that nobody has reaped yet has ended, too."""
    end, left = time.monotonic() + LONGEST, processes
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left = [process for process in left if is_at_work(process)]
    return left


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_no_rank_outlives_its_parent(alone, command, tmp_path):
    process = command("--ranks", "2", trouble="waits")
    wait_for_rows(tmp_path / "run", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in children if "runs.workers.processes" in " ".join(child.cmdline())]) >= 2
    process.kill()
    process.wait()
    assert still_running(children) == []
    assert command("--ranks", "2").wait(LONGEST) == 0
    check_equal(tmp_path / "run", alone)


@pytest.mark.parametrize("seed", range(30 if IS_LONG else 1))
def test_kills_of_any_process_at_any_moment_cost_nothing(alone, command, tmp_path, seed):
    chance = random.Random(seed)
    process = command("--ranks", "2", seconds="0.05")
    if chance.random() < 0.5:
        wait_for_rows(tmp_path / "run", 1)
    time.sleep(chance.uniform(0, 1.5))
    whole = (
        [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if process.poll() is None
        else []
    )
    if whole:
        chance.choice(whole).kill()
    process.communicate(timeout=LONGEST)
    assert command("--ranks", "2").wait(LONGEST) == 0
    check_equal(tmp_path / "run", alone)


def test_batches_are_handed_out_in_order():
    assert batches_of({5, 1, 2, 9}, 2) == [0, 1, 2, 4]
