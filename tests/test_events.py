"""state/events.jsonl: what happened to a run folder, line by line; nothing follows from it."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from rendered import document, rendered, write_run

from datasetdm_fast.data import Quarantined
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder import events
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.events import EVENTS
from datasetdm_fast.runs.run_folder.folder import RunFolder


def told(run):
    return [json.loads(line) for line in (run / EVENTS).read_text().splitlines()]


def test_a_run_tells_its_start_plan_progress_warnings_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "SECONDS_BETWEEN", 0.0)
    run = tmp_path / "run"
    with RunFolder(run, document(3)) as folder:
        assert not (run / EVENTS).exists()  # before the first change
        broken = replace(rendered(1).request, index=1)
        folder.add([rendered(0), Quarantined(broken, "a NaN")], {})
    assert [line["event"] for line in told(run)] == ["start", "plan", "warning", "progress"]
    assert told(run)[2]["sample"] == "00000001" and told(run)[2]["reason"] == "a NaN"
    with RunFolder(run, document(3)) as folder:  # the same line again
        folder.add([rendered(2)], {})
        finish_run(folder)
    assert [line["event"] for line in told(run)[4:]] == ["start", "plan", "progress", "done"]
    assert told(run)[5]["done"] == 1 and told(run)[-1] | {"made": 1, "done": 2, "set_aside": 1} == told(run)[-1]
    before = (run / EVENTS).read_bytes()
    with RunFolder(run, document(3)) as folder:  # nothing is left to be done
        finish_run(folder)
    assert (run / EVENTS).read_bytes() == before and audit(run).findings == []


def test_the_log_decides_nothing(tmp_path):
    write_run(tmp_path / "run", 2, 32)
    (tmp_path / "run" / EVENTS).write_text("not even JSON")
    assert audit(tmp_path / "run").findings == []
    (tmp_path / "run" / EVENTS).unlink()
    assert audit(tmp_path / "run").findings == []


def write_lines(path, process):
    for number in range(100):
        storage.append(path, f"{process} {number} {'x' * 5000}\n".encode())


def test_lines_of_several_processes_are_whole(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(partial(write_lines, tmp_path / "log"), range(4)))
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 400 and all(text == "x" * 5000 for _, _, text in lines)
    assert [int(number) for process, number, _ in lines if process == "2"] == list(range(100))


def test_after_half_a_line_a_new_one_begins(tmp_path, monkeypatch):
    storage.append(tmp_path / "log", b"one\n")
    (tmp_path / "log").write_bytes(b"one\ntw")
    storage.append(tmp_path / "log", b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw\nthree\n"

    def full(name, call, *arguments):
        if name == "write":
            raise OSError(28, "No space left on device")
        return call(*arguments)

    monkeypatch.setattr(storage, "syscall", full)
    with pytest.raises(Missing, match="the disk is full"):
        storage.append(tmp_path / "log", b"four\n")
