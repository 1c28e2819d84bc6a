"""What the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest

from datasetdm_fast.generate import main
from datasetdm_fast.loading.presets import DEMO

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained yet")


def blocks(language: str) -> list[str]:
    return [
        text
        for named, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if named == language
    ]


def test_the_library_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--number", "4", "--steps", "4", "--batch-size", "4", "--quiet"]) == 0
    (example,) = blocks("python")
    names: dict = {}
    exec(example, names)
    out, run = names["out"], names["run"]
    assert (
        out.images[0].shape == (128, 128, 3) and out.semantic[0].labels.shape == (128, 128) and out.meta[0]["seed"] == 7
    )
    assert list(names["pyramid"]) == ["low", "mid", "high", "highest"]
    assert len(run) == 4 and run[3].semantic.labels.shape == (128, 128)
    image, label = names["images_and_labels"][0]
    assert image.shape == (3, 128, 128) and label.shape == (128, 128)


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("python -m datasetdm_fast.generate")
    ],
)
def test_generate_lines_are_accepted(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[3:]
    for flag in {"--model", "--decoder"} & set(words):  # the line's own folders are the reader's
        words[words.index(flag) + 1] = "demo"
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_every_flag_of_the_table_exists(capsys):
    assert main(["--help"]) == 0
    known = capsys.readouterr().out
    for flag in re.findall(r"`(--[a-z-]+)", README):
        assert flag in known, flag
