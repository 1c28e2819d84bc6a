"""The programs of docs/examples run as they stand, beside the run folder of the demo. The pictures that `example`
writes are completed by the same command, and no file of another is overwritten.
"""

import runpy
from pathlib import Path

import pytest

from datasetdm_fast import example
from datasetdm_fast.disk import storage
from datasetdm_fast.generate import main

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))
LONGEST = 25  # lines
pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")


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


def test_labelled_pictures_that_a_full_disk_cut_short_are_completed(tmp_path, capsys):
    folder = tmp_path / "photos"
    assert example.main([str(folder)]) == 0
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    missing = [folder / "images" / "039.jpg", folder / "prompts.txt"]
    for path in missing:
        path.unlink()
    storage.part_of(missing[0]).write_bytes(b"half")
    assert example.main([str(folder)]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    (folder / "masks" / "000.png").write_bytes(b"mine")
    assert example.main([str(folder)]) == 2 and "nothing is overwritten" in capsys.readouterr().err
    assert (folder / "masks" / "000.png").read_bytes() == b"mine"


def test_labelled_pictures_are_not_laid_beside_files_of_another(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert example.main([str(tmp_path)]) == example.main([str(tmp_path / "notes.txt")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
