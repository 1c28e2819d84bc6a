"""Edits and variants: what stays is the source's bit by bit, what is new is labelled anew, the same line resumes."""

import hashlib
import json
import shutil
import signal
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from forked import ForkedPython
from PIL import Image
from pycocotools.coco import COCO
from rendered import document, rendered, write_run
from test_ledger import tree

from datasetdm_fast import audit as audit_command
from datasetdm_fast import edit, generate, label, merge, vary
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels import LABEL_KINDS, mask_rle, number_classes
from datasetdm_fast.engine.labels.class_tables import replaced_text
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.sampling.schedule import make_schedule
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions import edit as regions
from datasetdm_fast.runs.compositions import redraw
from datasetdm_fast.runs.compositions.edit import MOST_NEW, Edits
from datasetdm_fast.runs.compositions.redraw import open_source
from datasetdm_fast.runs.compositions.settings import EditSettings, VarySettings
from datasetdm_fast.runs.compositions.vary import DOMAINS, Variants, measure_consistency, move_prompt
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs import job
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.reader import open_run

pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")

SIDE = 128
PROMPTS = ["a red person and an orange ball on a grey table", "a white ball on a pink table", "a green tree"]
TASKS = "semantic,instance,depth,pose,open-vocabulary"
EDIT = ["--class", "ball", "--prompt", "a blue cube", "--grow", "4"]
VARY = ["--domain", "night,fog", "--batch-size", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, one_engine_of_a_kind) -> Path:
    path = tmp_path_factory.mktemp("source") / "run"
    (path.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    line = ["--prompts", str(path.parent / "prompts.txt"), "--number", "3", "--seed", "5", "--steps", "6"]
    assert generate.main([*line, "--task", TASKS, "--out", str(path), "--engine", "fast", "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def edited(source) -> Path:
    out = source.parent / "edited"
    assert edit.main([str(source), *EDIT, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def varied(source) -> Path:
    out = source.parent / "varied"
    assert vary.main([str(source), *VARY, "--out", str(out), "--quiet"]) == 0
    return out


def test_dry_runs_write_nothing(source, edited, tmp_path, capsys, monkeypatch):
    before = tree(source.parent)
    for command, line, told in (
        (edit, [str(source), *EDIT, "--out", str(tmp_path / "run")], {"number": 2, "done": 0}),
        (vary, [str(source), *VARY, "--out", str(tmp_path / "run")], {"number": 6, "done": 0}),
    ):
        assert command.main([*line, "--dry-run", "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found | told == found and err.endswith("--dry-run: nothing is written\n")
    line = [str(source), *EDIT, "--out", str(tmp_path / "run"), "--limit", "1", "--dry-run"]
    assert edit.main(line) == 0 and "1 of 2 images would be made" in capsys.readouterr().err
    monkeypatch.setattr(job.storage, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(redraw, "open_engine", None)  # before networks are loaded
    assert edit.main(line) == 3 and "are free" in capsys.readouterr().err
    assert tree(source.parent) == before and not list(tmp_path.iterdir())


def test_doubtful_samples_are_counted(source, edited, varied, monkeypatch, capsys):
    monkeypatch.setattr(Ledger, "count_trust", lambda ledger: (1, 0, 0))
    for command, flags, out in ((edit, EDIT, edited), (vary, VARY, varied)):
        line, number = [str(source), *flags, "--out", str(out)], len(open_run(out))
        assert command.main(line) == 0
        assert capsys.readouterr().err.endswith(
            f"1 of {number} samples is doubtful: filter --where 'trust == 1' leaves it out\n"
        )
        assert command.main([*line, "--json"]) == 0 and json.loads(capsys.readouterr().out)["doubtful"] == 1


def test_outside_of_the_mask_nothing_changes(source, edited):
    run, new = open_run(source), open_run(edited)
    assert [sample.meta["source"] for sample in new] == ["00000000", "00000001"]  # the third shows no ball
    for sample in new:
        old, told = run[sample.meta["source"]], sample.meta["mask"]
        mask = mask_rle.decode(told["segmentation"])
        assert (mask == regions.grow(old.semantic.labels == old.semantic.classes.index("ball"), 4)).all()
        assert told["sha256"] == hashlib.sha256(mask.astype(np.uint8).tobytes()).hexdigest()
        for name in ("image", "depth.metres", "semantic.labels", "semantic.confidence", "open_vocabulary.labels"):
            before, after = old, sample
            for part in name.split("."):
                before, after = getattr(before, part), getattr(after, part)
            assert (before[~mask] == after[~mask]).all(), name
            assert name.startswith("open") or (before[mask] != after[mask]).any(), name
        assert "a blue cube" in sample.prompt and "ball" not in sample.prompt
        assert "cube" in sample.classes and "ball" not in sample.classes


def test_instances_keep_their_ids(source, edited):
    before, after = (COCO(path / "instances.json").dataset["annotations"] for path in (source, edited))
    ids = [entry["id"] for entry in after]
    assert len(ids) == len(set(ids))
    old = {entry["id"]: entry for entry in before}
    kept = [entry for entry in after if entry["id"] in old]
    names = open_run(source).classes
    assert [names[entry["category_id"]] for entry in kept] == ["person"]
    assert kept[0]["segmentation"] == old[kept[0]["id"]]["segmentation"]
    assert all(id > max(old) for id in ids if id not in old)


def test_of_the_samples_that_are_named_the_first_are_taken_up_to_the_number(source):
    for number, positions in ((0, [0, 1]), (1, [0])):
        settings = EditSettings(str(source), prompt="a cube", box="0,0,64,64", only=("1", "0", "1"), number=number)
        assert Edits(open_source(source, only_kept=False), settings).positions == positions


def test_steps_and_guidance_are_those_of_the_source_where_no_others_are_given(source):
    opened, model = open_source(source, only_kept=False), str(source / "moved")
    for given in ({"steps": 7, "guidance": 2.0, "model": model}, {}):
        settings = VarySettings(run=str(source), domain=("night",), **given)
        config = vars(redraw._run_config(Variants(opened, settings), source / "varied"))
        stored, made = opened.document["config"], opened.document["sampling"]
        expected = {name: (made if name in made else stored)[name] for name in redraw.CHANGEABLE} | given
        assert {name: config[name] for name in redraw.CHANGEABLE} == expected
        begun = redraw._run_config(Variants(opened, settings), source / "varied", {"sampling": made | {"steps": 9}})
        assert begun.steps == given.get("steps", 9)


def test_what_is_made_of_an_edit_or_by_a_speed_has_the_steps_that_made_its_images(tmp_path):
    line = ["--prompts", "a ball", "--number", "1", "--steps", "3", "--guidance", "1.5", "--sampler", "euler"]
    line += ["--task", "depth", "--engine", "fast", "--quiet", "--out", str(tmp_path / "run")]
    assert generate.main(line) == 0
    region = ["--box", "0,0,64,64", "--prompt", "a cube", "--quiet"]
    assert edit.main([str(tmp_path / "run"), *region, "--out", str(tmp_path / "edited")]) == 0
    line = [
        str(tmp_path / "edited"),
        "--domain",
        "fog",
        "--strength",
        "1",
        "--quiet",
        "--out",
        str(tmp_path / "varied"),
    ]
    assert vary.main(line) == 0
    begun = json.loads((tmp_path / "varied/run.json").read_text())
    begun["config"]["speed"] = "fast25"  # of the source, as former versions copied it
    (tmp_path / "varied/run.json").write_text(json.dumps(begun))
    assert vary.main(line) == 0
    made = [json.loads((tmp_path / name / "run.json").read_text())["sampling"] for name in ("run", "edited", "varied")]
    assert {(each["steps"], each["guidance"], each["sampler"]) for each in made} == {(3, 1.5, "euler")}
    document = json.loads((tmp_path / "run/run.json").read_text())
    document["sampling"] |= {"speed": "fast25", "sampler": "dpm-solver++", "steps": 25}
    document["config"] |= {"speed": "fast25", "sampler": "pndm", "steps": 0}
    (tmp_path / "run/run.json").write_text(json.dumps(document))
    settings = VarySettings(run=str(tmp_path / "run"), domain=("night",))
    variants = Variants(open_source(tmp_path / "run", only_kept=False), settings)
    config = redraw._run_config(variants, tmp_path / "x")
    assert (config.steps, config.sampler, config.speed) == (25, "dpm-solver++", "exact")
    assert "speed" not in variants.config  # of run.json


def test_new_things_of_two_labels_have_different_ids(source, monkeypatch):
    ids = {"instance:a": {0: [1, 2], 1: [3]}, "instance:b": {0: [], 1: [4, 5]}}
    monkeypatch.setattr(regions, "labels_of", lambda *_: list(ids))
    monkeypatch.setattr(regions, "annotation_ids", lambda _, label: ids[label])
    edits = Edits(open_source(source, only_kept=False), EditSettings(str(source), prompt="a cube", box="0,0,64,64"))
    new = [edits.first_new_id(label, index) + k for label in ids for index in range(3) for k in (0, MOST_NEW - 1)]
    assert len(set(new)) == len(new) and min(new) == 6


def test_things_of_an_edit_have_an_id_in_every_domain(edited, tmp_path):
    line = [str(edited), "--domain", "night,fog", "--only", "00000000", "--out", str(tmp_path / "run"), "--quiet"]
    assert vary.main(line) == 0
    (first, *_), (night, fog) = open_run(edited), open_run(tmp_path / "run")
    ids = [entry["id"] for entry in COCO(tmp_path / "run" / "instances.json").dataset["annotations"]]
    assert len(ids) == len(set(ids)) == 2 * len(first.instances.masks) > 0
    assert (night.instances.masks == first.instances.masks).all() and (
        fog.instances.masks == night.instances.masks
    ).all()


def test_ids_and_the_number_of_samples_are_given_as_everywhere(source, tmp_path, capsys):
    folder = tmp_path / "run"
    for command, line in (
        (vary, [str(source), "00000001", "--domain", "fog"]),
        (vary, [str(source), "--domain", "fog", "--number", "1"]),
        (edit, [str(source), "00000000", "--box", "0,0,64,64", "--prompt", "a cube"]),
        (edit, [str(source), "--number", "1", "--box", "0,0,64,64", "--prompt", "a cube"]),
        (vary, [str(source), "00000001", "--only", "00000000", "--domain", "fog,night"]),
    ):
        assert command.main([*line, "--out", str(folder), "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["number"] == (4 if "--only" in line else 1)


def test_a_variant_keeps_the_geometry_and_tells_its_source(source, varied):
    run, new = open_run(source), open_run(varied)
    assert [(each.meta["source"], each.meta["domain"]) for each in new][:3] == [
        ("00000000", "night"),
        ("00000000", "fog"),
        ("00000001", "night"),
    ]
    lines = [json.loads(line) for line in (varied / "samples.jsonl").read_text().splitlines()]
    for line, sample in zip(lines, new, strict=True):
        old = run[line["source"]]
        assert line["group"] == old.row.files["image"].stored.sha256[:16] and line["seed"] == old.seed
        assert line["prompt"] == f"{old.prompt}{DOMAINS[line['domain']]}" and 0.7 < line["consistency"] <= 1
        assert np.abs(sample.image.astype(int) - old.image).mean() > 3
        same = sample.semantic.labels == old.semantic.labels
        assert (sample.semantic.labels[~same] == 255).all() and same.mean() > 0.8
    dark = [each.image.mean() - run[each.meta["source"]].image.mean() for each in new if each.meta["domain"] == "night"]
    assert max(dark) < -5


def test_a_variant_is_asked_by_the_class_prompt_of_its_source(tmp_path):
    line = {"prompt": "a red ball on a grey table", "classes": ["ball"], "class_prompt": "a photo of a ball"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    asked = ["--prompts", str(tmp_path / "prompts.jsonl"), "--task", "attention", "--number", "1", "--steps", "3"]
    assert generate.main([*asked, "--engine", "fast", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert vary.main([str(tmp_path / "run"), "--domain", "night", "--out", str(tmp_path / "varied"), "--quiet"]) == 0
    for folder in ("run", "varied"):
        with open_run(tmp_path / folder) as run:
            (row,) = run.rows(parts=())
        assert row.request.class_prompt == line["class_prompt"], folder
    assert "night" in row.request.prompt


def test_a_variant_keeps_the_geometry_of_its_source_by_default_and_an_edit_starts_from_noise():
    """Of a variant drawn from pure noise the labels of its source say nothing."""
    assert (VarySettings().strength, EditSettings().strength) == (0.4, 1.0)


def test_source_labels_are_taken_over(source, tmp_path):
    old, out = open_run(source)["00000001"], tmp_path / "run"
    line = [str(source), "--domain", "fog", "--only", "1", "--engine", "torch", "--strength", "0.6"]
    assert vary.main([*line, "--out", str(out), "--quiet"]) == 0
    (sample,) = open_run(out)
    is_same = {role: file.stored == old.row.files[role].stored for role, file in sample.row.files.items()}
    assert not is_same.pop("image") and is_same["depth"]
    assert audit(out).findings == []


def test_kill_9_and_the_same_line_give_the_same_bytes(source, varied, tmp_path):
    out = tmp_path / "out"
    line = [str(source), *VARY, "--out", str(out), "--quiet"]
    process = ForkedPython(["-m", "datasetdm_fast.vary", *line])
    while process.poll() is None and not (out / "images").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert vary.main(line) == 0 and tree(out) == tree(varied) and audit(out).findings == []
    assert vary.main(line) == 0  # nothing is left to do


def test_an_edit_that_was_stopped_goes_on(source, edited, tmp_path):
    out = tmp_path / "out"
    line = [str(source), *EDIT, "--out", str(out), "--quiet"]
    assert edit.main([*line, "--limit", "1"]) == 0 and len(open_run(out)) == 1
    (out / "images" / "00000001.png").write_bytes(b"half")
    assert edit.main(line) == 0 and tree(out) == tree(edited) and audit(out).findings == []


def test_a_damaged_sample_is_taken_out_and_made_again(source, edited, tmp_path, capsys):
    out = Path(shutil.copytree(edited, tmp_path / "out"))
    (out / "images" / "00000001.png").unlink()
    (finding,) = audit(out).findings
    assert finding.remedy == "Take it out with --repair; the line that made the run then makes it again."
    assert audit_command.main([str(out), "--repair", "--quiet"]) == 4
    assert "1 sample taken out: run the line that made the run again" in capsys.readouterr().err
    assert edit.main([str(source), *EDIT, "--out", str(out), "--quiet"]) == 0 and tree(out) == tree(edited)


def test_the_folder_names_its_source_and_can_be_a_source(source, edited, tmp_path):
    document = open_run(edited).document
    assert document["model"] == open_run(source).document["model"]
    assert document["composition"]["source"]["path"] == str(source) and audit(edited).findings == []
    assert "Apache-2.0".lower() in (edited / "README.md").read_text().lower()
    line = [str(edited), "--domain", "fog", "--only", "0", "--out", str(tmp_path / "varied"), "--quiet"]
    assert vary.main(line) == 0
    group = open_run(edited)["00000000"].meta["group"]
    assert open_run(tmp_path / "varied")["00000000"].meta["group"] == group  # all of one picture belong together


def test_a_source_that_no_model_drew_is_refused(source, edited, tmp_path, capsys):
    merged, labelled = tmp_path / "merged", tmp_path / "labelled"
    assert merge.main([str(source), str(edited), "--out", str(merged), "--quiet"]) == 0
    assert label.main([str(source / "images"), "--task", "semantic", "--out", str(labelled), "--quiet"]) == 0
    capsys.readouterr()
    for made_by, path in (("merge", merged), ("label", labelled)):
        for command, flags in ((vary, ["--domain", "fog"]), (edit, EDIT)):
            assert command.main([str(path), *flags, "--out", str(tmp_path / "out")]) == 2
            assert f"was made by {made_by}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def mask_file(path: Path, side: int, value: int) -> str:
    Image.new("L", (side, side), value).save(path)
    return str(path)


def test_a_mask_from_a_file_a_box_and_an_instance(source, tmp_path):
    whole = Image.new("L", (SIDE, SIDE))
    whole.paste(255, (70, 30, 120, 100))
    whole.save(tmp_path / "mask.png")
    line = [str(source), "--only", "0", "--prompt", "a red star", "--strength", "0.2", "--quiet", "--out"]
    assert edit.main([*line, str(tmp_path / "a"), "--mask", str(tmp_path / "mask.png")]) == 0
    (tmp_path / "mask.png").unlink()
    assert edit.main([*line, str(tmp_path / "b"), "--box", "70,30,120,100"]) == 0
    assert edit.main([*line, str(tmp_path / "d"), "--box", "70,30,120,100", "--seed", str(2**62)]) == 0
    assert (tmp_path / "a/images/00000000.png").read_bytes() == (tmp_path / "b/images/00000000.png").read_bytes()
    entry = COCO(source / "instances.json").dataset["annotations"][0]
    assert edit.main([*line, str(tmp_path / "c"), "--instance", str(entry["id"])]) == 0
    run = open_run(tmp_path / "c")
    run[0].meta["mask"].clear()  # a reader's own copy
    assert run[0].meta["mask"]["segmentation"] == entry["segmentation"]


WRONG = [
    (vary, [], "--domain is missing"),
    (vary, ["--domain", "nihgt"], "unknown domain (did you mean night?)"),
    (vary, ["--domain", "snow"], "the model demo does not know this domain"),
    (vary, ["--domain", "fog", "--strength", "1.5"], "--strength 1.5: expected 0 to 1"),
    (vary, ["--domain", "fog", "--strength", "-0.1"], "--strength -0.1: expected 0 to 1"),
    (vary, ["--domain", "fog", "--guidance", "1e308"], "--guidance 1e+308: expected 0 to 1000"),
    (vary, ["--domain", "fog", "--only", "7"], "no sample of"),
    (edit, ["--class", "ball"], "--prompt is missing"),
    (edit, ["--class", "ball", "--prompt", "caf\udce9"], "--prompt: 'caf\\udce9' holds control characters or invalid"),
    (edit, [*EDIT, "--grow", str(SIDE + 1)], f"--grow {SIDE + 1}: expected a number from 0 to {SIDE}, the side of the"),
    (edit, [*EDIT, "--feather", str(SIDE + 1)], f"--feather {SIDE + 1}: expected a number from -1 to {SIDE}"),
    (edit, ["--box", "0,0,8,8", "--prompt", "red " * 90], "92 tokens, at most 77 fit"),
    (edit, [*EDIT, "--seed", "-2"], "--seed -2: expected a whole number from 0 to"),
    (edit, [*EDIT, "--seed", str(2**63 - 1)], f"--seed {2**63 - 1}: expected a whole number"),  # of several images
    (edit, ["--prompt", "a cube"], "the region to redraw is missing"),
    (edit, [*EDIT, "--box", "0,0,8,8"], "2 ways to name the region, expected one"),
    (edit, ["--class", "bal", "--prompt", "a cube"], "no label of"),
    (edit, ["--class", "bal", "--prompt", "a cube"], "(did you mean ball?)"),
    (edit, ["--class", "ring", "--prompt", "a cube"], "shows it"),
    (edit, ["--class", "ball", "--prompt", "a cube", "--only", "2"], "sample 00000002 does not show it"),
    (edit, ["--class", "ring", "--prompt", "a cube", "--only", "2,1"], "sample 00000001 does not show it"),
    (edit, ["--instance", "999", "--prompt", "a cube"], "no annotation of the selected samples has this id"),
    (edit, ["--box", "9,9,9,20", "--prompt", "a cube"], "is empty or leaves the samples"),
    (edit, ["--box", "0,0,8", "--prompt", "a cube"], "expected four whole numbers"),
    (edit, ["--mask", "EMPTY", "--prompt", "a cube"], "the mask is empty, no pixel has a value of 128 or more"),
    (edit, ["--mask", "nothing.png", "--prompt", "a cube"], "--mask nothing.png: no such file"),
    (edit, ["--mask", ".", "--prompt", "a cube"], "--mask .: not a file"),
    (edit, ["--mask", "SMALL", "--prompt", "a cube"], "64 x 64 pixels, the samples have 128 x 128"),
    (edit, ["--claas", "ball"], "did you mean --class?"),
]


@pytest.mark.parametrize("command, flags, said", WRONG, ids=lambda value: str(value)[:20])
def test_bad_input_is_refused_and_nothing_written(command, flags, said, source, tmp_path, capsys):
    files = {"EMPTY": mask_file(tmp_path / "e.png", SIDE, 20), "SMALL": mask_file(tmp_path / "s.png", 64, 255)}
    line = [str(source), *(files.get(flag, flag) for flag in flags), "--out", str(tmp_path / "out")]
    assert command.main(line) == 2
    told = capsys.readouterr().err.splitlines()
    assert said in told[0] and len(told) == 2 and not (tmp_path / "out").exists()
    assert "--truncate-prompts" not in told[1]  # which these commands do not have


@pytest.mark.parametrize("strength", [1, 0.5])
def test_outside_of_a_region_the_source_stands_at_every_call_with_its_noise_and_without_at_the_last(strength):
    """Latents of 2 x 2 cells, of which the one at the top right is drawn anew; noise of step k is told as 10 + k."""
    edits, region = object.__new__(regions.Edits), np.zeros((16, 16), bool)
    region[7, 8] = True
    source = SimpleNamespace(clean=torch.full((1, 4, 2, 2), 1.0), noise=torch.full((1, 4, 2, 2), 3.0), draw=None)
    source.add_noise = lambda step: torch.full((1, 4, 2, 2), 10.0 + step)
    edits.choice, edits.latents = SimpleNamespace(strength=strength), lambda engine, requests: source
    edits.region_of, edits.tile = lambda tile: region, lambda index: index
    schedule = mock.MagicMock(noise_scale=2.0, noise_steps=(0.0, 1.0, 2.0))
    schedule.__len__.return_value = 3
    engine = SimpleNamespace(model=SimpleNamespace(latents=SimpleNamespace(pixels=8)))
    begun = edits.begin(engine, schedule, [Request(0, "a ball", 7)])
    inside = 6.0 if strength == 1 else 10.0
    assert begun.latents[0, 2].tolist() == [[10, inside], [10, 10]]
    for call, known in ((0, 11.0), (1, 12.0), (2, 1.0)):
        shown = begun.after(call, torch.full((1, 4, 2, 2), 5.0))
        assert shown[0, 3].tolist() == [[known, 5], [known, known]]


def test_calls_of_an_edit_and_of_a_variant_add_what_each_seed_gives_after_the_first_noise():
    shape, pixels, drawn = (4, 2, 2), np.zeros((16, 16, 3), np.uint8), torch.Generator().manual_seed(7)
    _, second, third = (torch.randn(shape, generator=drawn) for _ in range(3))
    scheduler = {"num_train_timesteps": 1000}
    model = SimpleNamespace(latent_shape=lambda: shape, scheduler=scheduler, latents=SimpleNamespace(pixels=8))
    engine = SimpleNamespace(model=model, encode_image=lambda images: torch.zeros(len(images), *shape))
    for redrawing in map(object.__new__, (Edits, Variants)):
        redrawing.choice, redrawing.region_of = SimpleNamespace(strength=0.5), lambda tile: np.ones((16, 16), bool)
        redrawing.tile = lambda index: SimpleNamespace(pixels={"image": pixels})
        begun = redrawing.begin(engine, make_schedule(scheduler, "euler-ancestral", 4), [Request(0, "a ball", 7)])
        assert torch.equal(begun.noise()[0], second) and torch.equal(begun.noise()[0], third)


def test_an_edit_blends_at_the_border_of_its_region_and_names_what_is_shown_or_no_label_could_show():
    """A region of 3 x 3 pixels, feathered over one: its middle is new, and around it is the mean, rounded."""
    edits, region = object.__new__(regions.Edits), np.zeros((5, 5), bool)
    region[1:4, 1:4] = True
    old, new = np.full((5, 5, 3), (10, 20, 30), np.uint8), np.full((5, 5, 3), (13, 20, 7), np.uint8)
    tile = SimpleNamespace(
        pixels={"image": old}, row=SimpleNamespace(request=Request(3, "", 0, ("ball", "cube", "owl")))
    )
    edits.feather, edits.ids, edits.tile, edits.region_of = 1, {}, lambda index: tile, lambda tile: region
    edits.provenance = lambda index: {"source": "00000003"}
    labels = {"semantic": {"classes": ["wall", "ball", "cube", "cone"]}, "depth": {}}
    edits.source = SimpleNamespace(document={"labels": labels, "plan": {"words": ["cone", "cube", "ball", "owl"]}})
    made = edits.finish(Sample(Request(0, "a cone", 0, ("cone",)), new, {}, {"calls": 2}))
    assert made.image[2, 2].tolist() == [13, 20, 7] and made.image[0].tolist() == old[0].tolist()
    assert made.image[1, 1].tolist() == made.image[3, 2].tolist() == [12, 20, 18]  # of 11.5 and 18.5 the even ones
    assert made.provenance["feather"] == 1 and made.provenance["mask"]["pixels"] == 9 and made.provenance["calls"] == 2
    plane = np.zeros((50, 50), np.uint8)
    plane.flat[:10], plane.flat[10:19] = 1, 2  # a 250th of the picture, and less
    shown = {"semantic": SemanticMap(plane, plane / 255, tuple(labels["semantic"]["classes"])), "depth": None}
    assert edits._classes(Request(0, "", 0, ("cone",)), tile, shown) == ("cone", "ball", "owl")


def test_the_sides_of_a_mask_are_told_width_first_and_grey_of_128_is_white(tmp_path):
    Image.new("L", (6, 4), 255).save(tmp_path / "mask.png")
    with pytest.raises(Refused, match="mask.png: 6 x 4 pixels, the samples have 4 x 4"):
        regions.read_mask(str(tmp_path / "mask.png"), 4)
    grey = np.array([[127, 128], [0, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    assert (mask_rle.decode(regions.read_mask(str(tmp_path / "mask.png"), 2)) == [[0, 1], [0, 1]]).all()
    Image.new("L", (2, 2), 128).save(tmp_path / "mask.png")
    assert mask_rle.decode(regions.read_mask(str(tmp_path / "mask.png"), 2)).all()
    for box, shown in (("0,0,4,2", [[1] * 4, [1] * 4, [0] * 4, [0] * 4]), ("3,1,4,4", [[0] * 4] + [[0, 0, 0, 1]] * 3)):
        assert regions.read_box(box, 4).astype(int).tolist() == shown


def test_a_mask_of_more_parts_than_can_be_stored_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.indices((16, 16)).sum(0).astype(np.uint8) % 2 * 255).save(tmp_path / "mask.png")
    longest = len(regions.read_mask(str(tmp_path / "mask.png"), 16)["counts"])
    monkeypatch.setattr(regions, "LONGEST_MASK", longest - 1)
    with pytest.raises(Refused, match="mask.png: has too many parts to be stored"):
        regions.read_mask(str(tmp_path / "mask.png"), 16)


def test_other_weights_than_those_of_the_source_are_refused():
    document = {"model": {"digests": {"unet": "1"}}, "decoders": {"depth": {"digest": "2", "licence": "none"}}}
    source = SimpleNamespace(path="run", document=document)
    engine = SimpleNamespace(model=SimpleNamespace(digests={"unet": "1"}))
    redraw._check_weights(source, engine, {"depth": {"digest": "2"}})
    for decoders in ({"depth": {"digest": "3"}}, {}):
        with pytest.raises(Refused, match="run: was made with other weights .*depth"):
            redraw._check_weights(source, engine, decoders)


def test_labels_without_areas_have_no_consistency():
    people = Keypoints(np.zeros((0, 1, 3), np.float32), np.zeros((0, 1)), np.zeros(0), ("head",), ())
    assert measure_consistency({"pose": people}, {"pose": people}) is None


def test_labels_that_the_run_lacks_are_told(source, tmp_path, capsys):
    out = tmp_path / "depth"
    line = ["--prompts", "a ball", "--number", "1", "--steps", "2", "--task", "depth", "--engine", "fast"]
    assert generate.main([*line, "--out", str(out), "--quiet"]) == 0
    assert edit.main([str(out), *EDIT, "--out", str(tmp_path / "out")]) == 2
    assert "has no labels that name classes, it has depth" in capsys.readouterr().err
    assert edit.main([str(out), "--instance", "1", "--prompt", "a cube", "--out", str(tmp_path / "out")]) == 2
    assert "has no instances, it has depth" in capsys.readouterr().err
    assert edit.main([*EDIT]) == 2 and "RUN is missing" in capsys.readouterr().err
    assert vary.main([str(source), "--domain", "fog", "--out", str(source)]) == 2
    assert "it holds a run of generate, not of vary" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "dpm-solver++", "euler"])
@pytest.mark.parametrize("profile", ["0.3.0", "0.14.0"])
def test_the_last_calls_of_a_schedule_take_away_exactly_the_noise_that_was_added(sampler, profile):
    """With the true noise for the network's answer every sampler ends at the image, wherever it begins."""
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    image, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for strength in (0.0, 0.02, 0.4, 0.97, 0.99, 1.0):
        schedule = make_schedule(scheduler, sampler, 50, profile, strength)
        assert len(schedule) <= max(round(50 * strength), 1) + (strength == 1)
        latents = walk.add_noise(scheduler, image, noise, schedule.noise_steps[0])
        state = walk.ReferenceSampler(schedule, 1.0, latents)
        for k in range(len(schedule)):
            state.step(k, noise)
        ahead = schedule.noise_steps[0] - schedule.timesteps[0]
        end = image if sampler != "pndm" else walk.add_noise(scheduler, image, noise, ahead)
        assert (state.latents - end).abs().max() < 1e-6, strength


def test_things_that_are_too_unsure_for_a_region_are_not_edited(tmp_path):
    described = document(2, 64)
    described["labels"]["instance"]["classes"].append("kite")
    described |= number_classes(described["labels"])
    kite = len(described["labels"]["instance"]["classes"]) - 1
    with RunFolder(tmp_path / "run", described) as folder:
        for k, score in enumerate((0.39, 0.4)):
            sample, mask = rendered(k, 64), np.zeros((1, 64, 64), bool)
            mask[:, 8:24, 8:24] = True
            names = tuple(described["labels"]["instance"]["classes"])
            found = Instances(mask, np.array([kite]), np.array([score], np.float32), names)
            folder.add([replace(sample, annotations={**sample.annotations, "instance": found})], {})
        finish_run(folder)
    settings = EditSettings(run=str(tmp_path / "run"), class_="kite", prompt="a red star")
    edits = Edits(open_source(tmp_path / "run", only_kept=False), settings)
    assert [edits.prompt(index).seed for index in range(edits.number)] == [1]
    assert edits.region_of(edits.tile(0)).sum() == 16 * 16
    with pytest.raises(Refused, match="--class kite: sample 00000000 does not show it"):
        Edits(open_source(tmp_path / "run", only_kept=False), replace(settings, only=("00000000",)))


@pytest.mark.parametrize(
    "prompt, name, replaced",
    [
        ("a red person and an orange ball in fog", "ball", "a red person and a star in fog"),
        ("a cat and ball", "ball", "a cat and a star"),
        ("a ball beside a Big ball", "ball", "a star beside a star"),
        ("a dining table near a dog", "diningtable", "a star near a dog"),
        ("two trees", "ball", ""),
        ("some wolves in snow", "wolf", "a star in snow"),
        ("people in a café", "person", "a star in a café"),
        ("a baby girl in a café", "person", "a star in a café"),
        ("Two big wolves and 12 balls", "wolf", "a star and 12 balls"),
        ("a ball chasing two wolves", "wolf", "a ball chasing a star"),
        ("a boy walking wolves", "wolf", "a boy walking a star"),
        ("the two wolves", "wolf", "a star"),
        ("a few grey wolves beside a Group of balls", "wolf", "a star beside a Group of balls"),
        ("a ball beside a group of wolves", "wolf", "a ball beside a star"),
        ("a young woman's hat", "person", "a star's hat"),
        ("an orange ball", "orange", ""),  # a colour
        ("A ball beside a Café", "ball", "a star beside a Café"),
        ("a dog's toy and a ball in fog", "ball", "a dog's toy and a star in fog"),
    ],
)
def test_an_edit_replaces_what_the_prompt_says_of_a_class(prompt, name, replaced):
    assert replaced_text(prompt, name, "a star", ("ball", name)) == replaced
    assert replaced_text(unicodedata.normalize("NFD", prompt), name, "a star", ("ball", name)) == replaced


def test_an_edit_of_one_of_several_things_replaces_its_own_mention(tmp_path):
    out, prompt = tmp_path / "run", "a red person and a green person on a grey table"
    line = ["--prompts", prompt, "--number", "1", "--seed", "2", "--steps", "15", "--task", "instance"]
    assert generate.main([*line, "--out", str(out), "--engine", "fast", "--quiet"]) == 0
    things = json.loads((out / "instances.json").read_text())["annotations"]
    left, right = sorted(things, key=lambda item: item["bbox"][0])
    told = []
    for item in (left, right):
        settings = EditSettings(run=str(out), instance=item["id"], prompt="a blue cone")
        told.append(Edits(open_source(out, only_kept=False), settings).prompt(0).text)
    assert told == [
        "a blue cone and a green person on a grey table",
        "a red person and a blue cone on a grey table",
    ]


@pytest.mark.parametrize(
    "prompt, place, replaced",
    [
        ("two people", 0, "a star and one person"),
        ("two people", 1, "one person and a star"),
        ("Two happy adults on a table", 1, "one happy adult and a star on a table"),
        ("a person, the 12 young people", 7, "a person, 11 young people and a star"),
        ("three people and a person", 3, "three people and a star"),
        ("a dog watching two people", 1, "a dog watching one person and a star"),
        ("three people and a person", 4, "a star and two people and a person"),  # there is none: the first
        ("some people in snow", 1, "a star and some people in snow"),
        ("a few old people in snow", 0, "a star and a few old people in snow"),
        ("the person in snow", 1, "a star in snow"),
        ("one person in snow", 0, "a star in snow"),
        ("two baby girls and a person", 0, "a star and one girl and a person"),
        ("two baby girls and a person", 2, "two baby girls and a star"),
    ],
)
def test_an_edit_of_one_of_things_named_together_leaves_the_others(prompt, place, replaced):
    assert replaced_text(prompt, "person", "a star", ("person",), place=place) == replaced


def test_an_edit_of_people_replaces_them_in_the_prompt(tmp_path):
    sample = rendered(0, SIDE)
    sample = replace(sample, request=replace(sample.request, prompt="people and a ball on a table"))
    with RunFolder(tmp_path / "run", document(1, SIDE)) as folder:
        folder.add([sample], {})
        finish_run(folder)
    for way in ({"class_": "person"}, {"box": "0,0,64,64"}):
        settings = EditSettings(run=str(tmp_path / "run"), prompt="a red star", **way)
        told = Edits(open_source(tmp_path / "run", only_kept=False), settings).prompt(0).text
        assert told == ("a red star and a ball on a table" if way.get("class_") else "a red star")


@pytest.mark.parametrize("left", [None, "instance", "semantic"])
def test_what_one_label_alone_still_shows_is_not_said_to_be_in_the_prompt(tmp_path, left):
    """The rim of an instance around what the label map called by its name made "ball is in the prompt" a reason."""
    write_run(tmp_path / "run", 1)
    opened = open_source(tmp_path / "run", only_kept=False)
    edits = Edits(opened, EditSettings(run=str(tmp_path / "run"), box="0,0,64,64", prompt="a red star"))
    tile, sample = edits.tile(0), rendered(0)
    tile = replace(tile, row=replace(tile.row, request=replace(tile.row.request, classes=("ball",))))
    rim, labels = np.zeros((64, 64), bool), {}
    rim[:4, :8] = True  # 0.8 % of the pixels
    for task in ("instance", "semantic"):
        names = tuple(opened.document["labels"][task]["classes"])
        shown = rim if left in (task, None) else np.zeros_like(rim)
        if task == "instance":
            labels[task] = Instances(shown[None], np.array([names.index("ball")]), np.float32([0.9]), names)
        else:
            numbers = np.where(shown, names.index("ball"), names.index("table")).astype(np.uint8)
            labels[task] = replace(sample.annotations["semantic"], labels=numbers, classes=names)
    request = replace(sample.request, prompt="a red star", classes=("star",))
    words = {*edits._classes(request, tile, labels)}
    assert words == {"star"} | ({"ball"} if left is None else set())


def test_every_image_has_a_seed_and_ids_of_its_own(tmp_path):
    write_run(tmp_path / "run", 3)
    opened, settings = open_source(tmp_path / "run", only_kept=False), {"run": str(tmp_path / "run")}
    settings = EditSettings(**settings, box="0,0,32,64", prompt="a red star", seed=9)
    edits, kept = Edits(opened, settings), Edits(opened, replace(settings, seed=-1))
    assert [[each.prompt(k).seed for k in range(3)] for each in (edits, kept)] == [[9, 10, 11], [0, 1, 2]]
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 1:3, 1:3] = masks[1, 5:7, 1:3] = True  # too small to be what was there before
    names = tuple(opened.document["labels"]["instance"]["classes"])
    two = Instances(masks, np.array([0, 1]), np.float32([0.9, 0.8]), names)
    drawn = rendered(1)
    made = edits.finish(replace(drawn, annotations={**drawn.annotations, "instance": two}))
    largest = max(item["id"] for item in json.loads((tmp_path / "run" / "instances.json").read_text())["annotations"])
    assert made.annotations["instance"].ids[-2:].tolist() == [largest + 1 + MOST_NEW, largest + 2 + MOST_NEW]


def test_prompts_say_the_domain():
    assert move_prompt("a dog at night.", "fog") == "a dog in fog" and move_prompt("a dog", "day") == "a dog"


def test_regions_are_grown_by_squares_and_feathered_inside():
    region = np.zeros((16, 16), bool)
    region[:5, 5:12] = True
    assert regions.grow(region, 2).sum() == 7 * 11
    share = regions.weights(region, 1)
    assert (share[~region] == 0).all() and share[0, 6] == 1 and share[4, 6] == share[0, 5] == 0.5
    assert regions.to_cells(region, 8).tolist() == [[True, True], [False, False]]


def test_labels_are_merged():
    region = np.zeros((8, 8), bool)
    region[:, 4:] = True
    first, second = np.zeros((2, 1, 8, 8), bool)
    first[0, :, 2:5], second[0, :, 3:7] = True, True
    kept = Instances(first, np.array([1]), np.ones(1, np.float32), ("a", "b"), np.array([7]))
    other = Instances(second, np.array([0]), np.ones(1, np.float32) / 2, ("a", "b"))
    kind = LABEL_KINDS["instance"]
    new = kind.merge(kept, other, region)  # another class: the old one keeps its part, the new one is added
    assert new.ids.tolist() == [7, 0] and new.masks.sum((1, 2)).tolist() == [16, 24]
    assert kind.overlap(other, kept) == 0
    near = Instances(np.roll(first, 1, 2), np.array([1]), np.ones(1, np.float32), ("a", "b"))
    again = kind.merge(kept, near, region)  # the same thing goes on inside
    assert again.ids.tolist() == [7] and again.masks.sum() == 16 + 16
    assert kind.merge(kept, kept, ~np.zeros_like(region)).ids.tolist() == [7]
    nothing = Instances(first[:0], kept.class_ids[:0], kept.scores[:0], ("a", "b"))
    assert len(kind.merge(kept, nothing, region | first[0]).masks) == 0
    metres = DepthMap(np.full((8, 8), 2.0, np.float32), 4.0), DepthMap(np.full((8, 8), 3.0, np.float32), 4.0)
    assert LABEL_KINDS["depth"].merge(*metres, region).metres.mean() == 2.5
    half = DepthMap(np.where(region, 0.0, 2.0).astype(np.float32), 4.0)  # unknown in the region
    depth, table = LABEL_KINDS["depth"], {"max_depth": 4.0, "unit": "millimetre"}
    assert depth.encode(half, {}, table)[1] == {"min": 2.0, "mean": 2.0, "max": 2.0}
    nowhere = DepthMap(np.zeros((8, 8), np.float32), 4.0)
    assert depth.encode(nowhere, {}, table)[1] == {"min": 0.0, "mean": 0.0, "max": 0.0}
    pixels = {"depth": (half.metres * 1000).astype(np.uint16)}
    for record, said in (({"min": 2.0, "mean": 2.0, "max": 2.0}, 0), ({"min": 1.0, "mean": 2.0, "max": 2.0}, 1)):
        assert len(list(depth.check(record, pixels, table, (8, 8)))) == said
    points = np.array([[[1, 1, 0.9], [1, 6, 0.9], [6, 6, 0.9]]], np.float32)
    person = Keypoints(points, np.full((1, 3), 2), np.ones(1, np.float32), ("x", "y", "z"))
    moved = Keypoints(points + np.float32([0.2, 0, 0]), np.full((1, 3), 2), np.ones(1, np.float32), ("x", "y", "z"))
    pose = LABEL_KINDS["pose"]
    assert pose.merge(person, moved, region).points[0, :, 0].tolist() == pytest.approx([1, 1, 6.2])
    nobody = Keypoints(points[:0], np.zeros((0, 3), int), np.ones(0, np.float32), ("x", "y", "z"))
    assert pose.merge(person, nobody, region).visibility.tolist() == [[2, 2, 0]]
    assert pose.merge(nobody, person, region).points.shape[0] == 0
    sure = np.ones((2, 2), np.float32)
    truth, guess = (SemanticMap(np.uint8([[0, 1], last]), sure, ("a", "b")) for last in ([1, 255], [0, 1]))
    assert LABEL_KINDS["semantic"].overlap(guess, truth) == 0.5
