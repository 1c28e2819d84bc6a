"""Recipes of published experiments: their lines are accepted, begin where all is there, and are run once."""

import argparse
from importlib import import_module

import layouts
import pytest
from skips import long_test

from datasetdm_fast import recipe
from datasetdm_fast.evaluate import main as evaluate
from datasetdm_fast.evaluation import naming

PARSED = 77
NAMES = sorted(path.stem for path in recipe.FOLDER.glob("*.yaml"))


def steps(name: str, *flags: str) -> list[recipe.Step]:
    config, _ = recipe.parse([name, *flags], recipe.RecipeConfig)
    return recipe.steps_of(recipe.read(name), config)


@pytest.mark.parametrize("flags", [(), ("--quick",)], ids=["whole", "quick"])
@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_one_that_its_command_accepts(name, flags, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *arguments):
        found, unknown = parse(self, *arguments)
        assert not unknown
        raise SystemExit(PARSED)

    lines = steps(name, "--root", "DATA", *flags)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    for step in lines:
        assert "{" not in step.line
        assert import_module(f"datasetdm_fast.{step.words[0]}").main(list(step.words[1:])) == PARSED, step.line
        if "--data" in step.words and "run:" not in step.line:
            assert step.needs, step.line


def test_what_is_missing_is_named_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main(["voc-semantic", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "missing: data/VOC2012/ImageSets/Segmentation/val.txt (PASCAL VOC 2012)" in said and "65.2" in said
    assert recipe.main(["voc-semantic"]) == 3 and "step teach needs it" in capsys.readouterr().err
    layouts.voc(tmp_path / "data" / "VOC2012")
    assert recipe.main(["voc-semantic"]) == 3 and "stable-diffusion-v1-4" in capsys.readouterr().err
    assert recipe.main(["voc-semantik"]) == 2 and "did you mean voc-semantic?" in capsys.readouterr().err
    assert recipe.main(["voc-semantic", "--only", "paint"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert recipe.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)


def test_a_finished_step_is_not_repeated(tmp_path, monkeypatch, capsys):
    layouts.voc(tmp_path / "VOC2012")
    lines, fails = [], ["generate"]

    class Command:
        def __init__(self, name):
            self.name = name.rpartition(".")[2]

        def main(self, words):
            lines.append(self.name)
            return 4 if self.name in fails else 0

    monkeypatch.setattr(recipe, "import_module", Command)
    line = ["voc-semantic", "--root", str(tmp_path), "--model", "demo", "--out", str(tmp_path / "out")]
    assert recipe.main(line) == 4 and lines == ["train", "prompts", "generate"]
    fails.clear()
    assert recipe.main(line) == 0 and lines[3:] == ["generate", "splice", "convert", "evaluate"]
    assert recipe.main(line) == 0 and len(lines) == 7
    assert recipe.main([*line, "--real", "50"]) == 2 and "its step teach was another one" in capsys.readouterr().err


def test_several_data_sets_and_names_of_classes(tmp_path, capsys):
    assert naming.addresses("voc:a,b[val],coco:c") == ["voc:a,b[val]", "coco:c"]
    layouts.voc(tmp_path)
    data = f"demo:1@5,voc:{tmp_path}[val]"
    line = ["--data", data, "--task", "semantic", "--bootstrap", "0", "--quiet"]
    assert evaluate([*line, "--class-names", "bicycle=ball,auto"]) == 0
    said = capsys.readouterr().out
    assert f"voc:{tmp_path}[val]" in said and "  ball" in said and "in_common" in said and "  bicycle" not in said
    assert (
        evaluate([*line, "--class-names", "zebra=ball"]) == 2 and "--class-names zebra=ball" in capsys.readouterr().err
    )
    assert evaluate([*line, "--class-names", "cat=dog"]) == 2 and "two classes" in capsys.readouterr().err
    assert evaluate(["--data", data, "--student", "small", "--run", "x"]) == 2


@long_test
@pytest.mark.parametrize("name, layout", [("voc-semantic", "voc:VOC2012"), ("voc-long-tail", "voc:VOC2012")])
def test_a_quick_recipe_runs_to_its_end(name, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, _, folder = layout.partition(":")
    getattr(layouts, kind)(tmp_path / "data" / folder)
    line = [name, "--model", "demo", "--quick"]
    assert recipe.main(line) == 0
    out = tmp_path / "runs" / f"{name}-quick"
    assert (out / "students").is_dir() and (out / "export" / "mmseg" / "dataset.py").is_file()
    assert recipe.main(line) == 0
