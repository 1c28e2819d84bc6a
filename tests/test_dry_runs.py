"""--dry-run of every command that writes: it says what would be done, writes nothing and ends well."""

import json
import shutil
from importlib import import_module

import pytest
from rendered import write_run

from datasetdm_fast import drop, filter
from datasetdm_fast.cli import COMMANDS
from datasetdm_fast.command_line.completion import describe_flags

ONLY_READ = {"audit", "doctor", "serve"}
ELSEWHERE = {  # command -> the test file that has its dry run
    "generate": "test_generate.py",
    "train": "test_train.py",
    "edit": "test_redraw.py",
    "vary": "test_redraw.py",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs, the first scored and one of its samples dropped, one filtered; and two pictures."""
    path = tmp_path_factory.mktemp("runs")
    for name, number in (("one", 4), ("two", 2)):
        write_run(path / name, number, 32, [f"a ball, {name} {k}" for k in range(number)])
    assert filter.main([str(path / "one"), "--json"]) == 0 and drop.main([str(path / "one"), "00000003"]) == 0
    shutil.copytree(path / "one", path / "filtered")
    assert filter.main([str(path / "filtered"), "--where", "score>=0"]) == 0
    shutil.copytree(path / "two" / "images", path / "photos")
    return path


def contents(path):
    return {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in path.rglob("*")}


LINES = [
    ("convert", "RUNS/one --to coco,voc", {"samples": 3, "splits": {"train": 3}}),
    ("drop", "RUNS/one 00000001", {"dropped": ["00000001"], "left": 2}),
    ("evaluate", "--data demo:3@7", {"images": {"demo:3@7": 3}}),
    ("example", "RUNS/new", {"path": "RUNS/new", "pictures": 40}),
    ("export", "--model tiny --decoder none --raw-capture --out RUNS/graphs", {"path": "RUNS/graphs"}),
    ("filter", "RUNS/one --where score<0", {"kept": 0, "left_out": 3}),
    ("filter", "RUNS/two", {"scored": 2}),
    ("filter", "RUNS/filtered --undo", {"restored": 0}),
    ("gallery", "RUNS/two", {"samples": 2, "number": 2}),
    ("label", "RUNS/photos --model tiny --labeller attention --classes ball --out RUNS/new", {"number": 2, "done": 0}),
    ("merge", "RUNS/one RUNS/two --out RUNS/all", {"number": 3, "done": 0, "duplicates": 2}),
    ("prompts", "--classes owl,lamp --per-class 5 --out RUNS/prompts.jsonl", {"classes": {"owl": 5, "lamp": 5}}),
    ("restore", "RUNS/one --all", {"restored": ["00000003"]}),
    ("split", "RUNS/one --shares 50,50", {"parts": {"train": 2, "val": 1}}),
    ("verify", "--model tiny --decoder none --number 1 --steps 2", {"number": 1}),
]


@pytest.mark.parametrize("command, line, told", LINES, ids=[f"{name}-{k}" for k, (name, *_) in enumerate(LINES)])
def test_nothing_is_written(runs, command, line, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(runs)
    words = [*line.replace("RUNS", str(runs)).split(), "--dry-run", "--json"]
    assert import_module(COMMANDS[command][0]).main(words) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.replace(str(runs), "RUNS"))
    assert found | told == found and err.splitlines()[-1] == "--dry-run: nothing is written"
    assert contents(runs) == before and not list(tmp_path.iterdir())


def test_every_command_that_writes_has_dry_runs():
    flags = {
        name: {word for flag in describe_flags(module) for word in flag["flags"]}
        for name, (module, _) in COMMANDS.items()
    }
    assert {name for name, found in flags.items() if "--dry-run" not in found} == ONLY_READ
    assert COMMANDS.keys() == {name for name, *_ in LINES} | ELSEWHERE.keys() | ONLY_READ


def test_the_help_of_every_command_has_examples(capsys):
    for name, (module, _) in COMMANDS.items():
        assert import_module(module).main(["--help"]) == 0
        shown = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        assert shown and all(f"datasetdm_fast.{name}" in line for line in shown), name


def test_a_condition_is_tried_on_scored_samples_only(runs, capsys):
    assert filter.main([str(runs / "two"), "--where", "score>0", "--dry-run"]) == 2
    assert "2 samples have no scores yet" in capsys.readouterr().err
