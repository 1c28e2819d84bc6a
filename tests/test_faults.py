"""No call to the disk can fail, fall short or be a process's last and cost a sample, a byte or a clear word.

Two counters: `storage.syscall` inside the process, where every call of a run fails in turn, and a preloaded library
that also sees SQLite's own calls.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torchless
from fault_server import FaultServer
from power import states
from skips import IS_LONG, long_test

from datasetdm_fast import generate
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import Ledger

KILLS = 200 if IS_LONG else 8
SMALL = ("--number", "2", "--batch-size", "1", "--task", "semantic", "--quiet")
USUAL = ("--number", "6", "--batch-size", "2", "--quiet")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fault library is preloaded as Linux does it")


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a run folder but its state, with its bytes."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and "state" not in file.parts
    }


def check_refusal(code: int, err: str) -> None:
    """The end of a run the disk did not let finish: exit 3, the cause, the remedy, nothing else."""
    lines = err.splitlines()
    assert code == 3 and len(lines) == 2 and "Traceback" not in err and all(lines), (code, err)


def check_whole(path: Path) -> None:
    """What is there may be too little, but every sample of the ledger is as it was written."""
    if (path / LEDGER).exists():
        assert audit(path, threads=1).findings == []


# Every call of the storage module -------------------------------------------------------------------------------------


class Fault:
    """Lets the call `place`, or all from it on, fail in the way of `kind`."""

    def __init__(self, kind: str, place: int = 1 << 62, is_lasting: bool = False):
        self.kind, self.place, self.is_lasting, self.seen = kind, place, is_lasting, 0
        self.names: list[str] = []

    def applies(self, name: str) -> bool:
        return {
            "full": name in ("open", "write", "mkdir", "rename", "sqlite COMMIT", "sqlite INSERT"),
            "broken": True,
            "short": name == "write",
            "unsynced": name in ("fsync", "sqlite COMMIT"),
        }[self.kind]

    def __call__(self, name, call, *arguments):
        if not self.applies(name):
            return call(*arguments)
        place, self.seen = self.seen, self.seen + 1
        self.names.append(name)
        if place != self.place and not (self.is_lasting and place > self.place):
            return call(*arguments)
        if self.kind == "short":
            handle, data = arguments
            return call(handle, data[: max(len(data) // 2, 1)])
        if name.startswith("sqlite"):
            error = sqlite3.OperationalError("disk I/O error" if self.kind != "full" else "database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC if self.kind != "full" else sqlite3.SQLITE_FULL
            raise error
        number = errno.ENOSPC if self.kind == "full" else errno.EIO
        raise OSError(number, os.strerror(number))


@pytest.fixture
def arithmetic(monkeypatch):
    torchless.install(monkeypatch.setattr)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    monkeypatch.setattr(sqlite, "SYNCHRONOUS", "PRAGMA synchronous=OFF")


def run_with(fault: Fault, out: Path, monkeypatch, capsys) -> tuple[int, str]:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "syscall", fault)
        code = generate.main([*SMALL, "--out", str(out)])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("is_lasting", [False, pytest.param(True, marks=long_test)], ids=["once", "for good"])
@pytest.mark.parametrize("kind", ["full", "broken", "short", "unsynced"])
def test_every_call_to_the_disk_may_fail(arithmetic, tmp_path, monkeypatch, capsys, kind, is_lasting):
    count = Fault(kind)
    assert run_with(count, tmp_path / "whole", monkeypatch, capsys) == (0, "")
    whole = tree(tmp_path / "whole")
    assert count.seen >= {"full": 30, "broken": 60, "short": 10, "unsynced": 20}[kind]
    places = range(count.seen) if IS_LONG else of_every_name(count.names, 8, seed=2)
    for place in places:
        out = tmp_path / "run"
        fault = Fault(kind, place, is_lasting)
        code, err = run_with(fault, out, monkeypatch, capsys)
        if code or kind != "short":
            # A temporary file that cannot be removed is left to the next start, so some calls may fail and cost
            # nothing.
            assert code == 0 or check_refusal(code, err) is None, f"call {place}, {fault.names[place]}"
        assert code == 0 or kind != "short"
        if out.exists():
            check_whole(out)
        assert generate.main([*SMALL, "--out", str(out)]) == 0 and tree(out) == whole, (
            f"call {place}, {fault.names[place]}"
        )
        assert audit(out, threads=1).findings == []
        capsys.readouterr()
        shutil.rmtree(out)
    print(f"{len(places)} of {count.seen} calls, each failed in turn")


# Every call of a process, SQLite's too --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = FaultServer(tmp_path_factory.mktemp("faults"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert server.run(*USUAL, out=path)["code"] == 0
    return tree(path)


def calls(server, path: Path, kind: str) -> int:
    """How many calls of an undisturbed run a fault of this kind could meet."""
    found = server.run(*USUAL, out=path, kind=kind, at=1 << 62)
    assert found["code"] == 0
    shutil.rmtree(path)
    return found["seen"]


def chosen(count: int, most: int, seed: int) -> list[int]:
    """Places spread over all of `count`: every one where the test is long, `most` of them else."""
    return list(range(count)) if IS_LONG else sorted(random.Random(seed).sample(range(count), min(most, count)))


def of_every_name(names: list[str], most: int, seed: int) -> list[int]:
    """About `most` places among all calls, as many of each name and one of each at least."""
    places = {name: [place for place, other in enumerate(names) if other == name] for name in names}
    each, dice = max(most // len(places), 1), random.Random(seed)
    return sorted(place for found in places.values() for place in dice.sample(found, min(each, len(found))))


def resume(server, path: Path, undisturbed: dict[str, bytes]) -> None:
    """The same line again ends with the same bytes as if nothing had happened."""
    again = server.run(*USUAL, out=path)
    assert again["code"] == 0, again
    assert tree(path) == undisturbed
    assert audit(path, threads=1).findings == []
    shutil.rmtree(path)


@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("kind", ["full", "broken", "short", "unsynced"])
def test_every_system_call_may_fail(server, undisturbed, tmp_path, kind, is_lasting):
    path = tmp_path / "run"
    places = chosen(calls(server, path, kind), 4, seed=1)
    for place in places:
        ended = server.run(*USUAL, out=path, kind=kind, at=place, lasting=is_lasting)
        if ended["code"]:
            check_refusal(ended["code"], ended["stderr"])
        assert ended["signal"] == 0 and (kind != "short" or ended["code"] == 0), (place, ended)
        check_whole(path)
        resume(server, path, undisturbed)
    print(f"{len(places)} system calls, each failed in turn")


def test_a_killed_run_loses_and_repeats_nothing(server, undisturbed, tmp_path):
    path, dice = tmp_path / "run", random.Random(0)
    count = calls(server, path, "kill before")
    places, kills = sorted(dice.sample(range(count), min(KILLS, count))), 0
    for k, place in enumerate(places):
        kind = ("kill before", "kill after")[k % 2]
        ended = server.run(*USUAL, out=path, kind=kind, at=place)
        # A slower run writes a few events more, so one of the last calls may be none of this one's.
        assert ended["signal"] == 9 or ended["seen"] <= place, (place, ended)
        kills += ended["signal"] == 9
        check_whole(path)
        if k % 10 == 0:  # and killed again while it goes on
            server.run(*USUAL, out=path, kind=kind, at=dice.randrange(count))
            check_whole(path)
        resume(server, path, undisturbed)
    assert kills >= 0.9 * len(places)
    print(f"{kills} kills at chosen calls of {count}, each run whole and of the same bytes")


def test_a_run_killed_at_any_moment_loses_and_repeats_nothing(server, undisturbed, tmp_path):
    path, dice, kills = tmp_path / "run", random.Random(1), 0
    for _ in range(KILLS // 4):
        longest = 0.08  # seconds; more each time, so that a machine busy with other work ends the run as well
        while server.run(*USUAL, out=path, seconds=dice.uniform(0.002, longest))["code"] is None:
            kills, longest = kills + 1, longest * 1.1
            check_whole(path)
        resume(server, path, undisturbed)
    print(f"{kills} kills at any moment, each run whole and of the same bytes")


# Loss of power --------------------------------------------------------------------------------------------------------


def test_a_loss_of_power_costs_no_committed_sample(server, undisturbed, tmp_path):
    """Whatever was not synced is gone, torn or out of order; what the ledger had acknowledged is there."""
    path, log = tmp_path / "run", tmp_path / "log"
    assert server.run(*USUAL, out=path, record=log)["code"] == 0
    shutil.rmtree(path)
    found = list(states(log.read_bytes(), path))
    places = chosen(len(found), 16, seed=2)
    for k in places:
        made, build, name = found[k]
        build()
        if (path / LEDGER).exists() and made:
            with Ledger(path / LEDGER) as ledger:
                assert ledger.count() >= made, name
        if made:
            assert audit(path, threads=1).done >= made and audit(path, threads=1).findings == [], name
        again = server.run(*USUAL, out=path)
        assert again["code"] == 0, (name, again)
        assert tree(path) == undisturbed, name
        shutil.rmtree(path)
    print(f"{len(places)} states after a loss of power")


def test_what_sqlite_left_beside_a_finished_ledger_goes_at_the_next_start(arithmetic, tmp_path):
    """As a process leaves it that is killed while it closes the ledger."""
    out = tmp_path / "run"
    line = [*SMALL, "--out", str(out)]
    assert generate.main(line) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for kinds in (("-wal", "-shm"), ("-shm",)):
        for kind in kinds:
            (out / f"{LEDGER}{kind}").touch()
        assert generate.main(line) == 0
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
