"""The programs of docs/examples run as they stand, beside the run folder of the demo."""

import runpy
from pathlib import Path

import pytest

from datasetdm_fast.generate import main

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))
LONGEST = 25  # lines


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    assert main(["--number", "4", "--steps", "4", "--out", str(folder / "runs" / "demo"), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, demo_run, monkeypatch, capsys):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST and source.startswith('"""')
    monkeypatch.chdir(demo_run)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_nine():
    assert len(EXAMPLES) == 9
