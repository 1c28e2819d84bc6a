"""Figures of merit: one on the truth itself, known values on known mistakes."""

from dataclasses import replace

import numpy as np
import pytest

from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.errors import Refused
from datasetdm_fast.metrics import METRICS
from datasetdm_fast.readers import open_data

SIZE = 64


@pytest.fixture(scope="module")
def source():
    return open_data("demo:12@40", SIZE)


def perfect(source, item):
    shape, people = item.image.shape[:2], len(item.keypoints)
    score = np.where(item.keypoints[..., 2:] > 0, 1.0, 0.0).astype(np.float32)
    return {
        "semantic": SemanticMap(item.semantic, np.ones(shape, np.float32), source.classes),
        "instance": Instances(item.masks, item.mask_classes, np.ones(len(item.masks), np.float32), source.thing_classes),
        "depth": DepthMap(item.depth, source.max_depth),
        "pose": Keypoints(np.concatenate([item.keypoints[..., :2], score], -1), np.where(score[..., 0] > 0, 2, 0), np.ones(people, np.float32), source.joints),
        "open-vocabulary": SemanticMap(
            np.where(item.semantic > 1, item.semantic - 1, 0).astype(np.uint8), np.ones(shape, np.float32), ("none", *source.thing_classes)
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
    assert result["depth"] == {"absrel": 0, "rmse": 0, "delta_1.25": 1}
    assert result["pose"]["pck"] == 1 and result["pose"]["oks_ap"] == pytest.approx(1)


def test_ten_percent_too_far_is_an_absrel_of_a_tenth(source):
    result = scored(source, lambda task, label: replace(label, metres=label.metres * 1.1) if task == "depth" else label)
    assert result["depth"]["absrel"] == pytest.approx(0.1, abs=1e-6)


def test_everything_called_wall_scores_the_share_of_wall(source):
    result = scored(source, lambda task, label: replace(label, labels=np.zeros_like(label.labels)) if task == "semantic" else label)
    wall = np.mean([(item.semantic == 0).mean() for item in source])
    assert result["semantic"]["per_class"]["wall"] == pytest.approx(wall)
    assert result["semantic"]["per_class"]["table"] == 0


def test_missing_everything_scores_nothing(source):
    def gone(task, label):
        if task == "instance":
            return replace(label, masks=label.masks[:0], class_ids=label.class_ids[:0], scores=label.scores[:0])
        return replace(label, points=label.points[:0], visibility=label.visibility[:0], scores=label.scores[:0]) if task == "pose" else label

    result = scored(source, gone)
    assert result["instance"] == {"ap": 0.0, "ap50": 0.0}
    assert result["pose"]["pck"] == 0 and result["pose"]["oks_ap"] == 0


def test_joints_half_a_box_away_are_wrong(source):
    result = scored(source, lambda task, label: replace(label, points=label.points + np.float32([SIZE / 2, 0, 0])) if task == "pose" else label)
    assert result["pose"]["pck"] == 0


@pytest.mark.parametrize("spec", ["demo:0", "demo:x", "demo:", "demo", "demo:5@-1"])
def test_bad_demo_specifications_are_refused(spec):
    with pytest.raises(Refused, match="demo:COUNT@FIRST_SEED"):
        open_data(spec, SIZE)


def test_an_unknown_reader_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match="(?s)no reader is called 'dem'.*did you mean demo"):
        open_data("dem:5", SIZE)
