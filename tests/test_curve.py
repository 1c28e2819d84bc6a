"""The learning curve: laws found again from their own points, forecasts, and the command on a small model."""

import json
import shutil

import numpy as np
import pytest
import torch
from layouts import LAYOUTS

from bench.proof.curve import curve_table, learning_curve, main, parse_counts, power_law, training_address
from bench.proof.decoders import train_decoder
from datasetdm_fast.data import DepthMap, Keypoints
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.settings import CacheSettings, RecipeSettings, ViewSettings

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")

COUNTS = [10, 30, 100, 300]


@pytest.mark.parametrize(
    "floor, scale, exponent", [(0.0, 2.0, 0.4), (0.1, 1.5, 0.6), (0.25, 0.9, 0.3), (0.05, 3.0, 1.0)]
)
def test_a_law_is_found_again_from_its_points(floor, scale, exponent):
    errors = floor + scale * np.array(COUNTS, float) ** -exponent
    law = power_law(COUNTS, np.stack([errors, 2 * errors]))
    assert law.at(350) == pytest.approx(np.array([1, 2]) * (floor + scale * 350**-exponent), rel=5e-3)
    assert law.at(10) - law.at(300) == pytest.approx(np.array([1, 2]) * (errors[0] - errors[-1]), rel=0.02)


def test_few_points_fall_to_nothing_and_errors_never_grow():
    law = power_law([10, 40], np.array([[0.4, 0.2], [0.2, 0.3], [0.3, 0.3]]))
    assert law.floor.tolist() == [0, 0, 0] and law.exponent == pytest.approx([0.5, 0, 0], abs=1e-9)
    assert law.at(160)[0] == pytest.approx(0.1) and law.at(1000)[2] == pytest.approx(0.3)


def judge_of(absrel):
    """A meter over the same 40 images whose errors scatter about what a law says for a number of labels."""
    item, source = open_data("demo:1@7", 32)[0], open_data("demo:1@7", 32)

    def judge(count, repeat):
        meter, random = METRICS["depth"](source), np.random.default_rng(repeat)
        for _ in range(40):
            meter.add(
                item, DepthMap(item.depth * np.float32(1 + absrel(count) * random.uniform(0.5, 1.5)), source.max_depth)
            )
        return meter

    return judge


def test_fifty_more_labels_are_worth_what_the_law_says():
    found = learning_curve("depth", COUNTS, 2, judge_of(lambda n: 0.02 + 1.2 * n**-0.6), bootstrap=200, level=0.95)
    gain = 1.2 * (300**-0.6 - 350**-0.6)
    low, high = found["more"]["interval"]
    assert found["figure"] == "absrel" and found["more"]["labels"] == 350
    assert low < found["more"]["gain"] < high and found["more"]["gain"] == pytest.approx(gain, rel=0.5)
    assert [len(point["repeats"]) for point in found["points"]] == [2] * 4
    for point in found["points"]:
        assert point["interval"][0] <= point["value"] <= point["interval"][1]
    lines = curve_table("depth", found, 0.95).splitlines()
    assert (
        lines[-1].startswith("50 more labels would bring AbsRel to about 0.0")
        and "lower" in lines[-1]
        and len(lines) == 7
    )
    level = {**found, "more": {**found["more"], "gain": 4e-5}}
    assert ": no change (95% interval " in curve_table("depth", level, 0.95).splitlines()[-1]


def test_images_without_truth_have_no_curve():
    empty = METRICS["depth"](open_data("demo:1@7", 32))
    with pytest.raises(Refused, match="no image has the ground truth to compare with"):
        learning_curve("depth", COUNTS, 1, lambda count, repeat: empty, bootstrap=2, level=0.95)


def test_draws_of_images_that_show_nothing_are_no_figures_of_0():
    source, meter = open_data("demo:1@7", 64), METRICS["pose"](open_data("demo:1@7", 64))
    items = list(open_data("demo:16@900", 64))
    shown = next(item for item in items if len(item.keypoints))
    nobody = [item for item in items if not len(item.keypoints)][:4]
    none = np.zeros((0, len(source.joints)), np.float32)
    for item in (shown, *nobody):
        seen = np.full(item.keypoints.shape[:2], 2)
        points = item.keypoints if len(item.keypoints) else none.reshape(0, len(source.joints), 3)
        meter.add(item, Keypoints(points, seen, np.ones(len(seen), np.float32), source.joints))
    found = learning_curve("pose", COUNTS, 1, lambda count, repeat: meter, bootstrap=200, level=0.95)
    assert [point["value"] for point in found["points"]] == [1.0] * 4
    assert [point["interval"] for point in found["points"]] == [[1.0, 1.0]] * 4


def test_a_forecast_from_few_numbers_says_that_it_is_hopeful():
    found = learning_curve("depth", COUNTS[:3], 1, judge_of(lambda n: 1.2 * n**-0.6), bootstrap=50, level=0.95)
    assert curve_table("depth", found, 0.95).splitlines()[-1].startswith("Fewer than 4 numbers")


def test_a_flat_curve_promises_nothing():
    found = learning_curve("depth", COUNTS, 1, judge_of(lambda n: 0.2), bootstrap=100, level=0.9, more=100)
    assert abs(found["more"]["gain"]) < 1e-6 and found["more"]["labels"] == 400
    assert curve_table("depth", found, 0.9).splitlines()[-1].startswith("The figures do not improve")


def test_few_images_leave_a_wider_interval(monkeypatch):
    def width():
        judge = judge_of(lambda n: 1.2 * n**-0.6)
        found = learning_curve("depth", COUNTS, 1, judge, bootstrap=200, level=0.95)
        return found["points"][0]["interval"][1] - found["points"][0]["interval"][0]

    of_many = width()
    monkeypatch.setattr(METRICS["depth"], "telling", 4)
    assert width() > 1.2 * of_many


@pytest.mark.parametrize("words", [["10"], ["0", "10"], ["ten", "20"], ["10", "-3"], ["10", "2.5"]])
def test_counts_that_are_no_curve_are_refused(words):
    with pytest.raises(Refused, match="--counts"):
        parse_counts(words)
    assert parse_counts(["30", "10", "30"]) == [10, 30]


def test_those_that_judge_do_not_teach():
    assert training_address("coco:/data[val]", "", 9) == "coco:/data"
    assert training_address("demo:500@900000", "", 300) == "demo:300@1000"
    assert training_address("voc:/a", "voc:/b", 9) == "voc:/b"
    same = (("voc:/a", ""), ("voc:/a[train]", "voc:/a"), ("voc:/a[val]", "voc:/a[val]"), ("demo:5@3", "demo:5@3"))
    overlapping = (("demo:500@1005", ""), ("demo:5@3", "demo:4"), ("vkitti2:/a[Scene20]", ""))
    for data, learn_from in (*same, *overlapping):
        with pytest.raises(Refused, match="none are left"):
            training_address(data, learn_from, 9)


def test_those_that_judge_do_not_teach_under_another_address(tmp_path):
    (tmp_path / "val").mkdir()
    addresses = (f"folder:{tmp_path}[val]", f"folder:{tmp_path}/val", f"folder:{tmp_path}/./val[train]")
    for learn_from in addresses:
        with pytest.raises(Refused, match="none are left"):
            training_address(addresses[0], learn_from, 9)
    assert training_address(addresses[0], f"folder:{tmp_path}/val/..", 9)


def test_images_that_teach_and_judge_are_counted_under_any_address(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path / "cache"))
    LAYOUTS["folder"][1](tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    line = ["--model", "tiny", "--data", f"folder:{tmp_path / 'one'}", "--learn-from", f"folder:{tmp_path / 'two'}"]
    line += ["--task", "depth", "--bootstrap", "20", "--quiet", "--threads", "1", "--counts", "1,2", "--steps", "1"]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["curve"]["depth"]["seen_in_training"] == 2
    assert main(line) == 0
    assert "depth: the training data held 2 of these images" in capsys.readouterr().out


def test_the_command_teaches_and_judges_each_number(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path))
    flags = [
        "--model",
        "tiny",
        "--counts",
        "2,4",
        "--data",
        "demo:4@900000",
        "--task",
        "depth",
        "--steps",
        "3",
        "--bootstrap",
        "20",
        "--quiet",
        "--threads",
        "1",
    ]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["curve"]["depth"]
    assert [point["labels"] for point in found["points"]] == [2, 4] and found["more"]["labels"] == 54
    assert all(0 < point["value"] < 10 for point in found["points"])
    assert main([*flags, "--learn-from", "demo:3@50"]) == 2
    assert "demo:3@50 has 3" in capsys.readouterr().err


def test_a_learning_curve_can_be_taught_from_growing_parts(tmp_path):
    engine = build_engine("torch", load_model("tiny", size=64), {})
    source = open_data("demo:4@1000", 64)
    before = set(tmp_path.glob("*.f16"))
    settings = {
        "view_settings": ViewSettings(draws=2),
        "recipe_settings": RecipeSettings(steps=2),
        "cache_settings": CacheSettings(cache_dir=str(tmp_path)),
    }
    first, second = (
        fold(train_decoder(engine, source, "open-vocabulary", count, **settings)).requires_grad_(False)
        for count in (2, 4)
    )
    words = engine.encode_classes(list(source.thing_classes))
    capture = engine.denoise_and_capture_raw(torch.zeros(1, 4, 8, 8), 1, engine.encode_text(["", "a ball"]))[1]
    for decoder in (first, second):
        found = decoder(capture, words[None])
        assert found["pred_masks"].shape[1] == len(source.thing_classes) and not any(
            p.requires_grad for p in decoder.parameters()
        )
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert len(set(tmp_path.glob("*.f16")) - before) <= 4
    with pytest.raises(ValueError, match="5 images to learn from, expected 1 to 4"):
        train_decoder(engine, source, "depth", 5)


def test_a_curve_of_images_that_show_nothing_is_refused_before_a_decoder_is_trained(monkeypatch, capsys):
    monkeypatch.setattr("bench.proof.decoders.train_decoder", lambda *_, **__: pytest.fail("it was trained"))
    line = ["--data", "demo:6@900", "--counts", "2,3", "--task", "pose", "--quiet"]
    assert main(line) == 2
    assert "no image has the ground truth to compare with" in capsys.readouterr().err


def test_a_dry_run_names_the_decoders_and_more_labels_than_images_are_refused(capsys):
    line = "--data demo:3@7 --learn-from demo:9@50 --task semantic --dry-run"
    assert main([*line.split(), "--counts", "2,3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == [2, 3]
    assert main([*line.split(), "--counts", "2,10"]) == 2
    assert capsys.readouterr().err.startswith("--counts: 10 labels, but demo:9@50 has 9 of the selected images\n")
