"""The command that teaches: from every layout, interrupted in every way, in several processes, and on bad input."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import weakref
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from browser import Watched, browser
from forked import ForkedPython
from layouts import LAYOUTS, save
from PIL import Image
from safetensors.torch import load_file
from skips import IS_LONG, long_test

from bench.decoders import load_decoders
from bench.world import teach
from datasetdm_fast import example, train
from datasetdm_fast.data import DepthMap, Instances
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import colour, find_classes
from datasetdm_fast.engine.loading import PRESETS, load_model, presets
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.training import (
    checkpoint,
    cross_validation,
    data_record,
    page,
    predictions,
    session,
    splits,
    task_training,
    workflow,
)
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.data_record import find_changes, record_data, with_names_below
from datasetdm_fast.training.readers import open_data, parse_address
from datasetdm_fast.training.settings import TaskSettings, TrainConfig
from datasetdm_fast.training.trainer import Trainer

SMALL = (
    "--model tiny --size 64 --draws 2 --batch-size 4 --engine torch --threads 1 --folds no".split()
)  # else five more


pytestmark = pytest.mark.usefixtures("tiny_has_one_layer", "one_model_of_a_kind")


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    return tmp_path_factory.mktemp("captures")


@pytest.fixture
def run(captures, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "CHECK_STEPS", 2)
    monkeypatch.setattr(workflow, "CHECK_SAMPLES", 1)  # all of them are read in test_domain.py
    monkeypatch.setattr(workflow, "DOMAIN_DRAWS", 1)

    def command(*arguments, out="decoder", cache=captures):
        return train.main([*SMALL, "--cache-dir", str(cache), "--out", str(tmp_path / out), *arguments])

    return command


def weights(folder, task="depth"):
    return (folder / task / "model.safetensors").read_bytes()


def losses(folder, task="depth"):
    lines = [json.loads(line) for line in (folder / task / "training" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_training_leaves_decoder_figures_page_and_log(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "CHECK_SAMPLES", 16)
    assert run("--data", "demo:12@1000", "--task", "depth,pose", "--steps", "6", "--checks", "3", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)["tasks"]
    assert result["depth"]["held_out_images"] == 1 and result["depth"]["images"] == 11 and result["depth"]["steps"] == 6
    assert 0 < result["depth"]["held_out"]["absrel"] and set(result) == {"depth", "pose"}
    for line in (
        "data       demo:12@1000",
        "images     11 to learn from in 2 views each, 1 held out",
        "captures   features and maps kept in",
        "depth decoder, 6 steps of 4 views",
        "depth: 6 steps; on 1 held-out image: AbsRel",
        "1 image is too few for a figure to rely on: --folds auto measures on all of them",
    ):
        assert line in err
    assert "chosen on the same images" not in err and not result["depth"]["step_chosen_on_held_out"]
    assert result["depth"]["weights_of_step"] == 6 and not result["depth"]["held_out_intervals"]
    decoders = load_decoders(tmp_path / "decoder")
    assert {task: one.config.outlines for task, one in decoders.items()} == {
        task: one["outlines"] for task, one in result.items()
    }
    assert set(decoders) == {"depth", "pose"} and result["pose"]["outlines"] == "decoder"  # as it has none
    state = tmp_path / "decoder" / "depth" / "training"
    page = (state / "page.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 3 + 2 * 11 and "AbsRel" in page and "absrel" not in page
    assert 'src="http' not in page
    assert f"outlines of labels</th><td>of the {result['depth']['outlines']}<" in page
    assert "too few for a figure" in page and 'name="viewport"' in page
    assert "datasetdm_fast.train --model tiny" in page
    lines = [json.loads(line) for line in (state / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_absrel" in line] == [2, 4, 6] and not (
        state / checkpoint.NAME
    ).exists()


def test_held_out_images_all_of_whose_truth_is_ignored_have_no_figure(run, tmp_path, capsys):
    for number in range(12):
        view = world.view(number, 64)
        save(tmp_path / f"data/images/{number:02}.png", view.image)
        save(tmp_path / f"data/masks/{number:02}.png", view.semantic)
    (tmp_path / "data/classes.txt").write_text("\n".join(world.CLASSES))
    source = open_data(address := f"folder:{tmp_path / 'data'}", 64)
    (held,) = splits.split(source, range(12), 0.1, 0)[1]
    save(tmp_path / f"data/masks/{held:02}.png", np.full((64, 64), 255, np.uint8))
    line = ["--data", address, "--task", "semantic", "--steps", "2", "--checks", "2", "--held-out", "0.1", "--json"]
    assert run(*line, "--draws", "1") == 0
    result = json.loads(capsys.readouterr().out)["tasks"]["semantic"]
    assert result["held_out"] == {} and result["held_out_images"] == 1 and result["weights_of_step"] == 2


def test_the_same_line_again_has_nothing_to_do_and_other_settings_are_refused(run, tmp_path, capsys):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps", "2"]
    assert run(*line) == 0
    before = weights(tmp_path / "decoder")
    assert run(*line) == 0 and weights(tmp_path / "decoder") == before
    assert "2 steps of 4 views - finished" in capsys.readouterr().err
    left = tmp_path / "decoder" / "depth" / "training" / checkpoint.NAME
    left.write_bytes(b"as a kill after the last step leaves it")
    assert run(*line, "--dry-run") == 0 and left.exists()
    assert run(*line) == 0 and not left.exists()
    for name in ("model.safetensors", "config.json"):  # without them it is taught anew
        (tmp_path / "decoder" / "depth" / name).unlink()
        assert run(*line) == 0 and weights(tmp_path / "decoder") == before and load_decoders(tmp_path / "decoder")
    capsys.readouterr()
    assert run(*line, "--rate", "0.5") == 2
    assert "was trained with other settings (rate 0.002 there, 0.5 now)" in capsys.readouterr().err


def test_what_captions_always_name_is_looked_for_only_by_name(run, tmp_path, capsys):
    line = ["--task", "instance", "--steps", "1", "--quiet"]
    things = load_decoders("demo")["instance"].config.named
    ways = [
        ("demo:3@1000", "auto", things),
        ("demo:3@1000", "no", ()),
        ("folder", "auto", ()),
        ("folder", "yes", ("table", *things)),
    ]
    for k, (data, flag, found) in enumerate(ways):
        if data == "folder":
            data, line[1] = f"folder:{tmp_path / 'data'}", "semantic"
            if k == 2:
                LAYOUTS["folder"][1](tmp_path / "data")
        assert run("--data", data, *line, "--by-name", flag, out=f"decoder{k}") == 0
        assert load_decoders(tmp_path / f"decoder{k}")[line[1]].config.named == found and (not found or "ball" in found)
    capsys.readouterr()
    for flag in ("no", "yes"):  # what an earlier version chose by auto is resumed by that flag
        code = 0 if flag == "no" else 2
        assert run("--data", data, *line, "--by-name", flag, out="decoder2") == code
    err = capsys.readouterr().err
    assert "by_name" not in err and "(--by-name no or yes decides what the decoder names)" in err


def test_by_name_that_names_nothing_is_told(run, tmp_path, capsys):
    """Without captions nothing is found by name, even where a flag asks for it."""
    line = ["--data", "demo:3@1000", "--task", "semantic", "--steps", "1", "--dry-run", "--captions", "none"]
    for flag in ("yes", "auto"):
        assert run(*line, "--by-name", flag) == 0
        told = "by name    none: --captions none trains without prompts, so every class is looked for in every picture"
        assert (told in capsys.readouterr().err) == (flag == "yes")


def test_captions_that_name_what_they_name_wherever_it_is_shown_are_read_by_name(run, tmp_path, monkeypatch):
    """As those of `example`, without which its decoder would take a ball for a tree; others are no list of things."""
    LAYOUTS["folder"][1](data := tmp_path / "data")
    LAYOUTS["mask"][1](tmp_path / "mask")
    captions = json.loads((data / "captions.json").read_text())
    monkeypatch.setattr(session, "LEAST_CAPTIONS", len(captions))

    def named(address):
        config = TrainConfig(data=address, task=("semantic",), model="tiny", size=64, engine="torch", quiet=True)
        return train.open_workflow(config).session.recipe("semantic").config.named

    things = named(f"folder:{data}")
    assert things == ("cube", "cone", "star", "tree")  # all captions name a table and a person, and none a wall
    assert run("--data", f"folder:{data}", "--task", "semantic", "--steps", "1", "--quiet") == 0
    assert load_decoders(tmp_path / "decoder")["semantic"].config.named == things
    assert named(f"mask:{tmp_path / 'mask'}") == ()  # captions that are made, of a word that no prompt may have
    for others in ({"scene 0": "nothing else"}, dict.fromkeys(captions, "a scene")):
        (data / "captions.json").write_text(json.dumps(captions | others))
        assert named(f"folder:{data}") == ()
    monkeypatch.setattr(session, "LEAST_CAPTIONS", len(captions) + 1)
    (data / "captions.json").write_text(json.dumps(captions))
    assert named(f"folder:{data}") == ()


def test_what_every_picture_shows_need_not_be_named_by_a_prompt(tmp_path, monkeypatch):
    """Else "a photo of a ball" would have the wall labelled as a ball."""

    def named(classes, images=session.LEAST_CAPTIONS, **choices):
        data = tmp_path / f"{images} {len(classes)}"
        for part in ("images", "masks"):
            (data / part).mkdir(parents=True, exist_ok=True)
        (data / "classes.txt").write_text("\n".join(classes) + "\n")
        for k in range(images):
            labels = np.zeros((64, 64), np.uint8)
            labels[20:40, 20:40] = 1 + k % (len(classes) - 1)
            Image.fromarray(labels).save(data / "masks" / f"{k}.png")
            Image.fromarray(np.full((64, 64, 3), k, np.uint8)).save(data / "images" / f"{k}.png")
        config = TrainConfig(
            data=f"folder:{data}", task=("semantic",), model="tiny", size=64, engine="torch", quiet=True, **choices
        )
        return train.open_workflow(config).session.recipe("semantic").config.named

    classes = ("wall", "ball", "cube")
    assert named(classes) == ("ball", "cube") and named(classes, by_name="yes") == classes
    assert named(classes, session.LEAST_CAPTIONS - 1) == classes, "few may show it by chance"
    assert named(("background", "ball")) == ("ball",), "the word of the only class tells something"


def test_the_captions_of_the_example_are_read_by_name(tmp_path, capsys):
    assert example.main([str(tmp_path), "--quiet"]) == 0
    line = ["--data", f"folder:{tmp_path}", "--task", "semantic", "--model", "tiny", "--size", "64", "--dry-run"]
    assert train.main([*line, "--engine", "torch", "--out", str(tmp_path / "out")]) == 0
    shown = f"by name    {', '.join(world.THINGS[:5])} and 2 more: only where a prompt names them"
    assert shown in capsys.readouterr().err
    assert train.main([*line, "--engine", "torch", "--out", str(tmp_path / "out"), "--by-name", "no"]) == 0
    assert "by name" not in capsys.readouterr().err
    config = TrainConfig(data=f"folder:{tmp_path}", task=("semantic",), model="tiny", size=64, engine="torch")
    assert train.open_workflow(config).session.recipe("semantic").config.named == world.THINGS


def test_class_words_of_an_own_table_are_said_found_and_kept(run, tmp_path, capsys):
    LAYOUTS["voc"][1](tmp_path / "data")
    table, line = tmp_path / "own.csv", ["--data", f"voc:{tmp_path / 'data'}", "--task", "semantic", "--quiet"]
    source = open_data(line[1], 64)
    shown = next(name for name in source.thing_classes if f"a {name}" in source[0].caption)
    table.write_text(f"name,say,words\n{shown.upper()},gadget,gizmo | doodad\n,,toy gadget\n")
    assert run(*line, "--steps", "1", "--class-table", str(table)) == 0
    config = load_decoders(tmp_path / "decoder")["semantic"].config
    assert config == type(config).from_json(config.to_json()) and shown in config.named
    assert [find_classes(text, config.named, config.table) for text in ("doodads", "a toy gadget")] == [(shown,), ()]
    source.class_table = config.table
    assert "a gadget" in source[0].caption and shown not in source[0].caption
    assert run(*line, "--steps", "1") == 2 and "other settings (class_table" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("name\nunicorn\n")
    assert run(*line, "--class-table", str(tmp_path / "other.csv"), out="other") == 2
    assert "holds none of the data's classes" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_data_that_changed_is_noticed_before_a_training_goes_on(run, tmp_path, capsys):
    LAYOUTS["folder"][1](data := tmp_path / "data")
    line = ["--data", f"folder:{data}", "--task", "semantic", "--steps", "1"]
    assert run(*line) == 0
    (data / "masks" / "scene 1.png").touch()
    assert run(*line) == 0  # the same pixels
    with Image.open(data / "masks" / "scene 1.png") as image:
        labels = np.array(image)
    labels[0, 0] = 255
    save(data / "masks" / "scene 1.png", labels)
    for result in (True, False):  # of a finished training, and of one that is to go on
        assert run(*line) == 2 and (tmp_path / "decoder/semantic/training/result.json").exists() == result
        assert "now with other pixels, labels or captions of images/scene 1.png" in capsys.readouterr().err
        (tmp_path / "decoder/semantic/training/result.json").unlink(missing_ok=True)
    for folder, ending in (("images", "png"), ("masks", "png"), ("depth", "png")):
        (data / folder / f"added.{ending}").write_bytes((data / folder / f"scene 1.{ending}").read_bytes())
    assert run(*line) == 2
    assert "trained on other data: now with images/added.png" in capsys.readouterr().err
    for folder in ("images", "masks", "depth"):
        (data / folder / "added.png").unlink()
    names = (data / "classes.txt").read_text().splitlines()
    (data / "classes.txt").write_text("\n".join([*names[:2], *names[:1:-1]]))
    assert run(*line) == 2 and "(decoder classes [" in capsys.readouterr().err
    assert run(*line, out="other") == 0


def test_data_and_model_may_lie_elsewhere_when_a_training_goes_on(run, tmp_path, capsys):
    LAYOUTS["folder"][1](tmp_path / "data")
    line = ["--data", f"folder:{tmp_path / 'data'}", "--task", "semantic", "--steps", "2"]
    assert run(*line) == 0
    before = weights(tmp_path / "decoder", "semantic")
    (tmp_path / "data").rename(tmp_path / "moved")
    path = tmp_path / "decoder/semantic/training/settings.json"
    stored = json.loads(path.read_text()) | {"model": "/where/it/was"}
    moved = ["--data", f"folder:{tmp_path / 'moved'}/", *line[2:]]
    earlier = {"quirks": [], "first_word_only": False}  # of an earlier version
    for other in ({"quirks": ["Q13"]}, {"first_word_only": True}, {"left_out": None}):
        path.write_text(json.dumps(stored | earlier | other))
        assert run(*moved) == 2 and f"({next(iter(other))} " in capsys.readouterr().err
    path.write_text(json.dumps(stored | earlier))
    assert run(*moved) == 0 and "finished" in capsys.readouterr().err
    (tmp_path / "decoder/semantic/model.safetensors").unlink()
    for _ in range(2):  # taught anew, then found finished
        assert run(*moved) == 0 and weights(tmp_path / "decoder", "semantic") == before
    (tmp_path / "moved/images/scene 1.png").write_bytes((tmp_path / "moved/images/scene 2.png").read_bytes())
    assert run(*moved) == 2
    assert "now with other pixels, labels or captions of images/scene 1.png" in capsys.readouterr().err
    assert run("--data", f"folder:{tmp_path / 'moved'}[val]", *line[2:]) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_keep_their_names_where_the_data_set_is_moved(name, tmp_path, monkeypatch):
    kind, write, tasks = LAYOUTS[name]
    write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    ends = [""]
    if name == "coco":
        os.link(tmp_path / "data/annotations/instances_train2017.json", tmp_path / "data/train2017/all.json")
        ends += ["/train2017/all.json", "/train2017/all.json:data/train2017"]
    kept = {end: _named_below(f"{kind}:data{end}", tasks) for end in ends}
    (tmp_path / "data").rename(tmp_path / kind)
    (tmp_path / "export.json").touch()
    assert not find_changes(kept[""], _named_below(f"{kind}:{tmp_path}", tasks))
    (tmp_path / kind).rename(tmp_path / "moved")
    for end, before in kept.items():
        now = _named_below(f"{kind}:{tmp_path}/moved{end.replace('data/', f'{tmp_path}/moved/')}", tasks)
        assert not find_changes(before, now)


def _named_below(address, tasks):
    """What is recorded of the images at an address, but where it lies."""
    return with_names_below(record_data(open_data(address, 64, tasks=tasks[:1]))["items"], parse_address(address))


def test_a_training_that_an_earlier_version_began_is_not_resumed(run, tmp_path, capsys):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps", "1", "--quiet"]
    assert run(*line) == 0
    state = tmp_path / "decoder/depth/training"
    record = json.loads((state / "data.json").read_text())
    (state / "data.json").write_text(json.dumps(record | {"version": 1}))
    assert run(*line) == 0  # which has nothing left to do
    (state / "result.json").unlink()
    for _ in range(2):
        assert run(*line) == 2 and "was begun by an earlier version" in capsys.readouterr().err
        (state / "data.json").unlink(missing_ok=True)  # the first versions wrote none
    (state / "data.json").write_text(json.dumps(record))
    assert run(*line) == 0


def test_a_training_killed_while_it_records_its_data_is_not_taken_for_one_of_an_earlier_version(
    run, tmp_path, monkeypatch
):
    data, rename, recorded = tmp_path / "data", os.replace, []
    for number in range(2):
        save(data / "images" / f"{number}.png", np.zeros((64, 64, 3), np.uint8))
        save(data / "masks" / f"{number}.png", np.eye(64, dtype=np.uint8))
    (data / "classes.txt").write_text("background\nball\n")
    line = ["--data", f"folder:{data}", "--task", "semantic", "--steps", "1", "--augment", "voc", "--quiet"]

    def killed(part, path):
        recorded.extend([path] if Path(path).name in ("data.json", "settings.json") else [])
        if len(recorded) == 2:
            raise OSError(errno.EIO, "killed")
        rename(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert run(*line) == 3
    save(data / "masks" / "1.png", np.eye(64, dtype=np.uint8)[::-1])  # nothing was learnt from it yet
    assert run(*line) == 0 and run(*line) == 0


def test_a_decoder_is_not_written_among_the_labels(run, tmp_path, capsys):
    LAYOUTS["folder"][1](data := tmp_path / "semantic")
    line = ["--data", f"folder:{data}[train]", "--task", "semantic", "--steps", "1"]
    for out in ("semantic", "semantic/masks", "semantic/train", "."):  # folders of tasks would be labels, or the data
        assert run(*line, out=out) == 2
        assert f"lies in the data, folder:{data}" in capsys.readouterr().err and not (data / "semantic").exists()
    assert run("--data", f"yolo-seg:{data}", "--task", "semantic", out="semantic/decoder") == 2
    assert "lies in the data" in capsys.readouterr().err  # whose reader looks into every folder
    assert run(*line, "--dry-run", out="semantic/decoder") == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert run(*line, out="run") == 2 and "semantic lies in a run folder, where" in capsys.readouterr().err
    assert run("--data", "demo:1", "--task", "semantic", "--dry-run", out=".") == 0


def test_labels_are_found_in_capitals_and_a_missing_one_is_told_what_to_do_about(tmp_path):
    LAYOUTS["folder"][1](tmp_path)
    for folder in ("images", "masks", "depth"):
        (tmp_path / folder / "scene 1.png").rename(tmp_path / folder / "scene 1.PNG")
    source = open_data(f"folder:{tmp_path}", 64)
    assert source[1].id == "scene 1" and source[1].semantic.any()
    (tmp_path / "masks" / "scene 1.PNG").write_bytes(b"")
    with pytest.raises(Refused, match="scene 1.PNG: empty, expected a PNG or JPEG file"):
        source[1]
    (tmp_path / "masks" / "scene 1.PNG").unlink()
    with pytest.raises(Refused, match="pass --skip-bad to continue without it"):
        source[1]


@pytest.mark.parametrize("kind", ["yolo-seg", "mask"])
def test_other_layouts_find_labels_in_capitals_and_refuse_one_label_for_two_pictures(tmp_path, kind):
    LAYOUTS[kind][1](tmp_path)
    source = open_data(f"{kind}:{tmp_path}", 64)
    shown, picture = len(source[0].masks), source.images[0]
    label = next(p for p in sorted(tmp_path.rglob(f"{picture.stem}.*")) if p.parent != picture.parent)
    label.rename(label.with_suffix(label.suffix.upper()))
    assert shown and len(open_data(f"{kind}:{tmp_path}", 64)[0].masks) == shown
    save(picture.with_suffix(".png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(Refused, match="is the name of two images"):
        open_data(f"{kind}:{tmp_path}", 64)


BEGUN = {"data": "folder:/a[x]", "model": "m", "model_digests": {"unet": "1"}, "rate": 1, "images": 2, "quirks": []}
RECORD = [{"name": f"/a/{name}", "sides": [8, 8], "image": "0"} for name in "cd"]


@pytest.mark.parametrize(
    ("before", "now", "names", "said"),
    [
        ({}, {}, "cd", ""),
        ({}, {"quirks": None}, "cd", ""),  # which this version no longer has
        ({"quirks": ["a"]}, {"quirks": None}, "cd", r'with other settings \(quirks \["a"\] there, null now\)'),
        ({}, {"model": "n"}, "cd", ""),
        ({}, {"model": "n", "model_digests": {"unet": "2"}}, "cd", r"\(model .*, model_digests "),
        ({}, {"data": "folder:/b[x]"}, "cd", ""),
        ({}, {"data": "folder:/b[y]"}, "cd", r'\(data "folder:/a\[x\]" there, "folder:/b\[y\]" now\)'),
        ({}, {"data": "mask:/b[x]"}, "cd", r"\(data "),
        ({}, {"rate": 2}, "c", r"with other settings \(rate 1 there, 2 now\)"),
        ({}, {"images": 1}, "c", "on other data: now without d"),
        ({}, {}, "ce", "on other data: now without d and with e"),
        ({}, {}, "dc", "on other data: the same images in another order"),
        ({}, {"images": 1}, "cd", r"with other settings \(images 2 there, 1 now\)"),
        ({"decoder": {"side": 8}}, {"decoder": {"side": 16}}, "cd", r"\(decoder side 8 there, 16 now\)"),
    ],
)
def test_a_training_goes_on_with_the_settings_and_data_it_began_with(before, now, names, said):
    before, now = BEGUN | before, {name: value for name, value in (BEGUN | now).items() if value is not None}
    folder = now["data"].partition(":")[2].partition("[")[0]
    items = [{"name": f"{folder}/{name}", "sides": [8, 8], "image": "0"} for name in names]
    plan = SimpleNamespace(settings=now, data={"items": items})
    with pytest.raises(Refused, match=f"--out: out was trained .*{said}") if said else nullcontext():
        task_training._check_settings(Path("out"), before, {"items": RECORD}, plan)


def test_a_change_of_anything_that_is_truth_is_another_record():
    ones, twos = (np.full((4, 4), number, np.uint8) for number in (1, 2))
    image = np.zeros((4, 4, 3), np.uint8)
    changes = {
        "image": (image, image + 1),
        "caption": ("a ball", "a cube"),
        "semantic": (ones, twos),
        "masks": ([ones.copy], [twos.copy]),
        "mask_classes": ([0], [1]),
        "crowds": ([ones.copy], [twos.copy]),
        "crowd_classes": ([0], [1]),
        "searched": ((0,), (0, 1)),
        "not_exhausted": ((), (1,)),
        "depth": (ones.astype(np.float32), twos.astype(np.float32)),
        "keypoints": (np.ones((1, 2, 3)), np.zeros((1, 2, 3))),
        "keypoint_boxes": (np.ones((1, 4)), np.zeros((1, 4))),
        "keypoint_areas": (np.ones(1), np.zeros(1)),
    }
    assert {*changes} == {field.name for field in fields(Picture)} - {"id", "person"}  # a box of keypoint_boxes

    class OnePicture(list):
        order, name, is_rendered = [0], str, False

    whole = Picture("a", **{name: before for name, (before, _) in changes.items()})
    (record,) = record_data(OnePicture([whole]))["items"]
    for name, (_, after) in changes.items():
        (changed,) = record_data(OnePicture([replace(whole, **{name: after})]))["items"]
        assert sum(record[part] != changed[part] for part in record) == 1, name


def test_captions_that_are_made_of_the_labels_are_part_of_the_record():
    class Source:
        is_rendered, order = False, (3,)
        __len__, guard = (lambda self: 1), staticmethod(lambda call, record: call(record))
        name, photo_of = staticmethod("picture {}".format), staticmethod(lambda names: f"a photo of {names[0]}")

        def __init__(self, caption):
            self.picture = lambda record: Picture("a", np.zeros((4, 6, 3), np.uint8), caption)

    (mug,), (cup,), (told,) = (record_data(Source(each))["items"] for each in (("mug",), ("cup",), "a photo of mug"))
    assert mug["caption"] != cup["caption"] and mug == told and (mug["name"], mug["sides"]) == ("picture 3", [6, 4])


def test_arrays_of_equal_bytes_and_other_sides_have_another_digest():
    shapes = ((2, 3), (3, 2), (6,))
    digests = [data_record._digest((np.zeros(shape, np.uint8), "a")) for shape in shapes]
    digests += [data_record._digest((np.zeros((2, 3), bool), "a")), data_record._digest((np.zeros(shapes[0]), "b"))]
    assert len({*digests}) == 5
    lazy = data_record._digest(([lambda: np.zeros((2, 3), np.uint8)], "a"))
    assert lazy == digests[0]  # masks may be functions that make them


@pytest.mark.parametrize("stored", [{"folds": 2, "a": 1}, {"folds": 3}, None])
def test_figures_of_another_number_of_folds_are_computed_anew(tmp_path, monkeypatch, stored):
    depth = DepthMap(np.ones((2, 2), np.float32), 9.0)
    plan = task_training.TaskPlan(None, SimpleNamespace(steps=1), None, {}, {})
    item = SimpleNamespace(depth=np.full((2, 2), 2.0, np.float32))
    opened = SimpleNamespace(
        source=None,
        numbers=(0, 1),
        view_settings=SimpleNamespace(seed=0),
        views=lambda task, fold, draws: SimpleNamespace(item=lambda view: item),
        predictor=lambda plan: SimpleNamespace(predict=lambda decoder, views: [depth]),
        plan=lambda task: plan,
    )
    for name, answer in {
        "split_folds": [[0], [1]],
        "without_fold": opened,
        "find_result": {},
        "load_decoder": None,
        "read_folds": stored,
    }.items():
        monkeypatch.setattr(cross_validation, name, lambda *_, answer=answer: answer)
    (tmp_path / "training").mkdir()
    found = cross_validation.cross_validate(opened, "depth", tmp_path, 2, TaskSettings(), None, lambda: False)
    if stored and stored["folds"] == 2:
        assert found is stored and not (tmp_path / "training" / "folds.json").exists()
        return
    assert (found["folds"], found["images"], found["held_out"]["absrel"]) == (2, 2, 0.5)
    assert json.loads((tmp_path / "training" / "folds.json").read_text()) == found


def test_what_changed_of_data_is_told():
    old = [{"name": name, "image": "1", "depth": "2", "caption": "3"} for name in "abc"]
    assert not find_changes(old, [{**item, "semantic": "4"} for item in old])  # which was not read before
    assert not find_changes([{**item, "semantic": "4"} for item in old], old)  # or is not read any more
    changes = "now with other pixels, labels or captions of a and 2 more"
    assert find_changes(old, [{**item, "image": "0"} for item in old]) == changes
    assert find_changes(old, old[1:]) == "now without a" and find_changes(old[1:], old) == "now with a"
    assert find_changes(old, old[::-1]) == "the same images in another order"


def test_persons_are_told_to_be_cut_out_rather_than_their_pictures_to_the_middle(run, tmp_path, capsys):
    LAYOUTS["coco"][1](tmp_path / "data")
    line = ["--data", f"coco:{tmp_path / 'data'}", "--task", "pose", "--steps", "2", "--held-out", "0"]
    assert run(*line) == 0
    told = json.loads((tmp_path / "decoder/pose/training/result.json").read_text())["framing"]
    number = told["pictures"]
    assert told["framing"] == "person" and told["cut_to_a_square"] == told["scaled"] == number > 1
    how = f"{number} persons, each in the middle of a square that is cut out and scaled to that"
    assert f"64 pixels a side ({how})" in capsys.readouterr().err
    assert how in (tmp_path / "decoder/pose/training/page.html").read_text()


def test_pictures_cut_to_the_models_square_are_told_and_folds_without_held_out_images_have_a_page(
    run, tmp_path, capsys, monkeypatch
):
    LAYOUTS["folder"][1](tmp_path / "data")
    line = [
        "--data",
        f"folder:{tmp_path / 'data'}",
        "--task",
        "semantic",
        "--steps",
        "2",
        "--held-out",
        "0",
        "--draws",
        "1",
    ]
    state, whole = tmp_path / "decoder/semantic/training", "scaled to that and cut to the square in the middle"
    assert run(*line) == 0 and "3-fold" not in (state / "page.html").read_text()
    assert f"64 pixels a side (all 3 pictures are {whole})" in (err := capsys.readouterr().err)
    assert "no image was held out to measure it: --folds 2 measures" in err
    told = json.loads((state / "result.json").read_text())["framing"]
    assert told == {"pixels_a_side": 64, "framing": "fit", "pictures": 3, "scaled": 3, "cut_to_a_square": 3}
    assert run(*line, "--folds", "3", "--dry-run") == 0
    assert "6 steps in all, 3 times those of one decoder" in capsys.readouterr().err
    opened, stored = [], cache.cache_captures
    monkeypatch.setattr(cache, "cache_captures", lambda *a, **b: opened.append(len(a[1].numbers)) or stored(*a, **b))
    assert run(*line, "--folds", "3") == 0 and "s with what follows" in capsys.readouterr().err
    assert opened.count(3) == 1  # to compare the decoder with them; those that it learned from stay closed
    page = (state / "page.html").read_text()
    assert "3-fold cross-validation" in page and page.count("<h3>Per class</h3>") == 1 and whole in page
    assert '<th scope="row">mIoU</th>' in page and "miou" not in page and page.count('alt="answer"') == 1


def test_long_names_of_classes_break_on_the_page_beside_their_figures_and_in_captions(tmp_path, monkeypatch):
    names = ["ball", "a name of many words " * 9, "a_name_without_any_blank_" * 7]
    result = {"held_out": {"miou": 0.5, "per_class": dict.fromkeys(names, 0.25)}}
    source = types.SimpleNamespace(classes=names, thing_classes=names)
    facts = {"data": "folder:photos"}
    monkeypatch.setattr(page, "_views", lambda *_: f"<figure><figcaption>a photo of {names[2]}</figcaption></figure>")
    content = page.page("semantic", source, facts, result, views=MagicMock(__len__=lambda _: 1), labels=[None])
    (tmp_path / "page.html").write_bytes(content)
    with browser() as running:
        shown = Watched(running, width=390).page
        shown.goto((tmp_path / "page.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth <= 390")
        assert shown.evaluate("Math.min(...[...document.querySelectorAll('td')].map(td => td.clientWidth)) > 90")


@pytest.mark.parametrize("made", [("semantic", "depth"), ("semantic",), ()])
def test_a_training_that_was_stopped_at_any_of_its_tasks_says_how_to_resume(tmp_path, monkeypatch, capsys, made):
    outcomes = {
        task: SimpleNamespace(document={} if task in made else None, result={}) for task in ("semantic", "depth")
    }
    workflow = SimpleNamespace(prepare=list, run=lambda *_: outcomes)
    monkeypatch.setattr(train, "open_workflow", lambda config: workflow)
    train.main(["--data", "demo:9", "--task", "semantic,depth", "--out", str(tmp_path / "trained"), "--quiet"])
    assert ("stopped; resume with: python -m datasetdm_fast.train --data demo:9" in capsys.readouterr().err) == (
        len(made) < 2
    )


@pytest.mark.parametrize(("number", "shown"), [(3, 3), (12, 12), (13, 12)])
def test_a_page_has_no_more_than_twelve_images(monkeypatch, number, shown):
    monkeypatch.setattr(page, "_legend", lambda *_: [])
    monkeypatch.setattr(page, "_views", lambda task, source, item, label: f"<i>{item} {label}</i>")
    views = type("Views", (), {"item": lambda self, view: f"view {view}", "__len__": lambda self: number})()
    labels = [f"label {view}" for view in range(number)]
    text = page.page("depth", None, {}, {"held_out": {}}, views=views, labels=labels, shown="Some").decode()
    assert re.findall("<i>(.*?)</i>", text) == [f"view {view} label {view}" for view in range(shown)]


def test_things_have_the_colours_of_a_gallery_on_the_page():
    source = open_data("demo:1", 64)
    legend, ball = page._legend("instance", source)[0], source.classes.index("ball")
    assert f'rgb{colour(ball)}"></i>ball' in legend and source.thing_classes[0] == "ball"
    empty = np.zeros((1, 64, 64), bool)
    label = Instances(empty, np.zeros(1, np.int64), np.ones(1, np.float32), source.thing_classes)
    assert page._recolour(source, label).class_ids[0] + 1 == ball
    numbers = page._numbers(SimpleNamespace(classes=(), thing_classes=[f"thing {k}" for k in range(1, 300)]))
    assert numbers["background"] == 0 and [numbers[f"thing {k}"] for k in (254, 255, 299)] == [254, 256, 300]


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", __file__)  # where there can be none
    line = ["--data", "demo:3@1000", "--dry-run", "--preset", "upstream", "--cache", "off"]
    assert train.main([*SMALL, *line, "--out", str(tmp_path / "decoder")]) == 0
    err = capsys.readouterr().err
    assert "made anew at every step" in err and "15000 steps of 4 views" in err
    assert not (tmp_path / "decoder").exists()


@pytest.mark.parametrize("name", LAYOUTS if IS_LONG else ("kitti",))
def test_it_learns_from_every_layout(run, tmp_path, tmp_path_factory, captures, name):
    kind, write, tasks = LAYOUTS[name]
    write(tmp_path / "data")
    assert run("--data", f"{kind}:{tmp_path / 'data'}", "--task", tasks[0], "--steps", "2", "--quiet") == 0
    found = load_decoders(tmp_path / "decoder")
    assert set(found) == {tasks[0]} and len(losses(tmp_path / "decoder", tasks[0])) == 2
    if name == "voc":  # whose captions are made of the masks
        assert found["semantic"].config.named


def test_captures_made_anew_teach_nearly_the_same_as_kept_ones(run, tmp_path):
    line = ["--data", "demo:2@1000", "--task", "depth", "--steps", "3", "--quiet"]
    assert run(*line, out="kept") == 0 and run(*line, "--cache", "off", out="anew") == 0
    kept, anew = (losses(tmp_path / name) for name in ("kept", "anew"))
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in anew], rel=1e-3)
    assert weights(tmp_path / "kept") != weights(tmp_path / "anew")


def test_the_kind_of_captures_is_not_changed_on_the_way(run, tmp_path, capsys):
    line = ["--data", "demo:2@1000", "--task", "depth", "--steps", "2"]
    assert run(*line) == 0
    (tmp_path / "decoder" / "depth" / "training" / "result.json").unlink()
    assert run(*line, "--cache", "off") == 2
    assert "was started with captures kept on the disk" in capsys.readouterr().err
    assert run(*line) == 0


def test_the_kind_of_captures_is_chosen_anew_where_they_could_not_be_made(run, monkeypatch, capsys):
    def too_large(*given, **named):
        raise Refused("image 1000: 1 captured values exceed half precision", "Use --cache off, which keeps fp32.")

    line = ["--data", "demo:2@1000", "--task", "depth", "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "cache_captures", too_large)
        assert run(*line) == 2 and "Use --cache off" in capsys.readouterr().err
    assert run(*line, "--cache", "off") == 0


@long_test
def test_a_limit_per_class_and_upstreams_ways_are_followed(run, tmp_path, capsys):
    line = [
        "--data",
        "demo:30@1000",
        "--limit-per-class",
        "1",
        "--preset",
        "upstream",
        "--augment",
        "none",
    ]
    assert (
        run(
            *line,
            "--task",
            "open-vocabulary,depth",
            "--steps",
            "2",
            "--inversion",
            "ddim",
            "--ddim-steps",
            "2",
            "--timestep",
            "20",
        )
        == 0
    )
    err = capsys.readouterr().err
    assert "images     7 to learn from" in err
    settings = json.loads((tmp_path / "decoder" / "depth" / "training" / "settings.json").read_text())
    assert (
        settings["optimiser"] == "adam"
        and settings["decoder"]["capture_timestep"] == 20
        and settings["weight_decay"] == 0
    )


def test_damaged_files_of_a_training_are_refused_by_name(run, tmp_path, capsys):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps", "1", "--quiet"]
    assert run(*line) == 0
    state = tmp_path / "decoder" / "depth" / "training"
    (state / "folds.json").write_text("")
    for name in ("folds.json", "result.json", "captures.json", "data.json", "settings.json"):
        path, whole = state / name, (state / name).read_bytes()
        for content in (b"", b"\xff\x00{", b"[]", b'{"are_kept": 1, "items": 1, "steps": "two"}'):
            path.write_bytes(content)
            capsys.readouterr()
            assert run(*line) == 2, (name, content)
            cause, remedy = capsys.readouterr().err.splitlines()
            assert name in cause or "trained with other settings" in cause, (name, content)
            assert "Choose another --out" in remedy
        path.write_bytes(whole)
        if name in ("folds.json", "result.json"):  # without a result it is resumed, which reads captures.json
            path.unlink()


def test_names_of_files_that_are_not_utf8_are_learnt_from_and_shown(run, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xfcbung")
    for number in range(10):
        view = world.view(number, 64)
        save(Path(folder, "images", os.fsdecode(b"\xfc%d.png" % number)), view.image)
        save(Path(folder, "masks", os.fsdecode(b"\xfc%d.png" % number)), view.semantic)
    Path(folder, "classes.txt").write_text("\n".join(world.CLASSES))
    assert run("--data", f"folder:{folder}", "--task", "semantic", "--steps", "1", "--draws", "1") == 0
    page = (tmp_path / "decoder" / "semantic" / "training" / "page.html").read_text("utf-8")
    assert re.search(r"<figcaption>\?\d", page) and "?bung" in page


def test_copies_of_one_image_are_not_told_to_be_cross_validated(run, tmp_path, capsys):
    view = world.view(0, 64)
    for number in range(10):
        save(tmp_path / f"data/images/{number}.png", view.image)
        save(tmp_path / f"data/masks/{number}.png", view.semantic)
    (tmp_path / "data/classes.txt").write_text("\n".join(world.CLASSES))
    line = ["--data", f"folder:{tmp_path / 'data'}", "--task", "semantic", "--steps", "1", "--draws", "1"]
    assert run(*line, "--folds", "auto") == 0
    told = capsys.readouterr().err
    assert "no image was held out to measure it: evaluate on other data" in told and "1 step of 4 views" in told
    other = world.view(1, 64)
    save(tmp_path / "data/images/x.png", other.image)
    save(tmp_path / "data/masks/x.png", other.semantic)
    line += ["--held-out", "0", "--dry-run"]
    assert run(*line, "--folds", "auto", out="two") == 0
    assert "folds      2 more decoders" in capsys.readouterr().err
    assert run(*line, "--folds", "12", out="two") == 2
    assert "12 folds of 11 images" in capsys.readouterr().err


def test_tensorboard_is_written_where_it_is_asked_for(monkeypatch, tmp_path):
    from datasetdm_fast.training import log

    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *values):
            written.append(values)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with log.Log(tmp_path, 3) as one:
        one.step(4, 10, 0.5, 0.1)
    assert not written
    with log.Log(tmp_path, 3, ["tensorboard"]) as one:
        one.step(4, 10, 0.5, 0.1)
        one.figure(4, "miou", 0.25)
    assert written == [
        (str(tmp_path / "tensorboard"), 4),
        ("loss", 0.5, 4),
        ("rate", 0.1, 4),
        ("held_out_miou", 0.25, 4),
        "closed",
    ]


def test_wandb_and_mlflow_are_told_by_their_own_means(monkeypatch, tmp_path):
    from datasetdm_fast.training.log import Log, run_id

    told, folder = [], tmp_path / "decoder" / "depth" / "training"
    folder.mkdir(parents=True)
    run = types.SimpleNamespace(
        log=lambda values, step: told.append(("wandb", values, step)), finish=lambda: told.append("finished")
    )
    starts = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **facts: starts.update(facts) or run))
    mlflow = types.SimpleNamespace(
        set_experiment=lambda name: told.append(name),
        start_run=lambda run_name, tags: told.append(run_name),
        log_metrics=lambda values, step: told.append(("mlflow", values, step)),
        end_run=lambda: told.append("ended"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with Log(folder, 0, ["wandb", "mlflow"]) as log:
        log.step(1, 10, 0.5, 0.1)
        log.figure(1, "absrel", 0.25)
    assert (starts["project"], starts["name"], starts["resume"]) == ("datasetdm_fast", "decoder-depth", "allow")
    other = tmp_path / "other" / "decoder" / "depth" / "training"
    assert starts["id"] == run_id(folder) != run_id(other) and starts["dir"] == str(
        folder
    )  # equal names are different trainings
    both = [{"loss": 0.5, "rate": 0.1}, {"held_out_absrel": 0.25}]
    assert [entry for entry in told if entry[0] == "wandb"] == [("wandb", values, 1) for values in both]
    assert [entry for entry in told if entry[0] == "mlflow"] == [("mlflow", values, 1) for values in both]
    assert told[:2] == ["datasetdm_fast", "decoder-depth"] and told[-2:] == ["finished", "ended"]


def test_a_tracker_that_is_missing_or_has_no_network_is_named(run, monkeypatch, tmp_path, capsys):
    from datasetdm_fast.training import log
    from datasetdm_fast.training.log import Log

    def refuse(**facts):
        raise ConnectionError("api.wandb.ai cannot be reached")

    assert run("--data", "demo:4", "--log", "wandb") == 3
    assert "--log wandb: wandb is not installed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(Missing, match="it cannot begin a run .ConnectionError: api.wandb.ai cannot be reached"):
        Log(tmp_path, 0, ["wandb"])
    closed: list[str] = []
    tracker = log.Tracker(lambda *_: None, lambda: closed.append("mlflow"))
    monkeypatch.setitem(log.TRACKERS, "mlflow", lambda folder, done: tracker)
    with pytest.raises(Missing, match="--log wandb: it cannot begin a run"):
        log.open_trackers(["mlflow", "wandb"], tmp_path, 0)
    assert closed == ["mlflow"]


def test_a_tracker_that_fails_later_is_told_once_and_costs_no_training(monkeypatch, tmp_path, capsys):
    from datasetdm_fast.training import log

    def refuse(*_, **__):
        raise ConnectionError("the server is gone")

    told: list[int] = []
    trackers = {"mlflow": log.Tracker(refuse, refuse), "wandb": log.Tracker(lambda _, step: told.append(step), refuse)}
    for name, tracker in trackers.items():
        monkeypatch.setitem(log.TRACKERS, name, lambda folder, done, tracker=tracker: tracker)
    with log.Log(tmp_path, 0, ["mlflow", "wandb"]) as opened:
        for step in (1, 2):
            opened.step(step, 2, 0.5, 0.1)
    assert told == [1, 2] and len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    words = "it takes no more figures, log.jsonl has them (ConnectionError: the server is gone)"
    assert capsys.readouterr().err == f"--log mlflow: {words}\n--log wandb: {words}\n"


def test_a_log_goes_on_after_the_last_kept_step(tmp_path):
    from datasetdm_fast.training.log import Log

    with Log(tmp_path, 0) as first:
        for step in (1, 2, 3):
            first.step(step, 9, step / 2, 0.1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    with Log(tmp_path, 2) as second:
        second.step(3, 9, 7.0, 0.1)
    assert [
        (line["step"], line["loss"]) for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    ] == [(1, 0.5), (2, 1.0), (3, 7.0)]


@pytest.mark.parametrize("images", [12, 11])
def test_it_ends_early_where_enough_images_say_that_nothing_gets_better(run, tmp_path, capsys, monkeypatch, images):
    monkeypatch.setattr(splits, "ENOUGH_IMAGES", 6)
    line = ["--task", "depth", "--steps", "10", "--checks", "5", "--patience", "2", "--rate", "1e-12", "--draws", "1"]
    assert run("--data", f"demo:{images}@1000", "--held-out", str(6 / 12 if images == 12 else 5 / 11), *line) == 0
    result = json.loads((tmp_path / "decoder" / "depth" / "training" / "result.json").read_text())
    err = capsys.readouterr().err
    assert result["held_out_images"] == images - 6
    if images == 12:
        assert result["steps"] < 10 and result["steps"] == result["weights_of_step"] + 4
        assert "stopped early, weights of step" in err and "the step of the weights was chosen on the same" in err
        written = (tmp_path / "decoder" / "depth" / "training" / "page.html").read_text()
        assert f"weights of step</th><td>{result['weights_of_step']}<" in written
    else:  # 5 are too few to choose a step by: the last weights are kept
        assert result["steps"] == result["weights_of_step"] == 10 and "stopped early" not in err


@pytest.mark.parametrize("steps, seen", [(19, 10), (13, 10), (3, 3)])
def test_held_out_images_are_evaluated_no_more_often_than_asked_for(run, tmp_path, steps, seen):
    line = ["--task", "depth", "--steps", str(steps), "--checks", "10", "--draws", "1"]
    assert run("--data", "demo:12@1000", "--held-out", "0.2", *line) == 0
    log = (tmp_path / "decoder" / "depth" / "training" / "log.jsonl").read_text().splitlines()
    figures = [line for line in map(json.loads, log) if "loss" not in line]
    assert len(figures) == seen and figures[-1]["step"] == steps


def test_figures_are_those_of_the_weights_that_are_written(run, tmp_path, monkeypatch):
    """In half precision a weight of 1.0004 is 1, and the answers are those of 1."""
    scored, score = [], task_training.TaskTraining._score

    def recorded(training, decoder):
        scored.append({name: value.clone() for name, value in decoder.state_dict().items()})
        return score(training, decoder)

    monkeypatch.setattr(task_training.TaskTraining, "_score", recorded)
    line = ["--task", "depth", "--steps", "1", "--draws", "1", "--storage", "fp16"]
    assert run("--data", "demo:12@1000", "--held-out", "0.2", *line) == 0
    written = load_file(tmp_path / "decoder" / "depth" / "model.safetensors")
    assert all(torch.equal(scored[-1][name], value.float()) for name, value in written.items())


def command(captures, out, *arguments):
    return ["-m", "datasetdm_fast.train", *SMALL, "--cache-dir", str(captures), "--out", str(out), *arguments]


def killed(line, out, steps):
    """The process that was killed when it had logged so many steps."""
    process = ForkedPython(line, stderr=subprocess.PIPE, text=True)
    log = out / "depth" / "training" / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and len(log.read_bytes().splitlines()) >= steps):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return process


def test_a_decoder_that_another_training_finished_in_the_meantime_is_left_alone(run, tmp_path, capsys, monkeypatch):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps"]
    prepare = workflow.Workflow.prepare

    def slowly(*arguments):
        plans = prepare(*arguments)
        monkeypatch.undo()
        assert run(*line, "2") == 0
        return plans

    monkeypatch.setattr(workflow.Workflow, "prepare", slowly)
    assert run(*line, "3") == 2 and [step for step, _ in losses(tmp_path / "decoder")] == [1, 2]
    assert "was trained with other settings (steps 2 there, 3 now)" in capsys.readouterr().err


def test_killed_and_interrupted_it_ends_with_the_same_bits(run, captures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", presets.load_tiny)  # as in the process that is killed
    monkeypatch.setattr(session, "load_model", load_model)
    arguments = ["--data", "demo:10@1000", "--task", "depth", "--steps", "12", "--checks", "2", "--save-every", "0.05"]
    out = tmp_path / "troubled"
    line = command(captures, out, *arguments)
    assert killed(line, out, 3).returncode == -signal.SIGKILL and not (out / "depth" / "config.json").exists()
    half = out / "depth" / "training" / f".{checkpoint.NAME}.1.part"  # of a process killed while it wrote
    half.touch()
    step, places = Trainer.step, iter(range(5))

    def interrupted(trainer):
        if next(places, None) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train.main(line[2:]) == 130
    assert "stopped; resume with: python -m datasetdm_fast.train" in capsys.readouterr().err
    assert (out / "depth" / "training" / checkpoint.NAME).exists()
    assert train.main(line[2:]) == 0 and not half.exists()
    assert run(*arguments, out="calm") == 0
    assert weights(out) == weights(tmp_path / "calm") and losses(out) == losses(tmp_path / "calm")
    assert (out / "depth" / "training" / "result.json").read_bytes() == (
        tmp_path / "calm" / "depth" / "training" / "result.json"
    ).read_bytes()


@pytest.mark.parametrize("name", ["measure_domain", "check_itself"])
def test_ctrl_c_is_heeded_after_the_last_step_and_progress_is_shown(run, tmp_path, monkeypatch, capsys, name):
    arguments = ["--data", "demo:10@1000", "--task", "depth", "--steps", "2", "--draws", "1", "--folds", "no"]
    folder, real = tmp_path / "decoder" / "depth", getattr(workflow, name)

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(workflow, name, interrupted)
        assert run(*arguments) == 130
    assert "stopped; resume with: python -m datasetdm_fast.train" in capsys.readouterr().err
    assert (folder / "config.json").exists() and not (folder / "training" / "page.html").exists()
    monkeypatch.setattr(session, "SECONDS_PER_LINE", 0.0)
    assert run(*arguments) == 0 and (folder / "training" / "page.html").exists()
    told = capsys.readouterr().err
    assert "depth samples " in told and ("depth domain " in told) == (name == "measure_domain")


def test_every_image_is_judged_by_a_fold_that_has_not_seen_it(run, tmp_path, capsys, monkeypatch):
    arguments = [
        "--data",
        "demo:10@1000",
        "--task",
        "semantic",
        "--steps",
        "2",
        "--checks",
        "2",
        "--draws",
        "1",
        "--folds",
        "3",
    ]
    state, judged = tmp_path / "decoder" / "semantic" / "training", []
    taught, kept, real = [], [], cross_validation.run_training

    def stopping(training, *rest):  # as Ctrl-C does between two folds
        assert not any(one() for one in kept)  # captures and targets of a fold are given back before the next begins
        kept.append(weakref.ref(training.views))
        taught.append([training.views.source.order[k] for k in training.views.numbers])
        return None if len(taught) == 2 else real(training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cross_validation, "run_training", stopping)
        run(*arguments)
    assert "stopped; resume with" in capsys.readouterr().err and not (state / "folds.json").exists()
    first = (state / "folds-3" / "1" / "model.safetensors").read_bytes()
    (left := state / "folds-3" / "1" / "training" / checkpoint.NAME).write_bytes(b"as a kill after the last step")

    def watched(predictor, decoder, views, chosen=None):
        if chosen is None:  # else training images, for the outlines of its labels
            judged.append([views.source.order[k] for k in views.numbers])
        return predict(predictor, decoder, views, chosen)

    predict = predictions.Predictor.predict
    monkeypatch.setattr(predictions.Predictor, "predict", watched)
    assert run(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    of_folds = [part for part in judged if 1 < len(part) < 10]  # on all ten the final decoder is compared with them
    assert sorted(item for part in of_folds for item in part) == list(range(10)) and len(of_folds) == 3
    assert not set(taught[0]) & set(of_folds[0])
    assert first == (state / "folds-3" / "1" / "model.safetensors").read_bytes()
    told = json.loads(out)["tasks"]["semantic"]["folds"]
    assert not left.exists()
    assert told == json.loads((state / "folds.json").read_text()) and told["folds"] == 3 and told["images"] == 10
    low, high = told["held_out_intervals"]["miou"]
    assert low <= told["held_out"]["miou"] <= high and "semantic: 3-fold on 10 images (95 % intervals): mIoU" in err
    page = (state / "page.html").read_text()
    assert "3-fold cross-validation" in page and "In none of these images: " in page and 'class="legend"' in page
    judged.clear()
    assert run(*arguments) == 0 and not judged  # there is nothing left to do
    assert run(*arguments[:-1], "2") == 0 and "2-fold cross-validation" in (state / "page.html").read_text()
    assert run(*arguments) == 0  # whose decoders are there, but figures of two folds
    assert told["held_out"] == json.loads((state / "folds.json").read_text())["held_out"]
    assert "3-fold cross-validation" in (state / "page.html").read_text()


def test_the_page_says_why_a_class_has_no_interval():
    source = types.SimpleNamespace(classes=("background", "ball", "<cube>"), thing_classes=("ball", "<cube>"))
    figures = {"miou": 0.5, "per_class": {"background": 0.9, "ball": 0.4}}
    bounds = {"miou": [0.1, 0.8], "per_class": {"background": [0.8, 1.0]}}
    lines = {"images": 27, "held_out_images": 3, "held_out": figures}
    told = page.page("semantic", source, {}, lines | {"held_out_intervals": bounds}, []).decode()
    assert "0.9000 (0.8000 to 1.0000)<" in told and "0.4000 (no interval, as only one image shows it)<" in told
    assert '<p class="dim">In none of these images: &lt;cube&gt;.</p>' in told
    alone = page.page("semantic", source, {}, lines | {"held_out_intervals": {}}, []).decode()
    assert "<h2>On the held-out images (95 % intervals)</h2>" in told and "<h2>On the held-out images</h2>" in alone
    assert "no interval" not in alone


@pytest.mark.parametrize(("images", "held"), [(40, 0), (400, 32)])
def test_a_fold_holds_out_images_only_where_they_are_enough_to_choose_a_step_by(images, held):
    config = TrainConfig(data=f"demo:{images}@1000", task=("depth",), model="tiny", size=64, engine="torch", quiet=True)
    opened = train.open_workflow(config).session
    fold = splits.split_folds(opened.source, opened.numbers, 5, 0)[0]
    learnt, others = cross_validation.without_fold(opened, fold).split
    assert len(others) == held and sorted([*learnt, *others, *fold]) == list(range(images))


@pytest.mark.parametrize("folds_asked", ["1", "11", "many", "101"])
def test_folds_that_cannot_be(run, tmp_path, capsys, folds_asked):
    assert run("--data", "demo:10@1000", "--task", "depth", "--folds", folds_asked) == 2
    assert "--folds" in capsys.readouterr().err and not (tmp_path / "decoder").exists()


def test_a_full_disk_is_said_and_the_same_line_goes_on(run, tmp_path, monkeypatch, capsys):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps", "12", "--save-every", "0"]
    assert run(*line, out="calm") == 0
    calls = 0

    def full(name, call, *arguments):
        nonlocal calls
        calls += name == "write"
        if calls > 24:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "syscall", full)
        assert run(*line) == 3
    cause, remedy = capsys.readouterr().err.strip().splitlines()[-2:]
    assert cause.endswith("the disk is full") and "run the same command again" in remedy
    assert run(*line) == 0 and weights(tmp_path / "decoder") == weights(tmp_path / "calm")


def test_a_damaged_checkpoint_is_refused(run, captures, tmp_path, capsys, monkeypatch):
    line = ["--data", "demo:3@1000", "--task", "depth", "--steps", "4", "--save-every", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(train.sys, "stderr", sys.stderr)
        patched.setattr(checkpoint, "remove", lambda folder: None)
        assert run(*line) == 0
    state = tmp_path / "decoder" / "depth" / "training"
    (state / "result.json").unlink()
    whole = (state / checkpoint.NAME).read_bytes()
    for damaged in (whole[:-100], b"", b"\xff" * 64, checkpoint_of_another(tmp_path)):
        (state / checkpoint.NAME).write_bytes(damaged)
        assert run(*line) == 2
        assert str(checkpoint.NAME) in capsys.readouterr().err


def checkpoint_of_another(tmp_path):
    checkpoint.write(
        tmp_path, {"decoder.x": torch.zeros(1)}, {"step": 0, "loss": 0.0, "scaler": {}, "early_stopping": {}}
    )
    return (tmp_path / checkpoint.NAME).read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--data", "nothing:5"], 2, "no reader is called 'nothing'"),
        (["--data", "voc:/nowhere"], 2, "/nowhere"),
        (["--data", "voc:/nowhere", "--model", "/no/model"], 2, "/nowhere is not there"),
        (["--data", "voc:/nowhere", "--timestep", "soon"], 2, "--timestep: 'soon' is not -1, auto, or 1 to"),
        (["--data", "voc:/nowhere", "--blocks", "few"], 2, "--blocks: 'few' is not auto, or at most"),
        (["--task", "sematic"], 2, "did you mean semantic"),
        (["--data", "coco:tests", "--task", "semantic,pose"], 2, "pose learns from one person of coco: at a time"),
        (["--held-out", "0.9"], 2, "--held-out 0.9: expected 0 to 0.5"),
        (["--draws", "0"], 2, "--draws 0: expected 1 or more"),
        (["--accumulate", "0"], 2, "--accumulate 0: expected 1 or more"),
        (["--steps", "-1"], 2, "--steps -1: expected 0 or more"),
        (["--timestep", "1000"], 2, "--timestep: 1000 is not one of the model's 1000"),
        (["--dtype", "fp16"], 2, "--dtype: fp16 convolutions take a CPU hundreds of times longer than fp32 ones"),
        (["--cache", "disk", "--cache-gb", "0.0001"], 2, "--cache disk: the captures take"),
        (["--cache-dir", "/proc/nowhere", "--cache", "disk", "--cache-gb", "9"], 3, "/proc/nowhere"),
        (["--model", "/nowhere/model"], 2, "/nowhere/model"),
        (["--limit-per-class", "-1"], 2, "--limit-per-class -1: expected 0 or more"),
        (["--engine", "trt"], 3, "trt"),
        (["--out", ""], 2, "--out is empty"),
        (["--seed", str(2**64)], 2, f"--seed {2**64}: expected 0 to {2**63 - 1}"),
        (["--folds", "²"], 2, "--folds: '²' is neither auto, no, nor a number from 2 to 100"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, flags, code, said):
    given = {
        "--data": "demo:2@1000",
        "--task": "depth",
        "--steps": "1",
        "--out": str(tmp_path / "decoder"),
        "--cache-dir": str(tmp_path / "captures"),
    }
    given |= dict(zip(SMALL[::2], SMALL[1::2])) | dict(zip(flags[::2], flags[1::2]))
    assert train.main([word for pair in given.items() for word in pair]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_model_may_be_downloaded_where_a_flag_says_so(tmp_path, capsys, monkeypatch):
    def downloaded(name, allow_download):
        raise Refused(f"the hub was asked for {name}", "Answer it.")

    monkeypatch.setattr("datasetdm_fast.engine.loading.download_model", downloaded)
    line = ["--model", "someone/model", "--data", "demo:2", "--out", str(tmp_path)]
    assert train.main(line) == 2 and "Add --allow-download" in capsys.readouterr().err
    assert train.main([*line, "--allow-download"]) == 2
    assert "the hub was asked for someone/model" in capsys.readouterr().err


def test_a_line_without_flags_starts_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_workflow", None)
    assert train.main([]) == 2 and not list(tmp_path.iterdir())
    cause, remedy = capsys.readouterr().err.splitlines()
    assert "--data is missing" in cause and "--data folder:photos" in remedy and "--data demo:100" in remedy


def test_a_folder_with_a_decoder_of_other_making_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "decoder" / "depth").mkdir(parents=True)
    (tmp_path / "decoder" / "depth" / "config.json").write_text("{}")
    assert run("--data", "demo:2@1000", "--task", "depth", "--steps", "1") == 2
    assert "holds a decoder that was not trained there" in capsys.readouterr().err


def test_another_training_is_looked_for_at_the_first_that_is_left(tmp_path):
    tasks = ("depth", "semantic")
    for task in tasks:
        with task_training.lock_folder(tmp_path / task):
            pass
    (tmp_path / "depth" / "training" / "result.json").write_text("{}")
    with task_training.lock_folder(tmp_path / "depth"):
        task_training.check_unlocked(tmp_path, tasks)
    with task_training.lock_folder(tmp_path / "semantic"), pytest.raises(Refused, match="another process"):
        task_training.check_unlocked(tmp_path, tasks)


def test_a_folder_another_training_writes_to_is_left_alone(run, tmp_path, capsys, monkeypatch):
    line = ["--data", "demo:2@1000", "--task", "depth", "--steps", "1"]
    with task_training.lock_folder(tmp_path / "decoder" / "depth"):
        with monkeypatch.context() as patch:
            patch.setattr(session, "load_model", None)  # it is refused before
            assert run(*line) == 2
        assert run(*line, "--dry-run") == 0
    assert (
        "another process is writing to" in capsys.readouterr().err
        and not (tmp_path / "decoder" / "depth" / "config.json").exists()
    )
    assert run(*line) == 0


@pytest.mark.parametrize(
    ("folder", "value", "task", "said"),
    [
        ("masks", np.uint8(255), "semantic", "every pixel is background, the only class or 255"),
        ("masks", np.uint8(255), "open-vocabulary", "shows a thing"),
        ("depth", np.uint16(0), "depth", "above 0 and up to 10 m\nCheck the labels: their class numbers, or the"),
        ("depth", np.uint16(60000), "depth", "above 0 and up to 10 m\nCheck the labels: their class numbers, or the"),
    ],
)
def test_labels_that_say_nothing_are_refused(run, tmp_path, capsys, folder, value, task, said):
    kind, write, _ = LAYOUTS["folder"]
    write(tmp_path / "data")
    for path in (tmp_path / "data" / folder).iterdir():
        save(path, np.full((80, 96), value))
    assert run("--data", f"{kind}:{tmp_path / 'data'}", "--task", task) == 2
    err = capsys.readouterr().err
    assert "none of 3 images shows" in err and said in err


@pytest.mark.parametrize("name", ["background", "dog"])
def test_a_map_of_one_class_teaches_nothing(run, tmp_path, capsys, name):
    _, write, _ = LAYOUTS["folder"]
    write(tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text(f"{name}\n")
    for path in (tmp_path / "data" / "masks").iterdir():
        save(path, np.where(np.arange(96) < 48, 0, 255).astype(np.uint8)[None].repeat(80, 0))
    assert run("--data", f"folder:{tmp_path / 'data'}", "--task", "semantic") == 2
    assert "none of 3 images shows a class to tell from another" in capsys.readouterr().err


def test_copies_of_an_image_are_held_out_together(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
    for k in range(12):  # of each image three
        save(tmp_path / "data" / "images" / f"{k:02d}.png", pixels[k % 4])
        save(tmp_path / "data" / "depth" / f"{k:02d}.png", np.full((64, 64), 2000, np.uint16))
    line = ["--data", f"folder:{tmp_path / 'data'}", "--task", "depth", "--steps", "1", "--held-out", "0.3"]
    assert run(*line, "--folds", "2", "--quiet", "--dry-run") == 0
    (tmp_path / "list").write_text("\n".join(f"{k:02d}.png" for k in range(11, 0, -1) if k != 8))
    for chosen in ("", str(tmp_path / "list")):  # in another order
        options = {"model": "tiny", "size": 64, "engine": "torch", "held_out": 0.3, "images": chosen}
        opened = train.open_workflow(TrainConfig(data=line[1], task=("depth",), **options)).session
        for parts in (opened.split, splits.split_folds(opened.source, opened.numbers, 2, 0)):
            sides = [{opened.source.order[number] % 4 for number in part} for part in parts]
            assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_held_out_images_without_any_truth_have_no_figure(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), np.uint8)
    held = splits.split(open_data("demo:10", 64), range(10), 0.1, 0)[1]
    for k, image in enumerate(pixels):
        save(tmp_path / "data" / "images" / f"{k}.png", image)
        save(tmp_path / "data" / "depth" / f"{k}.png", np.full((64, 64), 0 if k in held else 2000, np.uint16))
    line = ["--data", f"folder:{tmp_path / 'data'}", "--task", "depth", "--steps", "2", "--checks", "1", "--draws", "1"]
    assert run(*line) == 0
    told, err = json.loads((tmp_path / "decoder/depth/training/result.json").read_text()), capsys.readouterr().err
    assert told["held_out_images"] == 1 and told["held_out"] == {} and "depth: 2 steps\n" in err
    assert [step for step, _ in losses(tmp_path / "decoder")] == [1, 2]


def test_bad_images_are_left_out_and_named(run, tmp_path, capsys):
    kind, write, tasks = LAYOUTS["folder"]
    write(tmp_path / "data")
    for folder in sorted(path for path in (tmp_path / "data").iterdir() if path.is_dir()):
        first = sorted(folder.iterdir())[0]
        first.rename(folder / "a\n\x1b[31mname.png")  # nothing in a name may steer a terminal
    broken = tmp_path / "data" / "images" / "a\n\x1b[31mname.png"
    broken.write_bytes(b"no picture")
    line = ["--data", f"{kind}:{tmp_path / 'data'}", "--task", tasks[0], "--steps", "1"]
    assert run(*line) == 2
    assert "31mname" in (err := capsys.readouterr().err) and "\x1b" not in err
    assert run(*line, "--skip-bad") == 0
    err = capsys.readouterr().err
    assert "images     2 to learn from" in err and "left out" in err and "31mname" in err and "\x1b" not in err
    assert err.count("31mname") == 1
    broken.unlink()
    assert run(*line, out="whole") == run(*line, "--skip-bad", out="whole") == 0
    assert "finished" in capsys.readouterr().err


def test_flags_of_the_demo_decoders_that_are_given_stand_once_in_the_command(monkeypatch):
    lines = []
    monkeypatch.setattr(train, "main", lambda line: lines.append(line) or 0)
    assert teach.main(["--world", "hard", "--steps=40", "--task", "depth", "--out", "x"]) == 0
    settings = teach.SETTINGS | {"--data": "hard:100@1000", "--steps": "40", "--task": "depth"}
    assert lines == [[*(word for pair in settings.items() for word in pair), "--out", "x"]]


def test_a_checkpoint_on_a_disk_that_fails_is_no_damaged_one(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, {"a": torch.ones(1)}, {"step": 1})
    assert checkpoint.read(tmp_path)[1] == {"step": 1}

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "safe_open", fail)
    with pytest.raises(Missing, match=f"{checkpoint.NAME}: Input/output error"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"items": [{"image": 1}]}', b"\xff", b"[" * 100_000])
def test_data_of_a_training_that_cannot_be_read_are_not_counted(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    assert data_record._recorded_images(tmp_path / "data.json") == set()
    (tmp_path / "settings.json").write_bytes(content)
    assert data_record._recorded_scenes(tmp_path) == set()
    with pytest.raises(Refused, match="data.json: not a file of a training"):
        task_training.read_state(tmp_path / "data.json", {"steps": int})
    other = types.SimpleNamespace(is_rendered=False)  # a checkpoint of DatasetDM has no folder of decoders
    assert data_record.count_seen_in_training(str(tmp_path / "w.pth"), other, ["depth"]) == {}


def test_the_page_shows_twelve_images_judged_by_a_decoder_that_has_not_learnt_from_them(tmp_path, monkeypatch):
    numbers, shown = list(range(40)), []
    engine = types.SimpleNamespace(model=types.SimpleNamespace(size=64))
    session = types.SimpleNamespace(split=(numbers, []), numbers=numbers, engine=engine, address="folder:a", source="s")
    session.view_settings, session.framing = types.SimpleNamespace(seed=3), {"scaled": 0, "cut_to_a_square": 0}
    session.framing |= {"pictures": 40, "framing": "fit"}
    session.views = lambda task, chosen, draws: chosen
    session.predictor = lambda plan: types.SimpleNamespace(predict=lambda decoder, views: (decoder, views))
    replaced = {
        "split_folds": lambda source, numbers, count, seed: [[k for k in numbers if k % count == seed - 3]],
        "load_decoder": lambda place: place,
        "check_itself": lambda *given: (),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(workflow, name, value)
    monkeypatch.setattr(workflow.page, "page", lambda *given: shown.append(given) or b"")
    opened = workflow.Workflow(session, tmp_path, ("depth",), TaskSettings(), "2")
    plan, result = types.SimpleNamespace(schedule=types.SimpleNamespace(steps=9)), {"steps": 9, "images": 40}
    for held_out in ([], [5, 7]):
        session.split = numbers, held_out
        shown_result = result | {"held_out_images": len(held_out)}
        opened._write_page("depth", plan, shown_result, {"folds": 2}, "train", lambda: False)
    (*_, views, labels, title, _), (*_, held_views, held_labels, held_title, _) = shown
    first = tmp_path / "depth/training/folds-2/1"
    assert labels == (first, views) and views == list(range(0, 24, 2)) and "first fold has not seen" in title
    assert held_labels == (tmp_path / "depth", [5, 7]) and held_title == "Held-out images"
