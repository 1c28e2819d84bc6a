"""The race and the whole run of `bench/gpu.sh 0`: what is stored when the clock cuts them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from skips import long_test
from test_bench import script

from bench import __main__ as bench
from bench import suite
from bench.machine import limits, machine
from bench.peers import PEERS
from bench.report import report, results
from bench.rows import layers, one_race, race, whole_run
from bench.rows.measurement import BenchRun

HEAD = {
    "suite": "gpu",
    "date": "",
    "command": "",
    "machine": dict.fromkeys(("device", "commit", "versions")),
    "setting": {},
}


@pytest.fixture
def known_limits(monkeypatch):
    known = {"tflops": {"fp32": 1.0}, "gbps": 100.0, "gexps": 1.0, "seconds": 0.0}
    monkeypatch.setattr(limits, "measure", lambda device, seconds: known)
    monkeypatch.setattr(layers, "fastest", lambda setting, dtype, seconds: 1e12)


class Death(BaseException):
    """In place of a process that dies of what it measures."""


def race_of_fakes(tmp_path, monkeypatch, *, slow=(), broken=(), dies="", ending=Death):
    """A race whose peers take no time to prepare, except the slow ones, which never are."""
    setting = SimpleNamespace(quick=True, device=torch.device("cpu"), flops=1, batch=lambda size: [None] * size)
    file = results.ResultFile.open(tmp_path / "one.json", HEAD, goes_on=True)
    run = BenchRun(setting, file, seconds=0.0, judged=2)
    run.race_end, run.moments = time.monotonic() + 600.0, []  # ample for the rounds

    def prepare(run, name, offer):
        assert offer.batch and not offer.like  # no batch size is searched
        if name in slow:
            raise one_race.OutOfTime  # as the timer does when the moment has come
        row = {"peer": name, "title": name, "status": "ok", "dtype": "fp32", "batch": offer.batch}
        return row, race.Runner(name, SimpleNamespace(batch=offer.batch), row)

    def to_files(peer, setting, folder):
        name = names.pop(0)

        def call():
            if name == dies:
                raise ending
            if name in broken:
                raise RuntimeError("out of luck")
            time.sleep(0.001)

        return call

    names = [name for name in one_race.RACED if name not in slow]
    monkeypatch.setattr(one_race, "stopped_at", lambda moment: run.moments.append(moment) or nullcontext())
    monkeypatch.setattr(one_race, "prepare", prepare)
    monkeypatch.setattr(one_race, "to_files", to_files)
    monkeypatch.setattr(one_race.limits, "rows", lambda run: [{"tflops": {"fp32": 1.0}}])
    monkeypatch.setitem(one_race.TIMED, True, 4.0)
    monkeypatch.setitem(one_race.PREPARED, True, 90.0)
    return run


def test_a_peer_that_is_not_ready_in_time_is_left_and_the_others_race(tmp_path, monkeypatch):
    run = race_of_fakes(tmp_path, monkeypatch, slow=("diffusers-compiled", "ours-bf16"))
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == ["peers"]  # so the command ends with 4
    stored = results.read(tmp_path / "one.json")
    rows = {row["peer"]: row for row in results.rows_of(stored, "peers")}
    assert [name for name, row in rows.items() if row.get("is_left")] == ["diffusers-compiled", "ours-bf16"]
    assert all(len(rows[name]["seconds_per_image"]["rounds"]) == one_race.ROUNDS for name in ("ours", "diffusers"))
    assert len(rows["diffusers"]["ours_over"]["rounds"]) == one_race.ROUNDS
    assert not results.is_settled(stored, "peers") and results.is_settled(stored, "limits")
    first, latest = run.race_end - 90.0 - 2 * 4.0, run.race_end - 4.0 * len(one_race.RACED)
    assert run.moments == [first, run.race_end, run.race_end, latest, latest]  # as two are prepared whatever the time


def test_a_preparation_is_stopped_when_its_moment_has_come():
    for seconds in (0.05, -1.0):
        with pytest.raises(one_race.OutOfTime), one_race.stopped_at(time.monotonic() + seconds):
            while True:
                time.sleep(0.01)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_first_peer_leaves_the_next_one_time_to_be_prepared(tmp_path, monkeypatch):
    run = race_of_fakes(tmp_path, monkeypatch, slow=("diffusers-compiled",))
    run.raced = ("diffusers-compiled", "ours", "diffusers")
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == ["peers"]
    assert [row["peer"] for row in run.file.rows("peers") if "seconds_per_image" in row] == ["ours", "diffusers"]


def test_only_the_peers_that_were_named_race(tmp_path, monkeypatch):
    run = race_of_fakes(tmp_path, monkeypatch, slow=("upstream-tf32", "diffusers-compiled", "ours-bf16"))
    run.raced = ("diffusers", "ours")
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == []
    assert [row["peer"] for row in run.file.rows("peers")] == list(run.raced)


def test_a_peer_that_fails_without_a_comparison_is_no_disagreement():
    agrees, differs = ({"passed": True}, {"passed": False})
    cases = {"pass": {"status": "ok", "parity": [agrees]}, "incomplete": {"status": "failed", "peer": "ours-run"}}
    cases["fail"] = {"status": "failed", "peer": "ours", "parity": [agrees, differs]}
    for said, row in cases.items():
        assert report.parity({"parts": {"peers": {"rows": [row]}}}) == said


def test_a_copy_without_history_names_its_commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


def test_a_peer_that_fails_in_its_turn_leaves_the_race_to_the_others(tmp_path, monkeypatch):
    run = race_of_fakes(tmp_path, monkeypatch, broken=("upstream-tf32",))
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == []
    rows = {row["peer"]: row for row in run.file.rows("peers")}
    assert rows.pop("upstream-tf32")["why"] == "RuntimeError: out of luck"
    assert all(len(row["seconds_per_image"]["rounds"]) == one_race.ROUNDS for row in rows.values())


def test_what_was_timed_is_stored_when_the_process_dies_and_a_second_try_keeps_it(tmp_path, monkeypatch):
    timed = ["diffusers-compiled", "ours", "diffusers"]
    for dies in ("upstream-tf32", "ours"):
        run = race_of_fakes(tmp_path, monkeypatch, dies=dies)
        with pytest.raises(Death):
            suite.measure(run, [one_race.MEASUREMENT], run.race_end)
        rows = results.rows_of(results.read(tmp_path / "one.json"), "peers")
        assert [row["peer"] for row in rows if "seconds_per_image" in row] == timed
    run = race_of_fakes(tmp_path, monkeypatch)
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == []  # it was begun twice and never ended
    (part,) = (part for name, part in run.file.document["parts"].items() if name == "peers")
    assert part["status"] == "broken" and len(part["rows"]) == len(one_race.RACED)


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143)])
def test_a_race_that_was_cut_from_outside_is_taken_up_however_often(tmp_path, monkeypatch, ending):
    for dies in ("upstream-tf32", "ours", "ours"):
        run = race_of_fakes(tmp_path, monkeypatch, dies=dies, ending=ending)
        with pytest.raises(type(ending)):
            suite.measure(run, [one_race.MEASUREMENT], run.race_end)
    run = race_of_fakes(tmp_path, monkeypatch)
    run.file.begin("another")
    run.file.forgive("peers")
    assert run.file.document["parts"]["another"]["tries"] == 1  # which was not measured meanwhile
    assert suite.measure(run, [one_race.MEASUREMENT], run.race_end) == []
    assert run.file.document["parts"]["peers"]["status"] == "done"
    assert all(len(row["seconds_per_image"]["rounds"]) == one_race.ROUNDS for row in run.file.rows("peers"))


def test_a_compiled_peer_never_searches_batch_sizes(monkeypatch):
    built = []

    def build(setting, batch):
        built.append(batch)
        raise RuntimeError

    for name in one_race.peers.BUILT:
        offer = PEERS[name]._replace(build=build, not_on_cpu="")
        device = torch.device("cpu")
        run = SimpleNamespace(setting=SimpleNamespace(device=device, quick=False), batches={})
        race.prepare(run, name, offer)
    assert built == [32, 32]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([20.0, 20.5, 21.0, 21.5, 23.5, 25.5, 27.5, 29.5], [21.5, 23.5, 25.5, 27.5, 29.5]),  # the first labels are late
        ([10.0, 12.0, 14.0], [12.0, 14.0]),
        ([10.0, 12.0], [10.0, 12.0]),
    ],
)
def test_a_whole_run_is_timed_over_the_later_half_of_its_batches(ends, expected):
    made = [moment - late for moment in ends for late in (0.3, 0.2, 0.1, 0.0)]
    assert whole_run.later_ends([*made, ends[-1] + 1.0], batch=4) == expected  # the clock cut the next batch
    assert whole_run.rate(expected, batch=4) == 2.0


def test_power_and_clock_of_a_whole_run_are_those_of_the_batches_that_count():
    made = [10.0, 12.0, 14.0]
    samples = [(9.0, {"watts": 100.0, "mhz": 300, "used": 5 * 2**20})]
    samples += [(11.0, {"watts": 600.0, "mhz": 1900, "used": 9 * 2**20}), (13.0, {"watts": 700.0, "mhz": 1800})]
    found = whole_run.figures(samples, {"used": 2 * 2**20}, made, batch=4)
    assert found == {"peak_mib": 7.0, "watts": 650, "mhz": 1850, "joules_per_image": 325.0}


@long_test
def test_the_race_and_the_whole_run_of_a_small_model(tmp_path, monkeypatch, known_limits, capsys):
    monkeypatch.setattr(one_race, "RACED", ("diffusers", "ours"))
    out = tmp_path / "one.json"
    line = ["gpu", "--device", "cpu", "--model", "tiny", "--steps", "2", "--quick", "--parts", "peers,peers run"]
    assert bench.dispatch([*line, "--out", str(out), "--lock", str(tmp_path / "lock"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ratios"]["fast_vs_diffusers_best"] > 0 and said["parity"] == "pass"
    rows = {row["peer"]: row for row in results.rows_of(results.read(out), "peers")}
    assert list(rows) == ["diffusers", "ours", whole_run.PEER]
    assert rows["ours-run"]["images"] == whole_run.NUMBER[True] and rows["ours-run"]["images_per_second"] > 0
    assert rows["ours-run"]["counted"] == 2  # of three batches of two the last, which follows the middle one
    assert all(row["batch"] == 2 for row in rows.values())


def test_a_call_that_was_killed_leaves_nothing_at_work(tmp_path):
    out, begun = tmp_path / "out", tmp_path / "begun"
    os.mkfifo(begun)
    python = tmp_path / "python"  # has an environment, and measures without end
    python.write_text(
        "#!/bin/sh\n[ $1 = -c ] && exec echo 2.11.0 False\n"
        f"[ $2 = bench.environment ] || {{ echo >{begun}; exec sleep 300; }}\n"
    )
    python.chmod(0o755)
    line, options = script(0, out, ONLY="race", PYTHON=str(python))
    with subprocess.Popen(line, **options | {"stderr": subprocess.DEVNULL}, stdout=subprocess.DEVNULL) as process:
        begun.read_text()
        other = subprocess.run(line, **options)
        assert other.returncode == 3 and f"another call is at work in OUT={out}" in other.stderr
        process.kill()
    assert subprocess.run(["flock", "--timeout", "20", out, "true"]).returncode == 0


STATES = {
    "before the first row": lambda parts: parts == {"peers": {"status": "begun", "tries": 1}},
    "while peers are prepared": lambda parts: bool(parts["peers"].get("rows")),
    "when the limits are known": lambda parts: parts.get("limits", {}).get("status") == "done",
    "after the first turn": lambda parts: any("seconds_per_image" in row for row in parts["peers"].get("rows", [])),
    "in the whole run": lambda parts: "peers run" in parts,
}


@long_test
@pytest.mark.parametrize("state", STATES)
def test_the_gpu_script_cut_anywhere_keeps_what_it_had_and_resumes(tmp_path, state):
    file = tmp_path / "one.json"
    line, options = script(0, tmp_path, ONLY="race", PEERS="ours,diffusers")  # the first takes time to prepare
    with subprocess.Popen(line, **options, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 300
        while time.monotonic() < end and not (file.exists() and STATES[state](results.read(file)["parts"])):
            time.sleep(0.01)
        cut = results.read(file)["parts"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    kept = results.read(file)["parts"]
    assert len(kept["peers"].get("rows", [])) >= len(cut["peers"].get("rows", []))
    again = subprocess.run(line, **options, stdout=subprocess.PIPE)
    assert again.returncode == 0, again.stdout + again.stderr
    parts = results.read(file)["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    assert set(parts) == {"peers", "limits", "peers run"}
    assert kept.get("limits", {}).get("status") != "done" or parts["limits"] == kept["limits"]


@long_test
def test_the_gpu_script_out_of_time_ends_with_4_and_names_what_is_left(tmp_path):
    line, options = script(0, tmp_path, ONLY="race", SECONDS_ALL="60")  # a whole run is not begun with so little left
    said = subprocess.run(line, **options, stdout=subprocess.PIPE)
    assert said.returncode == 4 and "failed: race-1(4)" in said.stderr and "left: peers run" in said.stdout, said.stdout
    rows = {row["peer"]: row for row in results.rows_of(results.read(tmp_path / "one.json"), "peers")}
    assert len(rows["ours"]["seconds_per_image"]["rounds"]) == one_race.ROUNDS
    assert sys.executable in (tmp_path / "one-log-0.txt").read_text()
