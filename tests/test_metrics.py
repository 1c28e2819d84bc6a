"""Figures of merit: one on the truth itself, known values on known mistakes."""

import math
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from bench.proof.students import student_data
from bench.proof.students.examples import Examples
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.engine.decoders.config import COCO_JOINTS
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.evaluation import measure, metrics, naming
from datasetdm_fast.training.evaluation import meter as interval_parts
from datasetdm_fast.training.evaluation import meter as meters
from datasetdm_fast.training.evaluation.meter import (
    Meter,
    check_count,
    expanded_level,
    figure_name,
    intervals,
    mean,
    translation,
)
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.evaluation.settings import EvaluateConfig, ScoreSettings
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.report import cautions
from datasetdm_fast.training.truth.augment import mirror

pytestmark = pytest.mark.core

SIZE = 64


@pytest.fixture(scope="module")
def source():
    return open_data("demo:12@40", SIZE)


def perfect(source, item):
    shape, people = item.image.shape[:2], len(item.keypoints)
    score = np.where(item.keypoints[..., 2:] > 0, 1.0, 0.0).astype(np.float32)
    return {
        "semantic": SemanticMap(item.semantic, np.ones(shape, np.float32), source.classes),
        "instance": Instances(
            item.masks, item.mask_classes, np.ones(len(item.masks), np.float32), source.thing_classes
        ),
        "depth": DepthMap(item.depth, source.max_depth),
        "pose": Keypoints(
            np.concatenate([item.keypoints[..., :2], score], -1),
            np.where(score[..., 0] > 0, 2, 0),
            np.ones(people, np.float32),
            source.joints,
        ),
        "open-vocabulary": SemanticMap(
            np.where(item.semantic > 1, item.semantic - 1, 0).astype(np.uint8),
            np.ones(shape, np.float32),
            ("none", *source.thing_classes),
        ),
    }


def scored(source, change=lambda task, label: label):
    meters = {task: metric(source) for task, metric in METRICS.items()}
    for item in source:
        for task, label in perfect(source, item).items():
            meters[task].add(item, change(task, label))
    return {task: meter.result() for task, meter in meters.items()}


def test_the_truth_scores_one(source):
    result = scored(source)
    assert result["semantic"]["miou"] == 1 and result["open-vocabulary"]["miou"] == 1
    assert result["instance"]["ap"] == pytest.approx(1) and result["instance"]["ap50"] == pytest.approx(1)
    assert result["depth"] == {"absrel": 0, "rmse": 0, "delta_1.25": 1, "delta_1.25_2": 1, "delta_1.25_3": 1}
    assert result["pose"]["pck"] == 1 and result["pose"]["oks_ap"] == pytest.approx(1)


@pytest.mark.parametrize("task", ["semantic", "open-vocabulary"])
def test_images_whose_every_pixel_is_ignored_do_not_count(source, task):
    meter, item = METRICS[task](source), source[0]
    meter.add(replace(item, semantic=np.full_like(item.semantic, 255)), perfect(source, item)[task])
    assert meter.count == 0
    meter.add(item, perfect(source, item)[task])
    assert meter.count == 1 and meter.result()["miou"] == 1


def test_figures_have_the_names_that_people_give_them():
    assert [figure_name(key) for key in ("ap50", "delta_1.25_2", "new_share")] == [
        "AP50",
        "delta < 1.25^2",
        "new share",
    ]


def test_ten_percent_too_far_is_an_absrel_of_a_tenth(source):
    result = scored(source, lambda task, label: replace(label, metres=label.metres * 1.1) if task == "depth" else label)
    assert result["depth"]["absrel"] == pytest.approx(0.1, abs=1e-6)


def test_errors_of_depth_by_hand():
    truth = SimpleNamespace(depth=np.float32([[0.5, 2.0, 4.0, 0.0, 8.0]]))
    meter = METRICS["depth"](None)
    meter.add(truth, DepthMap(np.float32([[0.625, 1.5, 0.0, 9.0, 8.0]]), 10.0))  # 1.25 times is not within 1.25
    meter.add(truth, DepthMap(np.float32([[0.5, 2.0, 4.0, 9.0, 8.0]]), 10.0))
    meter.add(SimpleNamespace(depth=np.zeros((1, 5))), DepthMap(np.ones((1, 5)), 10.0))  # which tells nothing
    assert meter.rows[0] == pytest.approx(((0.25 + 0.25 + 1) / 4, (0.125**2 + 0.5**2 + 4**2) / 4, 0.25, 0.75, 0.75))
    wanted = {"absrel": 0.1875, "rmse": np.sqrt((0.125**2 + 0.5**2 + 4**2) / 8), "delta_1.25": 0.625}
    assert meter.result() == pytest.approx({**wanted, "delta_1.25_2": 0.875, "delta_1.25_3": 0.875})
    weights = np.array([[3.0, 1.0]])
    assert meter.figures(weights)["rmse"][0] == pytest.approx(np.sqrt(3 * (0.125**2 + 0.5**2 + 4**2) / 16))


def test_overlaps_of_classes_by_hand():
    source = SimpleNamespace(classes=("wall", "mug", "pen", "background"))
    meter = METRICS["semantic"](source, unseen=("pen",))
    truth = SimpleNamespace(semantic=np.uint8([[0, 0, 0, 1], [1, 2, 3, 255]]))
    names = ("mug", "wall", "pen", "key")  # key is background
    meter.add(truth, SemanticMap(np.uint8([[1, 1, 0, 0], [2, 2, 3, 3]]), np.ones((2, 4)), names))
    assert meter.rows[0].tolist() == [[2, 1, 1, 1], [3, 3, 2, 1], [3, 2, 1, 1]]  # both, either, truth
    found = meter.result()
    assert found["per_class"] == pytest.approx({"wall": 2 / 3, "mug": 1 / 3, "pen": 1 / 2, "background": 1})
    assert (found["miou"], found["seen"], found["unseen"]) == pytest.approx((0.625, 0.5, 0.5))
    assert found["harmonic"] == pytest.approx(0.5)
    meter.rows[0][0, 2] = 0
    assert meter.result()["harmonic"] == 0 and meter.result()["unseen"] == 0
    meter.rows[0][0, :2] = 0
    assert meter.result()["harmonic"] == 0  # of twice nothing, too
    known = ("wall", "mug")
    assert translation(("mug", "key", "wall"), known, 5).tolist() == [1, -1, 0, -1, -1]
    assert translation(("mug", "key"), ("background", "mug"), 1).tolist() == [1, 0]
    assert mean(np.array([[1.0, np.nan, 4.0], [2.0, 2.0, 2.0]])).tolist() == [2.5, 2.0]


def test_a_pixel_that_a_label_gives_no_class_is_missed():
    meter = METRICS["semantic"](SimpleNamespace(classes=("wall", "mug")))
    truth = SimpleNamespace(semantic=np.uint8([[0, 0, 1]]))
    meter.add(truth, SemanticMap(np.uint8([[0, 255, 1]]), np.ones((1, 3)), ("wall", "mug")))
    assert meter.result()["per_class"] == {"wall": 0.5, "mug": 1}


@pytest.mark.parametrize(
    ("columns", "ap50", "ap", "ap75"),
    [(52, 1, 0.1, 0), (72, 1, 0.5, 0), (77, 1, 0.6, 1), (49, 0, 0, 0), (100, 1, 1, 1)],
)
def test_a_mask_counts_from_the_overlaps_on_that_it_reaches(columns, ap50, ap, ap75):
    truth, found = np.zeros((2, 1, 10, 100), bool)
    truth[:], found[..., :columns] = True, True  # so many of a hundred columns
    meter = METRICS["instance"](SimpleNamespace(thing_classes=("mug",)))
    item = Labelled("", np.zeros((10, 100, 3), np.uint8), "", masks=truth, mask_classes=np.array([0]))
    meter.add(item, Instances(found, np.array([0]), np.float32([0.9]), ("mug",)))
    result = meter.result()
    assert result.pop("per_class") == pytest.approx({"mug": ap})
    assert result == pytest.approx({"ap": ap, "ap50": ap50, "ap75": ap75})


def test_words_are_not_judged_where_the_truth_is_unknown():
    labels, mask = np.uint8([[0, 255, 0, 0]]), np.array([[[True, True, True, False]]])
    item = Labelled("", np.zeros((1, 4, 3), np.uint8), "", labels, mask, np.array([0]))
    meter = METRICS["open-vocabulary"](SimpleNamespace(thing_classes=("mug", "pen")))
    predicted = SemanticMap(np.uint8([[1, 0, 0, 1]]), np.ones((1, 4), np.float32), ("none", "mug", "pen"))
    meter.add(item, predicted)
    assert meter.rows[0].tolist() == [[1, 0], [3, 0], [2, 0]]  # both, either, truth
    crowd = {"crowds": np.array([[[False, True, True, True]]]), "crowd_classes": np.array([EVERY_CLASS])}
    meter.add(replace(item, semantic=None, **crowd), predicted)  # a thing counts, also where it lies in a crowd
    assert meter.rows[1].tolist() == [[1, 0], [3, 0], [3, 0]]


def test_bootstrap_draws_are_of_as_many_images_with_replacement():
    meter = METRICS["depth"](None)
    meter.rows = [(float(2**k), 0.0, 0.0, 0.0, 0.0) for k in range(5)]
    drawn = np.random.default_rng(3).multinomial(5, [0.2] * 5, size=7)
    assert meter.draws(7, 3)["absrel"].tolist() == pytest.approx((drawn @ [1, 2, 4, 8, 16] / 5).tolist())
    assert (
        meter.draws(7)["absrel"].tolist()
        == meter.draws(7, 0)["absrel"].tolist()
        != meter.draws(7, 1)["absrel"].tolist()
    )


def test_the_parts_of_an_interval_by_their_formulas():
    away = np.sqrt(5 / 4) * 2.7764451  # of t with four degrees of freedom
    assert expanded_level(0.95, 5) == pytest.approx(math.erf(away / math.sqrt(2)), rel=1e-6)
    assert expanded_level(0.95, 5, 3) == pytest.approx(math.erf(away * math.sqrt(1 + 3 / 2) / math.sqrt(2)), rel=1e-6)
    assert expanded_level(0.95, 1) == 0.95 and expanded_level(0.5, 2) == pytest.approx(math.erf(1.0), rel=1e-6)
    values = np.arange(101.0)
    assert interval_parts._between(values, 0.9).tolist() == pytest.approx([5, 95])
    assert interval_parts._holding(3.0, 4.0, 5.0) == [3.0, 5.0] and interval_parts._holding(6.0, 4.0, 5.0) == [4.0, 6.0]
    worst, best = np.random.default_rng(4).gamma(1 / 3, size=(2, 4))
    share = np.array([0.0, 0.25, 0.5, 1.0])
    assert interval_parts._with_further(share, 8) == pytest.approx((8 * share + best) / (8 + worst + best))
    each = np.array([[0.5, np.nan, 0.1], [np.nan, np.nan, 0.2], [0.1, 0.2, 0.3]])
    unknown = np.random.default_rng([0, 4]).random(3)
    found = interval_parts._over_classes({"miou": np.array([0.3, 0.2, np.nan]), "per_class": each}, "per_class", 4)
    wanted = [0.3 * 0.5 + 0.5 * unknown[0], 0.2 * 0.25 + 0.75 * unknown[1], 0.25 * unknown[2]]
    assert list(found) == ["miou"] and found["miou"].tolist() == pytest.approx(wanted)


def test_an_evaluation_goes_on_in_seeds_and_tells_how_many_images_are_done(monkeypatch):
    asked, done = [], []

    def invert(engine, labels, pixels, captions, seeds):
        asked.append((len(pixels), list(captions), list(seeds)))

    monkeypatch.setattr(measure, "invert_for", invert)
    data, engine = open_data("demo:5@40", 32), SimpleNamespace(decoders={})
    for kind in ("true", "none"):
        settings = ScoreSettings(kind, batch_size=2, seed=7)
        assert measure.measure(engine, data, (), settings, lambda *counts: done.append(counts)) == {}
    assert done == [(2, 5), (4, 5), (5, 5)] * 2
    assert [(count, seeds) for count, _, seeds in asked] == [(2, [7, 8]), (2, [9, 10]), (1, [11])] * 2
    assert asked[1][1] == [data[2].caption, data[3].caption] and asked[4][1] == ["", ""]
    assert ScoreSettings() == ScoreSettings("true", 10, 0, (), 500, 0.95)


def test_notes_tell_how_captions_were_used_and_how_many_images_were_learnt_from():
    named = {"captions": "true", "captions_name_all": True, "named_by_captions": True, "seen_in_training": 3}
    told = measure.notes({"semantic": named, "depth": {"captions": "true", "seen_in_training": 7}})
    assert told[0] == "captions: read, and they name all that an image shows; semantic looked only for what they name"
    assert [line.partition(";")[0] for line in told[1:]] == [
        f"{task}: the training data held {count} of these images" for task, count in (("semantic", 3), ("depth", 7))
    ]
    usual = {how: measure.notes({"depth": {"captions": how}}) for how in ("true", "unread", "none")}
    assert [*usual.values()] == [["captions: read"], ["captions: text condition only"], ["captions: none"]]


def test_a_crowd_of_every_class_hides_what_is_found_of_the_last():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2], masks[1, 4:] = True, True
    meter = METRICS["instance"](SimpleNamespace(thing_classes=("pen", "mug")))
    facts = {"masks": masks[:1], "mask_classes": np.array([1]), "crowds": masks[1:]}
    item = Labelled("", np.zeros((8, 8, 3), np.uint8), "", crowd_classes=np.array([EVERY_CLASS]), **facts)
    meter.add(item, Instances(masks, np.array([1, 1]), np.float32([0.5, 0.9]), ("pen", "mug")))
    assert meter.result()["per_class"] == pytest.approx({"mug": 1.0})


def test_classes_that_are_not_seen_are_of_the_data_and_not_all_of_them():
    apart = metrics._separate_unseen
    assert (apart(("a", "b"), ("b",)), apart(("a", "b"), ("a", "b")), apart(("a",), ())) == (("b",), (), ())
    with pytest.raises(Refused, match="the data set has no class 'c'"):
        apart(("a", "b"), ("a", "c"))


def test_a_decoder_of_the_background_alone_is_compared_with_any_data():
    check = meters.check_names
    assert check("semantic", ("background",), ("mug",)) is None and check("pose", ("a",), ()) is None
    assert check("semantic", ("none", "mug"), ("background", "mug")) is None
    with pytest.raises(Refused, match="the decoder knows background, a, the data set background, mug: no class in"):
        check("semantic", ("background", "a"), ("background", "mug"))


def test_a_mean_is_over_all_classes_that_are_shown_however_few_are_asked_for():
    meter = METRICS["semantic"](SimpleNamespace(classes=("wall", "mug")))
    meter.rows += [
        np.array([[900 - k, 300 * (k == 0)], [1000, 500 * (k == 0)], [950, 400 * (k == 0)]]) for k in range(5)
    ]
    assert intervals(meter, classes=1) == intervals(meter, classes=2) == intervals(meter) != intervals(meter, classes=3)


def test_images_that_are_not_judged_count_no_things(monkeypatch):
    class Data(list):
        classes, thing_classes = ("background", "mug"), ("mug",)

    facts = {"masks": np.ones((2, 2, 2), bool), "mask_classes": np.array([0, 0])}
    item = Labelled("", np.zeros((2, 2, 3), np.uint8), "", np.full((2, 2), 255, np.uint8), **facts)
    shown = replace(item, semantic=np.ones((2, 2), np.uint8), masks=facts["masks"][:1])
    config = SimpleNamespace(task="semantic", classes=Data.classes, has_text=False, table=None)
    model = SimpleNamespace(size=2, tokenizer=None)
    engine = SimpleNamespace(decoders={"a": SimpleNamespace(config=config)}, model=model, annotate=lambda *_: None)
    monkeypatch.setattr(measure, "invert_for", lambda *_: {"a": None})
    label = SemanticMap(np.ones((2, 2), np.uint8), np.ones((2, 2), np.float32), Data.classes)
    monkeypatch.setattr(measure, "read_labels", lambda raw, images, *_: [label for _ in images])
    meter = measure.measure(engine, Data([item, shown, item]), ("a",), ScoreSettings(captions="none"))["a"]
    assert (meter.things, meter.count, meter.result()["miou"]) == ([1], 1, 1)


def test_decoders_of_one_call_and_one_kind_of_picture_share_their_captures():
    def config(task, times):
        return SimpleNamespace(task=task, capture_timestep=times)

    configs = {"depth": config("depth", None), "semantic": config("semantic", 1), "depth:b": config("depth", 1)}
    configs |= {"pose": config("pose", 1), "instance": config("instance", (9, 1)), "depth:c": config("depth", (9, 4))}
    alone = [("depth",), ("semantic", "depth:b"), ("instance",), ("depth:c",), ("pose",)]
    assert measure.passes("coco:/a", configs) == alone  # a pose decoder sees one person of COCO at a time
    assert measure.passes("demo:3", configs) == [("depth",), ("semantic", "depth:b", "pose"), *alone[2:4]]


def test_flags_of_an_evaluation_have_their_bounds():
    least, most = {"batch_size": 1, "bootstrap": 0, "threads": 0, "seed": 0}, {"seed": 2**63 - 1, "bootstrap": 10_000}
    for bounds, away, said in ((least, -1, "expected {}"), (most, 1, "expected 0 to {}")):
        for name, bound in bounds.items():
            flag = f"--{name.replace('_', '-')}"
            assert getattr(parse([flag, str(bound)], EvaluateConfig)[0], name) == bound
            with pytest.raises(Refused, match=f"{flag} {bound + away}: {said.format(bound)}"):
                parse([flag, str(bound + away)], EvaluateConfig)
    for level in (0.0, 1.0):
        with pytest.raises(Refused, match="--level: [01] is not between 0 and 1"):
            EvaluateConfig(level=level).check()
    EvaluateConfig(level=0.01).check()
    several = EvaluateConfig(data="demo:3@5, vkitti2:/a[Scene01,Scene02],coco:/my, photos").addresses
    assert several == ["demo:3@5", "vkitti2:/a[Scene01,Scene02]", "coco:/my, photos"]
    asked = EvaluateConfig(captions="none", batch_size=3, seed=4, unseen=("a",), bootstrap=5, level=0.5).group(
        ScoreSettings
    )
    assert asked == ScoreSettings("none", 3, 4, ("a",), 5, 0.5)


def test_classes_are_told_by_name_as_far_as_there_is_room():
    many = [f"c{k}" for k in range(9)]
    assert naming.describe_absent(["background", *many], {"c8"}) == f"no image shows {', '.join(many[:8])}"
    assert naming.describe_absent(many, ()) == f"no image shows {', '.join(many[:8])} and 1 more"
    assert (
        naming.describe_absent(["background", "a"], {"a"}) == "" == naming.describe_unknown(["background", "a"], ["a"])
    )
    told = naming.describe_unknown(["background", "a", "b"], ["a"])
    assert told.startswith("the decoder has no class b, so these count as missed; --class-names")
    shared = naming.in_common(
        {"per_class": {"background": 1.0, "a": 0.5, "b": 0.2, "c": 0.7}}, ["background", "a", "c"]
    )
    assert shared == {"in_common": pytest.approx(0.6), "classes_in_common": 2} and naming.in_common({}, ["a"]) == {}


def test_pairs_of_class_names_are_read_or_refused():
    data = [SimpleNamespace(classes=["sky"], thing_classes=["cat"])]
    assert naming.parse_names([" cat = dog ", "auto", "sky=air"], data) == {"cat": "dog", "sky": "air"}
    for pair in ("cat", "cat=", "bird=dog"):
        with pytest.raises(Refused, match=f"--class-names {pair}: .* of the data .cat, sky."):
            naming.parse_names([pair], data)


def test_figures_are_a_table_with_those_of_each_class_and_number_of_things():
    by_things = {"1": {"pck": 0.75, "images": 1}, "2": {"pck": 0.25, "images": 3}}
    figures = {"pck": 0.5, "images": 4, "captions": "none", "per_joint": {"left wrist": 1.0}, "by_things": by_things}
    assert measure.figures_table({"pose": figures}, 0.9).splitlines() == [
        "task  figure                            value",
        "pose  PCK@0.1                          0.5000",
        "pose    left wrist                     1.0000",
        "pose    PCK@0.1 of 1 thing, 1 image    0.7500",
        "pose    PCK@0.1 of 2 things, 3 images  0.2500",
        "captions: none",
    ]
    told = measure.figures_table({"pose": figures | {"intervals": {"pck": [0.25, 0.75]}}}, 0.9).splitlines()
    assert told[0].endswith("   value   90% interval") and told[1].endswith("0.5000   0.2500 to 0.7500")
    assert told[2].endswith("1.0000")


def test_everything_called_wall_scores_the_share_of_wall(source):
    result = scored(
        source, lambda task, label: replace(label, labels=np.zeros_like(label.labels)) if task == "semantic" else label
    )
    wall = np.mean([(item.semantic == 0).mean() for item in source])
    assert result["semantic"]["per_class"]["wall"] == pytest.approx(wall)
    assert result["semantic"]["per_class"]["table"] == 0


def test_classes_that_the_data_lack_are_their_background(source):
    item = source[0]
    things = np.where(item.semantic > 1, item.semantic - 1, 0).astype(np.uint8)
    meter = METRICS["semantic"](SimpleNamespace(classes=("background", *source.thing_classes)))
    meter.add(replace(item, semantic=things), perfect(source, item)["semantic"])  # which tells wall from table
    assert meter.result()["miou"] == 1


def test_a_class_that_no_truth_shows_has_no_figure_however_much_of_it_is_predicted(source):
    item, labels = source[0], perfect(source, source[0])["semantic"]
    meter = METRICS["semantic"](SimpleNamespace(classes=("wall", "table", "mug")))
    half = np.where(np.arange(SIZE) % 2, 1, 0).astype(np.uint8)[None].repeat(SIZE, 0)
    meter.add(replace(item, semantic=np.zeros_like(half)), replace(labels, labels=half, classes=("wall", "mug")))
    assert meter.result() == {"miou": 0.5, "per_class": {"wall": 0.5}}


def test_missing_everything_scores_nothing(source):
    def gone(task, label):
        if task == "instance":
            return replace(label, masks=label.masks[:0], class_ids=label.class_ids[:0], scores=label.scores[:0])
        return (
            replace(label, points=label.points[:0], visibility=label.visibility[:0], scores=label.scores[:0])
            if task == "pose"
            else label
        )

    result = scored(source, gone)
    assert result["instance"]["ap"] == result["instance"]["ap50"] == 0 and not any(
        result["instance"]["per_class"].values()
    )
    assert result["pose"]["pck"] == 0 and result["pose"]["oks_ap"] == 0


@pytest.mark.parametrize("largest", [0, 1])
def test_joints_are_counted_of_the_largest_person(source, largest):
    item = next(item for item in source if len(item.keypoints))
    apart = item.keypoints[[0, 0]] + np.float32([[[0, 0, 0]], [[SIZE, 0, 0]]])
    areas = np.float32([100, 100])
    areas[largest] = 400
    both = replace(item, keypoints=apart, keypoint_boxes=item.keypoint_boxes[[0, 0]], keypoint_areas=areas)
    meter, label = METRICS["pose"](source), perfect(source, replace(item, keypoints=apart[[largest]]))["pose"]
    meter.add(both, label)
    assert meter.result()["pck"] == 1


def test_a_joint_that_is_called_absent_is_not_found(source):
    item = next(item for item in source if len(item.keypoints) and (item.keypoints[0, :, 2] > 0).all())
    item = replace(
        item, keypoints=item.keypoints[:1], keypoint_boxes=item.keypoint_boxes[:1], keypoint_areas=np.ones(1)
    )
    label, meter = perfect(source, item)["pose"], METRICS["pose"](source)
    meter.add(item, replace(label, visibility=np.int64([[2] + [0] * (len(source.joints) - 1)])))
    assert meter.result()["pck"] == pytest.approx(1 / len(source.joints))


def test_joints_are_judged_by_hand():
    """PCK: a tenth of the longer side of a box, of the first person that is predicted. OKS: the mean over the labelled
    joints of exp(-d^2 / (2 area (2 x 0.072)^2)), here 0.82; a person without any of these is neither right nor wrong.
    """
    meter, image = METRICS["pose"](SimpleNamespace(joints=("head", "hand", "foot"))), np.zeros((64, 64, 3), np.uint8)
    shown = np.float32([[[10, 10, 2], [20, 20, 1], [0, 0, 0]]])
    near = np.float32([[[14, 10, 1], [20, 24.1, 1], [0, 0, 1]], [[10, 10, 1], [20, 20, 1], [0, 0, 1]]])
    for keypoints, count in ((shown, 2), (shown * np.float32([1, 1, 0]), 1)):
        person = {"keypoint_boxes": np.float32([[5, 5, 20, 40]]), "keypoint_areas": np.float32([2000])}
        found = Keypoints(near[:count], np.full((count, 3), 2), np.float32([0.9, 0.8])[:count], meter.joints)
        meter.add(Labelled("", image, "", keypoints=keypoints, **person), found)
    result = meter.result()
    assert result.pop("per_joint") == {"head": 1.0, "hand": 0.0}
    # at seven of the ten levels the first one is right; above them the second, after one that is wrong
    assert result == pytest.approx({"pck": 0.5, "oks_ap": (7 + 3 / 2) / 10, "oks_ap50": 1.0})
    assert meter.telling == 1 and meter.count_images().tolist() == [1, 1, 0]
    assert METRICS["pose"](SimpleNamespace(joints=COCO_JOINTS)).sigmas is None  # those of COCO


def test_words_that_a_decoder_was_not_taught_are_unseen_unless_all_are():
    source = SimpleNamespace(thing_classes=("mug", "pen", "key"))

    def unseen(taught, *asked):
        config = SimpleNamespace(classes=taught)
        return METRICS["open-vocabulary"].judging(source, config, asked).unseen.tolist()

    assert unseen(("mug", "pen")) == [False, False, True] and unseen(("mug", "pen"), "mug") == [True, False, False]
    assert unseen(()) == unseen(("owl",)) == unseen(("mug",), "mug", "pen", "key") == [False] * 3


def test_what_no_image_shows_has_no_figure(source):
    item = source[0]
    nobody = replace(
        item,
        masks=item.masks[:0],
        mask_classes=item.mask_classes[:0],
        keypoints=item.keypoints[:0],
        keypoint_boxes=item.keypoint_boxes[:0],
        keypoint_areas=item.keypoint_areas[:0],
    )
    for task in ("instance", "pose"):
        meter = METRICS[task](source)
        for _ in range(3):
            meter.add(nobody, perfect(source, item)[task])
        assert meter.result() == {} and intervals(meter, 50) == {}
        with pytest.raises(Refused, match="no image has the ground truth"):
            check_count(meter)
    absent = [name for k, name in enumerate(source.classes) if k not in item.semantic]
    meter = METRICS["semantic"](source, unseen=absent)
    for _ in range(3):
        meter.add(item, perfect(source, item)["semantic"])
    assert {"miou", "seen"} <= set(meter.result()) and not {"unseen", "harmonic"} & set(meter.result())
    assert not {"unseen", "harmonic"} & set(intervals(meter, 50))
    assert set(meter.not_shown(meter.result())) == set(absent)


def test_joints_half_a_box_away_are_wrong(source):
    result = scored(
        source,
        lambda task, label: (
            replace(label, points=label.points + np.float32([SIZE / 2, 0, 0])) if task == "pose" else label
        ),
    )
    assert result["pose"]["pck"] == 0


def wrong_in_many_ways(source, seed=3, digits=1):
    """Labels with every kind of mistake: moved, missed, doubled, of another class; with one digit, scores that tie."""
    random = np.random.default_rng(seed)

    def change(task, label):
        if task == "instance":
            masks = np.stack(
                [np.roll(mask, random.integers(-3, 4), random.integers(2)) for mask in label.masks for _ in range(3)]
            )
            classes = np.repeat(label.class_ids, 3)
            classes = np.where(
                random.random(len(classes)) < 0.3,
                random.integers(len(source.thing_classes), size=len(classes)),
                classes,
            )
            kept = random.random(len(classes)) < 0.8
            scores = np.round(random.random(len(classes)), digits).astype(np.float32)
            return replace(label, masks=masks[kept], class_ids=classes[kept], scores=scores[kept])
        if task == "pose":
            return replace(label, points=label.points + random.normal(0, 2, label.points.shape).astype(np.float32))
        return label

    return change


def meters_of(source, change):
    meters = {task: metric(source) for task, metric in METRICS.items()}
    for item in source:
        for task, label in perfect(source, item).items():
            meters[task].add(item, change(task, label))
    return meters


@pytest.mark.parametrize("task, kind", [("instance", "segm"), ("pose", "keypoints")])
def test_average_precision_is_pycocotools_own(task, kind, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source = open_data("demo:30@40", SIZE)
    meter = meters_of(source, wrong_in_many_ways(source))[task]
    truth = COCO()
    truth.dataset = {"info": {}, "images": meter.images, "categories": meter.categories, "annotations": meter.truth}
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes([dict(row) for row in meter.predicted]), kind)
    if meter.sigmas is not None:
        judge.params.kpt_oks_sigmas = meter.sigmas
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    result, names = meter.result(), {"instance": ("ap", "ap50", "ap75"), "pose": ("oks_ap", "oks_ap50")}[task]
    assert 0.05 < judge.stats[0] < 0.95
    assert [result[name] for name in names] == pytest.approx(list(judge.stats[: len(names)]), abs=1e-12)
    if task == "instance":
        precision = judge.eval["precision"][:, :, :, 0, -1]
        assert list(result["per_class"].values()) == pytest.approx(
            [precision[:, :, k].mean() for k in range(7) if (precision[:, :, k] > -1).all()], abs=1e-12
        )


def test_an_image_drawn_twice_counts_twice():
    source = open_data("demo:10@40", SIZE)
    doubled = [source[k] for k in range(10)] + [source[k] for k in (2, 2, 5)]
    for task in METRICS:
        change = wrong_in_many_ways(source, 5, digits=7)
        labels = {item.id: change(task, perfect(source, item)[task]) for item in source}
        once, twice = METRICS[task](source), METRICS[task](source)
        for item in source:
            once.add(item, labels[item.id])
        for item in doubled:
            twice.add(item, labels[item.id])
        weights = np.ones((1, once.count))
        weights[0, 2], weights[0, 5] = 3, 2
        found, wanted = once.figures(weights), twice.figures(np.ones((1, twice.count)))
        for name in found:
            assert found[name] == pytest.approx(wanted[name], nan_ok=True, abs=1e-9), (task, name)


def test_intervals_hold_the_figure_and_narrow_with_more_images():
    widths = []
    for count in (12, 60):
        source = open_data(f"demo:{count}@40", SIZE)
        meters = meters_of(source, wrong_in_many_ways(source))
        for task, meter in meters.items():
            result, bounds = meter.result(), intervals(meter, 200)
            for name, value in result.items():
                pairs = (
                    [(value, bounds.get(name, (value, value)))]
                    if isinstance(value, float)
                    else [(value[key], bounds[name][key]) for key in value if key in bounds[name]]
                )
                assert all(low - 1e-9 <= one <= high + 1e-9 for one, (low, high) in pairs), (task, name)
        assert intervals(meters["instance"], 50) == intervals(meters["instance"], 50)
        widths.append(np.diff(intervals(meters["instance"], 200)["ap"])[0])
    assert 0 < widths[1] < 0.8 * widths[0]


def test_intervals_of_folds_are_wider():
    """Five decoders judge a fifth each: their variance is (1/5 + 1/4) / (1/5) times that of one decoder."""
    source = open_data("demo:60@40", SIZE)
    meter = meters_of(source, wrong_in_many_ways(source))["semantic"]
    one, five = (np.diff(intervals(meter, 20_000, folds=folds)["miou"])[0] for folds in (0, 5))
    assert 1.4 < five / one < 1.8
    narrow, wide = (intervals(meter, 2000, folds=folds)["per_class"] for folds in (0, 5))
    assert all(np.diff(wide[name]) > np.diff(narrow[name]) for name in narrow) and len(narrow) > 2
    assert expanded_level(0.95, 40, 5) > expanded_level(0.95, 40, 10) > expanded_level(0.95, 40)


def test_a_class_that_one_image_shows_has_no_interval():
    """Its draws are all alike, which would look like certainty; those of a class in few images are moved far out."""
    source = open_data("demo:5@40", SIZE)
    meters = meters_of(source, wrong_in_many_ways(source))
    for task in ("semantic", "instance", "pose"):
        meter = meters[task]
        assert meter.count_images().tolist() == Meter.count_images(meter).tolist()
        counts = dict(zip(meter.columns, meter.count_images().tolist(), strict=True))
        found = intervals(meter)[meter.each]
        assert set(found) == {name for name, count in counts.items() if count > 1}, task
        for name, values in zip(meter.columns, meter.draws(2000)[meter.each].T, strict=True):
            if name in found:
                low, high = np.nanquantile(values, [0.025, 0.975])
                assert found[name][0] <= low + 1e-6 and np.diff(found[name]) > high - low - 1e-6, (task, name)
    counts = meters["semantic"].count_images()
    assert 1 in counts and counts.max() == 5
    two = METRICS["semantic"](SimpleNamespace(classes=("wall", "mug")))
    two.rows += [np.array([[900, mug // 2], [1000, mug], [1000, mug]]) for mug in (0, 500)]
    assert set(intervals(two)["per_class"]) == {"wall"}  # a quarter of the draws of two images has no mug
    two.rows += [two.rows[1], *[two.rows[0]] * 17]
    assert set(intervals(two)["per_class"]) == {"wall", "mug"}  # which an eighth of the draws of 20 images lacks
    assert expanded_level(0.95, 2) > expanded_level(0.95, 6) > expanded_level(0.95, 200) > 0.95


def test_intervals_of_few_images_allow_for_classes_that_none_of_them_shows():
    """A decoder that fails at three rare classes: few images show these, and the others say nothing about them."""

    class Source:
        classes = ("wall", "table", "mug", "pen", "key")

    random, shares, quality = np.random.default_rng(0), (1, 1, 0.2, 0.2, 0.2), np.array([0.9, 0.8, 0.2, 0.1, 0.3])
    held, plain, images = 0, 0, 4
    for _ in range(60):
        meter = METRICS["semantic"](Source)
        for _ in range(images):
            pixels = 1000 * (random.random(5) < shares)
            meter.rows.append(np.stack([pixels * quality, pixels, pixels]).astype(np.int64))
        low, high = intervals(meter, classes=len(quality))["miou"]
        assert low <= meter.result()["miou"] <= high
        held += low <= quality.mean() <= high
        low, high = np.quantile(meter.draws(2000)["miou"], np.array([-1, 1]) * expanded_level(0.95, images) / 2 + 0.5)
        plain += low <= quality.mean() <= high
    assert held >= 57 and plain < 40, (held, plain)


def test_intervals_of_few_images_allow_for_failures_that_none_of_them_shows():
    """One person in twelve is not found, and a third of the images show a person."""

    class Source:
        joints = ("head", "left_hand", "right_hand")

    random, share, images = np.random.default_rng(0), 11 / 12, 40
    held, plain, joints = 0, 0, 0
    for _ in range(60):
        meter = METRICS["pose"](Source)
        for number in range(images):
            meter.images.append({"id": number})
            has_person, is_found = random.random(2) < (1 / 3, share)
            meter.rows.append(np.array([[has_person * is_found] * 3, [has_person] * 3], float))
        meter.precision = lambda weights: np.full((len(weights), 1, 10), 0.5)  # joints alone are judged here
        found = intervals(meter)
        held += found["pck"][0] <= share <= found["pck"][1]
        joints += all(low <= share <= high for low, high in found["per_joint"].values())
        low, high = np.nanquantile(meter.draws(2000)["pck"], [0.025, 0.975])
        plain += low <= share <= high
        assert meter.telling < images
    assert held >= 57 and joints >= 57 and plain < 50, (held, joints, plain)


def test_intervals_of_shares_of_depth_allow_for_an_image_that_fails():
    """Of one image in twelve the depth is wrong by more than a factor of 1.25."""
    random, share, held, plain = np.random.default_rng(0), 11 / 12, 0, 0
    for _ in range(60):
        meter = METRICS["depth"](None)
        meter.rows = [(0.1, 0.1, float(is_near), 1.0, 1.0) for is_near in random.random(15) < share]
        found = intervals(meter)
        low, high = found.get("delta_1.25", (1, 1))
        held += low <= share <= high
        low, high = np.nanquantile(meter.draws(2000)["delta_1.25"], [0.025, 0.975])
        plain += low <= share <= high
        assert found["delta_1.25_2"][0] < 0.99 and np.ptp(found["absrel"]) < 1e-9
    assert held >= 57 and plain < 50, (held, plain)


def test_an_interval_of_means_is_the_textbooks_one():
    """The mean of n independent errors has a 95 % interval of 2 x 1.96 standard errors."""
    source, random = open_data("demo:1@40", SIZE), np.random.default_rng(0)
    meter, item = METRICS["depth"](source), source[0]
    errors = random.normal(0.2, 0.05, 400)
    for error in errors:
        meter.add(item, DepthMap(item.depth * (1 + np.float32(error)), source.max_depth))
    low, high = intervals(meter)["absrel"]
    assert high - low == pytest.approx(2 * 1.96 * errors.std() / 20, rel=0.1)


@pytest.mark.parametrize("task", ["semantic", "open-vocabulary"])
def test_seen_unseen_and_their_harmonic_mean(source, task):
    unseen = ("ring", "star", "person")
    meter, plain = METRICS[task](source, unseen=unseen), METRICS[task](source)
    for item in source:
        label = perfect(source, item)[task]
        gone = [label.classes.index(name) for name in unseen]
        half = np.isin(label.labels, gone) & (np.arange(SIZE)[:, None] % 2 == 0)
        label = replace(label, labels=np.where(half, 0, label.labels))
        meter.add(item, label)
        plain.add(item, label)
    result = meter.result()
    each = plain.result()["per_class"]
    seen, missed = (
        np.mean([value for name, value in each.items() if (name in unseen) is is_unseen]) for is_unseen in (False, True)
    )
    assert result["seen"] == pytest.approx(seen) and result["unseen"] == pytest.approx(missed) and 0.3 < missed < 0.7
    assert result["harmonic"] == pytest.approx(2 * seen * missed / (seen + missed)) and "harmonic" not in plain.result()


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong(source):
    item = next(item for item in source if len(item.masks) >= 2)
    found = Instances(
        item.masks,
        np.zeros(len(item.masks), np.int64),
        np.linspace(0.9, 0.8, len(item.masks), dtype=np.float32),
        source.thing_classes,
    )
    rest = replace(item, masks=item.masks[1:], mask_classes=found.class_ids[1:])
    with_crowd, without = METRICS["instance"](source), METRICS["instance"](source)
    with_crowd.add(replace(rest, crowds=item.masks[:1], crowd_classes=found.class_ids[:1]), found)
    without.add(rest, found)
    assert with_crowd.result()["ap"] == pytest.approx(1) and without.result()["ap"] < 0.9


def test_a_crowd_of_every_class_hides_what_is_found_of_any(source):
    item = next(item for item in source if len(item.masks) >= 2)
    kinds, scores = np.zeros(len(item.masks), np.int64), np.linspace(0.9, 0.8, len(item.masks), dtype=np.float32)
    found = Instances(item.masks, kinds, scores, source.thing_classes)
    figures = {}
    for kind in (EVERY_CLASS, 2):
        crowds = {"crowds": item.masks[:1], "crowd_classes": np.array([kind])}
        truth = replace(item, masks=item.masks[1:], mask_classes=kinds[1:], **crowds)
        numbered = Examples(source, student_data.vocabulary_of(source), "instance")._numbered(truth)
        meter = METRICS["instance"](source)
        meter.add(mirror(mirror(numbered, source), source), found)
        figures[kind] = meter.result()["ap"]
    assert figures[EVERY_CLASS] == pytest.approx(1) and figures[2] < 0.9


def test_what_an_image_was_not_searched_for_is_neither_right_nor_wrong(source):
    """As lvis-api has it: answers of unknown classes are left out, those of a class with more things ignored."""
    item = next(item for item in source if len(set(item.mask_classes)) >= 2)
    own = item.mask_classes == item.mask_classes[0]
    truth = replace(item, masks=item.masks[own], mask_classes=item.mask_classes[own])
    scores = np.where(own, 0.5, 0.9).astype(np.float32)
    things = Instances(item.masks, item.mask_classes, scores, source.thing_classes)
    twice = replace(  # another thing of the class that is there, surer than the true ones
        things,
        masks=np.concatenate([np.roll(item.masks[:1], 30, 2), item.masks[own]]),
        class_ids=np.concatenate([item.mask_classes[:1], item.mask_classes[own]]),
        scores=np.array([0.95, *scores[own]], np.float32),
    )
    kind, vocabulary = int(item.mask_classes[0]), student_data.vocabulary_of(source)

    def found(given, **more):
        meter = METRICS["instance"](source)
        meter.add(Examples(source, vocabulary, "instance")._numbered(replace(truth, **more)), given)
        return meter

    assert (
        len(found(things).predicted) == len(item.masks) and len(found(things, searched=(kind,)).predicted) == own.sum()
    )
    assert found(twice).result()["ap"] < 0.9 and found(twice, not_exhausted=(kind,)).result()["ap"] == pytest.approx(1)


def test_a_word_that_an_image_was_not_searched_for_or_that_lies_in_a_crowd_costs_nothing(source):
    item = next(item for item in source if len(set(item.mask_classes)) >= 2)
    item = replace(item, image=item.image[8:], masks=item.masks[:, 8:])  # no square
    kind, own = int(item.mask_classes[0]), item.mask_classes == item.mask_classes[0]
    labels = np.zeros(item.image.shape[:2], np.uint8)
    for mask, k in zip(item.masks, item.mask_classes):
        labels[mask] = k + 1
    shown = {"semantic": None, "masks": item.masks[own], "mask_classes": item.mask_classes[own]}

    def miou(words=labels, **more):
        meter, names = METRICS["open-vocabulary"](source), ("none", *source.thing_classes)
        meter.add(replace(item, **shown, **more), SemanticMap(words, np.ones(words.shape, np.float32), names))
        return meter.result()["miou"]

    crowds = {"crowds": item.masks[~own], "crowd_classes": item.mask_classes[~own]}
    assert miou() < 0.6 and miou(searched=(kind,)) == miou(**crowds) == pytest.approx(1)
    more = np.where(np.roll(item.masks[0], 30, 1), kind + 1, labels).astype(np.uint8)
    assert miou(more, searched=(kind,)) < 0.9
    assert miou(more, searched=(kind,), not_exhausted=(kind,)) == pytest.approx(1)


def test_classes_are_compared_by_name(source):
    names = ("sky", *reversed(source.classes))
    meter = METRICS["semantic"](source)
    for item in source:
        label = perfect(source, item)["semantic"]
        meter.add(item, replace(label, labels=(len(source.classes) - label.labels).astype(np.uint8), classes=names))
    assert meter.result()["miou"] == 1
    things = ("cloud", *reversed(source.thing_classes))
    meter = METRICS["instance"](source)
    for item in source:
        label = perfect(source, item)["instance"]
        meter.add(item, replace(label, class_ids=len(source.thing_classes) - label.class_ids, classes=things))
    assert meter.result()["ap"] == pytest.approx(1)


@pytest.mark.parametrize("spec", ["demo:0", "demo:x", "demo:", "demo", "demo:5@-1"])
def test_bad_demo_specifications_are_refused(spec):
    with pytest.raises(Refused, match="demo:COUNT@FIRST_SEED"):
        open_data(spec, SIZE)


def test_an_unknown_reader_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(Refused, match="the kind of this data set is missing") as stop:
        open_data(str(tmp_path), SIZE)
    assert f"Write folder:{tmp_path} for images/" in stop.value.remedy
    with pytest.raises(Refused, match="(?s)no reader is called 'dem'.*did you mean demo"):
        open_data("dem:5", SIZE)


def test_figures_are_told_by_the_number_of_things(source):
    meter = METRICS["semantic"](source)
    for k in range(12):
        item = source[k]
        flat = np.zeros_like(item.semantic)
        told = item.semantic if len(item.masks) == 1 else flat
        meter.add(item, SemanticMap(told, np.ones(told.shape, np.float32), source.classes))
        meter.things.append(len(item.masks))
    found = meter.by_things()
    assert found["1"]["miou"] == 1 and all(own["miou"] < 0.5 for count, own in found.items() if count != "1")
    assert sum(own["images"] for own in found.values()) == 12 and len(found) > 1
    assert METRICS["depth"](source).by_things() == {}


@pytest.mark.parametrize("things", [(1, 1), (1, 2), (0, 1, 2, 4)])
def test_numbers_of_things_are_told_where_they_differ(source, things):
    meter = METRICS["semantic"](source)
    for k, count in enumerate(things):
        meter.add(source[k], perfect(source, source[k])["semantic"])
        meter.things.append(count)
    told = measure.figures(meter, 0, 0.95).get("by_things", {})
    assert list(told) == ([] if len({*things}) == 1 else [str(count) for count in things if count])


def test_intervals_of_few_held_out_images_are_wide():
    random, held = np.random.default_rng(0), {4: 0, 40: 0}
    for count in held:
        for _ in range(60):
            meter = METRICS["depth"](None)
            meter.rows = [(float(value), 0.0, 0.0, 0.0, 0.0) for value in random.normal(1.0, 0.2, count)]
            low, high = intervals(meter)["absrel"]
            held[count] += low <= 1.0 <= high
    assert held[4] >= 50 and held[40] >= 54  # of 60, where plain percentiles hold 44 and 56 or fewer
    meter.rows = meter.rows[:1]
    assert intervals(meter) == {}
    meter.rows = [(1.0, 0.0, 0.0, 0.0, 0.0)] * 5
    assert "absrel" not in intervals(meter)  # five images that agree do not make a figure certain


def test_what_to_know_of_a_figure():
    assert cautions({"images": 30, "held_out_images": 30}) == []
    assert len(cautions({"images": 90, "held_out_images": 29, "step_chosen_on_held_out": True})) == 2
    assert "raise --held-out" in cautions({"images": 59, "held_out_images": 1})[0]
    assert "raise --held-out" not in cautions({"images": 58, "held_out_images": 1})[0]
    assert "--folds 2 " in cautions({"images": 9, "held_out_images": 0})[0]  # of fewer than ten
    assert "--folds 5 " in cautions({"images": 10, "held_out_images": 0})[0]
    five = cautions({"images": 90, "held_out_images": 30, "not_shown": list("abcde")})
    assert five[0].startswith("no held-out image shows a, b, c, d, e: means")
    few = {"images": 36, "held_out_images": 4, "not_shown": ["mug"], "named_by_captions": True}
    notes = cautions(few)
    assert len(notes) == 3 and "--folds auto" in notes[0] and "raise --held-out" not in notes[0]
    assert (
        notes[1].startswith("no held-out image shows mug: means leave it out, and intervals allow")
        and "--captions unread" in notes[2]
    )
    assert "raise --held-out to 30" in cautions({"images": 56, "held_out_images": 4})[0]
    assert "--folds" not in cautions({"images": 1, "held_out_images": 0})[0]
    assert "--folds" not in cautions({"images": 12, "held_out_images": 0, "unrelated_images": 1})[0]
    three = {"images": 12, "held_out_images": 0, "unrelated_images": 3, "named_by_captions": True}
    assert len(cautions(three)) == 1 and "--folds 3 measures" in cautions(three)[0]
    assert "(3 more trainings)" in cautions(three | {"held_out_images": 4})[0]
    assert "--captions unread" in cautions(three, has_folds=True)[1]
    assert cautions(three, has_folds=True)[0].endswith("held out to measure it: see the figures of cross-validation")
    assert cautions(three | {"held_out_images": 4}, True)[0].endswith("rely on: see those of cross-validation")
    told = cautions({"images": 90, "held_out_images": 30, "outlines": "image"})
    assert len(told) == 1 and "figures of single steps were measured without them" in told[0]
    many = cautions({"images": 90, "held_out_images": 30, "not_shown": list("abcdefg")})
    assert len(many) == 1 and many[0].startswith(
        "no held-out image shows a, b, c, d, e and 2 more: means leave them out"
    )


@pytest.mark.parametrize("captions", ["true", "unread", "none"])
def test_how_captions_were_used_is_told_and_they_are_made_with_the_words_of_a_decoder(source, monkeypatch, captions):
    shared = {"task": "depth", "classes": (), "has_text": False, "capture_timestep": 1}
    configs = {
        "depth": SimpleNamespace(table=None, named=(), **shared),
        "depth:b": SimpleNamespace(table="words", named=("ball",), **shared),
    }
    engine = SimpleNamespace(decoders={label: SimpleNamespace(config=config) for label, config in configs.items()})
    seen = SimpleNamespace(captions_name_all=True, skipped={"a.png": "cut short"}, classes=(), thing_classes=())
    meter = METRICS["depth"](source)
    meter.rows.append((0.1, 0.01, 1.0, 1.0, 1.0))
    monkeypatch.setattr(measure.data_record, "count_seen_in_training", lambda *_: {"depth:b": 3})
    monkeypatch.setattr(measure, "measure", lambda *_: dict.fromkeys(configs, meter))
    settings = ScoreSettings(captions=captions, bootstrap=0)
    result, skipped = measure.evaluate_decoders(engine, "out", "demo:1", ["depth"], (), lambda *_: seen, settings)
    told = {"absrel": 0.1, "captions": captions, "captions_name_all": captions == "true"}
    assert result["depth"].items() >= (told | {"named_by_captions": False}).items()
    assert result["depth:b"].items() >= {"named_by_captions": captions == "true", "seen_in_training": 3}.items()
    assert "seen_in_training" not in result["depth"] and skipped == seen.skipped and seen.class_table == "words"
    parts = [SimpleNamespace(**vars(seen) | {"skipped": {name: "cut short"}}) for name in ("b.png", "c.png")]
    monkeypatch.setattr(measure, "passes", lambda address, configs: [(label,) for label in configs])
    arguments = (engine, "out", "demo:1", ["depth"], (), lambda *_: parts.pop(0), settings)
    assert measure.evaluate_decoders(*arguments)[1] == {"b.png": "cut short", "c.png": "cut short"}


@pytest.mark.parametrize(
    ("facts", "shown", "lines"),
    [
        ({}, {"mug": 0.5}, ["the decoder has no class cup,", "no image shows jug"]),
        ({"classes": ("background", "mug", "cup")}, {"mug": 0.5, "cup": 0.1}, []),
        ({}, {"cup": 0.5, "background": 0.9}, None),
        ({"has_text": True}, {"cup": 0.5}, []),
        ({"classes": ()}, {"cup": 0.5}, []),
    ],
)
def test_names_of_a_decoder_are_compared_with_those_that_images_show(facts, shown, lines):
    usual = {"task": "semantic", "classes": ("background", "mug", "jug"), "has_text": False}
    meter = METRICS["semantic"](SimpleNamespace(classes=("background", "mug", "cup")))
    config = SimpleNamespace(**usual | facts)
    with pytest.raises(Refused, match="no class in common") if lines is None else nullcontext():
        told = measure._compare_names(meter, config, {"per_class": shown})
        assert len(told) == len(lines) and all(line.startswith(start) for line, start in zip(told, lines))
    assert measure._compare_names(Meter(), config, {"f1": 1.0}) == []  # of another package, with figures of no class
    meter.each = "per_joint"
    assert measure._compare_names(meter, config, {"per_class": {"cup": 1.0}}) == []


def test_decoders_that_find_nothing_to_be_compared_with_are_refused(source, monkeypatch):
    config = SimpleNamespace(task="depth", classes=(), joints=(), table=None, timesteps=None, timestep=None)
    engine, settings = SimpleNamespace(decoders={"depth": SimpleNamespace(config=config)}), ScoreSettings()

    def evaluate(tasks, requested=()):
        measure.evaluate_decoders(engine, "out", "demo:12", tasks, requested, lambda *_: source, settings)

    with pytest.raises(Refused, match="demo:12: ground truth for pose, semantic, but only decoders for depth"):
        evaluate(("pose", "semantic"))
    monkeypatch.setattr(measure, "passes", lambda address, configs: [tuple(configs)])
    monkeypatch.setattr(measure, "measure", lambda *_: {"depth": SimpleNamespace(result=dict)})
    with pytest.raises(Refused, match="no image has the ground truth to compare with"):
        evaluate(("depth",))


def test_every_candidate_of_a_decoder_is_ranked_however_unsure_it_is():
    config = make_dataclass("Config", ("score_threshold", "other"), frozen=True)(0.5, 1)
    assert METRICS["instance"].reading(config) == replace(config, score_threshold=0.0)
    assert METRICS["semantic"].reading(config) is config
