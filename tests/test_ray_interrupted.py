"""A Ray run that is interrupted a hundred times, at any moment: each time exit code 130, the line that resumes the run,
and a whole run folder.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torchless
from run_steps import prepare
from skips import long_test
from test_ranks import tree
from test_ray import SAMPLES, alone, command, config, head, pictures, surroundings, with_ray  # noqa: F401

from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder.audit import audit

ROUNDS = int(os.environ.get("DATASETDM_SOAK_ROUNDS", "100"))
SEED = int(os.environ.get("DATASETDM_SOAK_SEED", "0"))
RESUMES = "; resume with: python -m datasetdm_fast.generate --out", "interrupted; run the same command again"
SECONDS_TO_END = 30  # workers have, once their driver is gone
OWN_RAY = 5  # in every so many rounds the run starts a Ray of its own, which takes a few seconds more


def interrupted(process: subprocess.Popen, out: Path, dice: random.Random) -> str:
    """Sends Ctrl-C to the command at some moment, once or twice, to itself or to its group as a terminal does; returns
    what was done, and nothing where the command had ended before.
    """
    while not (out.parent / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    moment, count = dice.choice(("start", "start", "sample", "batch")), dice.choice((0, 1, 2, 6, 20))
    if moment != "start":
        end = time.monotonic() + 120
        while pictures(out) < count and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
    seconds = dice.uniform(0, {"start": 6, "sample": 0.02, "batch": 0.6}[moment])
    time.sleep(seconds)
    send = dice.choice((process.send_signal, lambda number: os.killpg(process.pid, number)))
    gap = dice.choice((None, None, None, 0, dice.uniform(0, 2)))
    if process.poll() is not None:
        return ""
    for wait in (0,) if gap is None else (0, gap):
        time.sleep(wait)
        if process.poll() is None:
            send(signal.SIGINT)
    to = "the command" if send == process.send_signal else "its group"
    return f"{moment} {count} + {seconds:.3f} s to {to}" + ("" if gap is None else f", again after {gap:.3f} s")


def at_work(folder: Path) -> list[psutil.Process]:
    """Workers of any Ray that were started from this folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd", "status"])
        if "ray::RayWorker" in " ".join(process.info["cmdline"] or ())
        and process.info["cwd"] == str(folder)
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@with_ray
@pytest.mark.loopback
@long_test
def test_whoever_interrupts_a_ray_run_gets_130_the_line_that_resumes_it_and_a_whole_folder(
    alone,  # noqa: F811
    head,  # noqa: F811
    command,  # noqa: F811
    tmp_path,
    monkeypatch,
    record_property,
):
    passed, failed, number, rounds = 0, [], -1, 0
    torchless.install(monkeypatch.setattr)
    while rounds < ROUNDS:
        number += 1
        dice, is_own = random.Random(f"{SEED} {number}"), number % OWN_RAY == 0
        out = tmp_path / f"run{number}"
        (tmp_path / "begun").unlink(missing_ok=True)
        line = ("--cluster", "ray" if is_own else head.address, "--ranks", "2", "--out", str(out))
        begin = time.monotonic()
        process = command(*line, TROUBLED_SECONDS=str(dice.choice((0.05, 0.3, 0.6))))
        done = interrupted(process, out, dice)
        how = f"round {number}{' (own Ray)' if is_own else ''}: {done or 'ended before its interrupt, not counted'}"
        rounds += bool(done)
        interrupt = time.monotonic()
        _, errors = process.communicate(timeout=120)
        seconds = time.monotonic() - interrupt
        while (left := at_work(tmp_path)) and time.monotonic() < interrupt + SECONDS_TO_END:
            time.sleep(0.1)
        found = [f"still at work: {left}"] if left else []
        is_complete = out.exists() and pictures(out) == SAMPLES
        if process.returncode != (130 if done else 0) and not (is_complete and process.returncode == 0):
            found.append(f"exit code {process.returncode}")
        if not is_complete and not any(words in errors for words in RESUMES):
            found.append("nothing says how to resume")
        if "Traceback" in errors:
            found.append("a traceback")
        if (out / "state" / "ledger.sqlite").exists() and (damage := audit(out, threads=1).findings):
            found.append(f"damaged: {damage}")
        made = pictures(out)
        write_missing(prepare(config(out)))
        if tree(out) != tree(alone):
            found.append("resumed to other bytes")
        shutil.rmtree(out, ignore_errors=True)
        passed += bool(done) and not found
        print(
            f"{how}: {made} samples, ended in {seconds:.1f} s, whole round {time.monotonic() - begin:.1f} s", flush=True
        )
        if found:
            failed.append(f"{how}: {'; '.join(found)}\n{errors}")
            print(failed[-1], flush=True)
    record_property("told", f"interrupted Ray runs: {passed} of {ROUNDS} as they should be")
    assert failed == []
