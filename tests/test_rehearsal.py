"""The CUDA path without a GPU: no finding, every planted fault found at its line, and a budget that may only fall."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.rehearsal import budget
from bench.rehearsal.roofline import Reckoning
from bench.rehearsal.timeline import HostThread, Timeline

ROOT = Path(__file__).parents[1]
LONG = os.environ.get("DATASETDM_LONG_TESTS") == "1"
long_test = pytest.mark.skipif(not LONG, reason="the long form only")

# What is planted -> the rule that finds it, and the file whose line is named.
EXPECTED = {
    "images decoded by other threads": ("race", "engines/fast.py"),
    "sums given back too early": ("freed too early", "generation/driver.py"),
    "the label stream does not wait": ("race", "engines/fast.py"),  # what it should have waited for
    "a number is read in the loop": ("host wait", "generation/driver.py"),
    "fp32 in the fp16 network": ("error", "models/unet.py"),
    "a tensor of the host": ("host wait", "models/unet.py"),
    "the host reads before the copy is over": ("race", "tasks/to_host.py"),
    "a pageable copy at the start of a batch": ("host wait", "engines/device.py"),
    "a graph recorded with another GPU's stream": ("wrong GPU", "engines/cuda_graph.py"),
    "a kernel launched on another GPU": ("wrong GPU", "kernels/layer_norm.py"),
    "fp32 that is TF32": ("precision", "engines/fast.py"),
}
USUAL = ("images decoded by other threads", "a number is read in the loop")  # of every `make test`


def ran(*arguments: str, seconds: float = 900) -> subprocess.CompletedProcess:
    """A program of its own: this process has its kernels in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def rehearsed(*flags: str) -> dict:
    done = ran("-m", "bench", "rehearse", "--json", *flags)
    assert done.stdout, done.stderr
    return json.loads(done.stdout) | {"code": done.returncode, "said": done.stderr}


def test_a_run_on_a_gpu_is_in_order():
    found = rehearsed("--model", "tiny", "--batch", "4", "--batches", "2")
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == 8 and found["replays"] == 10 and found["kernels"] > 20


@long_test
@pytest.mark.parametrize(
    "flags",
    [
        *(("--model", "random-sd14", "--batch", str(batch)) for batch in (1, 8, 32)),
        ("--model", "tiny", "--device", "cuda:1"),
        ("--model", "tiny", "--dtype", "fp32"),
        ("--model", "tiny", "--dtype", "tf32"),
        ("--model", "tiny", "--dtype", "bf16"),
    ],
    ids=" ".join,
)
def test_so_are_runs_of_every_size_card_and_precision(flags):
    found = rehearsed(*flags)
    assert found["findings"] == [] and found["code"] == 0, found["findings"]


@pytest.mark.parametrize("names", [USUAL, pytest.param(tuple(EXPECTED.keys() - set(USUAL)), marks=long_test)])
def test_what_is_planted_is_found_at_its_line(names):
    done = ran("tests/planted_faults.py", *names)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in answers} == set(names), done.stderr
    for one in answers:
        rule, file = EXPECTED[one["name"]]
        places = [f"{finding['place']} {finding['what']}" for finding in one["findings"] if finding["rule"] == rule]
        assert any(file in place for place in places), f"{one['name']}: {one['findings']}"


def test_waits_and_events_order_what_they_should():
    timeline = Timeline()
    first, second = timeline.new_stream(0), timeline.new_stream(0)
    timeline.counts[first] = 3
    timeline.wait(second, timeline.reached(first))
    assert timeline.clocks[second] == {first: 3}
    worker = HostThread("worker")
    timeline.knows(worker, {first: 2})
    with timeline.on_thread(worker):
        assert timeline.thread is worker and worker.clock == {first: 2}
    assert timeline.thread.clock == {}


def test_the_budget_may_only_fall():
    """What a card is given for one call of SD 1.4, against bench/gpu_budget.json."""
    done = ran("-m", "bench", "rehearse", "--budget", "--json")
    assert done.stdout, done.stderr
    assert json.loads(done.stdout)["risen"] == [] and done.returncode == 0, done.stderr


def test_a_figure_that_rose_is_named():
    before = {"call": Reckoning(655, 37.3, 11.9, 31.4)}
    assert budget.risen(before, before) == []
    after = {"call": Reckoning(656, 37.3, 11.9, 31.3)}
    assert budget.risen(after, before) == ["call: 656 launches, the budget is 655"]
    assert budget.risen({"other": before["call"]}, before) == [
        "call: only in one of the file and the reckoning",
        "other: only in one of the file and the reckoning",
    ]
