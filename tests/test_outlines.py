"""Outlines that follow the image: the C++ filters against plain NumPy, and where their labels go."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from datasetdm_fast import _C, evaluate, generate, label
from datasetdm_fast.data import IGNORE, DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.engine.decoders.config import DecoderConfig, upstream
from datasetdm_fast.engine.labels import LABEL_KINDS, with_outlines
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.predictions import choose_outlines
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.settings import TrainConfig, ViewSettings
from datasetdm_fast.training.truth.augment import Augmentation

pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")

REACH = 4


def fading(ratio):
    return 1 / (1 + ratio) ** 2


def weights(image):
    """[H, W, 9, 9]: how much each neighbour of each pixel counts, 0 beyond the border and for every other one."""
    margins = (REACH, REACH), (REACH, REACH), (0, 0)
    near, inside = np.pad(image.astype(float), margins), np.pad(image[..., 0] >= 0, REACH)
    found = np.zeros((*image.shape[:2], 9, 9))
    for v, u in np.ndindex(9, 9):
        if (v + u) % 2 == 0:
            place = slice(v, v + len(image)), slice(u, u + image.shape[1])
            alike = fading(((near[place] - image) ** 2).sum(-1) / 400)
            found[..., v, u] = alike * fading(((v - REACH) ** 2 + (u - REACH) ** 2) / 40) * inside[place]
    return found


def window(plane, y, x, reach=REACH, outside=0):
    """The square around a pixel."""
    padded = np.pad(plane, reach, constant_values=outside)
    return padded[y : y + 2 * reach + 1, x : x + 2 * reach + 1]


def inside(plane, y, x, reach):
    return plane[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]


def voted(labels, image):
    """A reading of the rule by itself, not of the code."""
    height, width = labels.shape
    count, found = weights(image), labels.copy()
    for _ in range(2):
        before, found = found, found.copy()
        edge = np.array([[len(np.unique(inside(before, y, x, 1))) > 1 for x in range(width)] for y in range(height)])
        share = np.where(edge, 1 / 128, 1)
        for y, x in np.ndindex(labels.shape):
            if not inside(edge, y, x, REACH - 1).any():
                continue
            votes = count[y, x] * window(share, y, x)
            around = window(before.astype(int), y, x, outside=-1)
            names = [before[y, x], *(name for name in np.unique(around) if name not in (-1, before[y, x]))]
            found[y, x] = max(names, key=lambda name: votes[around == name].sum())
    kept = [name for name in np.unique(labels) if 2 * (found == name).sum() < (labels == name).sum()]
    return np.where(np.isin(labels, kept), labels, found)


def averaged(metres, image):
    height, width = metres.shape
    count, found = weights(image), metres.copy()
    for _ in range(2):
        before, found = found, found.copy()
        sure = np.zeros(metres.shape)
        for y, x in np.ndindex(metres.shape):
            near = inside(before, y, x, 1)
            if before[y, x] > 0:
                slope = (float(near.max()) / near[near > 0].min() - 1) / 0.1
                sure[y, x] = fading(slope**2) + 1e-3
        for y, x in np.ndindex(metres.shape):
            near = inside(before, y, x, REACH)
            if before[y, x] > 0 and near.max() >= 1.15 * near[near > 0].min():
                share = count[y, x] * window(sure, y, x)
                found[y, x] = (share * window(before, y, x)).sum() / share.sum()
    return found


def scene(seed=0, height=20, width=27):
    """A noisy image of three areas, and labels of them whose outlines are a few pixels off."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    true = np.where((y - 11) ** 2 + (x - 9) ** 2 < 50, 1, np.where(x > 18, 2, 0))
    colours = np.array([[90, 110, 120], [200, 60, 50], [60, 160, 70]])
    image = np.clip(colours[true] + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    return image, np.roll(true, (2, -2), (0, 1)).astype(np.uint8), true


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_those_of_the_rule_in_numpy(seed):
    image, labels, true = scene(seed)
    labels[3, 23] = IGNORE
    found = _C.outlines_of_labels(labels, image)
    np.testing.assert_array_equal(found, voted(labels, image))
    assert (found != true).mean() < 0.6 * (labels != true).mean()


@pytest.mark.parametrize("seed", range(3))
def test_depths_are_those_of_the_rule_in_numpy(seed):
    image, labels, true = scene(seed)
    depth = np.array([4.0, 2.0, 1.2], np.float32)
    metres = depth[labels] * (1 + np.arange(27, dtype=np.float32) / 500)
    metres[5, 15:18] = 0
    found = _C.outlines_of_depth(metres, image)
    np.testing.assert_allclose(found, averaged(metres, image), rtol=1e-5)
    assert (found[metres == 0] == 0).all()
    assert abs(found / depth[true] - 1)[metres > 0].mean() < 0.75 * abs(metres / depth[true] - 1)[metres > 0].mean()


def test_what_is_far_from_an_edge_stays():
    image, labels, _ = scene()
    flat = np.full(labels.shape, 3, np.uint8)
    assert (_C.outlines_of_labels(flat, image) == 3).all()
    slope = np.linspace(2, 2.1, flat.size, dtype=np.float32).reshape(flat.shape)
    np.testing.assert_array_equal(_C.outlines_of_depth(slope, image), slope)


def test_a_label_that_would_lose_most_of_its_pixels_stays():
    image = np.full((20, 20, 3), 100, np.uint8)  # nothing in it says where the thing ends
    labels = np.zeros((20, 20), np.uint8)
    labels[9:11, 9:11] = 1
    np.testing.assert_array_equal(_C.outlines_of_labels(labels, image), labels)


def test_a_label_that_keeps_just_half_of_its_pixels_moves():
    labels, image = np.zeros((6, 20), np.uint8), np.full((6, 20, 3), 40, np.uint8)
    labels[:, 6:8], image[:, 7] = 1, 220  # of its two columns one looks like all around it
    found = _C.outlines_of_labels(labels, image)
    assert (found[:, 7] == 1).all() and found.sum() == 6


def test_of_labels_with_as_many_votes_the_first_met_wins():
    """The one in the middle sees itself and the corners, two of either label, in one colour."""
    labels, image = np.array([[1, 2, 0], [2, 3, 3], [1, 3, 0]], np.uint8), np.full((3, 3, 3), 99, np.uint8)
    assert _C.outlines_of_labels(labels, image)[1, 1] == 1


@pytest.mark.parametrize(
    "labels, image",
    [((4, 4), (4, 5, 3)), ((4, 4), (4, 4, 4)), ((4, 4), (4, 4)), ((2, 4, 4), (4, 4, 3)), ((0, 4), (0, 4, 3))],
)
def test_other_shapes_are_refused(labels, image):
    image = np.zeros(image, np.uint8)
    with pytest.raises(ValueError, match="outlines_of_labels"):
        _C.outlines_of_labels(np.zeros(labels, np.uint8), image)
    with pytest.raises(ValueError, match="outlines_of_depth"):
        _C.outlines_of_depth(np.ones(labels, np.float32), image)


def config(task, outlines="image"):
    kinds = {"depth": "depth", "pose": "heatmap", "open-vocabulary": "open-vocabulary"}
    return replace(upstream(kinds.get(task, "segmentation")), task=task, outlines=outlines)


def test_each_kind_of_label_follows_its_image():
    image, labels, _ = scene()
    sure, names = np.ones(labels.shape, np.float32), ("wall", "ball", "tree")
    ours = _C.outlines_of_labels(labels, image)

    def one(task, label):
        assert with_outlines([label], [image], config(task, "decoder"))[0] is label
        return with_outlines([label], [image], config(task))[0]

    for task in ("semantic", "open-vocabulary"):
        found = one(task, SemanticMap(labels, sure, names))
        np.testing.assert_array_equal(found.labels, ours)
        assert found.confidence is sure and found.classes == names
    many = one("open-vocabulary", SemanticMap(labels.astype(np.int32) * 300, sure, ()))
    assert many.labels.dtype == np.int32
    np.testing.assert_array_equal(many.labels, ours.astype(np.int32) * 300)

    masks = np.stack([labels == 1, labels != 0])  # that overlap
    label = Instances(masks, np.array([0, 1]), np.array([0.9, 0.5], np.float32), names)
    found = one("instance", label)
    np.testing.assert_array_equal(found.masks[0], _C.outlines_of_labels(masks[0].astype(np.uint8), image))
    assert found.masks.dtype == bool and (found.masks[0] & ~found.masks[1]).sum() < 4
    none = Instances(masks[:0], label.class_ids[:0], label.scores[:0], names)
    assert one("instance", none) is none

    metres = 1 + labels.astype(np.float32)
    found = one("depth", DepthMap(metres, 10.0))
    np.testing.assert_array_equal(found.metres, _C.outlines_of_depth(metres, image))
    pose = Keypoints(np.zeros((0, 1, 3)), np.zeros((0, 1)), np.zeros(0), ("head",))
    assert one("pose", pose) is pose


def test_a_configuration_says_where_outlines_are_from():
    plain = upstream("segmentation")
    assert "outlines" not in json.loads(plain.to_json())  # earlier versions read it
    assert DecoderConfig.from_json(plain.to_json()).outlines == "decoder"
    follows = replace(plain, outlines="image")
    assert DecoderConfig.from_json(follows.to_json()) == follows
    with pytest.raises(Refused, match="outlines is 'sharp', expected one of decoder, image"):
        replace(plain, outlines="sharp")


def test_a_run_and_pictures_that_exist_get_the_outlines_that_are_asked_for(tmp_path, capsys):
    line = ["--task", "semantic,instance,depth", "--number", "2", "--steps", "3", "--batch-size", "1", "--quiet"]
    line += ["--force-domain"]  # pictures of three steps
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    assert generate.main([*line, "--outlines", "decoder", "--out", str(plain)]) == 0
    assert generate.main([*line, "--out", str(ours)]) == 0  # as the demo decoders say
    own, folder = {"semantic": config("semantic"), "depth": config("depth")}, tmp_path / "pictures"
    folder.mkdir()
    with open_run(plain) as before, open_run(ours) as after:
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.image, other.image)
            for task, said in own.items():
                kind = LABEL_KINDS[task]
                (wanted,) = with_outlines([one.label(task)], [one.image], said)
                assert (
                    kind.distance(other.label(task), wanted) < 1e-3 < kind.distance(other.label(task), one.label(task))
                )
            Image.fromarray(one.image).save(folder / f"{one.id}.png")
    assert json.loads((plain / "run.json").read_text())["config"]["outlines"] == "decoder"
    assert "outlines" not in json.loads((ours / "run.json").read_text())["config"]
    assert generate.main([*line, "--out", str(plain)]) == 2 and "outlines" in capsys.readouterr().err

    found = []
    for asked in ("decoder", "auto"):
        out = tmp_path / asked
        given = ["--task", "depth", "--outlines", asked, "--out", str(out), "--quiet"]
        assert label.main([str(folder), *given]) == 0
        with open_run(out) as run:
            found.append([(sample.image, sample.depth) for sample in run])
    for (image, depth), (_, other) in zip(*found, strict=True):
        (wanted,) = with_outlines([depth], [image], own["depth"])
        assert LABEL_KINDS["depth"].distance(other, wanted) < 1e-3 < LABEL_KINDS["depth"].distance(other, depth)


def test_labels_without_a_decoder_have_no_outlines_to_choose(tmp_path, capsys):
    line = ["--labeller", "attention", "--classes", "ball", "--prompts", "a ball", "--number", "1"]
    assert generate.main([*line, "--outlines", "image", "--out", str(tmp_path / "run")]) == 2
    assert "--outlines image: no label of this run is made by a decoder" in capsys.readouterr().err


def test_evaluate_measures_either(capsys):
    line = ["--data", "demo:6@910000", "--task", "semantic,depth", "--bootstrap", "0", "--json", "--quiet"]
    found = []
    for asked in ("decoder", "image"):
        assert evaluate.main([*line, "--outlines", asked]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["semantic"]["miou"] > found[0]["semantic"]["miou"] + 0.02
    assert found[1]["depth"]["absrel"] < 0.97 * found[0]["depth"]["absrel"]


class Answers:
    """A decoder in training whose labels of each image are the truth moved by some pixels."""

    def __init__(self, source, task, moved):
        self.config, self.source, self.moved = config(task, "decoder"), source, moved

    def answers(self, views):
        assert list(views) == [0, 3, 6, 9]  # the first of every image
        truths = [TASKS[self.config.task].truth(self.source, self.source[view // 3]) for view in views]
        return [replace(truth, labels=np.roll(truth.labels, self.moved, 1)) for truth in truths]


@pytest.mark.parametrize(
    "moved, flags, found",
    [
        (3, {}, "image"),
        (0, {}, "decoder"),  # nothing is nearer than the truth itself
        (3, {"preset": "upstream"}, "decoder"),
        (3, {"outlines": "decoder"}, "decoder"),
        (0, {"outlines": "image"}, "image"),
    ],
)
def test_a_training_chooses_the_outlines_that_are_nearer_the_truth(moved, flags, found):
    source = open_data("demo:4@910100", 128, tasks=("semantic",))
    decoder = Answers(source, "semantic", moved)
    views = TrainingViews(source, range(4), "semantic", ViewSettings(draws=3, augmentation=Augmentation()))
    requested = TrainConfig(**flags).task_settings().outlines
    assert choose_outlines(requested, decoder.config, views, decoder.answers).outlines == found
