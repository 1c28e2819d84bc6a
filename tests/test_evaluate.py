"""python -m datasetdm_fast.evaluate on real layouts: figures, intervals, tables, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, coco, save

from datasetdm_fast.engine.decoders.checkpoint import build_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import COCO_JOINTS, COCO_LIMBS, DecoderConfig
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.errors import Refused
from datasetdm_fast.evaluate import _finish, main
from datasetdm_fast.training import data_record, session
from datasetdm_fast.training.evaluation.meter import figure_name
from datasetdm_fast.training.evaluation.settings import EvaluateConfig
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.session import open_session
from datasetdm_fast.training.settings import Inversion, ModelChoice, TrainingData

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer", "one_engine_of_a_kind")

SMALL = {"width": 16, "upscale": 2, "depth_width": 8}
MASKS = {"heads": 2, "layers": 2, "feed_forward": 32, "mask_dim": 16, "queries": 6}
HOW = {
    "true": "captions: read, and they name all that an image shows; semantic looked only for what they name",
    "unread": "captions: text condition only",
    "none": "captions: none",
}
MAIN = {"semantic": "miou", "instance": "ap", "depth": "absrel", "pose": "pck", "open-vocabulary": "miou"}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A folder of untaught decoders for the classes of a data set."""
    model = load_model("tiny")

    def make(source, tasks, **more) -> str:
        folder = tmp_path_factory.mktemp("decoders")
        shared = {"levels": model.levels, "text_width": 32, "capture_timestep": 1, **SMALL, **more}
        made = {
            "semantic": {"kind": "segmentation", "classes": source.classes, **MASKS},
            "instance": {"kind": "segmentation", "classes": source.thing_classes, **MASKS},
            "open-vocabulary": {
                "kind": "open-vocabulary",
                "classes": source.thing_classes[:4],
                "text_width": model.modules["text_encoder"].config.hidden_size,
                **MASKS,
            },
            "depth": {"kind": "depth", "max_depth": source.max_depth},
            "pose": {"kind": "heatmap", "joints": source.joints, "limbs": source.limbs},
        }
        for task in tasks:
            torch.manual_seed(0)
            save_decoder(build_decoder(DecoderConfig(task=task, **{**shared, **made[task]})), folder / task)
        return str(folder)

    return make


def run(capsys, *flags) -> tuple[int, str, str]:
    code = main(["--model", "tiny", "--quiet", "--bootstrap", "20", *flags])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("name", ["coco", "voc", "kitti", "folder", "hf-parquet"])
def test_real_layouts_are_evaluated(decoders, tmp_path, capsys, name):
    kind, make, tasks = LAYOUTS[name]
    make(tmp_path / "data")
    address = f"{kind}:{tmp_path / 'data'}[train]"
    folder = decoders(open_data(address, 64), tasks)
    code, out, _ = run(capsys, "--decoder", folder, "--data", address, "--json")
    result = json.loads(out)
    assert code == 0 and list(result) == [task for task in MAIN if task in tasks]
    for task, found in result.items():
        low, high = found["intervals"][MAIN[task]]
        assert low <= high and found[MAIN[task]] >= 0 and found["images"] >= 3
    if "open-vocabulary" in tasks:
        assert {"seen", "unseen", "harmonic"} <= set(result["open-vocabulary"])
    code, out, _ = run(capsys, "--decoder", folder, "--data", address, "--task", tasks[0])
    assert (
        code == 0
        and "95% interval" in out
        and out.splitlines()[1].split()[:2] == [tasks[0], figure_name(MAIN[tasks[0]])]
    )


def test_images_of_the_decoders_own_training_are_counted_and_named(decoders, tmp_path, capsys):
    LAYOUTS["folder"][1](tmp_path / "data")
    address = f"folder:{tmp_path / 'data'}"
    source = open_data(address, 64)
    folder, flags = decoders(source, ("semantic", "depth")), ("--data", address, "--json")
    assert "seen_in_training" not in run(capsys, "--decoder", folder, *flags)[1]
    (record := Path(folder) / "depth" / "training" / "data.json").parent.mkdir()
    counts = []
    items = data_record.record_data(source, lambda count, item: counts.append(count))["items"]
    assert counts == [*range(1, len(source) + 1)]
    items[0]["image"] = "0" * len(items[0]["image"])  # that training had another picture
    record.write_bytes(data_record.as_json({"items": items}))
    result = json.loads(run(capsys, "--decoder", folder, *flags)[1])
    assert result["depth"]["seen_in_training"] == len(source) - 1 and "seen_in_training" not in result["semantic"]
    told = run(capsys, "--decoder", folder, *flags[:2])[1].splitlines()[-1]
    assert told.startswith(f"depth: the training data held {len(source) - 1} of these images; expect lower")


def test_rendered_scenes_of_the_decoders_own_training_are_counted(decoders, capsys):
    """By the address and the number of scenes in the settings of the training; by the whole address where it chose."""
    address = "demo:4@900000"
    folder = decoders(open_data(address, 64), ("semantic", "depth"))
    (settings := Path(folder) / "depth" / "training" / "settings.json").parent.mkdir()
    for data, chosen, seen in (
        ("demo:5@900002", {"images": 4, "held_out_images": 1}, 2),
        ("demo:5@900002", {"images": 1, "held_out_images": 0}, 1),
        ("demo:5@900002", {"images": 1, "held_out_images": 0, "only_classes": ["ball"]}, 2),
        ("demo:5@900004", {"images": 5, "held_out_images": 0}, None),
        ("folder:900000", {"images": 5, "held_out_images": 0}, None),
        ("demo:x", {"images": 5, "held_out_images": 0}, None),
    ):
        settings.write_text(json.dumps({"data": data, **chosen}))
        result = json.loads(run(capsys, "--decoder", folder, "--data", address, "--json")[1])
        assert (result["depth"].get("seen_in_training"), result["semantic"].get("seen_in_training")) == (seen, None)


def test_a_label_that_no_image_shows_is_left_out_by_name(decoders, tmp_path, capsys):
    LAYOUTS["cvat"][1](tmp_path)
    file = tmp_path / "annotations.xml"
    file.write_text(re.sub(r"<(box|mask) .*?</\1>", "", file.read_text()))
    data = f"cvat:{tmp_path}"
    where = decoders(open_data(data, 32), ("semantic", "instance"))
    code, out, err = run(capsys, "--decoder", where, "--data", data, "--task", "instance")
    assert code == 2 and "no image has the ground truth to compare with" in err
    code = main(["--model", "tiny", "--bootstrap", "20", "--decoder", where, "--data", data, "--json"])
    said = capsys.readouterr()
    assert code == 0 and set(json.loads(said.out)) == {"semantic"}
    assert f"instance is left out: no image of {data} shows anything to compare with" in said.err


def test_bad_images_end_with_2_or_are_counted_and_listed(decoders, tmp_path, capsys):
    LAYOUTS["folder"][1](tmp_path / "data")
    address = f"folder:{tmp_path / 'data'}"
    folder = decoders(open_data(address, 64), ("depth",))
    (tmp_path / "data" / "depth" / "scene 1.png").unlink()
    code, out, said = run(capsys, "--decoder", folder, "--data", address, "--json")
    assert code == 2 and not out and "scene 1.png" in said.splitlines()[0] and "--skip-bad" not in said.splitlines()[0]
    code, out, said = run(capsys, "--decoder", folder, "--data", address, "--json", "--skip-bad")
    result = json.loads(out)
    assert code == 0 and result["depth"]["images"] == 2
    assert [reason for reason in result["skipped"].values() if "scene 1.png" in reason] and not said
    assert _finish(EvaluateConfig(skip_bad=True), {}, result["skipped"]) == 0
    assert capsys.readouterr().err.startswith("1 image was skipped:")
    shutil.rmtree(tmp_path / "data" / "images")
    shutil.copytree(tmp_path / "data" / "depth", tmp_path / "data" / "images")  # no pictures of colours
    code, out, said = run(capsys, "--decoder", folder, "--data", address, "--skip-bad")
    assert code == 2 and said.startswith("none of 2 images can be read; ")


def test_captions_are_read_twice_once_or_not_at_all(decoders, capsys):
    source = open_data("demo:6", 64)
    folder = decoders(source, ("semantic", "open-vocabulary"), named=source.thing_classes[:4])
    lines = ["--decoder", folder, "--data", "demo:6@0", "--json", "--bootstrap", "0", "--captions"]
    held, unread, none = (json.loads(run(capsys, *lines, how)[1]) for how in ("true", "unread", "none"))
    free = decoders(source, ("semantic", "open-vocabulary"))
    lines[1] = free
    said = {how: json.loads(run(capsys, *lines, how)[1]) for how in ("true", "unread")}
    assert said["unread"] == unread and held != unread and none != unread
    told = {"captions": "true", "captions_name_all": True, "named_by_captions": False}
    assert said["true"] == {task: {**found, **told} for task, found in unread.items()}
    assert held["semantic"]["named_by_captions"] and none["semantic"]["captions"] == "none"


def test_the_table_says_what_was_read_of_captions(decoders, capsys):
    source = open_data("demo:2", 64)
    folder = decoders(source, ("semantic",), named=source.thing_classes[:4])
    given = ("--decoder", folder, "--data", "demo:2", "--captions")
    lines = {how: run(capsys, *given, how)[1].splitlines() for how in HOW}
    assert {how: told[-1] for how, told in lines.items()} == HOW and "mIoU" in lines["none"][1]


def test_selections_and_framing_are_flags(decoders, capsys):
    folder = decoders(open_data("demo:3", 64), ("semantic",))
    flags = ("--decoder", folder, "--data", "demo:12@0", "--json", "--bootstrap", "5")
    _, out, _ = run(capsys, *flags, "--limit-per-class", "1", "--framing", "upstream")
    assert json.loads(out)["semantic"]["images"] < 12
    _, out, _ = run(capsys, *flags, "--limit-images", "2", "--unseen", "ball,cube")
    assert json.loads(out)["semantic"]["images"] == 2 and "harmonic" in json.loads(out)["semantic"]


@pytest.mark.parametrize("flags, count", [("--limit-images 3", 3), ("--only-classes ball,cone,ring,tree", 5), ("", 9)])
def test_a_dry_run_counts_the_images_that_are_selected(capsys, flags, count):
    address = "demo:9@900000"
    assert main(["--data", address, *flags.split(), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": {address: count}}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "coco:/nowhere"], "/nowhere"),
        (["--data", "coc:/nowhere"], "did you mean coco"),
        (["--task", "depth"], "no decoder for depth"),
        (["--unseen", "unicorn"], "unicorn"),
        (["--level", "2"], "--level"),
        (["--bootstrap", "-1"], "--bootstrap"),
        (["--bootstrap", "10000000000"], "--bootstrap 10000000000: expected 0 to 10000"),
        (["--limit-per-class", "-1"], "--limit-per-class"),
        (["--select", "vok"], "--select"),
        (["--only-classes", "unicorn"], "unicorn"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(decoders, capsys, flags, said):
    folder = decoders(open_data("demo:1", 64), ("semantic",))
    given = ["--decoder", folder, *([] if "--data" in flags else ["--data", "demo:2"]), *flags]
    code, out, error = run(capsys, *given)
    assert code == 2 and not out and said in error


def test_a_model_may_be_downloaded_where_a_flag_says_so(decoders, capsys, monkeypatch):
    def downloaded(name, allow_download):
        raise Refused(f"the hub was asked for {name}", "Answer it.")

    monkeypatch.setattr("datasetdm_fast.engine.loading.download_model", downloaded)
    line = ["--model", "someone/model", "--data", "demo:2", "--task", "semantic"]
    code, _, error = run(capsys, "--decoder", decoders(open_data("demo:1", 64), ("semantic",)), *line)
    assert code == 2 and "Add --allow-download" in error
    assert main([*line, "--allow-download"]) == 2
    assert "the hub was asked for someone/model" in capsys.readouterr().err


def test_a_decoder_of_other_classes_or_joints_is_refused(decoders, tmp_path, capsys):
    LAYOUTS["coco"][1](tmp_path / "data")
    assert len(COCO_JOINTS) == 17 and COCO_LIMBS
    folder = decoders(open_data("demo:1", 64), ("pose",))
    code, _, said = run(capsys, "--decoder", folder, "--data", f"coco:{tmp_path / 'data'}")
    assert code == 2 and "joints" in said
    LAYOUTS["cityscapes"][1](tmp_path / "streets")
    source = open_data("demo:1", 64)
    source.classes = ("one", "two")
    folder = decoders(source, ("semantic",))
    code, _, said = run(capsys, "--decoder", folder, "--data", f"cityscapes:{tmp_path / 'streets'}")
    assert code == 2 and "no class in common" in said


def as_voc(root: Path, names: str = "") -> str:
    """An image with three classes; without a file of names they would be VOC's aeroplane, bicycle and bird."""
    labels = np.zeros((64, 64), np.uint8)
    labels[8:30, 8:30], labels[8:30, 34:60], labels[34:60, 8:60] = 1, 2, 3
    save(root / "JPEGImages/a.jpg", np.repeat(labels[..., None] * 60, 3, 2))
    save(root / "SegmentationClass/a.png", labels)
    if names:
        (root / "class_names.txt").write_text(names)
    return f"voc:{root}"


def test_a_background_is_no_class_in_common(decoders, tmp_path, capsys):
    source = open_data("demo:1", 64)
    source.classes = ("background", "mug", "leaf", "bolt")
    folder = decoders(source, ("semantic",))
    code, out, said = run(capsys, "--decoder", folder, "--data", as_voc(tmp_path))
    assert code == 2 and not out and "no class in common" in said and "--class-names" in said


def test_classes_that_the_decoder_or_the_images_lack_are_told(decoders, tmp_path, capsys):
    source = open_data("demo:1", 64)
    source.classes = ("background", "mug", "leaf", "nut")
    line = ["--model", "tiny", "--decoder", decoders(source, ("semantic",))]
    assert main([*line, "--data", as_voc(tmp_path, "background\nmug\nleaf\nbolt\n")]) == 0
    said = capsys.readouterr().err
    assert "semantic: the decoder has no class bolt, so these count as missed; --class-names THEIRS=OURS" in said
    assert "semantic: no image shows nut\n" in said


def test_a_training_tells_classes_that_no_image_shows_and_how_many_are_left_out(tmp_path, monkeypatch):
    lines: list[str] = []
    data = TrainingData(as_voc(tmp_path, "background\nmug\nleaf\nbolt\nnut\nscrew\n"), skip_bad=True)
    for name in "bc":  # without a picture
        shutil.copy(tmp_path / "SegmentationClass/a.png", tmp_path / f"SegmentationClass/{name}.png")
    monkeypatch.setattr(session, "MOST_LISTED", 1)
    monkeypatch.setattr(session, "SECONDS_PER_LINE", 0.0)
    open_session(data, ModelChoice("tiny", device="cpu"), ("semantic",), Inversion((1,)), on_message=lines.append)
    assert "classes    no image shows nut, screw" in lines and "data       1 of 1 images read" in lines
    left = [line for line in lines if line.startswith("left out   ")]
    assert len(left) == 2 and "b.jpg" in left[0] and left[1] == "left out   2 in all"


def test_a_training_tells_how_many_images_nobody_labelled(tmp_path):
    lines: list[str] = []
    data = TrainingData(as_voc(tmp_path, "background\nmug\nleaf\nbolt\n"))
    for name, number in (("b", 0), ("c", 255)):  # of the last all is ignored, and nothing is learnt
        shutil.copy(tmp_path / "JPEGImages/a.jpg", tmp_path / f"JPEGImages/{name}.jpg")
        save(tmp_path / f"SegmentationClass/{name}.png", np.full((64, 64), number, np.uint8))
    open_session(data, ModelChoice("tiny", device="cpu"), ("semantic",), Inversion((1,)), on_message=lines.append)
    assert [line for line in lines if line.startswith("classes")] == [
        "classes    1 of 3 images without any, taken for pure background"
    ]


def test_an_image_of_a_crowd_alone_is_not_called_background(tmp_path):
    lines: list[str] = []
    coco(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    document = json.loads(path.read_text())
    first = document["annotations"][0]["image_id"]
    for row in document["annotations"]:
        row["iscrowd"] = int(row["image_id"] == first)
    path.write_text(json.dumps(document))
    model = ModelChoice("tiny", device="cpu")
    open_session(TrainingData(f"coco:{tmp_path}"), model, ("instance",), Inversion((1,)), on_message=lines.append)
    assert not [line for line in lines if "pure background" in line]


def test_a_bad_data_set_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasetdm_fast.engine.engines.open_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["--data", f"voc:{tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_name_that_no_image_shows_is_no_class_in_common(decoders, tmp_path, capsys):
    source = open_data("demo:1", 64)
    source.classes = ("background", "mug", "leaf", "bottle")  # VOC has bottles, too
    code, out, said = run(capsys, "--decoder", decoders(source, ("semantic",)), "--data", as_voc(tmp_path))
    assert code == 2 and not out
    assert "the data set aeroplane, bicycle, bird: no class in common" in said and "--class-names" in said
