"""Teaching a decoder: losses against hand-made cases, looks, the capture cache, and a fit that learns."""

import copy
import hashlib
import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from bench.proof.decoders import fit
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.data import join_texts
from datasetdm_fast.engine import tasks
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import SpectralConv2d
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.inversion import capture_timestep, invert_at, posterior_generator
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource
from datasetdm_fast.engine.sampling.schedule import ImageNoise, alphas_cumprod
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.kernels import image_norm
from datasetdm_fast.stages import LEVELS, Level
from datasetdm_fast.training import checkpoint, cross_validation, losses, predictions, session, task_training
from datasetdm_fast.training import trainer as loop
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.cache import Layout
from datasetdm_fast.training.captures.targets import TargetMemory, TrainingTarget, target_of
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.cross_validation import bound_of, is_worse
from datasetdm_fast.training.log import Log
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.recipes import TrainingSchedule, adjust, recipe
from datasetdm_fast.training.settings import (
    CacheSettings,
    Inversion,
    ModelChoice,
    RecipeSettings,
    TaskSettings,
    TrainConfig,
    TrainingData,
    ViewSettings,
)
from datasetdm_fast.training.splits import count_folds, split, split_folds
from datasetdm_fast.training.state import EarlyStopping, TrainingState
from datasetdm_fast.training.task_training import resolve_dtype
from datasetdm_fast.training.trainer import Trainer, loss_of, project, query_target, sample_word
from datasetdm_fast.training.truth.augment import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    crop,
    mirror,
    mirrored_names,
    paste,
    recolour,
    relight,
    rotate,
)
from datasetdm_fast.training.truth.selection import Selection
from datasetdm_fast.training.word_heads import WordHeads

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


def drawing(count):
    """Random numbers for each of so many images."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_wrong_answer_costs_many_times_a_right_one():
    torch.manual_seed(0)
    masks = torch.zeros(1, 16, 16)
    masks[0, 4:12, 4:12] = 1
    right = (
        torch.tensor([[[20.0, 0, 0], [0, 0, 20.0]]]),
        torch.stack([40 * masks - 20, -20 * torch.ones(1, 16, 16)], 1),
    )
    wrong = (right[0].flip(1), -right[1])
    truth = [torch.tensor([0])], [masks], 256, drawing(1), losses.totals([1], 2)
    cheap, dear = (losses.set_loss(*answer, *truth).item() for answer in (right, wrong))
    assert cheap < 5  # the least certain points lie on the edge, where even a right mask is half there
    assert dear > 10 * cheap


def test_an_image_without_things_still_teaches_their_absence():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    nothing = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, 16, 16)]
    loss = losses.set_loss(logits, torch.zeros(1, 3, 8, 8), *nothing, 64, drawing(1), losses.totals([0], 3))
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


def test_depths_that_cannot_be_told_apart_have_finite_losses():
    truth = torch.ones(2, 1, 1)
    found = losses.scale_invariant_log(torch.tensor([[[1.0]], [[0.0]]]), truth)
    assert found.tolist() == pytest.approx([1e-5, math.sqrt(0.5) * math.log(1e6)], rel=1e-5)


def test_relative_error_by_its_formula():
    truth = torch.tensor([[[1.0, 2.0, 0.0, 4.0]]])
    found = losses.relative_error(torch.tensor([[[2.0, 2.0, 9.0, 3.0]]]), truth)
    assert found.tolist() == pytest.approx([(1 + 0 + 1 / 4) / 3])


def target(**changes) -> TrainingTarget:
    """One without truth but for the changes."""
    empty = {"classes": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 2, 2, dtype=torch.bool)}
    empty |= {name: torch.zeros(0) for name in ("depth", "points", "weights")}
    return TrainingTarget(**{**empty, "searched": torch.zeros(0, dtype=torch.long), **changes})


def test_the_loss_of_heatmaps_by_its_formula(engine, source):
    config = replace(config_of(engine, source, "pose"), joints=("a", "b"))
    points, weights = np.float32([[[20, 44], [3, 61]], [[50, 10], [9, 9]]]), np.float32([[1, 0], [1, 1]])
    targets = [target(points=torch.tensor(points[b]), weights=torch.tensor(weights[b])) for b in range(2)]
    found, x = np.random.default_rng(0).random((2, 2, 16, 16)).astype(np.float32), np.arange(16)
    outputs, at = {"heatmaps": torch.tensor(found)}, points * 16 / 64 - 0.5  # cells, whose centres are at whole numbers
    squares = (x - at[..., 0, None, None]) ** 2 + (x[:, None] - at[..., 1, None, None]) ** 2
    error = ((found - np.exp(-squares / (2 * 1.5**2)) * weights[..., None, None]) ** 2).mean((2, 3))
    for is_taught in (True, False):  # that a joint is absent
        schedule = TrainingSchedule(sigma=1.5, gain=7.0, is_absence_taught=is_taught)
        wanted = 7 * 0.5 * (error * (1 if is_taught else weights)).mean(1).sum()
        for images in (2, 5):
            told = loss_of(config, outputs, targets, [], schedule, drawing(2), losses.Totals(images))
            assert told.item() == pytest.approx(wanted / images, rel=1e-5)
    bins = {"x": torch.randn(2, 2, 64), "y": torch.randn(2, 2, 64)}
    config = replace(config, kind="simcc", upscale=0)
    told = loss_of(config, bins, targets, [], TrainingSchedule(), drawing(2), losses.Totals(2))
    wanted = losses.axis_bins(bins["x"], bins["y"], torch.tensor(points), torch.tensor(weights)).sum() / 2
    assert told.item() == pytest.approx(wanted.item())


def test_the_loss_of_a_transformer_is_the_mean_of_its_layers(engine, source, monkeypatch):
    torch.manual_seed(0)
    config = config_of(engine, source, "instance")
    layers = [{"pred_logits": torch.randn(2, 6, 8), "pred_masks": torch.randn(2, 6, 4, 4)} for _ in range(3)]
    truths = [(torch.tensor([2]), torch.rand(1, 8, 8).round()), (torch.tensor([0, 5]), torch.rand(2, 8, 8).round())]
    ids, masks, calls, loss = *map(list, zip(*truths)), [], losses.set_loss
    own, totals = drawing(2), losses.totals([1, 2], 6)
    wanted = [loss(each["pred_logits"], each["pred_masks"], ids, masks, 16, own, totals) for each in layers]
    monkeypatch.setattr(losses, "set_loss", lambda *given: calls.append(len(given[0])) or loss(*given))
    for most, groups in ((2 * 192, [4, 2]), (1, [2, 2, 2]), (2**22, [6])):
        monkeypatch.setattr(loop, "LOGITS_AT_ONCE", most)
        outputs = {**layers[0], "aux": layers[1:]}
        found = loss_of(config, outputs, [target()] * 2, truths, TrainingSchedule(points=16), drawing(2), totals)
        assert found.item() == pytest.approx(sum(wanted).item() / 3, rel=1e-5) and calls == groups
        calls.clear()


def test_a_view_is_queried_with_a_word_and_answers_with_one_mask_of_all_its_things():
    masks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [0, 1]]]).bool()
    shown = target(classes=torch.tensor([2, 0, 2]), masks=masks)
    words = [sample_word(shown, 50, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    there = np.mean([word in (0, 2) for word in words])
    assert there == pytest.approx(0.8 + 0.2 * 2 / 50, abs=0.03) and set(words) > set(range(3, 50))
    for word, ids, wanted in (
        (2, [1], [[[1, 0], [0, 1]]]),
        (0, [1], [[[0, 1], [0, 0]]]),
        (1, [], []),
        (None, [2, 0, 2], masks.tolist()),
    ):
        found = query_target(shown, word, torch.device("cpu"))
        assert found[0].tolist() == ids and found[0].dtype == torch.long
        assert found[1].tolist() == wanted and found[1].dtype == torch.float32


def test_what_is_random_depends_on_the_seed_and_its_place_alone():
    digest = hashlib.blake2b(b"3/turn/1", digest_size=8).digest()
    assert loop.generator(3, "turn", 1).initial_seed() == int.from_bytes(digest, "big") // 2


def test_levels_of_two_calls_are_added_by_their_shares():
    decoder = SimpleNamespace(
        config=SimpleNamespace(calls=2),
        projections=lambda: {LEVELS[0]: torch.ones(1, 3, 1, 1)},
        call_shares=lambda: torch.tensor([[0.25] * 4, [0.75] * 4]),
    )
    level = torch.cat([torch.full((2, 4, 3), 1.0), torch.full((2, 4, 3), 5.0)], 1)  # a call after the other
    first, *others = project(decoder, [level] * 4).sums
    assert torch.equal(first, torch.full((2, 1, 2, 2), 3 * (0.25 + 3.75)))
    assert {tuple(each.shape) for each in others} == {(2, 0, 2, 2)}  # of levels that the decoder does not read


@pytest.mark.parametrize(
    ("mode", "has_begun", "was", "now", "is_stored"),
    [
        ("auto", True, True, False, True),  # the disk is full by now
        ("auto", True, False, True, False),
        ("disk", True, True, True, True),
        ("disk", True, False, True, None),
        ("off", True, True, False, None),
        ("off", False, True, False, False),
        ("auto", False, None, True, True),
    ],
)
def test_captures_are_kept_as_a_training_began(tmp_path, monkeypatch, mode, has_begun, was, now, is_stored):
    plan = cache.CachePlan(tmp_path / "captures", 8, 9, now)
    monkeypatch.setattr(session.TrainingSession, "cache_plan", lambda self, task: plan)
    one = session.TrainingSession("demo:4", None, None, (), cache_settings=CacheSettings(mode))
    kept, folder = tmp_path / "training" / "captures.json", tmp_path / "training"
    folder.mkdir()
    if was is not None:
        kept.write_text(json.dumps({"are_kept": was}))
    if has_begun:
        (folder / "settings.json").write_text("{}")
    if is_stored is None:
        how = "kept on the disk" if was else "made anew at every step"
        with pytest.raises(Refused, match=f"--cache {mode}: .* was started with captures {how}"):
            one._stored_cache_plan(tmp_path, "depth")
        return
    assert one._stored_cache_plan(tmp_path, "depth") == replace(plan, is_stored=is_stored)
    assert json.loads(kept.read_text()) == {"are_kept": is_stored}


def test_a_class_that_only_training_images_show_widens_the_interval(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(task_training, "intervals", lambda meter, **more: asked.append(more) or {"miou": [0.0, 1.0]})
    monkeypatch.setattr(predictions, "choose_outlines", lambda requested, config, *_: config)
    monkeypatch.setattr(predictions, "count_classes_shown", lambda views: 7)
    for name in ("save_decoder", "round_parameters"):
        monkeypatch.setattr(task_training, name, lambda *_, **__: None)
    monkeypatch.setattr(task_training, "count_unrelated", lambda source, numbers: len(numbers))
    meter = SimpleNamespace(result=lambda: {"miou": 0.5}, columns=("a", "b"), not_shown=lambda figures: ["b"])
    decoder, views = torch.nn.Linear(1, 1), SimpleNamespace(numbers=(0, 1), source=None)
    decoder.config = SimpleNamespace(outlines="mask", named=("a",))
    places = {"folder": tmp_path, "state_folder": tmp_path, "predictor": SimpleNamespace(predict=list)}
    facts = {"settings": TaskSettings(), "plan": SimpleNamespace(schedule=SimpleNamespace(steps=7)), "task": "semantic"}
    run = SimpleNamespace(**places, **facts, views=views, held_out=SimpleNamespace(numbers=(2,)), framing={})
    run.state = SimpleNamespace(best_weights={}, step=7, loss=0.5, early_stopping=EarlyStopping())
    run.has_early_stopping, run.heads = False, WordHeads((0.5,), 30, 0.9)
    run.save, run._decoder, run._score = list, lambda: decoder, lambda decoder: meter
    result = task_training.TaskTraining.finish(run)
    assert asked == [{"classes": 7}] and result["held_out"] == {"miou": 0.5} and result["not_shown"] == ["b"]
    assert (result["images"], result["held_out_images"], result["unrelated_images"]) == (2, 1, 3)
    assert (result["stopped_early"], result["step_chosen_on_held_out"], result["named_by_captions"]) == (0, 0, 1)
    assert result["words"] == {"masks": 30, "named_rightly": 0.9, "read": True}
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_every_view_of_every_step_has_random_numbers_of_its_own(engine, source, folder, monkeypatch):
    held, made, keys = training_views(engine, source, "semantic", folder), loop.generator, []
    schedule = TrainingSchedule(steps=9, batch_size=3, seed=5, points=16)
    taught = Trainer(config_of(engine, source, "semantic"), schedule, held, reads_ahead=False)
    monkeypatch.setattr(loop, "generator", lambda *key: keys.append(key) or made(*key))
    taught.step(), taught.step()
    assert [key for key in keys if "turn" not in key] == [(5, step, place) for step in (0, 1) for place in range(3)]


def test_a_plan_tells_images_that_were_left_out_and_asks_for_the_words_of_the_data(engine, source, monkeypatch):
    asked, other = [], copy.copy(source)
    monkeypatch.setattr(engine, "encode_classes", lambda words: asked.append(words) or torch.zeros(len(words), 4))
    other.class_table = class_tables.parse("name,say\nball,globe\n")
    one = session.TrainingSession("demo:4", engine, other, (0, 1, 2, 3))
    left_out = []
    for names in ((), ("a", "b"), ("b", "a"), ("a", "c")):
        other.skipped = dict.fromkeys(names, "cut short")
        left_out.append(one.plan("open-vocabulary").settings["left_out"])
    assert left_out[0] == "" and left_out[1] == left_out[2] != left_out[3] and left_out[1].startswith("2 images, ")
    assert asked[0] == class_tables.spoken(other.thing_classes, other.class_table) and "globe" in asked[0]


@pytest.mark.parametrize("count", [0, 2, 20, 21])
def test_images_that_were_left_out_are_told_up_to_twenty_of_them(monkeypatch, count):
    class Data(list):
        classes, thing_classes, layout, order = (), (), "found in a folder", ()
        skipped = {f"{k}.png": f"{'' if k else '0.png: '}cut short" for k in range(count)}

    model = SimpleNamespace(reading=lambda blocks: model, size=64, scheduler={}, defaults=SimpleNamespace(capture=7))
    for name, answer in {
        "check_address": ("folder", None, None),
        "_open_source": Data(),
        "_check_source": Data(),
        "load_model": model,
        "build_engine": "engine",
    }.items():
        monkeypatch.setattr(session, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(session.data_record, "record_data", lambda *_: {"items": []})
    told: list[str] = []
    given = TrainingData("folder:a"), ModelChoice("m"), ("depth",), Inversion((-1,))
    opened = session.open_session(*given, told.append)
    lines = [f"left out   {k}.png: cut short" for k in range(min(count, 20))]
    assert told == ["data       found in a folder", *lines, *["left out   21 in all"] * (count > 20)]
    assert (opened.engine, opened.numbers, opened.inversion.timesteps) == ("engine", (), (7,))


def test_captures_of_every_call_count_for_the_disk(engine, source, monkeypatch):
    asked = []
    monkeypatch.setattr(session.cache, "plan", lambda *given: asked.append(given))
    one = session.TrainingSession("demo:4", engine, source, (0, 1, 2, 3), ViewSettings(draws=5))
    for times in ((7,), (7, 100, 300)):
        replace(one, inversion=Inversion(times), cache_settings=CacheSettings("disk", "/a", 2.5)).cache_plan("depth")
    assert [(str(folder), count, *options) for folder, _, count, *options, _ in asked] == [
        ("/a", 4 * 5 * calls, "disk", 2.5) for calls in (1, 3)
    ]


def test_an_epoch_has_every_view_in_an_order_of_its_own(engine, source, folder):
    held = training_views(engine, source, "depth", folder)
    schedule = TrainingSchedule(steps=9, batch_size=3, seed=5)
    taught = Trainer(config_of(engine, source, "depth"), schedule, held, reads_ahead=False)
    seen = [view for step in range(9) for view in taught.batch_views(step)]
    orders = [torch.randperm(8, generator=loop.generator(5, "turn", epoch)).tolist() for epoch in range(4)]
    assert seen == sum(orders, [])[:27] and orders[0] != orders[1]


def test_the_rate_warms_up_and_falls_by_its_formula(engine, source, folder):
    held, config = training_views(engine, source, "depth", folder), config_of(engine, source, "depth")
    usual = Trainer(config, TrainingSchedule(steps=100, rate=1e-3, warmup=50), held, reads_ahead=False)
    for step, wanted in ((0, 1e-3 / 50), (24, 0.5e-3), (49, 1e-3), (75, 1e-3), (99, 1e-3)):
        fall = 0.5 * (1 + math.cos(math.pi * step / 100))
        assert usual.rate(step) == pytest.approx(wanted * fall, rel=1e-9)
    at_once = Trainer(config, TrainingSchedule(steps=100, rate=1e-3, warmup=0), held, reads_ahead=False)
    assert at_once.rate(0) == 1e-3
    fours = TrainingSchedule(rate=1.0, decay="steps", decay_every=8, batch_size=4, warmup=0)  # of images
    assert [Trainer.rate(SimpleNamespace(schedule=fours), step) for step in (1, 2, 3, 4)] == [1, 0.1, 0.1, 0.1**2]


def test_averages_of_weights_and_optimisers_are_those_of_the_schedule(engine, source, folder):
    held, config = training_views(engine, source, "depth", folder), config_of(engine, source, "depth")
    schedule = TrainingSchedule(steps=20_000, batch_size=1, average=0.9, weight_decay=0.125)
    taught = Trainer(config, schedule, held, reads_ahead=False)
    taught.state.step = 10_000  # the first averages are of fewer weights
    begun = [value.clone() for value in taught.state.average]
    taught.step()
    assert all(map(torch.allclose, taught.state.average, torch._foreach_lerp(begun, taught.state.parameters, 0.1)))
    taught.state.step, begun = 2, [value.clone() for value in taught.state.average]
    taught.step()  # 1 - 3/12
    assert all(map(torch.allclose, taught.state.average, torch._foreach_lerp(begun, taught.state.parameters, 0.75)))
    taught.state.average = [3 * value for value in taught.state.average]
    convolutions = [each for each in taught.state.averaged_decoder().modules() if isinstance(each, SpectralConv2d)]
    norms = [float(torch.linalg.matrix_norm(each.weight.detach().flatten(1), 2)) for each in convolutions]
    assert [float(each.sv0) for each in convolutions] == pytest.approx(norms, rel=0.2) and norms
    assert type(taught.state.optimiser) is torch.optim.AdamW
    assert taught.state.optimiser.defaults["weight_decay"] == 0.125
    other = Trainer(config, replace(schedule, optimiser="adam", average=0.0), held, reads_ahead=False).state
    assert type(other.optimiser) is torch.optim.Adam and other.average == []


def test_the_best_weights_the_evaluations_so_far_and_the_scale_of_losses_are_resumed(engine, source, folder, tmp_path):
    held, config = training_views(engine, source, "depth", folder), config_of(engine, source, "depth")
    options = {"dtype": "fp16", "reads_ahead": False}
    first, second = (Trainer(config, TrainingSchedule(), held, **options).state for _ in range(2))
    first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 512.0})
    first.step = 5
    first.record_evaluation(first.decoder, 0.25, True)
    best = {name: value.clone() for name, value in first.decoder.state_dict().items()}
    with torch.no_grad():
        torch._foreach_add_(first.parameters, 1.0)
    first.step, first.loss, first.early_stopping.evaluations = 7, 0.75, 3
    for _ in range(2):
        first.record_evaluation(first.decoder, 0.5, False)
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.scaler.get_scale() == 512
    told = {"evaluations": 3, "best_figure": 0.25, "best_step": 5, "without_improvement": 2}
    for state in (first, second):
        assert asdict(state.early_stopping) == told and (state.step, state.loss) == (7, 0.75)
        assert state.best_weights.keys() == best.keys()
        assert all(torch.equal(state.best_weights[name], value) for name, value in best.items())
    second.record_evaluation(second.decoder, 0.125, True)
    assert asdict(second.early_stopping) == told | {"best_figure": 0.125, "best_step": 7, "without_improvement": 0}
    assert all(map(torch.equal, second.best_weights.values(), first.decoder.state_dict().values()))


def test_a_figure_is_better_where_it_is_more_or_of_errors_less():
    assert [predictions.is_better("semantic", value, 0.5) for value in (0.4, 0.5, 0.6)] == [False, False, True]
    assert [predictions.is_better("depth", value, 0.5) for value in (0.4, 0.5, 0.6)] == [True, False, False]
    assert predictions.is_better("semantic", 0.0, None)


def training_run(steps, settings, evaluate, **more) -> SimpleNamespace:
    """What the loop of a training reads, with every step and evaluation it takes."""
    state = SimpleNamespace(step=0, early_stopping=SimpleNamespace(without_improvement=0))
    run = SimpleNamespace(state=state, saved=time.monotonic(), logged=[], kept=[], **more)

    def step():
        state.step += 1
        return 0.5

    def judge():
        state.early_stopping.without_improvement += 1
        return evaluate(state.step)

    plan = SimpleNamespace(schedule=SimpleNamespace(steps=steps))
    run.settings, run.plan, run.held_out, run.task = settings, plan, [0], "depth"
    run.trainer = SimpleNamespace(rate=lambda step: step / 10, step=step)
    run.evaluate, run.save = judge, lambda: run.kept.append(state.step)
    run.log = SimpleNamespace(step=lambda *told: run.logged.append(told), figure=lambda *told: run.logged.append(told))
    return run


@pytest.mark.parametrize(("patience", "last"), [(0, 10), (2, 5), (3, 8), (4, 10), (5, 10)])
def test_a_training_is_judged_at_even_steps_and_ends_after_enough_without_improvement(patience, last):
    settings, shown = TaskSettings(checks=4, patience=patience, save_every=1e9), []
    run = training_run(10, settings, lambda step: 0.25 if step > 3 else None)  # the first time nothing is shown
    told = task_training.TaskTraining.train(run, run.log, lambda *each: shown.append(each), lambda: False)
    assert told is True and run.state.step == last and not run.kept
    figures = {step: 0.25 for step in (5, 8, 10) if step <= last}
    assert run.state.early_stopping.without_improvement == 1 + len(figures)
    assert shown == [(step, 0.5, figures.get(step)) for step in range(1, last + 1)]
    wanted = [[(step, 10, 0.5, (step - 1) / 10), (step, "absrel", figures.get(step))] for step in range(1, last + 1)]
    assert run.logged == [line for lines in wanted for line in lines if line[-1] is not None]


@pytest.mark.parametrize("is_enough, step, evaluations", [(True, 4, 3), (False, 7, 3), (True, 4, 1)])
def test_the_weights_of_the_best_evaluation_are_saved_where_images_are_enough(
    tmp_path, monkeypatch, is_enough, step, evaluations
):
    saved, best, last = [], torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    last.config, wanted = SimpleNamespace(outlines="mask", named=()), (best if is_enough else last).weight.item()
    monkeypatch.setattr(predictions, "choose_outlines", lambda requested, config, *_: config)
    monkeypatch.setattr(task_training, "save_decoder", lambda decoder, *_, **__: saved.append(decoder.weight.item()))
    for name in ("round_parameters", "count_unrelated"):
        monkeypatch.setattr(task_training, name, lambda *_: 2)
    views, plan = SimpleNamespace(numbers=(0, 1), source=None), SimpleNamespace(schedule=SimpleNamespace(steps=10))
    places = {"folder": tmp_path, "state_folder": tmp_path, "predictor": SimpleNamespace(predict=list)}
    facts = {"settings": TaskSettings(), "plan": plan, "views": views, "held_out": None, "task": "depth", "framing": {}}
    stopping = EarlyStopping(evaluations=evaluations, best_figure=0.1, best_step=4, without_improvement=2)
    state = SimpleNamespace(best_weights=best.state_dict(), step=7, loss=0.5, early_stopping=stopping)
    run = SimpleNamespace(**places, **facts, state=state, has_early_stopping=is_enough)
    run.save, run._decoder, run.heads = list, lambda: last, WordHeads()
    result = task_training.TaskTraining.finish(run)
    assert (result["weights_of_step"], result["stopped_early"], saved) == (step, True, [wanted])
    assert result["step_chosen_on_held_out"] == (is_enough and evaluations > 1)


def test_a_training_is_saved_in_time_and_where_it_is_stopped():
    run = training_run(10, TaskSettings(checks=4, save_every=0.0), None)
    run.held_out = None
    told = task_training.TaskTraining.train(run, run.log, lambda *each: None, lambda: run.state.step == 4)
    assert told is False and run.kept == [1, 2, 3, 4, 4] and len(run.logged) == 4


def test_captures_are_read_ahead_once_and_no_further_than_the_last_step(engine, source, folder):
    views, asked = training_views(engine, source, "depth", folder), []

    class Counted:
        is_stored, layout = True, views.captures.layout

        def batch(self, chosen):
            asked.append(len(chosen))
            return views.captures.batch(chosen)

    schedule = TrainingSchedule(steps=3, batch_size=5, gradient_accumulation_steps=2)
    taught = Trainer(config_of(engine, source, "depth"), schedule, views.with_captures(Counted()))
    for _ in range(3):
        taught.step()
    taught.close()
    assert asked == [3, 2] * 3


def test_gradients_are_clipped_and_parts_of_a_step_share_their_statistics(engine, source, folder):
    held, config = training_views(engine, source, "depth", folder), config_of(engine, source, "depth")
    norms, seen = [], []

    def statistics(decoder):
        return {name: value.clone() for name, value in decoder.named_buffers() if "stored_" in name}

    for clip in (0.0, 1e-3):
        schedule = TrainingSchedule(batch_size=6, clip=clip, gradient_accumulation_steps=3)
        taught = Trainer(config, schedule, held, reads_ahead=False)
        before = statistics(taught.state.decoder)
        taught.state.decoder.register_forward_hook(lambda module, *_: seen.append(statistics(module)))
        taught.step()
        norms.append(math.sqrt(sum(float(value.grad.square().sum()) for value in taught.state.parameters)))
        parts = seen[-3:]
        assert any(not torch.equal(before[name], parts[1][name]) for name in before)
        for name, value in statistics(taught.state.decoder).items():
            assert torch.allclose(value, sum(part[name] for part in parts) / 3)
    assert norms[0] > 2e-3 and norms[1] == pytest.approx(1e-3, rel=1e-3) and len(seen) == 6


def test_hidden_channels_are_zero_and_the_others_make_up_for_them():
    levels = [
        torch.arange(1.0, 13).view(2, 2, 3),
        torch.ones(2, 1, 2),
    ]  # of 2 features and a map, of a feature and a map
    hidden = [torch.tensor([True, False, False]), torch.tensor([False, False, True])]
    layout = Layout(shapes=((2, 3), (1, 2)), features=(2, 1))
    first, second = loop.hide_channels(levels, hidden, 0.2, layout)
    assert torch.allclose(first / levels[0], torch.tensor([[[0, 1.25, 1]], [[1.25, 1.25, 1]]]))
    assert torch.allclose(second, torch.tensor([[[1.25, 1]], [[0, 1]]]))
    assert torch.equal(loop.hide_channels(levels, [], 0.0, layout)[0], levels[0])


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
    found = loss_of(taught.config, {"depth": metres}, [item], [], taught.schedule, drawing(1), losses.Totals(1))
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
    given = [torch.tensor([1])], [mask], 64, [torch.Generator().manual_seed(5)], losses.totals([1], 2)
    found = losses.set_loss(logits, flat, *given)
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


def test_points_are_sampled_in_one_draw_and_most_where_masks_are_uncertain():
    found = losses.sample_places(2, 8, torch.zeros(1), torch.Generator().manual_seed(3))
    assert [list(part.shape) for part in found] == [[1, 8, 2], [2, 24, 2], [2, 2, 2]]  # a quarter is taken anywhere
    drawn = torch.rand(8 + 48 + 4, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([part.flatten(0, 1) for part in found]), drawn)
    assert [len(part) for part in losses.sample_places(0, 8, torch.zeros(1), *drawing(1))] == [1, 0, 0]
    cells = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])  # of two rows of two pixels
    between, corner = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 1.0]])  # beyond its border a map is 0
    maps, points = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]]), torch.cat([cells, between, corner])[None]
    assert losses.sample_points(maps, points).tolist() == [[0, 4, 8, 12, 6, 3]]
    assert losses.sample_together(maps[:, None].expand(1, 2, 2, 2), points).tolist() == [[[0, 4, 8, 12, 6, 3]] * 2]
    logits, places = torch.tensor([[[9.0, -3.0], [1.0, -9.0]]]), torch.cat([cells, cells])[None, :6]
    chosen = losses.uncertain_points(logits, places, between[None])  # of two points one is taken as it comes
    assert chosen.tolist() == [[[0.25, 0.75], [0.5, 0.5]]]
    assert losses.dice(torch.zeros(1, 4), torch.tensor([[1.0, 0, 1, 0]])).item() == pytest.approx(1 - 3 / 5)


def test_denominators_count_the_whole_step():
    found = losses.totals([3, 0, 9], 5)
    assert (found.images, found.masks) == (3, 12)
    assert found.weight == pytest.approx(3 + 5 + 0.1 * 7)


def test_losses_of_masks_are_divided_by_all_masks_also_those_without_a_query():
    torch.manual_seed(2)
    logits, masks, ids = torch.randn(1, 1, 3), torch.randn(1, 1, 8, 8), [torch.tensor([0, 1])]
    truth = [(torch.rand(2, 8, 8) > 0.5).float()]

    def loss(count):
        random = [torch.Generator().manual_seed(0)]
        whole = losses.Totals(1, count, 1.0)
        return float(losses.set_loss(logits, masks, ids, truth, 64, random, whole))

    of_classes = loss(10**9)
    assert loss(2) - of_classes == pytest.approx(2 * (loss(4) - of_classes), rel=1e-4) and loss(2) > of_classes + 0.1


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
    found, truth, weights = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([[1.0, 0, 0.5], [1, 1, 1]])
    by_joint = [
        0.5 * ((found[:, j] * weights[:, j, None, None] - truth[:, j] * weights[:, j, None, None]) ** 2).mean()
        for j in range(3)
    ]
    assert losses.joint_mse(found, truth, weights).mean().item() == pytest.approx((sum(by_joint) / 3).item(), rel=1e-5)


def test_gaussians_stand_on_their_points():
    maps = losses.gaussian_heatmaps(torch.tensor([[[3.0, 5.0]]]), 8, 2.0)[0, 0]
    assert maps.flatten().argmax().item() == 5 * 8 + 3 and maps.max() == 1
    assert maps[7, 2].item() == pytest.approx(math.exp(-(2**2 + 1**2) / (2 * 2**2)))


def test_axis_bins_prefer_the_right_bins():
    points, weights = torch.tensor([[[3.0, 5.0], [0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    sure = torch.zeros(1, 2, 8)
    good_x, good_y = sure.clone(), sure.clone()
    good_x[0, 0, 3], good_y[0, 0, 5] = 20, 20
    found = losses.axis_bins(good_x, good_y, points, weights), losses.axis_bins(sure, sure, points, weights)
    assert found[0].item() < 1e-4 and found[1].item() == pytest.approx(2 * math.log(8))
    torch.manual_seed(0)
    points, weights, x, y = (
        torch.tensor([[[7.6, 2.6], [-3.0, 1.4]]]),
        torch.tensor([[1.0, 0.5]]),
        *torch.randn(2, 1, 2, 8),
    )
    x_chance, y_chance = (
        x[0].log_softmax(-1),
        y[0].log_softmax(-1),
    )  # 7.6 lies in the last of eight bins, -3 in the first
    wanted = -(x_chance[0, 7] + y_chance[0, 3]) - 0.5 * (x_chance[1, 0] + y_chance[1, 1])
    assert losses.axis_bins(x, y, points, weights).tolist() == pytest.approx([wanted.item()])


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
        ("l_eye", "lip", "r_eye"),
        ("upper arm.L", "L", "upper arm.R"),
        ("lKnee2", "R", "rKnee2"),
        ("kneeL", "r", "kneeR"),
        ("eyeLOuter", "L", "eyeROuter"),
        ("R_L_paw", "L_R_toe", "R_R_paw"),
    ],
)
def test_a_side_is_found_however_it_is_written(names):
    assert mirrored_names(names) == [2, 1, 0]


def test_a_name_whose_other_side_is_another_ones_stays():
    assert mirrored_names(("bleft", "bright", "right bright", "left bright", "a")) == [1, 0, 3, 2, 4]
    assert mirrored_names(("left", "leftleft", "rightleft")) == [0, 2, 1]
    assert mirrored_names(("left", "left", "right")) == [2, 1, 0]


def test_letters_and_words_that_only_begin_with_l_or_r_have_no_side():
    names = ("l", "r", "L", "R", "lamp", "ramp", "LED", "RED", "all", "arr")
    assert mirrored_names(names) == list(range(len(names)))


@pytest.mark.parametrize(
    "names",
    [
        ("LANKLE", "LHIP", "HEAD", "RANKLE", "RHIP", "ROOT"),
        ("lank", "lkne", "thrx", "rank", "rkne", "neck"),
        ("FL", "HL", "nose", "FR", "HR", "tail"),
        ("LF wheel", "LR wheel", "car", "RF wheel", "RR wheel", "road"),
    ],
)
def test_letters_right_beside_others_are_sides_where_half_of_the_names_are_pairs(names):
    assert mirrored_names(names) == [3, 4, 2, 0, 1, 5]
    assert mirrored_names((*names, "a", "b", "c")) == list(range(9))


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


def whole_item(**changes) -> Labelled:
    """A person and a mug in 64 x 64 pixels, the person with three joints and a box."""
    random = np.random.default_rng(0)
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 20:60, 10:40], masks[1, 30:50, 50:62] = True, True
    keypoints = np.float32([[[10, 20, 2], [0, 50, 1], [32, 10, 2]]])
    fields = {
        "semantic": (masks[0] + 2 * masks[1]).astype(np.uint8),
        "depth": random.uniform(1, 3, (64, 64)).astype(np.float32),
        "keypoints": keypoints,
        "keypoint_boxes": np.float32([[10, 20, 30, 40]]),
        "keypoint_areas": np.float32([1200]),
        "crowds": masks[1:],
        "crowd_classes": np.array([1]),
    }
    image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Labelled("0", image, "a person", masks=masks, mask_classes=np.array([0, 1]), **{**fields, **changes})


def source_of(*things) -> LabelledSource:
    source = LabelledSource(64, 1)
    source.classes, source.thing_classes, source.joints = ("background", *things), things, ("a", "left_b", "right_b")
    return source


def test_boxes_joints_and_crowds_have_their_places_in_a_mirror_and_a_crop():
    item, source = whole_item(), source_of("person", "mug")
    found = mirror(item, source)
    assert found.keypoint_boxes.tolist() == [[64 - 10 - 30, 20, 30, 40]] and found.crowd_classes.tolist() == [1]
    assert found.keypoints.tolist() == [[[54, 20, 2], [32, 10, 2], [64, 50, 1]]]  # left and right change places
    assert np.array_equal(found.crowds, item.crowds[..., ::-1]) and np.array_equal(found.depth, item.depth[:, ::-1])
    part = crop(item, 2.0, 0.0, 0.0)
    assert part.keypoint_boxes.tolist() == [[20, 40, 44, 24]]  # as much of it as is left
    assert part.keypoints.tolist() == [[[20, 40, 2], [0, 100, 0], [64, 20, 0]]]  # 64 is beyond the last pixel
    assert part.masks.shape == (1, 64, 64) and part.mask_classes.tolist() == [0] and len(part.crowds) == 1
    assert np.array_equal(part.masks[0], item.masks[0, :32, :32].repeat(2, 0).repeat(2, 1))
    assert np.array_equal(part.depth, item.depth[:32, :32].repeat(2, 0).repeat(2, 1)) and not part.crowds.any()
    left = crop(item, 2.0, 0.0, 0.3125).keypoints  # ten pixels lower; of the left edge
    assert left.tolist() == [[[20, 20, 2], [0, 80, 0], [64, 0, 0]]]
    kept = crop(item, 2.0, 0.0, 1.0)  # from row 32
    assert kept.keypoints.tolist() == [[[20, -24, 0], [0, 36, 1], [64, -44, 0]]]


def test_a_turned_box_is_the_one_around_its_corners():
    found = rotate(whole_item(keypoint_boxes=np.float32([[22, 27, 20, 10]])), 45)
    reach = (20 + 10) / 2 / math.sqrt(2)  # about the middle of the image
    assert np.allclose(found.keypoint_boxes, [[32 - reach, 32 - reach, 2 * reach, 2 * reach]], atol=1e-4)
    back = [[math.sqrt(0.5), math.sqrt(0.5)], [-math.sqrt(0.5), math.sqrt(0.5)]]
    places = (whole_item().keypoints[0, :, :2] - 32) @ np.array(back) + 32
    assert np.allclose(found.keypoints[0, :, :2], places, atol=1e-4)


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
    numbers, ranges = iter(drawn), []
    light = SimpleNamespace(
        random=iter(chances).__next__, uniform=lambda low, high: ranges.append((low, high)) or next(numbers)
    )
    found = relight(np.asarray(Image.new("RGB", (2, 1), before)), 0.5, light)
    wanted = Image.new("RGB", (2, 1), after) if isinstance(after, str) else Image.new("HSV", (2, 1), after)
    assert np.array_equal(found, np.asarray(wanted.convert("RGB")))
    usual = {0: [(0.8, 1.2), (-0.2, 0.2)], 1: [(0.8, 1.2)], 2: [(-28, 28), (-30, 30), (-20, 20)]}
    assert ranges == usual[chances.index(0)]


def test_other_colours_by_their_formula():
    ranges = []

    def uniform(low, high, count=None):
        ranges.append((low, high))
        return {(0.3, 1.4): 0.5, (0.7, 1.3): np.array([0.8, 1.0, 1.25]), (0.6, 1.4): 1.2}.get((low, high), high / 2)

    random = SimpleNamespace(uniform=uniform, standard_normal=lambda shape, kind: np.full(shape, -0.5, kind))
    image = np.uint8([[[100, 150, 200], [0, 0, 0], [255, 250, 245]]])
    grey = (image * [0.299, 0.587, 0.114]).sum(-1, keepdims=True) / 255
    pixels = (grey + (image / 255 - grey) * 0.5) * [0.8, 1.0, 1.25]
    pixels = (pixels - 0.5) * 1.2 + 0.5 + 0.1 - 0.5 * 0.02
    found = recolour(image, random)
    assert found.dtype == np.uint8 and found.tolist() == (pixels.clip(0, 1) * 255).round().tolist()
    assert found[0, 1].tolist() == [0, 0, 0] and 255 in found[0, 2]
    assert ranges == [(0.3, 1.4), (0.7, 1.3), (0.6, 1.4), (-0.2, 0.2), (0, 0.04)]


def test_a_look_is_made_of_its_parts_in_their_order(source):
    """Of each view: turned, mirrored, pasted into, cropped, recoloured and relit, from one stream of random numbers."""
    how = Augmentation(flip=True, rotated=0.5, rotation=20.0, light=0.4, zoom=1.7, pasted=0.6, is_recoloured=True)
    done = Counter[str]()

    def wanted(number, draw, seed, others):
        random, item = np.random.default_rng([seed, number, draw]), source[number]
        if random.random() < 0.5:
            done["rotate"] += 1
            item = rotate(item, float(np.clip(20 * random.normal(), -40, 40)))
        if draw in (1, 3, 5, 7):
            item = mirror(item, source)
        if draw == 0:  # the first of them is in its own colours
            return item
        if random.random() < 0.6:
            done["paste"] += 1
            other = source[others[random.integers(len(others))]]
            item = paste(item, mirror(other, source) if random.random() < 0.5 else other, source, 0.6, random)
        if random.random() < 0.5:
            done["crop"] += 1
            item = crop(item, 1.7 ** random.random(), random.random(), random.random())
        return replace(item, image=relight(recolour(item.image, random), 0.4, random))

    for number, draw in ((k, draw) for k in range(3) for draw in range(8)):
        one, other = (
            augment(source, number, how, draw, 9, source.__getitem__, (1, 2, 3)),
            wanted(number, draw, 9, (1, 2, 3)),
        )
        assert np.array_equal(one.image, other.image) and np.array_equal(one.semantic, other.semantic), (number, draw)
    assert min(done.values()) >= 5 and len(done) == 3
    lit = augment(source, 1, Augmentation(light=1.0), 0, 0, source.__getitem__)
    assert not np.array_equal(lit.image, source[1].image)  # the first view of others is no exception
    plain = augment(source, 1, AUGMENTATIONS["none"], 3, 0, source.__getitem__)
    assert np.array_equal(plain.image, source[1].image)


def test_the_augmentations_of_data_sets_are_datasetdms():
    crops = {name for name, how in AUGMENTATIONS.items() if how.has_crops}
    assert crops == {"voc", "cityscapes", "deepfashion", "coco", "lvis", "kitti", "vkitti2", "nyu", "coco-pose"}
    flips = {name for name, how in AUGMENTATIONS.items() if how.flip}
    assert flips == {"flip", "strong", "strong-depth", "coco", "lvis", "kitti", "vkitti2", "nyu", "coco-pose"}
    lights = {name: how.light for name, how in AUGMENTATIONS.items() if how.light}
    assert lights == {"kitti": 0.5, "vkitti2": 0.5, "nyu": 0.5}
    turned = {name: (how.rotated, how.rotation) for name, how in AUGMENTATIONS.items() if how.rotated or how.rotation}
    assert turned == {"coco-pose": (0.6, 40.0)}
    strong = {name: (how.zoom, how.pasted) for name, how in AUGMENTATIONS.items() if how.is_recoloured}
    assert strong == {"strong": (1.7, 0.5), "strong-depth": (1.0, 0.5)}


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
    told = paste(replace(item, caption="a tree"), other, source, 1.0, np.random.default_rng(0))
    assert told.caption == "a tree, a star"  # what is named once is not named again
    unmasked = paste(replace(item, masks=None), replace(other, masks=None), source, 1.0, np.random.default_rng(0))
    assert np.array_equal(unmasked.image[over], other.image[over])


def test_a_person_is_pasted_only_where_no_joints_are_known_and_hides_joints():
    item, source = (
        whole_item(keypoints=np.float32([[[55, 35, 2], [55, 5, 2], [70, 35, 1]]])),
        source_of("person", "mug"),
    )
    other = replace(whole_item(), image=np.full((64, 64, 3), 7, np.uint8))
    person, mug = item.masks
    found = paste(item, other, source, 1.0, np.random.default_rng(0))
    assert np.array_equal((found.image == 7).all(-1) & ~(item.image == 7).all(-1), mug)
    assert found.mask_classes.tolist() == [0, 1] and not found.crowds.any()  # what was there is covered
    assert found.keypoints[0, :, 2].tolist() == [1, 2, 1] and found.caption == "a person, a mug"
    covered = item.keypoints.copy()
    covered[0, 2] = (70, 70, 2)  # outside, nearest to the last pixel, which nothing covers
    assert paste(replace(item, keypoints=covered), other, source, 1.0, np.random.default_rng(0)).keypoints[0, 2, 2] == 2
    joints = replace(item, keypoints=None)
    found = paste(joints, other, source, 1.0, np.random.default_rng(0))
    assert np.array_equal((found.image == 7).all(-1) & ~(item.image == 7).all(-1), person | mug)
    assert np.array_equal(paste(item, other, source, 0.0, np.random.default_rng(0)).image, item.image)
    for seed in range(20):
        is_pasted = np.random.default_rng(seed).random() < 0.3
        assert (paste(item, other, source, 0.3, np.random.default_rng(seed)).image[40, 55] == 7).all() == is_pasted
    named = paste(replace(item, named=("mug", "wall")), other, source, 1.0, np.random.default_rng(0))
    assert named.named == ("mug", "wall")


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
    assert [item.caption for item in views.items(1)] == [source[1].caption] * 3 + [""] + [source[1].caption] * 3 + [""]


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
    (fresh,) = invert_at(engine, pixels, [source[2].caption], [1], [5], is_raw=True)
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
    pixels = torch.from_numpy(source[1].image[None].copy())
    (capture,) = invert_at(engine, pixels, [source[1].caption], [1], [3], is_raw=True)
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


def test_captures_made_anew_are_those_of_the_views_that_are_asked_for(engine, monkeypatch):
    asked = []
    monkeypatch.setattr(cache, "captures", lambda *given: asked.append(given[2:4]) or [1.0, 2.0])
    views = SimpleNamespace(item=lambda view: f"item {view}", seed=lambda view: 90 + view)
    made = cache.RecomputedCaptures(engine, views, Inversion((1, 0)))
    made.layout = SimpleNamespace(join=lambda call: (torch.full((2, 1, 1), call),))
    assert made.batch([7, 3])[0].tolist() == [[[1], [2]]] * 2 and asked == [(["item 7", "item 3"], [97, 93])]


def test_classes_shown_are_counted_once_over_the_first_views():
    classes = {0: [1, 1, 4], 3: [4], 6: []}
    views = SimpleNamespace(
        numbers=(5, 6, 7),
        first_views=lambda most: range(0, 3 * most, 3),
        target=lambda view: SimpleNamespace(classes=torch.tensor(classes[view])),
    )
    assert predictions.count_classes_shown(views) == 2


def test_an_error_without_a_text_is_told_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_safetensors", lambda path: (_ for _ in ()).throw(ValueError()))
    (tmp_path / checkpoint.NAME).write_bytes(b"x")
    with pytest.raises(Refused, match=r"checkpoint.safetensors: not a checkpoint \(\)"):
        checkpoint.read(tmp_path)


def test_kept_captures_are_those_of_an_image_its_view_and_every_call(tmp_path):
    paths = [[tmp_path / f"{image}{call}.f16" for call in range(2)] for image in range(2)]
    for image, calls in enumerate(paths):
        for call, path in enumerate(calls):
            views = [[100 * image + 10 * call + view] * 6 for view in range(3)]
            path.write_bytes(np.array(views, np.float16).tobytes() + b"digest")
    stored = cache.StoredCaptures(paths, cache.Layout(((2, 3),), (3,)), 3, torch.device("cpu"))
    (level,) = stored.batch([4, 2])
    assert level.shape == (2, 4, 3) and level[..., 0].tolist() == [[101, 101, 111, 111], [2, 2, 12, 12]]


def test_captures_that_no_training_has_needed_for_long_are_deleted(engine, source, tmp_path):
    long_ago = time.time() - 86400 * 31
    training_views(engine, source, "semantic", tmp_path)
    shards = sorted(tmp_path.glob("*.f16"))
    others = [tmp_path / "notes.txt", tmp_path / "of another program.f16"]
    day = 86400
    young = {tmp_path / f"{'a' * 64}.f16": 29.9 * day, tmp_path / f".{'b' * 64}.f16.1.part": 0.9 * day}
    half = tmp_path / f".{'c' * 64}.f16.1.part"  # of a process that was killed
    for path in (*others, *young, half):
        path.write_bytes(b"not ours")
    for path in (*shards, *others):
        os.utime(path, (long_ago, long_ago))
    for path, age in {**young, half: 1.1 * day}.items():
        os.utime(path, (time.time() - age,) * 2)
    few = cache.cache_captures(
        engine, TrainingViews(source, [1, 2], "pose", ViewSettings(draws=2)), Inversion((1,)), tmp_path
    )
    used = [path for paths in few.paths for path in paths]
    assert all(path.exists() for path in young) and not half.exists()
    for path in young:
        path.unlink()
    assert sorted(tmp_path.glob("*.f16")) == sorted([*used, others[1]]) and len(shards) == 4
    assert {path.stat().st_mtime for path in used} == {long_ago} and others[0].exists()  # used, not made again


def test_a_shard_is_of_one_model_precision_caption_seed_and_picture(engine, source):
    def name(settings=None, number=0, change=None, model=None, **numerics):
        views = TrainingViews(source, [number], "depth", settings or ViewSettings(draws=1))
        item = views.item(0)
        views.items = lambda image: [replace(item, image=change(item.image)) if change else item]
        told = {"levels": engine.model.levels, "digests": engine.model.digests, "blocks": (), **(model or {})}
        other = SimpleNamespace(model=SimpleNamespace(**told), fingerprint=lambda: engine.fingerprint() | numerics)
        (((path,), _, _),) = cache._shards(other, views, Inversion((1,)), Path())
        return path.name

    assert name() == name(device="another")
    names = [
        name(),
        name(number=1),
        name(ViewSettings(draws=1, seed=1)),
        name(ViewSettings(draws=1, captions="none")),
        name(change=lambda pixels: 255 - pixels),
        name(change=lambda pixels: pixels.reshape(32, 128, 3)),
        name(model={"digests": {"unet": "0"}}),
        name(model={"blocks": ((1,), (2,), (3,))}),
        name(engine="fast"),
        name(dtype="bf16"),
    ]
    assert len({*names}) == len(names)


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
    noise, again = ImageNoise([seed], (4, 8, 8)).draw()[0], torch.randn(4, 8, 8, generator=posterior_generator(seed))
    assert abs(float((noise * again).mean())) < 0.25
    assert torch.equal(again, torch.randn(4, 8, 8, generator=posterior_generator(seed)))
    assert posterior_generator(7).initial_seed() == 0x4A2C82B1  # the first bytes of the digest of "posterior 7"
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


def test_captures_take_half_of_the_free_disk_and_what_they_have(tmp_path, monkeypatch):
    levels = [Level("low", 2, (3, 4), (2,), 5), Level("high", 4, (6,), (1, 2), 5, halves=1)]
    numbers = 4 * (2 * (3 + 4) + 2 * 5) + 16 * (6 + 3 * 5)
    layout = Layout.of(levels)
    assert layout == Layout(shapes=((4, 24), (16, 21)), features=(14, 6)) and layout.values == numbers == 432
    size, asked = 10 * numbers * 2, []  # in half precision

    def cached():
        asked.append(True)
        return 2

    for free, budget, count in (
        (2 * size, size, 0),
        (2 * size - 2, size + 1, 1),
        (2 * size - 6, size - 1, 1),
    ):
        monkeypatch.setattr(cache.storage, "free_bytes", lambda folder, free=free: free)
        plan = cache.plan(tmp_path, levels, 10, "auto", 0.0, cached)
        assert (plan.bytes, plan.budget, plan.is_stored, len(asked)) == (size, budget, budget >= size, count)
        asked.clear()
    monkeypatch.setattr(cache.storage, "free_bytes", lambda folder: 0)
    told = cache.plan(tmp_path, levels, 10, "disk", 0.5)
    assert (told.budget, told.is_stored) == (500_000_000, True)
    assert str(told) == f"features and maps kept in {tmp_path}: at most 8.64e-06 GB of the 0.5 GB allowed"
    few = cache.plan(tmp_path, levels, 10, "auto", 1e-6, cached)
    assert (few.budget, few.is_stored, asked) == (1000, False, [])
    assert str(few).endswith(f"step: 8.64e-06 GB would not fit in the 1e-06 GB allowed for {tmp_path}")
    off = cache.plan(tmp_path, levels, 10, "off")
    assert (off.bytes, off.budget, str(off)) == (size, 0, "features and maps made anew at every step")


def test_features_and_maps_of_a_capture_lie_cell_by_cell():
    layout = Layout(shapes=((4, 2 + 1 + 2 * 3),), features=(3,))
    features = (torch.rand(2, 2, 2, 2), torch.rand(2, 1, 2, 2))  # [B, channels, height, width]
    maps = torch.rand(2, 2, 4, 3)  # [B, heads, cells, tokens]
    (level,) = layout.join(SimpleNamespace(features=[features], maps=[(maps,)]))
    for b, cell in ((0, 1), (1, 2)):
        own = [each[b, :, cell // 2, cell % 2] for each in features]
        assert torch.equal(level[b, cell], torch.cat([*own, maps[b, 0, cell], maps[b, 1, cell]]))
    (back,) = layout.unpack(level.half().flatten(1))
    assert torch.equal(back, level.half().float())
    calls = [(level,), (level + 1,)]
    assert (
        torch.equal(cache.join_calls(calls)[0], torch.cat([level, level + 1], 1))
        and cache.join_calls(calls[:1]) is calls[0]
    )


def test_only_captures_of_the_same_images_count_as_kept(engine, source, tmp_path, monkeypatch):
    """Beside half of the free disk; those of other data that lie there do not make room."""
    own, other = (TrainingViews(source, numbers, "semantic", ViewSettings(draws=2)) for numbers in ([0, 1], [2, 3]))
    cache.cache_captures(engine, own, Inversion((1,)), tmp_path)
    assert cache.cached_bytes(engine, own, Inversion((1,)), tmp_path) == sum(
        path.stat().st_size for path in tmp_path.glob("*.f16")
    )
    assert cache.cached_bytes(engine, other, Inversion((1,)), tmp_path) == 0
    monkeypatch.setattr(cache.storage, "free_bytes", lambda folder: 2)
    settings = {"inversion": Inversion((1,)), "cache_settings": CacheSettings(cache_dir=str(tmp_path))}
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


FIRST_LOSSES = {
    "semantic": (11.44869, 11.52240),
    "instance": (10.82031, 11.40246),
    "depth": (0.3880735, 0.3617657),
    "pose": (6.701466, 5.892812),
    "open-vocabulary": (9.769510, 9.963430),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_training_of_earlier_versions_goes_on_as_it_began(engine, source, folder, task):
    """What the first two steps draw and lose, by strong augmentation and the recipe's dropout."""
    settings = {"augmentation": AUGMENTATIONS["strong-depth" if task == "depth" else "strong"], "captions": "mixed"}
    held, words = training_views(engine, source, task, folder, 4, seed=3, **settings), words_of(engine, source, task)
    schedule = replace(recipe(task, source, engine.model.levels, 32, (1,), 4).schedule, batch_size=3, points=64, seed=5)
    taught = Trainer(config_of(engine, source, task), schedule, held, words, reads_ahead=False)
    assert [taught.step() for _ in range(2)] == pytest.approx(FIRST_LOSSES[task], rel=2e-3)


@pytest.mark.parametrize(
    ("task", "steps", "share"),
    [("semantic", 45, 0.9), ("instance", 20, 0.9), ("depth", 20, 0.7), ("pose", 20, 0.3), ("open-vocabulary", 20, 0.9)],
)
def test_a_few_steps_lower_the_loss(engine, source, folder, task, steps, share):
    held, words = training_views(engine, source, task, folder), words_of(engine, source, task)
    schedule = TrainingSchedule(steps=steps, batch_size=4, rate=6e-3, points=128, dropout=0.0)
    trainer = Trainer(config_of(engine, source, task), schedule, held, words)
    found = [trainer.step() for _ in range(schedule.steps)]
    trainer.close()
    assert sum(found[-5:]) < share * sum(found[:5])


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
        TrainingSchedule(steps=24, batch_size=1, warmup=1, dropout=0.0),  # a CPU takes long for fp16
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


USUAL = {
    "steps": 1500,
    "batch_size": 16,
    "rate": 1e-3,
    "optimiser": "adamw",
    "decay": "cosine",
    "decay_every": 0,
    "warmup": 50,
    "weight_decay": 0.05,
    "average": 0.995,
    "clip": 1.0,
    "points": 2048,
    "sigma": 1.0,
    "dropout": 0.3,
    "is_deep": True,
    "is_absence_taught": True,
    "gain": 100.0,
    "is_relative": False,
    "gradient_accumulation_steps": 2,
    "seed": 0,
}  # a training that an earlier version began goes on by these


def test_recipes_stay_those_of_earlier_versions(engine, source):
    assert asdict(TrainingSchedule()) == USUAL
    small, wide = engine.model.levels, [replace(level, features=(320,)) for level in engine.model.levels]

    def schedule(task, levels=small, images=100, **options):
        return recipe(task, source, levels, 32, (0,), images, **options).schedule

    semantic = {"batch_size": 12, "points": 512, "steps": 1250, "dropout": 0.6, "weight_decay": 0.2}
    assert asdict(schedule("semantic")) == USUAL | semantic
    assert asdict(schedule("semantic", is_varied=True)) == USUAL | semantic | {"dropout": 0.2, "weight_decay": 0.1}
    large = {"steps": 6000, "batch_size": 4, "rate": 2e-4, "points": 12544, "dropout": 0.2, "warmup": 200}
    assert asdict(schedule("semantic", wide)) == USUAL | large
    assert schedule("instance", wide).dropout == 0.0 and schedule("depth").is_relative
    varied = schedule("instance", wide, is_varied=True)
    assert (varied.dropout, varied.weight_decay) == (0.0, 0.05)  # no more than without
    upstream = {"steps": 500_000, "batch_size": 1, "rate": 1e-4, "optimiser": "adam", "decay": "steps", "warmup": 1}
    upstream |= {"decay_every": 35_000, "points": 196, "sigma": 0.25, "is_deep": False, "is_absence_taught": False}
    upstream |= dict.fromkeys(("weight_decay", "average", "clip", "dropout"), 0.0) | {"gain": 1.0}
    for levels in (small, wide):
        assert asdict(schedule("semantic", levels, preset="upstream")) == USUAL | upstream
    assert schedule("depth", reader="nyu", preset="upstream").decay_every == 40_000
    assert schedule("semantic", images=2, reader="deepfashion-mm", preset="upstream").steps == 1600
    times = [recipe("depth", source, small, 32, each, 9).config.capture_timestep for each in ((0,), (5,), (5, 2))]
    assert times == [None, 5, (5, 2)]
    asked = RecipeSettings(steps=7, batch_size=3, rate=0.5, accumulate=4, seed=9)
    changes = {"steps": 7, "batch_size": 3, "rate": 0.5, "gradient_accumulation_steps": 4}
    assert asdict(adjust(TrainingSchedule(), asked)) == USUAL | changes | {"seed": 9}


def test_upstreams_recipe(engine, source, folder):
    wide = [replace(level, features=(320,)) for level in engine.model.levels]
    for task in ("semantic", "depth", "pose"):  # of one architecture, however small the model
        both = engine.model.levels, wide
        small, large = (recipe(task, source, each, 32, (0,), 9, preset="upstream").config for each in both)
        assert replace(small, levels=large.levels) == large
    of_joints = [recipe("pose", source, engine.model.levels, 32, (0,), 9, preset=name).config for name in PRESETS]
    assert [config.score_threshold for config in of_joints] == [0.3, 0.2]
    for task, queries in (("semantic", 100), ("instance", 100), ("open-vocabulary", 20)):
        assert recipe(task, source, engine.model.levels, 32, (0,), 9, preset="upstream").config.queries == queries
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
    pose = recipe("pose", source, engine.model.levels, 32, (0,), 10, preset="upstream").schedule
    assert (pose.decay_every, pose.sigma) == (4000, engine.model.levels[-1].side / 32)  # of cells, 2 of 64
    assert adjust(TrainingSchedule(), RecipeSettings()) == TrainingSchedule()
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

    def __init__(self, engine, most, error=None):
        self.engine, self.most, self.asked = engine, most, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def encode_image(self, images, generators=None):
        self.asked.append(len(images))
        if len(images) > self.most:
            raise self.error
        return self.engine.encode_image(images, generators)


def test_captures_are_made_in_smaller_batches_where_memory_runs_out(engine, source, tmp_path):
    views = TrainingViews(source, range(1), "depth", ViewSettings(draws=5))
    whole = cache.cache_captures(engine, views, Inversion((1,)), tmp_path / "whole")
    small = SmallGpu(engine, 2)
    parts = cache.cache_captures(small, views, Inversion((1,)), tmp_path / "parts")
    assert small.asked == [5, 3, 2, 2, 1]
    for a, b in zip(whole.batch(range(5)), parts.batch(range(5))):
        assert torch.allclose(a, b, atol=1e-2, rtol=1e-2)
    lacking, other = map(RuntimeError, ("CUDA error: out of memory", "illegal access"))
    for error, kind, said in (
        (None, Missing, "the features and maps of one image"),
        (lacking, Missing, "the features and maps of one image"),
        (other, RuntimeError, "illegal access"),
    ):
        with pytest.raises(kind, match=said):
            cache.cache_captures(SmallGpu(engine, 0, error), views, Inversion((1,)), tmp_path / "none")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA out of memory")])
def test_a_step_that_memory_does_not_suffice_for_says_what_to_change(engine, source, folder, monkeypatch, error):
    schedule = TrainingSchedule(steps=1, batch_size=6, gradient_accumulation_steps=2)
    trainer = Trainer(config_of(engine, source, "depth"), schedule, training_views(engine, source, "depth", folder))

    def full(*arguments, **named):
        raise error

    monkeypatch.setattr(trainer.state.decoder, "forward", full)
    with pytest.raises(Missing, match="does not have enough memory for 3 views at once") as stop:
        trainer.step()
    error = RuntimeError("illegal access")
    with pytest.raises(RuntimeError, match="illegal access"):
        trainer.step()
    trainer.close()
    assert "--accumulate" in stop.value.remedy


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_that_only_emulate_bf16_teach_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda:1")) == dtype
    assert (
        resolve_dtype("fp16", torch.device("cuda:1")) == "fp16" and resolve_dtype("auto", torch.device("cpu")) == "fp32"
    )


def test_without_averages_the_decoder_is_a_copy_of_that_in_training():
    state = object.__new__(TrainingState)
    state.decoder, state.average = torch.nn.Linear(2, 2), []
    copied = state.averaged_decoder()
    assert torch.equal(copied.weight, state.decoder.weight) and copied.weight is not state.decoder.weight


def test_captures_that_are_damaged_gone_or_too_large_are_told(tmp_path, monkeypatch):
    path, content = tmp_path / "a.f16", bytes(range(8))
    for stored, is_whole in (
        (content + hashlib.sha256(content).digest(), True),
        (content + hashlib.sha256(b"").digest(), False),
        (content, False),
    ):
        path.write_bytes(stored)
        assert cache._is_whole(path, 8) is is_whole
    path.unlink()
    assert not cache._is_whole(path, 8)
    layout = Layout.of([Level("low", 1, (2,), (), 0)])
    with pytest.raises(Missing, match="a.f16"):
        cache.StoredCaptures([[path]], layout, 1, torch.device("cpu")).batch([0])
    monkeypatch.setattr(cache, "captures", lambda *_: [[torch.tensor([[7e4, 1.0]])]])
    layout, item = SimpleNamespace(join=lambda calls: calls), SimpleNamespace(id="scene")
    with pytest.raises(Refused, match="image scene: 1 captured values exceed half precision") as stop:
        cache._compute(None, None, [item], [0], None, layout)
    assert "--cache off" in stop.value.remedy


def test_things_of_an_item_are_those_of_its_masks_or_else_of_its_map(source):
    item = source[0]
    named = session._things(source, item)
    assert named and session._things(source, replace(item, masks=None, mask_classes=None)) == named


def test_a_share_is_held_out_by_seed_and_none_of_few():
    source = open_data("demo:100@1000", 64)
    learnt, held = split(source, range(100), 0.1, 0)
    assert len(held) == 10 and sorted(learnt + held) == list(range(100)) and learnt == sorted(learnt)
    assert split(source, range(100), 0.1, 0) == (learnt, held) != split(source, range(100), 0.1, 1)
    assert split(source, range(9), 0.1, 0) == (list(range(9)), []) and split(source, range(100), 0.0, 0)[1] == []
    assert len(split(source, range(10), 0.99, 0)[1]) == 9 and len(split(source, range(10), 0.01, 0)[1]) == 1
    assert [len(split(source, range(100), share, 0)[1]) for share in (0.054, 0.056)] == [5, 6]


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


def test_folds_are_counted_by_images_that_are_not_of_one_picture():
    def count(requested, images, held_out=0, unrelated=None):
        source = LabelledSource(64, images)
        source.origins = lambda number: (str(number % (unrelated or images)),)
        return count_folds(requested, source, range(images), held_out)

    assert [count("auto", 10), count("auto", 9), count("auto", 300, 29), count("auto", 300, 30)] == [5, 0, 5, 0]
    assert [count("auto", 12, unrelated=k) for k in (1, 2, 4, 6)] == [0, 2, 4, 5]
    assert [count("no", 99), count("3", 99, 99), count("9", 9)] == [0, 3, 9]
    with pytest.raises(Refused, match="10 folds of 9 images"):
        count("10", 9)


def test_sequences_are_held_out_whole_and_halves_of_two_pictures():
    source = LabelledSource(64, 12)
    source.sequence = lambda number: f"{number // 4}"
    found = split_folds(source, range(12), 3, 0)
    assert sorted(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # as many as folds
    four = split_folds(source, range(12), 4, 0)  # there are fewer, so that frames are taken one by one
    assert sorted(map(len, four)) == [3, 3, 3, 3] and sorted(sum(four, [])) == list(range(12))
    source.origins = lambda number: (f"{number % 2}",)
    with pytest.raises(Refused, match="3 folds of 2 pictures"):
        split_folds(source, range(12), 3, 0)
    source.sequence = lambda number: ""
    learnt, held = split(source, range(12), 0.1, 0)  # one is too few for either picture, and half is not too much
    assert len(held) == 6 and len({number % 2 for number in held}) == 1 and not {*held} & {*learnt}
    source.origins = lambda number: (str(min(number // 5, 1)),)  # five and seven
    assert split(source, range(12), 0.1, 0)[1] == [0, 1, 2, 3, 4]


def test_the_bound_of_one_more_decoder_is_that_of_a_prediction_interval():
    figures = [0.3, 0.4, 0.5]
    reach = 9.924843 * 0.1 * math.sqrt(4 / 3)  # the quantile 0.995 of t with two degrees of freedom
    assert bound_of("semantic", figures) == pytest.approx(0.4 - reach, rel=1e-6)
    assert bound_of("depth", figures) == pytest.approx(0.4 + reach, rel=1e-6)
    assert bound_of("semantic", [0.5] * 3) == pytest.approx(0.5 - 9.924843 * 0.01 * math.sqrt(4 / 3), rel=1e-6)
    for task, value, is_bad in (
        ("semantic", 0.1, True),
        ("semantic", 0.2, False),
        ("depth", 0.3, True),
        ("depth", 0.2, False),
    ):
        assert is_worse(task, {"value": value, "bound": 0.2}) is is_bad


def test_a_final_decoder_is_compared_with_those_of_the_folds_on_images_from_all_over_the_data(monkeypatch, tmp_path):
    asked, figures = [], {tmp_path: 0.2}
    figures |= {tmp_path / "training" / "folds-3" / str(k): value for k, value in ((1, 0.5), (2, 0.3), (3, 0.4))}

    def score(task, views, place):
        return SimpleNamespace(result=lambda: {"miou": figures[place]} if place in figures else {})

    monkeypatch.setattr(cross_validation, "load_decoder", lambda place: place)
    monkeypatch.setattr(cross_validation.predictions, "score", score)
    predictor = SimpleNamespace(predict=lambda place, views: place)
    one = SimpleNamespace(numbers=range(250), predictor=lambda plan: predictor)
    one.views = lambda *given: asked.append(given)
    plan, folds = SimpleNamespace(decoder=SimpleNamespace(task="semantic")), {"folds": 3, "images": 250}
    told = cross_validation.compare_with_folds(one, plan, tmp_path, folds)
    others = [0.5, 0.3, 0.4]
    wanted = {"figure": "miou", "value": 0.2, "folds": others, "bound": bound_of("semantic", others)}
    assert told.pop("final") == wanted and told == folds and asked == [("semantic", range(0, 250, 3), 1)]
    assert json.loads((tmp_path / "training" / "folds.json").read_text())["final"]["value"] == 0.2
    figures.popitem()  # all truth of its images is ignored
    assert cross_validation.compare_with_folds(one, plan, tmp_path, folds) == folds


def test_few_steps_are_logged_of_a_long_training(tmp_path):
    with Log(tmp_path, 0) as log:
        for step in (*range(1, 8), 14_999, 15_001):
            log.step(step, 15_001, 1.0, 0.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 15_001] and all(0 <= line["seconds"] < 60 for line in lines)
    with Log(tmp_path, 6) as log:  # resumed after step 6
        log.figure(9, "miou", 0.5)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3, 6, 9]


def test_flags_of_a_training_have_their_bounds(tmp_path):
    bounds = dict.fromkeys(
        ("steps", "batch_size", "patience", "seed", "size", "threads", "rate", "cache_gb", "save_every"), 0
    )
    bounds |= dict.fromkeys(("draws", "accumulate", "checks", "ddim_steps"), 1)
    bounds |= dict.fromkeys(("limit_per_class", "min_area", "limit_images", "held_out"), 0)
    for name, least in bounds.items():
        flag = f"--{name.replace('_', '-')}"
        assert getattr(parse([flag, str(least)], TrainConfig)[0], name) == least
        with pytest.raises(Refused, match=f"{flag} {least - 1}.*: expected {least} "):
            parse([flag, str(least - 1)], TrainConfig)
    most = 2**63 - 1
    for flag, bound, beyond in (("--seed", most, most + 1), ("--held-out", 0.5, 0.51)):
        parse([flag, str(bound)], TrainConfig)
        with pytest.raises(Refused, match=f"{flag} {beyond}: expected 0 to {bound}"):
            parse([flag, str(beyond)], TrainConfig)
    for right in ({"held_out": 0.5, "folds": "2"}, {"held_out": 0.0, "folds": "100"}, {"folds": "no", "seed": most}):
        TrainConfig(**right).check()
    for wrong in ("1", "101", "x"):
        with pytest.raises(Refused, match="--folds: "):
            TrainConfig(folds=wrong).check()
    assert TrainConfig(timestep=("20", "99999", "780", "20")).timesteps() == (99999, 780, 20)
    assert TrainConfig().timesteps() == TrainConfig(timestep=("auto",)).timesteps() == (-1,)
    assert len(TrainConfig(timestep=tuple(map(str, range(16)))).timesteps()) == 16
    for wrong in (("100000",), ("-2",), ("-1", "5"), ("auto", "5"), (), tuple(map(str, range(17)))):
        with pytest.raises(Refused, match="--timestep: "):
            TrainConfig(timestep=wrong).timesteps()
    (tmp_path / "list").write_text("a.png")
    identity = TrainConfig(images=str(tmp_path / "list"), steps=5, rate=2.0).session_settings()["identity"]
    assert identity["listed"] == hashlib.sha256(b"a.png").hexdigest()[:12] and not {"steps", "rate", "task"} & {
        *identity
    }


def test_without_flags_a_training_is_that_of_the_library():
    usual = TrainConfig()
    assert usual.task_settings() == TaskSettings() == TaskSettings(10, 4, 60.0, "fp32", "auto", "auto", "auto", ())
    assert (
        usual.group(RecipeSettings) == RecipeSettings() == RecipeSettings("default", "heatmap", 0, 0, 2, 0.0, "auto", 0)
    )
    assert usual.group(CacheSettings) == CacheSettings() == CacheSettings("auto", "", 0.0)
    assert usual.session_settings()["view_settings"] == ViewSettings(12, Augmentation(flip=True), "true", 0)
    assert ViewSettings() == ViewSettings(12, Augmentation(flip=True), "true", 0)
    assert usual.capture_settings() == Inversion((-1,)) == Inversion((-1,), "mean", 0)
    upstream = TrainConfig(preset="upstream", inversion="ddim", ddim_steps=7, by_word="no")
    assert upstream.capture_settings() == Inversion((-1,), "sample", 7)
    assert upstream.task_settings() == replace(TaskSettings(), outlines="", by_word="no")
    chosen = TrainConfig(preset="upstream", latent="mean", outlines="image", cache_dir="/captures", cache_gb=2.5)
    assert chosen.capture_settings().latent == "mean" and chosen.task_settings().outlines == "image"
    assert chosen.session_settings()["cache_settings"] == CacheSettings("auto", "/captures", 2.5)
    data = TrainConfig(data="demo:3", framing="upstream", skip_bad=True, class_table="words.csv").training_data()
    assert data == TrainingData("demo:3", Selection(), "upstream", True, "words.csv")
    model = TrainConfig(model="m", size=8, allow_download=True, engine="torch", device="cpu").model_choice()
    assert model == ModelChoice("m", 8, True, "torch", "cpu")


def test_a_session_tells_how_it_brings_pictures_to_the_models_size_and_augments_them(engine, source):
    one = session.TrainingSession("demo:4", engine, source, (0, 1, 2, 3))
    sides = [[64, 64], [80, 80], [80, 64], [64, 80]]
    framed = replace(one, data={"items": [{"sides": each} for each in sides]}).framing
    wanted = {"pixels_a_side": 64, "framing": "fit", "pictures": 4, "scaled": 3, "cut_to_a_square": 2}
    assert framed == wanted
    people = copy.copy(source)
    people.shows_persons = True
    framed = replace(one, source=people, data={"items": [{"sides": [64, 64]}]}).framing
    assert framed == {**wanted, "framing": "person", "scaled": 1, "cut_to_a_square": 1}
    for address, asked, task, name in (
        ("coco:/a", "auto", "pose", "coco-pose"),
        ("coco:/a", "auto", "semantic", "coco"),
        ("deepfashion-mm:/a", "auto", "semantic", "deepfashion"),
        ("folder:/a", "auto", "pose", "flip"),
        ("coco:/a", "strong", "depth", "strong-depth"),
        ("coco:/a", "none", "pose", "none"),
    ):
        assert replace(one, address=address, augment=asked).augmentation(task) is AUGMENTATIONS[name]
    views = TrainingViews(source, [2, 0], "depth", ViewSettings(draws=3, seed=7))
    assert [views.seed(view) for view in range(6)] == [13, 14, 15, 7, 8, 9] and len(views) == 6
    assert [[*views.first_views(most)] for most in (1, 2, 9)] == [[0], [0, 3], [0, 3]]
    plain = replace(one, view_settings=ViewSettings(draws=5)).plain_views("depth", [1], 2)
    assert (plain.settings.draws, plain.settings.augmentation) == (2, AUGMENTATIONS["none"])
    assert len(replace(one, view_settings=ViewSettings(draws=5)).plain_views("depth", [1])) == 5


@pytest.mark.parametrize("augment, is_whole", [("kitti", True), ("voc", False), ("lvis", False)])
def test_an_augmentation_crops_as_the_data_set_that_it_names(engine, tmp_path, augment, is_whole):
    """KITTI's crops have the height of the picture, also in plain folders, whose own are those of VOC."""
    picture, labels = np.zeros((400, 640, 3), np.uint8), np.ones((400, 640), np.uint8)
    labels[100:] = 0
    for folder, pixels in (("images", picture), ("masks", labels)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    (tmp_path / "classes.txt").write_text("background\nball\n")
    source = open_data(f"folder:{tmp_path}", 64)
    one = session.TrainingSession(f"folder:{tmp_path}", engine, source, (0,), augment=augment)
    views = one.plain_views("semantic", [0])
    assert ({int(item.semantic[:, 0].sum()) for item in views.items(0)} == {16}) is is_whole
    assert one.plain_views("semantic", [0], 1).source is source and source.rule == "voc"
    assert one.plan("semantic").settings.get("crops") == (None if augment == "voc" else augment)
    if augment == "lvis":
        assert views.source.rule == "coco"


class Captioned:
    """Images of things by their places in `thing_classes`, and a caption of each."""

    classes = thing_classes = ("wall", "ball", "cone")
    class_table, called, things_of = None, {}, LabelledSource.things_of

    def __init__(self, *items, captions_name_all=False, are_stored=True):
        self.items, self.captions_name_all, self.are_stored = items, captions_name_all, are_stored

    def __getitem__(self, place):
        things, caption = self.items[place]
        facts = {"caption": caption, "named": None if self.are_stored else ()}
        return SimpleNamespace(mask_classes=np.array(things), masks=things, **facts)


BALL, CONE = ((0, 1), "a ball"), ((0, 2), "a cone")


@pytest.mark.parametrize(
    ("source", "auto", "yes"),
    [
        (Captioned(*[BALL] * 10, *[CONE] * 10, captions_name_all=True), "ball cone", "wall ball cone"),
        (Captioned(*[BALL] * 9, *[CONE] * 10, captions_name_all=True), "wall ball cone", "wall ball cone"),
        (Captioned(*[((0, 1, 2), "")] * 20, captions_name_all=True), "wall ball cone", "wall ball cone"),
        (Captioned(*[BALL] * 10, *[CONE] * 10), "ball cone", "ball cone"),
        (Captioned(*[BALL] * 9, *[CONE] * 10), "", "ball cone"),
        (Captioned(*[BALL] * 10, *[CONE] * 10, are_stored=False), "", "ball cone"),
        (Captioned(*[BALL] * 20, ((0, 1, 2), "a ball")), "", "ball"),  # all captions say "ball", which tells nothing
        (Captioned(*[BALL] * 20, *[CONE] * 3, ((0, 2), "nothing")), "", "ball"),  # "a cone" is not always said
        (Captioned(*[BALL] * 20, ((0, 2), "nothing")), "ball", "ball"),
    ],
)
def test_classes_are_looked_for_by_name_where_captions_name_them(source, auto, yes):
    for by_name, captions, named in (
        ("auto", "true", auto),
        ("yes", "mixed", yes),
        ("no", "true", ""),
        ("yes", "none", ""),
    ):
        one = session.TrainingSession(
            "folder:a",
            None,
            source,
            tuple(range(len(source.items))),
            view_settings=ViewSettings(captions=captions),
            recipe_settings=RecipeSettings(by_name=by_name),
        )
        assert one._named_classes(("background", "wall", "ball", "cone")) == tuple(named.split()), (by_name, captions)
        assert one._named_classes(("background", "sky")) == ()


def test_the_time_that_is_left_of_captures_is_told(engine, source, tmp_path, monkeypatch):
    told, seconds = [], iter(range(1000, 2000, 5))  # a clock that is read once a view, and again for a line
    monkeypatch.setattr(session.time, "monotonic", lambda: next(seconds))
    settings = {"cache_settings": CacheSettings("disk", str(tmp_path)), "on_message": told.append}
    one = session.TrainingSession("demo:4", engine, source, (0, 1, 2, 3), ViewSettings(draws=2), **settings)

    def cached(engine, views, inversion, folder, on_views):
        for _ in range(4):
            on_views(2)

    monkeypatch.setattr(session.cache, "cache_captures", cached)
    plans = [replace(one, inversion=Inversion(times)).plan("depth") for times in ((7,), (7, 100))]
    assert [plan.settings["timestep"] for plan in plans] == [7, [7, 100]]  # one as decoders of earlier versions have it
    assert one.open_training(tmp_path, one.plan("depth"), TaskSettings(), lambda: False)
    assert told == ["captures 50%, about 15 s left", "captures 100%, about 0.0 s left"]
    assert one.open_training(tmp_path, one.plan("depth"), TaskSettings(), lambda: True) is None


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
        (["--seed", str(2**64)], 2, "--seed 18446744073709551616: expected 0 to"),
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


def test_every_image_is_judged_once_by_the_decoder_that_its_fold_was_left_out_of(tmp_path, monkeypatch):
    class Meter:
        made: list = []

        def __init__(self, source):
            self.added = []
            self.made.append(self)

        def add(self, item, label):
            self.added.append((item, label))

        count = property(lambda self: len(self.added))
        result = lambda self: {"absrel": 0.25}  # noqa: E731

    folds, trained = [[4, 0], [2, 3]], []
    plan = task_training.TaskPlan(None, SimpleNamespace(steps=5), None, {"seed": 7}, {})

    def views(task, numbers, draws):
        return SimpleNamespace(numbers=numbers, draws=draws, item=lambda view: f"image {numbers[view]}")

    def predict(decoder, views):
        return [(decoder, number, views.draws) for number in views.numbers]

    session = SimpleNamespace(source=None, numbers=range(5), view_settings=SimpleNamespace(seed=0), views=views)
    session.plan = lambda task: plan
    session.predictor = lambda plan: SimpleNamespace(predict=predict)
    replaced = {
        "METRICS": {"depth": Meter},
        "split_folds": lambda source, numbers, count, seed: folds,
        "without_fold": lambda session, fold: session,
        "find_result": lambda place, plan: trained.append((place, plan.settings)) or {"steps": 5},
        "load_decoder": lambda place: place.relative_to(tmp_path).as_posix(),
        "intervals": lambda meter, folds=0: {"absrel": [0.1, folds]},
    }
    for name, value in replaced.items():
        monkeypatch.setattr(cross_validation, name, value)

    def figures():
        return cross_validation.cross_validate(session, "depth", tmp_path, len(folds), None, None, lambda: False)

    document = figures()
    places = ["training/folds-2/1", "training/folds-2/2"]
    assert trained == [(tmp_path / place, {"seed": 7, "fold": f"{k} of 2"}) for k, place in enumerate(places, 1)]
    judged = [(number, place) for place, fold in zip(places, folds) for number in fold]
    assert Meter.made[0].added == [(f"image {number}", (place, number, 1)) for number, place in judged]
    wanted = {"task": "depth", "folds": 2, "images": 4, "held_out": {"absrel": 0.25}}
    assert document == wanted | {"held_out_intervals": {"absrel": [0.1, 2]}} == cross_validation.read_folds(tmp_path)
    assert figures() == document and len(Meter.made) == 1  # nothing has changed
    folds[:] = [[4], [0], [2, 3]]
    assert figures()["folds"] == 3 and len(Meter.made) == 2
