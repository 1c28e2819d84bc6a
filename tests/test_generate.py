import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
from run_steps import prepare
from stub_engine import StubEngine

from datasetdm_fast import drop, generate, restore
from datasetdm_fast.command_line.run_settings import (
    complete_settings,
    count_images,
    expand_names,
    name_folder,
    restore_settings,
)
from datasetdm_fast.config import TASKS
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.config import DEMO
from datasetdm_fast.engine.engines import check_sources, open_engine
from datasetdm_fast.engine.loading import presets
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.jobs.prompt_files import listed_words
from datasetdm_fast.runs.jobs.run import merge_with_stored
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, read_document
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import LabelConfig, RunConfig
from datasetdm_fast.runs.workers import devices


@pytest.fixture
def engines(monkeypatch):
    opened = []

    def open_engine(model="demo", decoder="demo", tasks=TASKS, **choices):
        opened.append(StubEngine(choices.get("size") or 64, tasks=tuple(tasks)))
        return opened[-1], {task: {"digest": "stub", "licence": "none"} for task in tasks}

    monkeypatch.setattr("datasetdm_fast.engine.engines.open_engine", open_engine)
    return opened


def run(*arguments, out=None):
    return generate.main([*arguments, *(["--out", str(out)] if out else [])])


def test_without_flags_it_makes_the_demo_run(engines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    out, err = capsys.readouterr()
    assert out == "runs/demo\n"
    first, second, *_ = err.splitlines()
    assert first.startswith("images     16 of 16, 64 x 64 pixels, ") and second.endswith("; run folder runs/demo")
    assert "sampler  " not in err
    assert run("--number", "17", "--dry-run") == 0
    err = capsys.readouterr().err
    for line in (
        "images     1 of 17, 64 x 64 pixels, seeds 0 to 16",
        "labels     semantic, instance, depth, pose",
        "1 batch of 6",
        "disk       at most",
    ):
        assert line in err
    assert len(open_run("runs/demo")) == 16 and (tmp_path / "runs/demo/gallery/index.html").exists()


def test_settings_without_out_have_a_run_folder_of_their_own(engines, tmp_path, monkeypatch, capsys):
    """After the demo run any other line works as it stands, and the same line, or a longer one, finds its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a ball\na cube\n")
    few = ["--number", "2", "--quiet"]

    def folder(*line):
        assert run(*line) == 0
        return capsys.readouterr().out.strip()

    assert folder(*few) == "runs/demo" == folder("--number", "3", "--quiet")  # which grows
    places = [
        folder(*few, *line)
        for line in (
            ["--prompts", "A red ball: beside a cube"],
            ["--prompts", "list.txt"],
            ["--prompts", "list.txt", "--seed", "4"],
            ["--steps", "9"],
            ["--classes", "ball,cube", "--task", "semantic"],
        )
    ]
    names = ["a-red-ball-beside-a-cube", "list", "list", "steps", "ball-cube"]
    assert [place[:-7] for place in places] == [f"runs/{name}" for name in names] and len(set(places)) == 5
    words = [f"{letter}{letter}ball" for letter in "abcdefghi"]
    assert name_folder(RunConfig(prompts=" ".join(words)))[5:-7] == "aaball-bbball-ccball-ddball-eeball-ffball-ggball"
    assert name_folder(RunConfig(prompts="a b c d e f g h i"))[5:-7] == "a-b-c-d-e-f-g-h"
    assert name_folder(RunConfig(prompts="x " + "y" * 50))[5:-7] == "x-" + "y" * 46
    seeds = {name_folder(RunConfig(seed=seed)) for seed in (3, 4)}
    assert len(seeds) == 2 and all(name.startswith("runs/seed-") for name in seeds)
    counts = [count_images(RunConfig(number=7, per_class=each, classes=("a", "b"))) for each in (0, 3)]
    assert counts == [7, 6]
    with open("list.txt", "a") as file:
        file.write("a cone\n")
    assert folder("--number", "3", "--quiet", "--prompts", "list.txt") == places[1]  # the list became longer
    assert len(open_run(places[1])) == 3 and len(open_run("runs/demo")) == 3
    assert folder(*few, "--prompts", "🎈").startswith("runs/run-")
    assert folder(*few, "--steps", "9", "--out", "own") == "own"


def test_labels_are_those_that_the_decoders_make_where_no_task_is_given(tmp_path):
    for name, task in (("depth", "depth"), ("semantic", "semantic"), ("streets", "semantic")):
        (tmp_path / "decoders" / name).mkdir(parents=True)
        shutil.copy(DEMO / task / "config.json", tmp_path / "decoders" / name)
    config = RunConfig(decoder=str(tmp_path / "decoders"))
    assert complete_settings(config, {"decoder"}).task == ("semantic", "semantic:streets", "depth")
    assert complete_settings(config, {"task"}).task == RunConfig.task == complete_settings(RunConfig(), set()).task
    pictures = LabelConfig("photos", decoder=config.decoder)  # which the command label reads in the same way
    assert expand_names(pictures, {"decoder"}).task == ("semantic", "semantic:streets", "depth")


def test_json_is_one_object_and_quiet_is_quiet(engines, tmp_path, capsys):
    assert run("--number", "3", "--json", "--quiet", out=tmp_path / "run") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and result["images_per_second"] > 0 and result["closing_seconds"] > 0
    assert 0 <= result["doubtful"] <= 3
    for name in ("images_per_second", "closing_seconds", "doubtful"):
        del result[name]
    assert result == {
        "path": str(tmp_path / "run"),
        "number": 3,
        "done": 3,
        "made": 3,
        "set_aside": 0,
        "complete": True,
    }


def test_the_same_line_again_has_nothing_to_do(engines, tmp_path, capsys):
    for _ in range(2):
        assert run("--number", "3", out=tmp_path / "run") == 0
    assert len(engines) == 1 and "complete with 3 samples, nothing to do" in capsys.readouterr().err


def files_of(path):
    """Every file of a run folder but its state, with its bytes; card and page tell which command made them."""
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("state/")}


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (["--number", "3"], ["--number", "7"]),
        (["--classes", "ball,cube", "--per-class", "2"], ["--classes", "ball,cube", "--per-class", "3"]),
        (["--prompts", "a ball\na cube", "--number", "2"], ["--prompts", "a ball\na cube\na cone", "--number", "7"]),
    ],
    ids=["number", "per class", "prompts"],
)
def test_a_finished_run_grows_into_the_one_that_was_larger_from_the_start(engines, tmp_path, capsys, first, more):
    usual = ["--batch-size", "2", "--quiet"]
    assert run(*first, *usual, out=tmp_path / "run") == 0
    assert run(*more, *usual, "--dry-run", out=tmp_path / "run") == 0
    assert audit(tmp_path / "run").is_complete and audit(tmp_path / "run").findings == []
    assert run(*more, *usual, "--limit", "1", out=tmp_path / "run") == 0
    assert not audit(tmp_path / "run").is_complete and audit(tmp_path / "run").findings == []
    assert run(*more, *usual, out=tmp_path / "run") == 0
    assert run(*more, *usual, out=tmp_path / "large") == 0
    grown, large = files_of(tmp_path / "run"), files_of(tmp_path / "large")
    assert grown == large and audit(tmp_path / "run").is_complete and audit(tmp_path / "run").findings == []
    ledgers = [(tmp_path / name / "state" / "ledger.sqlite").read_bytes() for name in ("run", "large")]
    assert ledgers[0] == ledgers[1]
    assert run(*first, *usual, out=tmp_path / "run") == 2  # it does not shrink
    assert "number:" in capsys.readouterr().err and files_of(tmp_path / "run") == grown


@pytest.mark.parametrize(
    "first, more, sizes",
    [
        (["--number", "1"], ["--number", "9"], [1] + 8 * [2]),  # a first image, to see whether it works
        (["--number", "3", "--batch-size", "2"], ["--number", "9", "--batch-size", "2"], 9 * [2]),
        (["--number", "5", "--batch-size", "4"], ["--number", "9", "--batch-size", "4"], 9 * [3]),
        (["--number", "4", "--batch-size", "3"], ["--number", "9", "--batch-size", "3"], 4 * [2] + 5 * [3]),
        (["--number", "1"], ["--number", "9", "--mixed", "no"], 9 * [1]),
        (["--number", "8", "--batch-size", "4"], ["--number", "9"], 8 * [4] + [3]),
    ],
)
def test_a_run_that_grows_gets_the_batches_of_the_larger_one(engines, tmp_path, monkeypatch, first, more, sizes):
    monkeypatch.setattr(StubEngine, "suggested_batch", lambda self: 2)
    for line in (first, more, more):
        assert run(*line, "--quiet", out=tmp_path / "run") == 0
        assert audit(tmp_path / "run").findings == []
    assert [sample.row.recipe["batch_size"] for sample in open_run(tmp_path / "run")] == sizes
    assert read_document(tmp_path / "run")["plan"]["batch_size"] == sizes[-1]


def test_no_memory_is_probed_for_a_batch_size_that_is_known(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(StubEngine, "suggested_batch", lambda self: pytest.fail("probed"))
    assert run("--number", "1", "--quiet", out=tmp_path / "one") == 0
    for number in ("3", "5"):
        assert run("--number", number, "--batch-size", "2", "--quiet", out=tmp_path / "run") == 0


def test_a_run_does_not_grow_where_an_image_would_become_another_one(engines, tmp_path, capsys):
    line = ["--prompts", "a ball\na cube", "--number", "3", "--quiet"]
    assert run(*line, out=tmp_path / "run") == 0
    before = files_of(tmp_path / "run")
    for prompts, index in (("a cone\na cube", 0), ("a ball\na cube\na cone", 2)):  # the third image was a ball again
        assert run("--prompts", prompts, "--number", "9", "--quiet", out=tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert f"image {index:08d} would change (" in err and "a cone" in err and "Add prompts" in err
    for other in (["--seed", "4"], ["--steps", "9"]):
        assert run("--prompts", "a ball\na cube", "--number", "9", "--quiet", *other, out=tmp_path / "run") == 2
    assert run("--prompts", "a ball\na cone", "--number", "3", "--quiet", out=tmp_path / "run") == 2
    assert files_of(tmp_path / "run") == before


def test_a_run_that_was_killed_while_it_began_to_grow_grows_with_the_same_line(engines, tmp_path, monkeypatch):
    """The ledger tells of more images, run.json does not yet."""
    line = ["--batch-size", "2", "--quiet"]
    assert run("--number", "3", *line, out=tmp_path / "run") == 0

    def killed(files):
        if tmp_path / "run" / "run.json" in files:
            raise KeyboardInterrupt
        return publish(files)

    publish = storage.publish
    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", killed)
        run("--number", "5", *line, out=tmp_path / "run")
    assert read_document(tmp_path / "run")["plan"]["number"] == 3 and audit(tmp_path / "run").findings == []
    assert run("--number", "5", *line, out=tmp_path / "run") == 0 == run("--number", "5", *line, out=tmp_path / "large")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "large") and audit(tmp_path / "run").findings == []


def test_a_larger_number_makes_others_in_the_place_of_dropped_samples(engines, tmp_path, capsys):
    line, out = ["--batch-size", "2", "--quiet", "--number"], tmp_path / "run"
    assert run(*line, "4", out=out) == 0 and drop.main([str(out), "1", "3", "--quiet"]) == 0
    assert run(*line, "4", out=out) == 0  # the same line makes none of them again
    assert [sample.id for sample in open_run(out)] == ["00000000", "00000002"]
    assert run(*line[:2], "--number", "6", "--dry-run", out=out) == 0 and "images     2 of 6" in capsys.readouterr().err
    assert run(*line, "6", out=out) == 0 and audit(out).findings == []
    assert [sample.id for sample in open_run(out)] == [f"{k:08d}" for k in (0, 2, 4, 5)]
    assert restore.main([str(out), "--all", "--quiet"]) == 0
    assert run(*line, "6", out=tmp_path / "large") == 0 and files_of(out) == files_of(tmp_path / "large")


def test_another_version_of_a_package_with_a_task_does_not_continue_its_run(engines, tmp_path):
    out = tmp_path / "run"
    assert run("--number", "2", "--quiet", out=out) == 0
    made, stored = prepare(RunConfig(out=str(out), number=3)), read_document(out)
    first, second = ({"packages": {"depth": f"theirs {version}"}} for version in ("1.0", "2.0"))
    assert merge_with_stored(replace(made, document=made.document | first), stored | first).plan.number == 3
    with pytest.raises(Refused, match='packages.depth: "theirs 1.0" there, "theirs 2.0" asked for'):
        merge_with_stored(replace(made, document=made.document | second), stored | first)


def test_a_run_that_cannot_be_written_to_is_refused_before_networks_are_loaded(engines, tmp_path, capsys):
    assert run("--number", "3", "--limit", "1", out=tmp_path / "run") == 0
    engines.clear()
    with storage.hold_lock(tmp_path / "run" / LOCK):
        assert run("--number", "3", out=tmp_path / "run") == 2
        assert run("--number", "3", "--dry-run", out=tmp_path / "run") == 0 and len(engines) == 1
    assert "state/lock: another process is writing to this run folder" in capsys.readouterr().err


def test_a_limited_run_says_how_to_go_on(engines, tmp_path, capsys):
    assert run("--number", "3", "--limit", "1", out=tmp_path / "run") == 0
    assert (
        "1 of 3 samples is there; resume with: python -m datasetdm_fast.generate --number 3 --limit 1 --out "
        f"{tmp_path / 'run'}" in capsys.readouterr().err
    )


def test_dry_run_shows_the_plan_and_writes_nothing(engines, tmp_path, capsys):
    assert run("--number", "2", "--prompts", "a ball", "--dry-run", out=tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert (
        out.splitlines() == ["00000000  seed 0  'a ball'", "00000001  seed 1  'a ball'"] and "images     2 of 2" in err
    )
    assert run("--number", "2", "--prompts", "a ball", "--dry-run", "--json", out=tmp_path / "run") == 0
    assert [request["seed"] for request in json.loads(capsys.readouterr().out)["requests"]] == [0, 1]
    assert not (tmp_path / "run").exists() and not [
        entry for engine in engines for entry in engine.log if entry[0] == "denoise"
    ]


def test_a_dry_run_of_many_lists_the_first(engines, tmp_path, capsys):
    assert run("--number", "50", "--prompts", "a ball", "--dry-run", out=tmp_path / "run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[39].startswith("00000039  seed 39") and printed[40:] == ["and 10 more, which --json lists"]


def test_decoders_may_be_moved(tmp_path, capsys):
    decoders, moved, path = tmp_path / "decoders", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(DEMO / "depth", decoders / "depth")
    line = ("--task", "depth", "--number", "2", "--steps", "2", "--batch-size", "1", "--device", "cpu", "--quiet")
    line += ("--force-domain",)  # its pictures are made in two steps
    assert run(*line, "--decoder", str(decoders), "--limit", "1", out=path) == 0
    decoders.rename(moved)
    for _ in range(2):  # resumed and finished
        assert run(*line, "--decoder", str(moved), out=path) == 0
    assert read_document(path)["config"]["decoder"] == str(decoders)
    (path / "depth/00000000.png").unlink()
    assert run("--only", "00000000", out=path) == 3, "its decoders are not there"
    assert run("--only", "00000000", "--decoder", str(moved), out=path) == 0 and audit(path).findings == []
    (moved / "depth/config.json").write_text((moved / "depth/config.json").read_text() + "\n")
    assert run(*line, "--decoder", str(moved), out=path) == 2 and "(decoder: " in capsys.readouterr().err
    assert run("--only", "00000000", "--decoder", str(moved), out=path) == 2
    assert "(decoders.depth.digest: " in capsys.readouterr().err


def test_the_model_may_be_moved(tmp_path, capsys):
    model, moved, path = tmp_path / "model", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(presets.DEMO, model)
    line = ("--task", "depth", "--number", "2", "--steps", "2", "--batch-size", "1", "--device", "cpu", "--quiet")
    line += ("--prompts", "a red ball", "--force-domain")
    assert run(*line, "--model", str(model), "--limit", "1", out=path) == 0
    model.rename(moved)
    for _ in range(2):  # resumed and finished
        assert run(*line, "--model", str(moved), out=path) == 0
    document = read_document(path)
    assert document["config"]["model"] == document["model"]["name"] == str(model)
    assert {sample.row.recipe["model"]["name"] for sample in open_run(path)} == {str(model)}
    assert run("--only", "00000001", "--model", str(moved), out=path) == 0 and audit(path).findings == []
    (moved / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert run(*line, "--model", str(moved), out=path) == 2 and "(model: " in capsys.readouterr().err


def test_per_class(engines, tmp_path):
    assert run("--classes", "ball,cube", "--per-class", "3", "--task", "semantic", out=tmp_path / "run") == 0
    assert [sample.classes for sample in open_run(tmp_path / "run")] == [("ball",), ("cube",)] * 3


def test_only(engines, tmp_path, capsys):
    assert run("--number", "3", out=tmp_path / "run") == 0
    (tmp_path / "run/depth/00000001.png").unlink()
    capsys.readouterr()
    assert run("--only", "00000001", "--json", out=tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(tmp_path / "run"),
        "id": "00000001",
        "written": ["depth/00000001.png"],
    }
    assert run("--only", "00000001", out=tmp_path / "run") == 0
    assert "sample 00000001: made again, no file changed" in capsys.readouterr().err
    (tmp_path / "run/depth/00000001.png").unlink()
    assert run("--only", "00000001", out=tmp_path / "run") == 0
    assert "sample 00000001: made again, 1 file written" in capsys.readouterr().err
    assert run("--only", "00000001", "--number", "4", out=tmp_path / "run") == 2


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--task", "colour"], "colour"),
        (["--engine", "warp"], "warp"),
        (["--number", "-1"], "-1"),
        (["--number", "0"], "0"),
        (["--steps", "-1"], "-1"),
        (["--batch-size", "-1"], "0"),
        (["--guidance", "nan"], "nan"),
        (["--guidance", "1e308"], "--guidance 1e+308: expected a number from 0 to 1000"),
        (["--size", "100"], "100"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompts", "x " * 90], "92 tokens"),
        (["--classes", "unicorn"], "unicorn"),
        (["--per-class", "2"], "no classes"),
        (["--prompts", ""], "--prompts"),
        (["--classes", ""], "--classes"),
        (["--model", "tiny"], "no prompts"),
        (["--model", "nope"], "model: 'nope' is neither"),
        (["--model", "nope", "--prompts", "missing.txt"], "model: 'nope' is neither"),
        (["--only", "7"], "is not a run folder"),
    ],
)
def test_bad_input_is_one_sentence_one_remedy_and_nothing_written(engines, tmp_path, capsys, arguments, cause):
    assert run(*arguments, out=tmp_path / "run") == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2 and cause in lines[0] and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_other_configurations_exit_with_two(engines, tmp_path, capsys):
    assert run("--number", "2", out=tmp_path / "run") == 0
    capsys.readouterr()
    assert run("--number", "1", "--seed", "4", out=tmp_path / "run") == 2
    assert "number: 2 there, 1 asked for; seed: 0 there, 4 asked for" in capsys.readouterr().err


class Other(StubEngine):
    """Another engine, whose images may be darker."""

    name, is_darker = "torch", False

    def fingerprint(self):
        return super().fingerprint() | {"engine": "torch", "device_name": "stub", "torch": "99.0"}

    def decode_and_check(self, latents):
        images, is_finite = super().decode_and_check(latents)
        return images // 2 if self.is_darker else images, is_finite


@pytest.fixture
def mixing(monkeypatch, tmp_path):
    """A run of two samples, then another engine in the place of the first; what run.json says of engines."""
    opened = []

    def open_engine(model="demo", decoder="demo", tasks=TASKS, **choices):
        opened.append((Other if choices["engine"] == "torch" else StubEngine)(64, tasks=tuple(tasks)))
        return opened[-1], {task: {"digest": "stub", "licence": "none"} for task in tasks}

    monkeypatch.setattr("datasetdm_fast.engine.engines.open_engine", open_engine)
    assert run("--number", "2", "--batch-size", "2", out=tmp_path / "run") == 0
    return opened


LARGER = ("--number", "5", "--engine", "torch", "--batch-size", "3")


def test_another_engine_goes_on_once_its_samples_are_those_that_are_there(mixing, tmp_path, capsys):
    path = tmp_path / "run"
    assert run(*LARGER, "--limit", "1", out=path) == 0
    assert "torch reproduces 2 samples of the run" in capsys.readouterr().err
    assert run(*LARGER, out=path) == 0 and "again" not in capsys.readouterr().err
    (entry,) = read_document(path)["mixed"]
    assert entry["engine"]["torch"] == "99.0" and entry["number"] == 2 and audit(path).findings == []
    with Ledger(path / LEDGER, read_only=True) as ledger:
        made = [(row.recipe["engine"]["engine"], row.recipe["batch_size"]) for row in ledger.rows()]
    assert made == [("stub", 2)] * 2 + [("torch", 3)] * 3
    assert "`torch fp32 on stub` continued the run: 2 samples" in (path / "README.md").read_text()
    for id, kind in (("00000004", Other), ("00000000", StubEngine)):
        (path / f"depth/{id}.png").unlink()
        assert run("--only", id, out=path) == 0 and type(mixing[-1]) is kind
    count = len(mixing)
    assert run("--number", "5", "--engine", "fast", out=path) == 0 and len(mixing) == count, "nothing to do"


def test_rows_name_the_engine_of_the_process_that_makes_them(mixing, tmp_path):
    """A rank prepares its job, and does so anew from run.json once no other process writes it."""
    path = tmp_path / "run"
    assert run(*LARGER, "--limit", "1", out=path) == 0
    first = prepare(RunConfig(number=5, engine="torch", batch_size=3, out=str(path)))
    again = merge_with_stored(first, read_document(path))
    assert first.recipe.facts == again.recipe.facts and again.recipe.facts["engine"]["engine"] == "torch"


def test_an_engine_whose_samples_are_others_does_not_go_on(mixing, tmp_path, monkeypatch, capsys):
    path, before = tmp_path / "run", files_of(tmp_path / "run")
    monkeypatch.setattr(Other, "is_darker", True)
    assert run(*LARGER, out=path) == 4 and "free image beyond the limit in 2 samples" in capsys.readouterr().err
    for line in (("--number", "5", "--engine", "torch"), ("--number", "5", "--batch-size", "3")):
        assert run(*line, "--mixed", "no", out=path) == 2
        assert "holds a run with other settings (" in capsys.readouterr().err
    with pytest.raises(Refused, match=r"engine.torch: nothing there, .99\.0. asked for") as stop:
        prepare(RunConfig(number=5, engine="torch", batch_size=2, out=str(path)))  # as a process of several does
    assert "--limit 1" in stop.value.remedy and files_of(path) == before


def test_samples_set_aside_exit_with_four(engines, tmp_path, capsys):
    for _ in range(2):
        assert run("--prompts", "a ball\nbroken", "--number", "2", out=tmp_path / "run") == 4
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / 'run'}\n" and "1 of 2 samples were quarantined" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_finishes_the_batch(engines, tmp_path, capsys, monkeypatch, number, code):
    denoise, sent = StubEngine.denoise, []

    def interrupted(self, latents, timestep, context):
        if (tmp_path / "run").exists() and not sent:  # not during the probe, and once
            sent.append(number)
            os.kill(os.getpid(), number)
        return denoise(self, latents, timestep, context)

    monkeypatch.setattr(StubEngine, "denoise", interrupted)
    assert run("--number", "6", "--batch-size", "2", out=tmp_path / "run") == code
    out, err = capsys.readouterr()
    assert "2 of 6 samples are there; resume with: python -m datasetdm_fast.generate --number 6" in err
    assert len(open_run(tmp_path / "run")) == 2 and (tmp_path / "run" / "instances.json").exists()
    assert run("--number", "6", "--batch-size", "2", out=tmp_path / "run") == 0
    assert len(open_run(tmp_path / "run")) == 6


def test_the_second_signal_ends_at_once():
    code = (
        "import os, signal, time\nfrom datasetdm_fast.command_line.ending import run_command\n"
        "from datasetdm_fast.command_line.interruption import Interruption\ndef command(arguments):\n"
        "    with Interruption(True):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\nrun_command(command)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 130


def test_a_complete_run_loads_no_network(engines, tmp_path):
    assert run("--number", "2", out=tmp_path / "run") == 0
    arguments = ["--number", "2", "--out", str(tmp_path / "run")]
    code = (
        f"import sys; from datasetdm_fast.generate import main; sys.exit(main({arguments!r}) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_model_of_seeded_weights_has_seeded_decoders(tmp_path, capsys):
    """Speed and memory of a size can be looked at without training anything."""
    line = ("--model", "tiny", "--prompts", "a ball", "--number", "1", "--steps", "2", "--device", "cpu", "--quiet")
    assert run(*line, out=tmp_path / "run") == 0
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(document["decoders"]) == {"semantic", "instance", "depth", "pose"}
    assert document["decoders"]["depth"]["digest"] == "seeded: depth"
    assert document["decoders"]["depth"]["licence"].startswith("none")
    assert run("--only", "00000000", "--quiet", out=tmp_path / "run") == 0
    assert run(*line, "--task", "open-vocabulary", out=tmp_path / "none") == 3
    assert "holds no decoder for it, only for semantic, instance, depth, pose" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_not_called_full(tmp_path, capsys):
    assert generate.main(["--number", "1", "--prompts", "a ball", "--out", "/proc/foo", "--dry-run"]) == 3
    said = capsys.readouterr().err
    assert "--out /proc/foo: /proc cannot be written to" in said and "MB" not in said


def test_a_plan_says_what_memory_a_large_batch_takes(tmp_path, capsys):
    """Of the demo's 128 x 128 pixels the image decoder has three maps of 16 channels, in fp32: 3.1 MB an image."""
    line = [
        "--number",
        "2000",
        "--prompts",
        "a red ball",
        "--dtype",
        "fp32",
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    assert generate.main([*line, "--batch-size", "1000", "--json"]) == 0
    weights = "memory     0.024 GB of weights"
    assert f"{weights} and at least 3.1 GB for 1000 images, of " in capsys.readouterr().err
    assert generate.main([*line, "--json"]) == 0 and f"{weights}, of " in capsys.readouterr().err


def test_a_dry_run_draws_no_weights_and_tells_what_they_take(tmp_path, monkeypatch, capsys):
    """Parameters of SDXL: 2,567 M of the U-Net, 818 M of the text encoders, 84 M of the autoencoder, 4 bytes each."""
    monkeypatch.setattr(presets, "as_filled", None)
    line = "--model random-sdxl --labeller attention --classes cat --prompts cat --dtype fp32 --dry-run --out".split()
    assert generate.main([*line, str(tmp_path / "run")]) == 0
    assert "memory     14 GB of weights, of " in capsys.readouterr().err


COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
for command, *words in map(json.loads, sys.stdin):
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        code = import_module(f"datasetdm_fast.{command}").main(words)
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]), flush=True)
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Exit code of a command in an interpreter that ran only such commands, its messages, and whether it has torch."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS], **pipes, text=True, cwd=tmp_path_factory.mktemp("c")
    ) as one:

        def run_in_it(command, line):
            one.stdin.write(f"{json.dumps([command, *line.split()])}\n")
            one.stdin.flush()
            return json.loads(one.stdout.readline())

        yield run_in_it


@pytest.mark.parametrize(
    ("command", "line", "code", "said"),
    [
        ("generate", "--prompts nowhere.txt", 2, "nowhere.txt: the prompt file cannot be read"),
        ("generate", "--model demoo", 2, "model: 'demoo' is neither one of demo, .* or file (did you mean demo?)"),
        ("generate", "--model models/sd14 --prompts nowhere.txt", 2, "model: 'models/sd14' is not a folder here"),
        ("generate", "--decoder nowhere", 3, "decoders nowhere: no such folder"),
        ("train", "--data demo:8 --model demoo", 2, "model: 'demoo' is neither one of demo, .* or file (did you mean"),
        ("train", "--data fold:photos", 2, "--data fold:photos: no reader is called 'fold' (did you mean folder?)"),
        ("train", "--data folder:nowhere", 2, "--data folder:nowhere: nowhere is not there"),
        ("evaluate", "--data demo:2 --dry-run", 0, "--dry-run: nothing is written"),
        ("evaluate", "--decoder nowhere", 3, "decoders nowhere: no such folder"),
        ("verify", "--model demoo", 2, "model: 'demoo' is neither one of demo"),
        ("verify", "--decoder nowhere", 3, "decoders nowhere: no such folder"),
        ("serve", "--decoder nowhere", 3, "decoders nowhere: no such folder"),
        ("export_cli", "--decoder nowhere --out graphs", 3, "decoders nowhere: no such folder"),
        ("evaluate", "--data fold:photos", 2, "--data fold:photos: no reader is called 'fold' (did you mean folder?)"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(command, line, code, said, without_torch):
    ended, err, has_torch = without_torch(command, line)
    assert (ended, has_torch) == (code, False) and all(part in err for part in said.split(".*"))


def test_a_sample_is_made_again_by_the_engine_that_made_it():
    other = {"engine": "torch", "dtype": "fp32", "device": "cpu"}
    ours = {"engine": "fast", "dtype": "bf16", "device": "cpu", "compiled": "2.13"}
    stored = {"config": {"engine": "torch", "dtype": "fp32", "compile": False, "task": ["depth"], "prompts": "x"}}
    stored |= {"mixed": [{"engine": ours, "number": 4}]}
    for engine, expected in ((ours, ("fast", "bf16", True)), (other, ("torch", "fp32", False))):
        restored = restore_settings(
            RunConfig(model="moved"), {"model"}, stored, SimpleNamespace(recipe={"engine": engine})
        )
        assert (restored.engine, restored.dtype, restored.compile) == expected
        assert (restored.model, restored.task, restored.prompts) == ("moved", ("depth",), "")


def test_words_of_a_table_come_in_the_order_of_their_numbers_and_with_its_colours_where_these_are_used(
    engines, tmp_path
):
    table, run = tmp_path / "own.csv", {"task": ("open-vocabulary",), "prompts": "a box and a ball", "number": 1}
    table.write_text("number,name,colour,words\n,pen,,\n0,background,,\n2,cube,1 2 3,box\n1,ball,4 5 6,\n")
    assert listed_words(str(table), ()) == ("ball", "cube", "pen") and listed_words(str(table), ("pen",)) == ("pen",)
    for palette, colours in (("ours", [None, None]), ("table", [[1, 2, 3], [4, 5, 6]])):
        config = RunConfig(class_table=str(table), palette=palette, classes=("cube", "ball"), out=str(tmp_path), **run)
        rows = prepare(replace(config, out=str(tmp_path / palette))).document["class_table"]
        assert [row["name"] for row in rows[:2]] == ["cube", "ball"]
        assert [row.get("colour") for row in rows[:2]] == colours


def test_a_checkpoint_is_judged_where_it_is_opened_and_a_folder_before(tmp_path):
    for name in ("weights.pth", "voc:weights", "voc:weights.pth"):
        check_sources("demo", str(tmp_path / name), False)
    with pytest.raises(Missing, match="weights: no such folder"):
        check_sources("demo", str(tmp_path / "weights"), False)


def test_a_missing_adapter_is_refused_before_libraries_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.engines.before_torch", lambda: pytest.fail("libraries are loaded"))
    with pytest.raises(Missing, match="style: no such file"):
        open_engine("demo", "demo", ["semantic"], lora=[str(tmp_path / "style:0.8")])


def test_a_dry_run_says_that_there_are_no_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: [])
    line = ["--number", "1", "--prompts", "a ball", "--gpus", "8", "--out", str(tmp_path / "run"), "--dry-run"]
    assert generate.main(line) == 3 and "--gpus 8: this machine has 0 GPUs" in capsys.readouterr().err


def test_the_settings_of_another_project_count_where_none_are_given():
    config = RunConfig(parity="dataset-diffusion", steps=30, guidance=2.0, exponent=1)
    steps, guidance, exponent = 100, 7.5, 4
    for provided, wanted in (((), (steps, guidance, exponent)), (("steps", "exponent"), (30, guidance, 1))):
        found = expand_names(config, {"parity", *provided})
        assert (found.steps, found.guidance, found.exponent) == wanted
        assert (found.threshold, found.uncertainty, found.profile) == (0.6, 0.5, "0.14.0")


@pytest.mark.parametrize(("limit", "counted"), [(0, 3), (4, 2)])
@pytest.mark.parametrize(("stored", "speed", "verify"), [(None, "fast25", 0), ({}, "fast25", 0), ({}, "exact", 2)])
def test_a_process_counts_its_share_and_judges_a_speed_once(
    tmp_path, monkeypatch, limit, counted, stored, speed, verify
):
    seen, judged, progress = [], [], Mock()
    monkeypatch.setattr(
        generate, "ImageProgress", lambda **given: seen.append(given["images"]) or nullcontext(progress)
    )
    monkeypatch.setattr(generate, "admit_job", lambda spec, stored, screen, verify: judged.append(verify))
    for name in ("tries_half", "may_differ"):
        monkeypatch.setattr(generate, name, lambda spec, stored: False)
    monkeypatch.setattr(generate, "count_rows", lambda folder: 3)
    config = SimpleNamespace(limit=limit, verify=verify, speed=speed, quiet=True)
    spec, peer = SimpleNamespace(folder=tmp_path, number=10), SimpleNamespace(world=3)
    for process in (peer, None):
        arguments = (config, spec, stored, lambda spec, callbacks: callbacks, process, MagicMock())
        callbacks = generate._write(*arguments)  # which tell of images alone, as those are what is counted
        assert progress.on_unet_call not in vars(callbacks).values() and callbacks.on_commit == progress.on_commit
    assert seen == [counted, limit or 7]
    assert judged == ([] if stored == {} and not verify else [verify])  # the samples of a run have been judged
