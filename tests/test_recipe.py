"""Recipes of published experiments: their lines are those of a shell, and commands accept them."""

import argparse
import json
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import layouts
import pytest

from datasetdm_fast import recipe
from datasetdm_fast.evaluate import main as evaluate
from datasetdm_fast.runs.exporting.conversion import open_format
from datasetdm_fast.runs.exporting.sources import labels_by_task
from datasetdm_fast.training.evaluation import naming
from datasetdm_fast.training.evaluation.settings import EvaluateConfig
from datasetdm_fast.training.readers import open_data

PARSED = 77
NAMES = sorted(path.stem for path in recipe.FOLDER.glob("*.yaml"))


def steps(name: str, *flags: str) -> list[recipe.Step]:
    config, _ = recipe.parse([name, *flags], recipe.RecipeConfig)
    return recipe.steps_of(recipe.read(name), config)


def published(root: Path) -> None:
    """The data sets of all recipes as they are published, the same three images in every split."""
    for split in ("train2017", "val2017"):
        layouts.coco(root / "coco", split)
    for name, write in (
        ("VOC2012", layouts.voc),
        ("cityscapes", layouts.cityscapes),
        ("deepfashion-mm", layouts.deepfashion),
        ("kitti", layouts.kitti),
        ("lvis", layouts.lvis),
        ("nyudepthv2", layouts.nyu),
        ("vkitti2", layouts.vkitti2),
    ):
        write(root / name)
    (root / "lvis" / "lvis_v1_train.json").rename(root / "lvis" / "annotations" / "lvis_v1_train.json")
    for there, copy in (
        ("cityscapes/leftImg8bit/train", "cityscapes/leftImg8bit/val"),
        ("cityscapes/gtFine/train", "cityscapes/gtFine/val"),
        ("kitti/kitti_eigen_train.txt", "kitti/kitti_eigen_test.txt"),
        ("lvis/annotations/lvis_v1_train.json", "lvis/annotations/lvis_v1_val.json"),
        ("nyudepthv2/sync", "nyudepthv2/official_splits/test"),
        ("nyudepthv2/train_list.txt", "nyudepthv2/test_list.txt"),
    ):
        (shutil.copytree if (root / there).is_dir() else shutil.copy)(root / there, root / copy)
    (root / "prompts").mkdir()
    for kind, words in (("voc", ("dog sofa", "cat", "bus")), ("coco", ("dog couch", "cat", "bus"))):
        rows = [
            {"filename": f"{k}.jpg", "caption": f"a {text.replace(' ', ' on a ')}; {text}", "class_prompt": text}
            for k, text in enumerate(words)
        ]
        (root / "prompts" / f"{kind}_prompts.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "data"
    published(folder)
    return folder


def test_every_data_set_of_a_line_is_there_in_its_published_layout(data):
    opened = {}
    for name in NAMES:
        for step in steps(name, "--root", str(data), "--model", "demo"):
            assert not step.missing, step.missing
            given = [after for flag, after in zip(step.words, step.words[1:]) if flag in ("--data", "--learn-from")]
            for address in {
                one for text in given for one in EvaluateConfig(data=text).addresses if not one.startswith("run:")
            }:
                opened[address] = opened.get(address) or len(open_data(address, 64))
    assert len(opened) == 12 and set(opened.values()) == {layouts.COUNT}


def test_every_export_is_one_of_the_labels_that_are_made():
    for name in NAMES:
        words = {step.words[0]: step.words for step in steps(name)}
        if "convert" in words:
            made = words.get("generate", ("--task", "attention"))  # Dataset Diffusion's labels are read from attention
            formats, tasks = (
                line[line.index(flag) + 1].split(",") for line, flag in ((words["convert"], "--to"), (made, "--task"))
            )
            for needs in (open_format(each).needs for each in formats):
                assert not needs or any(set(group) <= set(labels_by_task(tasks)) for group in needs)


@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_one_that_its_command_accepts(name, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_known_intermixed_args

    def parse_and_stop(self, *arguments):
        found, unknown = parse(self, *arguments)
        assert not unknown
        raise SystemExit(PARSED)

    lines = steps(name, "--root", "DATA")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", parse_and_stop)
    for step in lines:
        assert "{" not in step.line
        assert import_module(f"datasetdm_fast.{step.words[0]}").main(list(step.words[1:])) == PARSED, step.line
        if "--data" in step.words and "run:" not in step.line:
            assert step.needs, step.line


def test_the_lines_are_those_of_a_shell_and_name_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main(["voc-semantic"]) == 0
    said = capsys.readouterr().out
    assert "# missing: data/VOC2012/ImageSets/Segmentation/val.txt (PASCAL VOC 2012)" in said and "65.2" in said
    lines = [shlex.split(line, comments=True) for line in said.splitlines()]
    assert [words[2].rpartition(".")[2] for words in lines if words] == [
        "train",
        "prompts",
        "generate",
        "splice",
        "convert",
    ]
    assert recipe.main(["voc-semantik"]) == 2 and "did you mean voc-semantic?" in capsys.readouterr().err
    assert recipe.main(["voc-semantic", "--real", "-1"]) == 2
    assert not list(tmp_path.iterdir())
    assert recipe.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)


def test_several_data_sets_and_names_of_classes(tmp_path, capsys):
    assert EvaluateConfig(data="voc:a,b[val],coco:c").addresses == ["voc:a,b[val]", "coco:c"]
    layouts.voc(tmp_path)
    data = f"demo:1@5,voc:{tmp_path}[val]"
    line = ["--data", data, "--task", "semantic", "--bootstrap", "0", "--quiet"]
    assert evaluate([*line, "--class-names", "bicycle=ball,auto"]) == 0
    said = capsys.readouterr().out
    assert f"voc:{tmp_path}[val]" in said and "  ball" in said and "mIoU of" in said and "  bicycle" not in said
    assert (
        evaluate([*line, "--class-names", "zebra=ball"]) == 2 and "--class-names zebra=ball" in capsys.readouterr().err
    )
    assert evaluate([*line, "--class-names", "cat=dog"]) == 2 and "two classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_captions_made_of_labels_say_the_names_that_a_decoder_has(name, tmp_path):
    kind, write, _ = layouts.LAYOUTS[name]
    write(tmp_path)
    caption = open_data(f"{kind}:{tmp_path}", 64)[0].caption
    shown = next(one for one in open_data(f"{kind}:{tmp_path}", 64).thing_classes if one in caption)
    source = naming.rename(open_data(f"{kind}:{tmp_path}", 64), {shown: "zebra"}, ("zebra",), is_auto=False)
    assert source[0].caption == caption.replace(shown, "zebra") != caption
