"""Teaching a decoder: losses against hand-made cases, looks, the capture cache, and a fit that learns."""

import copy
import json
import math
import os
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from bench.proof.decoders import fit
from datasetdm_fast.data import join_texts
from datasetdm_fast.engine import tasks
from datasetdm_fast.engine.decoders.checkpoint import DecoderConfig, build_decoder, save_decoder
from datasetdm_fast.engine.decoders.layers import SpectralConv2d
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.inversion import capture_timestep, invert, posterior_generator
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource
from datasetdm_fast.engine.sampling.times import alphas_cumprod, initial_noise
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.kernels import image_norm
from datasetdm_fast.training import losses, session
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.cache import Inversion, Layout
from datasetdm_fast.training.captures.targets import TargetMemory, target_of
from datasetdm_fast.training.captures.views import TrainingViews, ViewSettings
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.recipes import RecipeSettings, TrainingSchedule, recipe
from datasetdm_fast.training.splits import split
from datasetdm_fast.training.task_training import resolve_dtype
from datasetdm_fast.training.trainer import Trainer, loss_of, project, sample_word
from datasetdm_fast.training.truth.augment import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    crop,
    mirror,
    mirrored_names,
    paste,
    relight,
    rotate,
)

TASKS = ("semantic", "instance", "depth", "pose", "open-vocabulary")


@pytest.fixture(scope="module")
def engine():
    return build_engine("torch", load_model("tiny", size=64), {})


@pytest.fixture(scope="module")
def source(engine):
    return open_data("demo:4@1000", engine.model.size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("captures")


def training_views(engine, source, task, folder, draws=2, **settings) -> TrainingViews:
    views = TrainingViews(source, range(len(source)), task, ViewSettings(draws=draws, **settings))
    return views.with_captures(cache.cache_captures(engine, views, Inversion((1,)), folder))


def config_of(engine, source, task, timestep=1, **changes) -> DecoderConfig:
    width = engine.model.modules["text_encoder"].config.hidden_size
    config = recipe(task, source, engine.model.levels, width, (timestep,), 4, **changes).config
    return replace(
        config,
        width=16,
        heads=2,
        layers=2,
        feed_forward=32,
        mask_dim=16,
        queries=6,
        upscale=min(config.upscale, 2),
        depth_width=8,
    )


def words_of(engine, source, task):
    return engine.encode_classes(list(source.thing_classes)).clone() if task == "open-vocabulary" else None


def test_matching_finds_the_cheapest_assignment():
    torch.manual_seed(0)
    masks = torch.zeros(2, 16, 16)
    masks[0, :8], masks[1, 8:] = 1, 1
    mask_logits = torch.stack([20 * masks[1] - 10, torch.zeros(16, 16), 20 * masks[0] - 10])
    class_logits = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [5.0, 0.0, 0.0]])
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 16, 16)
    (queries, targets), (none, _) = losses.match(
        *(torch.stack([logits] * 2) for logits in (class_logits, mask_logits)),
        *zip((torch.tensor([0, 1]), masks), nothing),
        torch.rand(2, 256, 2),
    )
    assert dict(zip(queries.tolist(), targets.tolist())) == {2: 0, 0: 1} and len(none) == 0


def test_matching_weighs_class_entropy_and_overlap_by_their_formula():
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        class_logits, mask_logits = torch.randn(1, 5, 3, generator=random), torch.randn(1, 5, 2, 2, generator=random)
        masks, ids = (torch.rand(3, 2, 2, generator=random) > 0.5).float(), torch.tensor([0, 1, 1])
        places = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]])  # of the four pixels
        chance, truth = mask_logits[0].flatten(1).sigmoid()[:, None], masks.flatten(1)  # [5, 1, 4] and [3, 4]
        entropy = -(truth * chance.log() + (1 - truth) * (1 - chance).log()).mean(-1)
        overlap = 1 - (2 * (chance * truth).sum(-1) + 1) / (chance.sum(-1) + truth.sum(-1) + 1)
        cost = -losses.CLASS * class_logits[0].softmax(-1)[:, ids] + losses.MASK * entropy + losses.DICE * overlap
        ((queries, targets),) = losses.match(class_logits, mask_logits, [ids], [masks], places)
        wanted = linear_sum_assignment(cost.numpy())
        assert (queries.tolist(), targets.tolist()) == (wanted[0].tolist(), wanted[1].tolist())


def test_a_wrong_answer_costs_many_times_a_right_one():
    torch.manual_seed(0)
    masks = torch.zeros(1, 16, 16)
    masks[0, 4:12, 4:12] = 1
    right = (
        torch.tensor([[[20.0, 0, 0], [0, 0, 20.0]]]),
        torch.stack([40 * masks - 20, -20 * torch.ones(1, 16, 16)], 1),
    )
    wrong = (right[0].flip(1), -right[1])
    cheap, dear = (losses.set_loss(*answer, [torch.tensor([0])], [masks], 256).item() for answer in (right, wrong))
    assert cheap < 5  # the least certain points lie on the edge, where even a right mask is half there
    assert dear > 10 * cheap


def test_an_image_without_things_still_teaches_their_absence():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    loss = losses.set_loss(
        logits, torch.zeros(1, 3, 8, 8), [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, 16, 16)], 64
    )
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(4)) and (logits.grad[..., 3] < 0).all()


def test_the_norm_of_a_training_has_the_references_answer_and_gradient():
    torch.manual_seed(0)
    x, out = (2 * torch.randn(3, 5, 4, 6) + 7).requires_grad_(), torch.randn(3, 5, 4, 6)
    found, mean, variance = image_norm.normalise_trained(x)
    assert torch.equal(found, image_norm.reference(x, has_relu=True))
    assert torch.allclose(mean, x.mean((2, 3), keepdim=True))
    assert torch.allclose(variance, x.var((2, 3), keepdim=True, correction=0))
    (gradient,) = torch.autograd.grad(found, x, out)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(image_norm.reference(wide, has_relu=True), wide, out.double())
    assert torch.allclose(gradient.double(), truth, atol=1e-5)


def test_scale_invariant_log_by_its_formula():
    truth = torch.tensor([[[1.0, 2.0, 0.0, 4.0]], [[1.0, 1.0, 1.0, 1.0]]])
    d = np.log([1 / 2, 2 / 2, 4 / 3])
    found = losses.scale_invariant_log(torch.tensor([[[2.0, 2.0, 9.0, 3.0]], [[2.0, 2.0, 2.0, 2.0]]]), truth)
    assert found.tolist() == pytest.approx(
        [math.sqrt((d**2).mean() - 0.5 * d.mean() ** 2), math.log(2) * math.sqrt(0.5)], rel=1e-5
    )


def test_relative_error_by_its_formula():
    truth = torch.tensor([[[1.0, 2.0, 0.0, 4.0]]])
    found = losses.relative_error(torch.tensor([[[2.0, 2.0, 9.0, 3.0]]]), truth)
    assert found.tolist() == pytest.approx([(1 + 0 + 1 / 4) / 3])


def test_a_word_that_is_not_there_is_one_the_picture_was_searched_for(source):
    item, count = source[0], len(source.thing_classes)
    there, every = set(item.mask_classes.tolist()), set(range(count))
    searched = there | {min(every - there)}
    for told, expected in ((None, every), (tuple(searched), searched)):
        found = target_of(source, replace(item, searched=told), "open-vocabulary")
        kept = TargetMemory(2 * found.bytes).copy(found)
        asked = {sample_word(kept, count, torch.Generator().manual_seed(seed)) for seed in range(400)}
        assert there < asked == expected


@pytest.mark.parametrize("is_relative", [True, False])
def test_small_depth_decoders_learn_by_relative_error(engine, source, is_relative):
    preset = "default" if is_relative else "upstream"
    taught = recipe("depth", source, engine.model.levels, 16, (0,), 8, preset=preset)
    assert taught.schedule.is_relative is is_relative
    item = target_of(source, source[0], "depth")
    metres = torch.full((1, 1, *item.depth.shape), 2.0)
    loss = losses.relative_error if is_relative else losses.scale_invariant_log
    found = loss_of(taught.config, {"depth": metres}, [item], [], taught.schedule)
    assert found == loss(metres[:, 0], item.depth[None]).sum()


@pytest.mark.parametrize("loss", [losses.scale_invariant_log, losses.relative_error])
def test_an_image_without_known_depth_teaches_nothing(loss):
    metres = torch.ones(1, 2, 2, requires_grad=True)
    loss(metres, torch.zeros(1, 2, 2)).sum().backward()
    assert torch.isfinite(metres.grad).all() and not metres.grad.any()


def test_the_set_loss_by_its_formula():
    torch.manual_seed(0)
    mask = torch.zeros(1, 8, 8)
    mask[0, :, :4] = 1
    logits, flat = torch.randn(1, 2, 3), torch.stack([torch.full((8, 8), 3.0), torch.full((8, 8), -2.0)])[None]
    found = losses.set_loss(logits, flat, [torch.tensor([1])], [mask], 64, [torch.Generator().manual_seed(5)])
    drawn = losses.sample_places(1, 64, logits, torch.Generator().manual_seed(5))
    ((chosen, _),) = losses.match(logits, flat, [torch.tensor([1])], [mask], drawn[0])
    chosen = chosen.item()
    places = losses.uncertain_points(flat[0, chosen : chosen + 1], *drawn[1:])
    inside = losses.sample_points(mask, places)[0]
    height = losses.sample_points(flat[0, chosen : chosen + 1], places)[
        0
    ]  # towards the border it falls to zero, as upstream has it
    wanted = [2, 2]
    wanted[chosen] = 1
    weight = [1.0 if k == 1 else 0.1 for k in wanted]
    entropy = -sum(w * logits[0, q].log_softmax(0)[k] for q, (k, w) in enumerate(zip(wanted, weight))) / sum(weight)
    binary = torch.nn.functional.binary_cross_entropy(height.sigmoid(), inside)
    overlap = 1 - (2 * (height.sigmoid() * inside).sum() + 1) / (height.sigmoid().sum() + inside.sum() + 1)
    assert found.item() == pytest.approx((2 * entropy + 5 * binary + 5 * overlap).item(), rel=1e-5)


def test_parts_of_a_step_add_up_to_it():
    torch.manual_seed(1)
    logits, masks = torch.randn(3, 4, 3), torch.randn(3, 4, 8, 8)
    ids = [torch.tensor([0]), torch.tensor([1, 0]), torch.zeros(0, dtype=torch.long)]
    truth = [(torch.rand(len(k), 8, 8) > 0.5).float() for k in ids]
    whole = losses.totals([len(k) for k in ids], 4)

    def loss(part):
        return losses.set_loss(
            logits[part],
            masks[part],
            ids[part],
            truth[part],
            32,
            [torch.Generator().manual_seed(b) for b in range(3)][part],
            whole,
        )

    assert (loss(slice(0, 1)) + loss(slice(1, 3))).item() == pytest.approx(loss(slice(0, 3)).item(), rel=1e-5)


def test_heatmaps_by_their_formula():
    found, truth, weights = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([[1.0, 0, 1], [1, 1, 1]])
    by_joint = [
        0.5 * ((found[:, j] * weights[:, j, None, None] - truth[:, j] * weights[:, j, None, None]) ** 2).mean()
        for j in range(3)
    ]
    assert losses.joint_mse(found, truth, weights).mean().item() == pytest.approx((sum(by_joint) / 3).item(), rel=1e-5)


def test_gaussians_stand_on_their_points():
    maps = losses.gaussian_heatmaps(torch.tensor([[[3.0, 5.0]]]), 8, 1.0)
    assert maps.flatten().argmax().item() == 5 * 8 + 3 and maps.max() == 1


def test_axis_bins_prefer_the_right_bins():
    points, weights = torch.tensor([[[3.0, 5.0], [0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    sure = torch.zeros(1, 2, 8)
    good_x, good_y = sure.clone(), sure.clone()
    good_x[0, 0, 3], good_y[0, 0, 5] = 20, 20
    found = losses.axis_bins(good_x, good_y, points, weights), losses.axis_bins(sure, sure, points, weights)
    assert found[0].item() < 1e-4 and found[1].item() == pytest.approx(2 * math.log(8))


def test_left_becomes_right_in_a_mirror(source):
    order = mirrored_names(source.joints)
    assert [source.joints[k] for k in order] == [
        "head",
        "neck",
        "pelvis",
        "right_hand",
        "left_hand",
        "right_foot",
        "left_foot",
    ]
    item = next(item for item in open_data("demo:40@0", 64) if len(item.keypoints))
    plain, other = (target_of(source, one, "pose") for one in (item, mirror(item, source)))
    hand, across = source.joints.index("left_hand"), source.joints.index("right_hand")
    assert other.points[hand].tolist() == pytest.approx(
        [64 - plain.points[across, 0].item(), plain.points[across, 1].item()]
    )
    again = mirror(mirror(item, source), source)
    for name in ("image", "semantic", "masks", "depth", "keypoint_boxes"):
        assert np.allclose(getattr(again, name), getattr(item, name))


def test_classes_with_a_side_change_places_in_a_mirror():
    source = LabelledSource(4, 1)
    source.classes = ("background", "left eye", "right_ear", "right eye", "bright", "left_ear")
    source.thing_classes = source.classes[1:]
    labels = np.array([[0, 1, 2, 255], [3, 4, 5, 0]], np.uint8)
    said = "a photo of a left eye, a Left Ear on the left, a bright thing, two right eyes"
    item = Labelled("", np.zeros((2, 4, 3), np.uint8), said, labels, labels[None] == 1, np.array([0]))
    found = mirror(item, source)
    assert found.semantic.tolist() == [[255, 5, 3, 0], [0, 2, 4, 1]] and found.mask_classes.tolist() == [2]
    assert found.caption == "a photo of a right eye, a Right Ear on the left, a bright thing, two left eyes"
    assert mirror(found, source).caption == said
    source.classes = ("background", "lefthand", "righthand")
    source.thing_classes = source.classes[1:]
    assert mirror(replace(item, caption="a lefthand"), source).caption == "a righthand"


@pytest.mark.parametrize(
    "names",
    [
        ("Left Hip", "bright", "Right Hip"),
        ("leftKnee", "x", "rightKnee"),
        ("LEFT", "x", "RIGHT"),
        ("lefthip", "bright", "righthip"),
        ("eyeleft", "cleft", "eyeright"),
        ("Lefthip", "right", "Righthip"),
        ("bright left", "b", "bright right"),
        ("brightleft", "brightness", "brightright"),
    ],
)
def test_a_side_is_found_however_it_is_written(names):
    assert mirrored_names(names) == [2, 1, 0]


def test_a_name_whose_other_side_is_another_ones_stays():
    assert mirrored_names(("bleft", "bright", "right bright", "left bright", "a")) == [1, 0, 3, 2, 4]
    assert mirrored_names(("left", "leftleft", "rightleft")) == [0, 2, 1]
    assert mirrored_names(("left", "left", "right")) == [2, 1, 0]


def test_a_quarter_turn_turns_the_truth_with_the_image(source):
    item = next(item for item in open_data("demo:40@0", 64) if len(item.keypoints))
    found = rotate(item, 90)
    apart = found.image.astype(int) - np.rot90(item.image, -1)
    assert np.abs(apart).max() <= 1 and np.array_equal(found.semantic, np.rot90(item.semantic, -1))
    assert np.array_equal(found.masks, np.rot90(item.masks, -1, (1, 2))) and np.array_equal(
        found.depth, np.rot90(item.depth, -1)
    )
    places = np.stack([64 - item.keypoints[..., 1], item.keypoints[..., 0]], -1)
    assert np.allclose(found.keypoints[..., :2], places, atol=1e-4)
    x, y, w, h = item.keypoint_boxes[0]
    assert np.allclose(found.keypoint_boxes[0], [64 - y - h, x, h, w], atol=1e-4)


def test_what_is_turned_in_from_outside_is_unknown(source):
    found = rotate(source[0], 45)
    assert (
        found.semantic[0, 0] == 255
        and found.depth[0, 0] == 0
        and not found.image[0, 0].any()
        and not found.masks[:, 0, 0].any()
    )


def test_another_light_changes_the_image_alone_and_by_its_seed(source):
    how = Augmentation(light=1.0)
    first, again, other = (augment(source, 0, how, draw, 0, source.__getitem__) for draw in (0, 0, 1))
    assert np.array_equal(first.image, again.image) and not np.array_equal(first.image, other.image)
    assert np.array_equal(first.semantic, source[0].semantic)
    assert np.array_equal(relight(source[0].image, 0.0, np.random.default_rng(0)), source[0].image)


@pytest.mark.parametrize(
    ("chances", "drawn", "before", "after"),
    [
        ((0, 1, 1), (1.2, -0.2), "#646464", "#454545"),  # 100 * 1.2 - 51
        ((1, 0, 1), (0.8,), "#646464", "#797979"),  # (100 / 255) ** 0.8
        ((1, 1, 0), (28, -30, -20), "hsv(0, 100%, 100%)", (28, 225, 235)),  # of 256
    ],
)
def test_light_changes_by_its_formula(chances, drawn, before, after):
    numbers = iter(drawn)
    light = SimpleNamespace(random=iter(chances).__next__, uniform=lambda low, high: next(numbers))
    found = relight(np.asarray(Image.new("RGB", (2, 1), before)), 0.5, light)
    wanted = Image.new("RGB", (2, 1), after) if isinstance(after, str) else Image.new("HSV", (2, 1), after)
    assert np.array_equal(found, np.asarray(wanted.convert("RGB")))


def test_things_are_pasted_with_their_truth_and_their_names(source):
    item, other = source[0], source[2]  # a cone and a person, a star and a tree
    found = paste(item, other, source, 1.0, np.random.default_rng(0))
    over = other.masks.any(0)
    assert np.array_equal(found.image[over], other.image[over]) and np.array_equal(found.depth[over], other.depth[over])
    assert np.array_equal(found.image[~over], item.image[~over])
    assert np.array_equal(found.semantic, np.where(over, other.semantic, item.semantic))
    names = [source.thing_classes[k] for k in found.mask_classes]
    assert {"star", "tree"} < set(names) and (found.masks.sum(0) <= 1).all() and found.masks.any((1, 2)).all()
    assert found.caption == f"{item.caption}, a star, a tree"
    unmasked = paste(replace(item, masks=None), replace(other, masks=None), source, 1.0, np.random.default_rng(0))
    assert np.array_equal(unmasked.image[over], other.image[over])


def test_a_covered_joint_is_hidden(source):
    item = next(item for item in source if len(item.keypoints))
    whole = replace(item, masks=np.ones((1, *item.image.shape[:2]), bool), mask_classes=np.array([0]))
    found = paste(item, whole, source, 1.0, np.random.default_rng(0))
    assert (found.keypoints[..., 2] <= 1).all() and np.array_equal(found.keypoints[..., :2], item.keypoints[..., :2])


def test_a_crop_moves_truth_and_image_alike(source):
    item = source[0]
    found = crop(item, 2.0, 1.0, 0.0)
    assert np.array_equal(found.semantic, item.semantic[:32, 32:].repeat(2, 0).repeat(2, 1))
    places = (item.keypoints[..., :2] - (32, 0)) * 2
    assert np.allclose(found.keypoints[..., :2], places, atol=1e-4)
    inside = ((places >= 0) & (places < 64)).all(-1)
    assert not found.keypoints[..., 2][~inside].any()


def test_a_person_out_of_sight_leaves_the_others_to_be_learnt(source):
    item = next(item for item in source if len(item.keypoints))
    (own,), seen = item.keypoints, np.array([0, 0, 1])
    apart = [own * seen + (x, 50, 0) for x in (10, 50)]  # the larger one is to the left
    both = replace(
        item,
        keypoints=np.float32(apart),
        keypoint_boxes=np.float32([[0, 40, 20, 20], [45, 45, 10, 10]]),
        keypoint_areas=np.float32([400, 100]),
    )
    for found in (crop(both, 2.0, 1.0, 1.0), rotate(crop(both, 2.0, 1.0, 1.0), 10.0)):
        learnt = target_of(source, found, "pose")
        assert len(found.keypoints) == len(found.keypoint_boxes) == len(found.keypoint_areas) == 1
        assert learnt.weights.any() and np.allclose(learnt.points, found.keypoints[0, :, :2])


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_of_several_people_the_largest_is_learnt(source, largest):
    item = next(item for item in source if len(item.keypoints))
    areas = np.float32([50, 60, 40])
    areas[largest] = 400
    people = item.keypoints[[0, 0, 0]] + np.float32([[[10, 0, 0]], [[20, 0, 0]], [[30, 0, 0]]])
    several = replace(item, keypoints=people, keypoint_boxes=item.keypoint_boxes[[0, 0, 0]], keypoint_areas=areas)
    assert np.array_equal(target_of(source, several, "pose").points, people[largest, :, :2])


def test_strong_looks_paste_only_what_is_learnt_from(source):
    asked = []

    def read(number):
        asked.append(number)
        return source[number]

    for draw in range(12):
        augment(source, 1, AUGMENTATIONS["strong"], draw, 0, read, (1, 2))
    assert set(asked) == {1, 2}
    first = augment(source, 1, AUGMENTATIONS["strong"], 0, 0, read, (1, 2))
    assert np.array_equal(first.image, source[1].image) and first.caption == source[1].caption
    deep = augment(source, 1, AUGMENTATIONS["strong-depth"], 2, 0, source.__getitem__, (1,))
    assert np.array_equal(deep.depth, source[1].depth) and not np.array_equal(deep.image, source[1].image)


def test_a_word_that_only_a_crowd_shows_is_not_asked_for_as_absent(source):
    item = source[0]
    shown, other = (
        int(item.mask_classes[0]),
        next(k for k in range(len(source.thing_classes)) if k not in item.mask_classes),
    )
    crowd = replace(item, crowds=item.masks[[0, 0, 0]], crowd_classes=np.array([shown, other, EVERY_CLASS]))
    everything = set(range(len(source.thing_classes)))
    for searched, left in ((None, everything - {other}), ((shown, other), {shown})):
        found = target_of(source, replace(crowd, searched=searched), "open-vocabulary")
        asked = {sample_word(found, len(everything), torch.Generator().manual_seed(seed)) for seed in range(400)}
        assert {*found.searched.tolist()} == left and asked == left | {int(kind) for kind in item.mask_classes}
    assert not len(target_of(source, item, "open-vocabulary").searched)


def test_every_fourth_view_has_no_caption_where_they_are_mixed(source):
    views = TrainingViews(source, [0, 1], "semantic", ViewSettings(draws=8, captions="mixed"))
    said = [bool(views.item(view).caption) for view in range(len(views))]
    assert said == [True, True, True, False] * 4
    assert views.captions(views.items(1)) == [source[1].caption] * 3 + [""] + [source[1].caption] * 3 + [""]


@pytest.mark.parametrize("name", [name for name, how in AUGMENTATIONS.items() if how.has_crops])
def test_upstreams_crops_are_drawn_by_the_data_set(source, name):
    class Drawn(LabelledSource):
        joints, classes, thing_classes, asked = source.joints, source.classes, source.thing_classes, []
        class_table = None

        def draw_view(self, number, seed):
            self.asked.append((number, seed))
            return source[number]

    data = Drawn(64, 3)
    data.asked = []
    for draw in (0, 1, 0):
        augment(data, 2, AUGMENTATIONS[name], draw, 7, source.__getitem__)
    assert data.asked[0] == data.asked[2] != data.asked[1] and {number for number, _ in data.asked} == {2}


def test_the_cache_holds_what_an_inversion_gives(engine, source, folder):
    held = training_views(engine, source, "semantic", folder)
    assert held.seed(5) == 5 and np.array_equal(held.item(5).image, source[2].image[:, ::-1])
    pixels = torch.from_numpy(source[2].image[:, ::-1].copy())[None]
    fresh = invert(engine, pixels, [source[2].caption], 1, [5], is_raw=True)
    for a, b in zip(Layout.of(engine.model.levels).join(fresh), held.captures.batch([5])):
        assert (a - b).norm() / a.norm() < 2e-3  # half precision


def test_truth_is_kept_as_it_is_until_its_memory_is_full(source):
    made = [target_of(source, item, "instance") for item in source]
    memory = TargetMemory(sum(one.bytes for one in made[:2]) + 2 * 5 * 8)
    kept = [memory.copy(one) for one in made]
    assert kept[0] and kept[1] and kept[3] is None
    for one, own in zip(made[:2], kept):
        for field in fields(one):
            before, after = getattr(one, field.name), getattr(own, field.name)
            assert before.dtype == after.dtype and torch.equal(before, after)


def test_a_projected_view_is_what_the_decoder_makes_of_its_capture(engine, source, folder):
    torch.manual_seed(0)
    decoder = build_decoder(config_of(engine, source, "depth")).eval()
    torch.nn.init.normal_(decoder.last_layer_depth[2].weight)
    capture = invert(engine, torch.from_numpy(source[1].image[None].copy()), [source[1].caption], 1, [3], is_raw=True)
    levels = Layout.of(engine.model.levels).join(capture)
    with torch.no_grad():
        ours, theirs = decoder(project(decoder, levels))["depth"], decoder(capture)["depth"]
    assert torch.allclose(ours, theirs, rtol=1e-4) and theirs.std() > 0


def test_shards_serve_any_number_of_images_and_a_damaged_one_is_made_again(engine, source, tmp_path):
    all_of_them = training_views(engine, source, "semantic", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.f16")}
    times = {path: path.stat().st_mtime_ns for path in before}
    views = TrainingViews(source, [1, 2], "pose", ViewSettings(draws=2))
    few = cache.cache_captures(engine, views, Inversion((1,)), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.f16")} == times and len(times) == 4
    assert torch.equal(few.batch([0])[0], all_of_them.captures.batch([2])[0])
    ((damaged,), _) = few.paths
    damaged.write_bytes(damaged.read_bytes()[:-40] + b"\0" * 40)
    cache.cache_captures(engine, views, Inversion((1,)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.f16")} == before


def test_captures_that_no_training_has_needed_for_long_are_deleted(engine, source, tmp_path):
    long_ago = time.time() - 86400 * 31
    training_views(engine, source, "semantic", tmp_path)
    shards = sorted(tmp_path.glob("*.f16"))
    others = [tmp_path / "notes.txt", tmp_path / "of another program.f16"]
    for path in others:
        path.write_bytes(b"not ours")
    for path in (*shards, *others):
        os.utime(path, (long_ago, long_ago))
    few = cache.cache_captures(
        engine, TrainingViews(source, [1, 2], "pose", ViewSettings(draws=2)), Inversion((1,)), tmp_path
    )
    used = [path for paths in few.paths for path in paths]
    assert sorted(tmp_path.glob("*.f16")) == sorted([*used, others[1]]) and len(shards) == 4
    assert {path.stat().st_mtime for path in used} == {long_ago} and others[0].exists()  # used, not made again


@pytest.mark.parametrize("change", [{"timesteps": (2,)}, {"latent": "sample"}, {"ddim_steps": 2}])
def test_another_inversion_has_other_shards(engine, source, folder, change):
    views = TrainingViews(source, [0], "depth", ViewSettings(draws=1))
    plain, other = (
        cache.cache_captures(engine, views, how, folder)
        for how in (Inversion((1,)), replace(Inversion((1,)), **change))
    )
    assert plain.paths != other.paths
    assert not torch.equal(plain.batch([0])[3], other.batch([0])[3])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**40 + 7])
def test_the_draw_from_the_posterior_is_not_the_noise_again(seed):
    """torch reads 32 bits of a seed, so a number above them would change nothing."""
    noise, again = initial_noise(seed, 4, 8, 8), torch.randn(4, 8, 8, generator=posterior_generator(seed))
    assert abs(float((noise * again).mean())) < 0.25
    assert torch.equal(again, torch.randn(4, 8, 8, generator=posterior_generator(seed)))
    assert not torch.equal(again, torch.randn(4, 8, 8, generator=posterior_generator(seed + 2**32)))


def test_whether_captures_are_kept_follows_the_room(engine, tmp_path):
    levels = engine.model.levels
    assert (
        cache.plan(tmp_path, levels, 10, "auto").is_stored and not cache.plan(tmp_path, levels, 10**9, "auto").is_stored
    )
    assert (
        "would not fit" in str(cache.plan(tmp_path, levels, 10**9, "auto"))
        and not cache.plan(tmp_path, levels, 1, "off").is_stored
    )
    with pytest.raises(Refused, match="--cache disk: the captures take"):
        cache.plan(tmp_path, levels, 10, "disk", 1e-6)


def test_only_captures_of_the_same_images_count_as_kept(engine, source, tmp_path, monkeypatch):
    """Beside half of the free disk; those of other data that lie there do not make room."""
    own, other = (TrainingViews(source, numbers, "semantic", ViewSettings(draws=2)) for numbers in ([0, 1], [2, 3]))
    cache.cache_captures(engine, own, Inversion((1,)), tmp_path)
    assert cache.cached_bytes(engine, own, Inversion((1,)), tmp_path) == sum(
        path.stat().st_size for path in tmp_path.glob("*.f16")
    )
    assert cache.cached_bytes(engine, other, Inversion((1,)), tmp_path) == 0
    monkeypatch.setattr(cache.storage, "free_bytes", lambda folder: 2)
    settings = {"inversion": Inversion((1,)), "cache_settings": cache.CacheSettings(folder=tmp_path)}
    made = session.TrainingSession("demo:4", engine, source, (0, 1, 2, 3), ViewSettings(draws=2), **settings)
    assert made._cache_plan(own).is_stored and not made._cache_plan(other).is_stored
    assert not made._cache_plan(own, other).is_stored


def test_ddim_runs_back_to_the_same_image(engine, source):
    from datasetdm_fast.engine.loop.inversion import ddim_latents

    clean = engine.encode_image(torch.from_numpy(source[0].image[None].copy()))
    text = join_texts([engine.encode_text([""]), engine.encode_text([source[0].caption])])
    noisy = ddim_latents(engine, clean, text, 30, 30)
    alphas = alphas_cumprod(engine.model.scheduler).double().tolist()
    back = noisy
    for timestep in range(30, 0, -1):  # DDIM forwards, from the formula
        alpha, target_alpha = alphas[timestep], alphas[timestep - 1]
        out = engine.denoise(back, timestep, text).chunk(2)[1]
        if engine.model.scheduler.get("prediction_type") == "v_prediction":
            image, noise = alpha**0.5 * back - (1 - alpha) ** 0.5 * out, alpha**0.5 * out + (1 - alpha) ** 0.5 * back
        else:
            image, noise = (back - (1 - alpha) ** 0.5 * out) / alpha**0.5, out
        back = target_alpha**0.5 * image + (1 - target_alpha) ** 0.5 * noise
    away = (noisy - clean).norm() / clean.norm()
    assert (back - clean).norm() / clean.norm() < 0.25 * away


@pytest.mark.parametrize(("quirk", "task"), [("Q12", "instance"), ("Q13", "depth"), ("Q14", "pose")])
def test_a_quirk_is_shown_to_its_task_alone(source, quirk, task):
    item = next(item for item in source if len(item.masks) > 1)
    index = next(k for k in range(4) if source[k].id == item.id)
    other = "pose" if task != "pose" else "depth"
    with_it, without, elsewhere = (
        TrainingViews(source, range(4), t, ViewSettings(draws=1, quirks=frozenset(q)))
        for t, q in ((task, [quirk]), (task, []), (other, [quirk]))
    )
    plain = without.pixels([item]).float()
    shown = {"Q12": plain, "Q13": plain / 2 + 127.5, "Q14": plain.flip(-1)}[quirk]
    assert torch.equal(with_it.pixels([item]).float(), shown) and torch.equal(elsewhere.pixels([item]).float(), plain)
    captions = {"Q12": [f"a photo of {source.thing_classes[1]},"], "Q13": ["a photo of "], "Q14": [item.caption]}[quirk]
    assert with_it.captions([item]) == captions and elsewhere.captions([item]) == [item.caption]
    if quirk == "Q12":
        assert set(with_it.target(index).classes.tolist()) == {1} and len(with_it.target(index).masks) == len(
            item.masks
        )


def test_upstreams_first_word_teaches_with_one_embedding(engine, source, folder):
    held, words = training_views(engine, source, "open-vocabulary", folder), words_of(engine, source, "open-vocabulary")
    heard = []
    for quirk in (False, True):
        schedule = TrainingSchedule(
            steps=1, batch_size=8, points=32, first_word_only=quirk, gradient_accumulation_steps=1
        )
        trainer = Trainer(config_of(engine, source, "open-vocabulary"), schedule, held, words, reads_ahead=False)
        trainer.state.decoder.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[1]))
        trainer.step()
    assert len(heard[0].unique(dim=0)) > 1 and torch.equal(heard[1], words[:1].expand(8, -1))


@pytest.mark.parametrize("task", TASKS)
def test_a_few_steps_lower_the_loss(engine, source, folder, task):
    held, words = training_views(engine, source, task, folder), words_of(engine, source, task)
    schedule = TrainingSchedule(steps=45, batch_size=4, rate=6e-3, points=128, dropout=0.0)
    trainer = Trainer(config_of(engine, source, task), schedule, held, words)
    found = [trainer.step() for _ in range(schedule.steps)]
    trainer.close()
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


def test_the_same_seed_fits_the_same_decoder_and_leaves_torchs_own_numbers_alone(engine, source, folder):
    held, config = training_views(engine, source, "depth", folder), config_of(engine, source, "depth")
    torch.manual_seed(11)
    first = fit(config, held, TrainingSchedule(steps=3, batch_size=2))
    after = torch.rand(1)
    second, third = (fit(config, held, TrainingSchedule(steps=3, batch_size=2, seed=seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), third.state_dict().values()))
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_in_parts_is_the_same_batch(engine, source, folder, task):
    held, words = training_views(engine, source, task, folder), words_of(engine, source, task)
    curves = []
    for parts in (1, 3):
        trainer = Trainer(
            config_of(engine, source, task),
            TrainingSchedule(steps=4, batch_size=6, points=64, gradient_accumulation_steps=parts),
            held,
            words,
            reads_ahead=False,
        )
        curves.append([trainer.step() for _ in range(4)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)  # rounding, which the matching of queries amplifies


@pytest.mark.parametrize("task", ["semantic", "pose"])
def test_a_saved_state_resumes_to_the_same_bits(engine, source, folder, tmp_path, task):
    held, config, schedule = (
        training_views(engine, source, task, folder),
        config_of(engine, source, task),
        TrainingSchedule(steps=6, batch_size=3, points=64),
    )
    whole = Trainer(config, schedule, held, reads_ahead=False)
    losses_of: list[float] = []
    for step in range(6):
        begun = [value.clone() for value in whole.state.average]
        losses_of.append(whole.step())
        moved = torch._foreach_lerp(begun, whole.state.parameters, 1 - (1 + step) / (10 + step))
        assert all(map(torch.allclose, whole.state.average, moved))
    first = Trainer(config, schedule, held, reads_ahead=False)
    for _ in range(3):
        first.step()
    second = Trainer(config, replace(schedule), held)
    first.state.save(tmp_path)
    second.state.resume(tmp_path)
    assert [second.step() for _ in range(3)] == losses_of[3:]
    second.close()
    decoders = (trainer.state.averaged_decoder().state_dict().values() for trainer in (whole, second))
    assert all(map(torch.equal, *decoders))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_arithmetic_starts_like_the_wide_one_and_learns(engine, source, folder, dtype):
    held, schedule = (
        training_views(engine, source, "pose", folder),
        TrainingSchedule(steps=24, batch_size=4, warmup=1, dropout=0.0),
    )
    curves = []
    for kind in ("fp32", dtype):  # the scale of fp16 starts too high, so that its first steps change nothing
        trainer = Trainer(config_of(engine, source, "pose"), schedule, held, dtype=kind, reads_ahead=False)
        curves.append([trainer.step() for _ in range(24)])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=0.02) and curves[0] != curves[1]
    assert all(sum(curve[-6:]) < 0.8 * sum(curve[:2]) * 3 for curve in curves)


@pytest.mark.parametrize("task", ["depth", "semantic"])
def test_a_loss_that_is_no_number_stops_the_training(engine, source, folder, task):
    trainer = Trainer(
        config_of(engine, source, task),
        TrainingSchedule(steps=2, batch_size=2),
        training_views(engine, source, task, folder),
        reads_ahead=False,
    )
    torch.nn.init.constant_(trainer.state.parameters[-1], float("nan"))
    with pytest.raises(GateFailed, match="the loss of step 1 is nan") as stop:
        trainer.step()
    assert "another --out" in stop.value.remedy  # as this one goes on with its own settings only


PRESETS = "default", "upstream"


def test_upstreams_recipe(engine, source, folder):
    found = recipe("semantic", source, engine.model.levels, 32, (0,), 100, preset="upstream").schedule
    assert (found.steps, found.batch_size, found.rate, found.optimiser, found.weight_decay) == (
        500_000,
        1,
        1e-4,
        "adam",
        0.0,
    )
    trainer = Trainer(
        config_of(engine, source, "semantic"),
        found,
        training_views(engine, source, "semantic", folder),
        reads_ahead=False,
    )
    assert [trainer.rate(step) for step in (0, 34_999, 35_000, 70_000)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6])
    assert recipe("pose", source, engine.model.levels, 32, (0,), 10, preset="upstream").schedule.decay_every == 4000
    assert RecipeSettings().adjust(TrainingSchedule()) == TrainingSchedule()
    for task, ours in (("semantic", 64), ("open-vocabulary", 64), ("depth", 16)):  # on a small UNet, too
        usual, theirs = (recipe(task, source, engine.model.levels, 32, (0,), 10, preset=k).config for k in PRESETS)
        assert (usual.width, theirs.width, usual.upscale, theirs.upscale) == (
            ours,
            256,
            2,
            0,
        ) and not theirs.text_centre
    usual, varied = (
        recipe("semantic", source, engine.model.levels, 32, (0,), 100, is_varied=k).schedule for k in (0, 1)
    )
    assert varied.dropout < usual.dropout and varied.weight_decay < usual.weight_decay and varied.steps == usual.steps


def test_simcc_learns_too(engine, source, folder):
    held = training_views(engine, source, "pose", folder)
    config = replace(config_of(engine, source, "pose", pose_head="simcc"), upscale=0)
    trainer = Trainer(config, TrainingSchedule(steps=30, batch_size=4, rate=6e-3, dropout=0.0), held, reads_ahead=False)
    found = [trainer.step() for _ in range(30)]
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


def test_narrow_arithmetic_divides_by_norms_of_fp32():
    torch.manual_seed(0)
    first = SpectralConv2d(32, 16, 3)
    second = copy.deepcopy(first)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = first.normalise_weight()
    assert torch.equal(narrow, second.normalise_weight()) and torch.equal(first.sv0, second.sv0)


def test_captures_made_anew_are_not_read_by_a_thread(engine, source):
    """The thread would use the engine while the training uses the GPU."""
    views = TrainingViews(source, range(4), "depth", ViewSettings(draws=1))
    views = views.with_captures(cache.RecomputedCaptures(engine, views, Inversion((1,))))
    trainer = Trainer(config_of(engine, source, "depth"), TrainingSchedule(steps=1, batch_size=2), views)
    assert trainer._reader is None


class SmallGpu:
    """An engine that takes so many images at once."""

    def __init__(self, engine, most):
        self.engine, self.most, self.asked = engine, most, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def encode_image(self, images, generators=None):
        self.asked.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.engine.encode_image(images, generators)


def test_captures_are_made_in_smaller_batches_where_memory_runs_out(engine, source, tmp_path):
    views = TrainingViews(source, range(1), "depth", ViewSettings(draws=5))
    whole = cache.cache_captures(engine, views, Inversion((1,)), tmp_path / "whole")
    small = SmallGpu(engine, 2)
    parts = cache.cache_captures(small, views, Inversion((1,)), tmp_path / "parts")
    assert small.asked == [5, 3, 2, 2, 1]
    for a, b in zip(whole.batch(range(5)), parts.batch(range(5))):
        assert torch.allclose(a, b, atol=1e-2, rtol=1e-2)
    with pytest.raises(Missing, match="the features and maps of one image"):
        cache.cache_captures(SmallGpu(engine, 0), views, Inversion((1,)), tmp_path / "none")


def test_a_step_that_memory_does_not_suffice_for_says_what_to_change(engine, source, folder, monkeypatch):
    schedule = TrainingSchedule(steps=1, batch_size=6, gradient_accumulation_steps=2)
    trainer = Trainer(config_of(engine, source, "depth"), schedule, training_views(engine, source, "depth", folder))

    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.state.decoder, "forward", full)
    with pytest.raises(Missing, match="does not have enough memory for 3 views at once") as stop:
        trainer.step()
    trainer.close()
    assert "--accumulate" in stop.value.remedy


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_that_only_emulate_bf16_teach_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda:1")) == dtype


def test_a_share_is_held_out_by_seed_and_none_of_few():
    source = open_data("demo:100@1000", 64)
    learnt, held = split(source, range(100), 0.1, 0)
    assert len(held) == 10 and sorted(learnt + held) == list(range(100)) and learnt == sorted(learnt)
    assert split(source, range(100), 0.1, 0) == (learnt, held) != split(source, range(100), 0.1, 1)
    assert split(source, range(9), 0.1, 0) == (list(range(9)), []) and split(source, range(100), 0.0, 0)[1] == []
    assert len(split(source, range(10), 0.99, 0)[1]) == 9 and len(split(source, range(10), 0.01, 0)[1]) == 1


def test_what_was_made_of_one_picture_is_never_held_out_from_it(monkeypatch):
    source = open_data("demo:100@1000", 64)
    families = [(f"{k // 4}",) for k in range(100)]  # four of each picture, and two pictures that one splice joins
    families[40] = ("10", "11")
    monkeypatch.setattr(source, "origins", families.__getitem__)
    for seed in range(8):
        learnt, held = split(source, range(100), 0.1, seed)
        assert 4 <= len(held) <= 10 and sorted(learnt + held) == list(range(100))
        groups = [{k // 4 if k // 4 != 11 else 10 for k in part} for part in (learnt, held)]
        assert not groups[0] & groups[1]
    families[:] = [("one",)] * 100
    assert split(source, range(100), 0.1, 0)[1] == []


def test_decoders_of_two_timesteps_cannot_share_a_capture(engine, source):
    depth, semantic = (config_of(engine, source, task, t) for task, t in (("depth", 1), ("semantic", 100)))
    assert capture_timestep({"depth": depth}) == 1
    with pytest.raises(ValueError, match="depth 1, semantic 100"):
        capture_timestep({"depth": depth, "semantic": semantic})


def test_evaluate_prints_every_figure(engine, tmp_path, capsys):
    from datasetdm_fast.evaluate import main

    source = open_data("demo:1", 64)
    for task in TASKS:
        torch.manual_seed(0)
        save_decoder(build_decoder(config_of(engine, source, task)), tmp_path / task)
    assert main(["--model", "tiny", "--decoder", str(tmp_path), "--data", "demo:3@900004", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    wanted = {"semantic": "miou", "instance": "ap50", "depth": "absrel", "pose": "pck", "open-vocabulary": "miou"}
    assert set(result) == set(wanted)
    assert all(0 <= result[task][figure] for task, figure in wanted.items())


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--data", "nothing:5"], 2, "no reader is called 'nothing'"),
        (["--task", "sematic"], 2, "did you mean semantic"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--seed", str(2**64)], 2, "--seed: 18446744073709551616 is not at most"),
        (["--decoder", "/nowhere"], 3, "decoders /nowhere: no such folder"),
        (["--decoder", "DEPTH"], 3, "Give the folder above"),
    ],
)
def test_evaluate_refuses_bad_input(engine, tmp_path, capsys, flags, code, said):
    from datasetdm_fast.evaluate import main

    save_decoder(build_decoder(config_of(engine, open_data("demo:1", 64), "depth")), tmp_path / "depth")
    flags = [flag.replace("DEPTH", str(tmp_path / "depth")) for flag in flags]
    given = {"--model": "tiny", "--decoder": str(tmp_path), **dict(zip(flags[::2], flags[1::2]))}
    assert main([word for pair in given.items() for word in pair]) == code
    assert said in capsys.readouterr().err


def test_recipes_hide_a_share_of_the_channels():
    shares = [
        part["dropout"] for task in tasks.TASKS.values() for part in (task.small, task.large) if "dropout" in part
    ]
    assert len(shares) > 4 and all(0 <= share < 1 for share in shares)
