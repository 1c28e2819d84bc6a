"""Several decoders of a kind in one run: labels that carry a decoder's name, and labels masked by others."""

import json
import shutil

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from stub_engine import CONFIGS, StubEngine
from test_ledger import tree

from datasetdm_fast import filter, generate
from datasetdm_fast.config import TASKS
from datasetdm_fast.data import DepthMap, Instances, SemanticMap
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.decoders.checkpoint import read_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import DEMO, find_decoders
from datasetdm_fast.engine.labels import LabelName, kind_of
from datasetdm_fast.engine.loop.combining import Combination, apply_combinations, parse_combinations
from datasetdm_fast.engine.loop.recipe import check_tasks
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.reader import open_run

LABELS = (*TASKS, *(f"{task}:other" for task in TASKS))
OWN_FILES = ("semantic", "confidence", "depth", "open_vocabulary", "open_vocabulary_confidence")


def open_stub(model="demo", decoder="demo", tasks=None, **choices):
    return StubEngine(64, CONFIGS, tuple(tasks)), {task: {"digest": "stub", "licence": "none"} for task in tasks}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two labels of every kind, the decoders of each pair being equal."""
    out = tmp_path_factory.mktemp("many") / "run"
    line = ["--task", ",".join(LABELS), "--number", "4", "--batch-size", "2", "--out", str(out), "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "open_engine", open_stub)
        assert generate.main([*line, "--limit", "2"]) == 0 and generate.main(line) == 0
    return out


def test_every_kind_of_label_is_stored_beside_that_of_the_tasks_own_decoder(run):
    found = audit(run)
    assert found.is_complete and not found.findings and found.files == 4 * (1 + 2 * len(OWN_FILES))
    for own in OWN_FILES:
        for path in (run / own).iterdir():
            assert (run / f"{own}.other" / path.name).read_bytes() == path.read_bytes()
    for own in ("instances", "keypoints"):
        of_own, of_other = (COCO(run / f"{own}{name}.json").dataset for name in ("", ".other"))
        ids = [{item.pop("id") for item in found["annotations"]} for found in (of_own, of_other)]
        assert of_own == of_other and not ids[0] & ids[1]
    whole = open_run(run)
    assert set(whole.tasks) == set(LABELS)
    for sample in whole:
        assert set(sample.row.labels) == set(LABELS)
        for task in TASKS:
            tables = whole.document["labels"]
            pair = (kind_of(label).arrays(sample.label(label), tables[label]) for label in (task, f"{task}:other"))
            np.testing.assert_equal(*pair)
    image, label = whole.as_dataset("depth:other")[0]
    assert image.shape == (3, 64, 64) and label.shape == (64, 64)


def test_pages_tell_both(run):
    card, told = (run / "README.md").read_text(), (run / "gallery" / "run.js").read_text()
    assert "`semantic.other/ID.png`" in card and "## Instances: other" in card and "decoder `pose:other`" in card
    facts = json.loads(told.removeprefix('receive("run",0,').removesuffix(");\n"))
    files = {layer["title"]: (layer["file"], layer["is_drawn"]) for layer in facts["layers"]}
    assert files["Semantic: other"] == ("semantic.other/ID.png", False)
    assert files["Depth: other"] == ("depth.other/ID.png", True)
    assert len(facts["layers"]) == 2 * (len(TASKS) + 2) == len({layer["name"] for layer in facts["layers"]})
    assert (run / "gallery" / "depth.other" / "00000000.png").exists()


def test_damage_to_a_named_label_is_found_and_mended(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "open_engine", open_stub)
    shutil.copytree(run, tmp_path / "run")
    before = tree(tmp_path / "run")
    (tmp_path / "run" / "semantic.other" / "00000002.png").write_bytes(b"x")
    (tmp_path / "run" / "depth.other" / "stray.png").write_bytes(b"x")
    assert {finding.place for finding in audit(tmp_path / "run").findings} == {
        "semantic.other/00000002.png",
        "depth.other/stray.png",
    }
    (tmp_path / "run" / "depth.other" / "stray.png").unlink()
    assert generate.main(["--out", str(tmp_path / "run"), "--only", "00000002", "--quiet"]) == 0
    assert tree(tmp_path / "run") == before


def test_runs_of_named_labels_are_filtered(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert filter.main([str(tmp_path / "run"), "--where", "agreement>=0", "--quiet"]) == 0
    assert not audit(tmp_path / "run").findings


@pytest.mark.parametrize("text", ["colour", "semantic:", "semantic:../x", "semantic:a.b", "semantic:a:b", ":a"])
def test_what_is_no_name_of_a_label_is_refused(text):
    with pytest.raises(ValueError):
        LabelName.parse(text)


def test_labels_that_a_run_cannot_have_are_refused():
    for tasks, said in (
        ((), "names no task"),
        (("depth", "colour"), "--task colour: not one of"),
        (("attention",), "--task attention: not one of"),
        (("attention:mine",), "labels of the labeller attention have no decoder"),
        (("semantic:a", "semantic:A"), "a label is named twice"),
    ):
        with pytest.raises(Refused, match=said):
            check_tasks(tasks)


def test_a_label_is_combined_once():
    once = "semantic within open-vocabulary:person"
    assert len(parse_combinations([once], LABELS)) == 1
    with pytest.raises(Refused, match="--combine: semantic is combined twice"):
        parse_combinations([once, once.replace("person", "ball")], LABELS)
    spaced = parse_combinations(["semantic within open-vocabulary: hot dog "], LABELS)
    assert spaced == (Combination("semantic", "open-vocabulary", "hot dog"),)
    for text, said in (
        ("semantic within depth:near", "depth has no classes"),
        ("depth within semantic:ball", "depth has no classes"),
        ("other within semantic:ball", "other is not a label of this run"),  # of which there are several
    ):
        with pytest.raises(Refused, match=said):
            parse_combinations([text], LABELS)


def test_layers_of_a_named_label_show_its_own_files():
    named = kind_of("semantic:street")
    assert [layer.role for layer in named.layers] == ["semantic.street", "confidence.street"] == list(named.roles)
    assert [layer.title for layer in named.layers] == ["Semantic: street", "Uncertainty: street"]
    assert kind_of("instance:street").coco_file == "instances.street.json" and not kind_of("pose:x").layers[0].role
    assert "`semantic.street/ID.png`" in named.contents and "`confidence.street/ID.png`" in named.contents
    with pytest.raises(ValueError, match="up to 63 letters"):
        LabelName.parse("semantic:")


def test_of_two_folders_the_first_one_has_a_decoder_and_a_task(tmp_path):
    for name, labels in (("a", ("one",)), ("b", ("one", "semantic"))):
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "config.json").write_text(CONFIGS["semantic"].to_json())
    first, second = tmp_path / "a", tmp_path / "b"
    for order, named, own in (([first, second], first / "one", first / "one"), ([second, first], second / "one", None)):
        found = find_decoders(order)
        assert found["semantic:one"] == named and found["semantic"] == (own or second / "semantic")
        assert "semantic:two" not in found and "depth" not in found


def test_names_and_file_names_are_told_from_each_other():
    for label in LABELS:
        assert str(LabelName.parse(label)) == label and LabelName.of_stem(LabelName.parse(label).stem).task in TASKS
        assert str(LabelName.of_stem(LabelName.parse(label).stem)) == label


# Folders of decoders --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A folder with two semantic decoders, the weights of the second slightly other and read at another timestep."""
    folder = tmp_path_factory.mktemp("decoders")
    for name in ("semantic", "pose"):
        shutil.copytree(DEMO / name, folder / {"semantic": "street"}.get(name, name))
    second = read_decoder(DEMO / "semantic")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in second.parameters():
            weight *= 1 + 0.05 * torch.randn_like(weight)
    save_decoder(second, folder / "clothes")
    written = folder / "clothes" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"capture_timestep": 300}))
    return folder


def test_a_task_without_a_name_is_the_only_decoder_or_the_one_called_like_it(decoders, tmp_path):
    found = find_decoders(decoders)
    assert set(found.labels) == {"semantic:street", "semantic:clothes", "pose"}
    assert "semantic" not in found and found["pose"] == found["pose:pose"] == decoders / "pose"
    assert find_decoders("demo").labels == sorted(TASKS)
    both = find_decoders(f"{decoders},demo")
    assert both["semantic"] == DEMO / "semantic" and both["pose"] == decoders / "pose" and "depth" in both
    assert both["pose:pose"] == decoders / "pose" and find_decoders(f"demo,{decoders}")["pose:pose"] == DEMO / "pose"
    shutil.copytree(decoders / "street", tmp_path / "semantic")
    shutil.copytree(decoders / "street", tmp_path / "second")
    assert find_decoders(tmp_path)["semantic"] == tmp_path / "semantic"
    shutil.copytree(decoders / "street", tmp_path / "no name")
    with pytest.raises(Refused, match="no name"):
        find_decoders(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--task", "semantic:streat"], "did you mean semantic:street?"),
        (["--task", "semantic"], "several decoders for it"),
        (["--task", "semantic:street,semantic:Street"], "named twice"),
        (["--task", "semantic:a/b"], "letters, digits"),
        (["--task", "semantic:street", "--combine", "stret within semantic:clothes:ball"], "did you mean street?"),
        (["--task", "semantic:street,pose", "--combine", "pose within street:ball"], "pose has no classes"),
        (["--task", "semantic:street", "--combine", "street in street:ball"], "expected LABEL within LABEL:CLASS"),
        (["--task", "semantic:street", "--combine", "street within street:bal"], "did you mean ball?"),
        (["--task", "semantic:street,semantic:clothes", "--model", "tiny", "--prompts", "x"], "level low"),
    ],
)
def test_bad_input_ends_with_two_and_nothing_written(decoders, tmp_path, capsys, line, said):
    assert generate.main([*line, "--decoder", str(decoders), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_two_decoders_of_a_kind_say_what_they_say_alone(decoders, tmp_path):
    """Byte for byte, although they read different calls of the sampler."""
    labels = ("semantic:street", "semantic:clothes")
    for name, task in (("both", ",".join(labels)), *((label, label) for label in labels)):
        line = ["--decoder", str(decoders), "--task", task, "--number", "2", "--steps", "5", "--engine", "fast"]
        assert generate.main([*line, "--out", str(tmp_path / name), "--quiet"]) == 0
    both = tree(tmp_path / "both")
    for label in labels:
        files = {
            name: data for name, data in tree(tmp_path / label).items() if name.startswith(("semantic.", "confidence."))
        }
        assert len(files) == 4 and files.items() <= both.items()
    street, clothes = (next((tmp_path / "both" / f"semantic.{name}").iterdir()) for name in ("street", "clothes"))
    assert street.read_bytes() != clothes.read_bytes()
    assert both["images/00000000.png"] == tree(tmp_path / labels[0])["images/00000000.png"]  # the later of the captures


# Labels masked by others ----------------------------------------------------------------------------------------------
LEFT = np.arange(16).reshape(4, 4) % 4 < 2  # the left half


def _map(labels, classes=("background", "ball", "person"), sure=1.0):
    return SemanticMap(np.asarray(labels, np.uint8), np.full((4, 4), sure, np.float32), classes)


def test_outside_the_mask_a_map_is_its_background_or_ignored():
    person = _map(np.where(LEFT, 2, 0), sure=0.75)
    for classes, outside in ((("background", "shirt"), 0), (("skirt", "shirt"), 255)):
        labels = {"semantic:clothes": _map(np.ones((4, 4)), classes, 0.5), "open-vocabulary": person}
        (wish,) = parse_combinations(["clothes within open-vocabulary:person"], tuple(labels))
        found = apply_combinations(labels, [wish])
        masked = found["semantic:clothes"]
        assert (masked.labels == np.where(LEFT, 1, outside)).all() and found["open-vocabulary"] is person
        assert (masked.confidence == np.where(LEFT, 0.5, 0.75).astype(np.float32)).all()


def test_the_library_takes_names_and_combinations():
    pipeline = Pipeline(StubEngine(64, CONFIGS, ("semantic", "semantic:other", "instance")))
    assert pipeline.tasks == ("semantic", "semantic:other", "instance")
    plain, cut = (pipeline(["a ball"], combine=some) for some in ((), ["other within semantic:ball"]))
    (label,), (masked,) = plain.labels("semantic:other"), cut.labels("semantic:other")
    inside = label.labels == label.classes.index("ball")
    assert (masked.labels == np.where(inside, label.labels, 255)).all() and (
        cut.semantic[0].labels == label.labels
    ).all()


def test_instances_are_cut_and_mask_others():
    masks = np.stack([np.ones((4, 4), bool), ~LEFT, LEFT])
    things = Instances(masks, np.array([0, 0, 1]), np.array([0.9, 0.8, 0.3], np.float32), ("ball", "person"))
    left = _map(np.where(LEFT, 1, 0))
    labels = {"instance": things, "semantic": left, "depth": DepthMap(np.ones((4, 4), np.float32), 4.0)}
    wishes = [Combination("instance", "semantic", "ball"), Combination("semantic", "instance", "person")]
    found = apply_combinations(labels, wishes)  # each by what the other was before
    assert found["instance"].scores.tolist() == pytest.approx([0.9, 0.3])
    assert (found["instance"].masks == LEFT).all()
    assert not found["semantic"].labels.any()  # the only person is too unsure to be shown
    sure = np.array([0.9, 0.8], np.float32)
    labels["instance"] = Instances(np.stack([~LEFT, LEFT]), np.array([0, 1]), sure, ("ball", "person"))
    wishes = [Combination("semantic", "instance", "ball"), Combination("instance", "semantic", "background")]
    for order in (wishes, wishes[::-1]):
        found = apply_combinations(labels, order)
        assert not found["semantic"].labels.any() and found["instance"].class_ids.tolist() == [0]
