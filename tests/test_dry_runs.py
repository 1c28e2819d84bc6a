"""--dry-run of every command that writes into or beside a run folder: it says what would be done and writes nothing."""

import json

import pytest
from rendered import write_run

from datasetdm_fast import convert, drop, filter, merge, restore, splice, split


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; of the first the samples are scored, and one is dropped."""
    path = tmp_path_factory.mktemp("runs")
    for name, number in (("one", 4), ("two", 2)):
        write_run(path / name, number, 32, [f"a ball, {name} {k}" for k in range(number)])
    assert filter.main([str(path / "one"), "--json"]) == 0 and drop.main([str(path / "one"), "00000003"]) == 0
    return path


def contents(path):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "command, line, told",
    [
        (convert, "RUNS/one --to coco,voc", {"samples": 3, "splits": {"train": 3}}),
        (drop, "RUNS/one 00000001", {"dropped": ["00000001"], "left": 2}),
        (filter, "RUNS/one --where score<0", {"kept": 0, "left_out": 3}),
        (merge, "RUNS/one RUNS/two --out RUNS/all", {"number": 3, "done": 0, "duplicates": 2}),
        (restore, "RUNS/one --all", {"restored": ["00000003"]}),
        (splice, "RUNS/one --number 3 --out RUNS/spliced", {"number": 3, "done": 0}),
        (split, "RUNS/one --shares 50,50", {"parts": {"train": 2, "val": 1}}),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2],
)
def test_nothing_is_written(runs, command, line, told, capsys):
    before = contents(runs)
    assert command.main([*line.replace("RUNS", str(runs)).split(), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found | told == found and contents(runs) == before


def test_a_condition_is_tried_on_scored_samples_only(runs, capsys):
    assert filter.main([str(runs / "two"), "--where", "score>0", "--dry-run"]) == 2
    assert "2 samples have no scores yet" in capsys.readouterr().err
    assert filter.main([str(runs / "one"), "--dry-run"]) == 2 and "no condition" in capsys.readouterr().err
