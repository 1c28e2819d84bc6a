"""Result files of the bench: stored part by part, continued, refused where they belong elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import suite
from bench.report import results
from bench.report.results import ResultFile
from bench.rows.measurement import BenchRun, Measurement
from datasetdm_fast.errors import Missing, Refused

HEAD = {
    "suite": "gpu",
    "date": "2026-01-02T03:04:05Z",
    "command": "python -m bench gpu",
    "machine": {"device": "NVIDIA H200", "commit": "abc1234", "versions": {"torch": "2.13.0"}},
    "setting": {"model": "tiny", "calls": 3},
}


class Killed(BaseException):
    """What no part can catch, as after kill -9."""


def measurement(path, **changes):
    return BenchRun(None, ResultFile.open(path, HEAD | changes, goes_on=True), 1.0, 2)


def parts(log, dies="", of=Killed):
    def part(name):
        def run(m):
            if name == dies:
                raise of
            log.append(name)
            return [{"peer": name, "status": "ok", "batch": 4}]

        return Measurement(name, "", run)

    return [part(name) for name in ("peers a", "peers b", "stages")]


def run(path, log, **options):
    return suite.measure(measurement(path), parts(log, **options), math.inf)


@pytest.mark.parametrize("ending", [Killed, KeyboardInterrupt, SystemExit])
def test_a_cut_run_leaves_what_it_had_and_goes_on(tmp_path, ending):
    path, log = tmp_path / "file.json", []
    for _ in range(1 if ending is Killed else 3):
        with pytest.raises(ending):
            run(path, log, dies="peers b", of=ending)
        log.clear()
    log.append("peers a")
    assert [row["peer"] for row in results.rows_of(results.read(path), "peers")] == ["peers a"]
    assert run(path, log) == [] and log == ["peers a", "peers b", "stages"]
    assert not list(tmp_path.glob(".*")) and results.batches_of(results.read(path)) == {"peers a": 4, "peers b": 4}


def test_a_part_that_takes_the_process_with_it_twice_is_given_up(tmp_path):
    path, log = tmp_path / "file.json", []
    for _ in range(2):
        with pytest.raises(Killed):
            run(path, log, dies="peers b")
    assert run(path, log, dies="peers b") == [] and log == ["peers a", "stages"]
    assert suite.failed(results.read(path)) == ["part peers b did not end"]


def test_no_part_is_begun_that_would_end_too_late(tmp_path):
    log = []
    m = measurement(tmp_path / "file.json")
    late = [replace(part, least_seconds=60.0) for part in parts(log)]
    assert suite.measure(m, late, 0.0) == ["peers a", "peers b", "stages"] and not log


@pytest.mark.parametrize(
    "change", [{"setting": {"model": "demo", "calls": 51}}, {"machine": HEAD["machine"] | {"commit": "fff0000"}}]
)
def test_another_setting_or_commit_is_refused(tmp_path, change):
    path = tmp_path / "file.json"
    run(path, [])
    with pytest.raises(Refused, match="choose another --out"):
        measurement(path, **change)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', "\x00"])
def test_what_is_no_result_file_is_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(Refused, match="file.json"):
        results.read(path)


def test_the_newest_of_a_suite_is_found_by_its_date(tmp_path):
    for name, suite_name, date in (("b", "cpu", "2026-02-01"), ("a", "cpu", "2026-03-01"), ("c", "gpu", "2026-04-01")):
        peers = {"status": "done", "rows": [{"peer": "ours"}]}
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"format": 1, "suite": suite_name, "date": date, "parts": {"peers": peers}})
        )
    (tmp_path / "part.json").write_text(
        json.dumps(
            {"format": 1, "suite": "cpu", "date": "2026-05-01", "parts": {"limits": {"status": "done", "rows": []}}}
        )
    )
    assert results.newest("cpu", tmp_path).name == "a.json" and results.newest("gpu", tmp_path).name == "c.json"
    assert results.newest("cpu", tmp_path / "nowhere") is None


def test_the_name_of_a_file_says_when_where_and_what():
    name = results.default_path(HEAD["machine"]).name
    assert name == f"{results.now()[:10]}-nvidia-h200-abc1234.json"


def test_a_second_run_takes_another_name(tmp_path):
    path = tmp_path / "a-1.json"
    assert results.unused(path) == path
    path.write_text("{}")
    (tmp_path / "a-1-2.json").write_text("{}")
    assert results.unused(path).name == "a-1-3.json"


def test_what_cannot_be_written_or_replaced_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "page.md").write_text("words")
    with pytest.raises(Refused, match="not a result file"):
        ResultFile.open(tmp_path / "page.md", HEAD)
    with pytest.raises(Refused, match="is a folder"):
        ResultFile.open(tmp_path, HEAD)
    with pytest.raises(Missing, match="cannot be written"):
        ResultFile.open(tmp_path / "page.md" / "file.json", HEAD)
    with pytest.raises(Missing, match="cannot be written"):
        ResultFile.open(Path("/proc/file.json"), HEAD)
    assert (tmp_path / "page.md").read_text() == "words" and [path.name for path in tmp_path.iterdir()] == ["page.md"]
