"""Teaching a decoder: losses against hand-made cases, the capture cache, and a fit that learns."""

import json
import math

import numpy as np
import pytest
import torch

from datasetdm_fast.demo.teach import configs
from datasetdm_fast.engines import build_engine
from datasetdm_fast.inversion import capture_timestep, invert
from datasetdm_fast.loading import load_model
from datasetdm_fast.models.decoders import DecoderConfig, build_decoder, save_decoder
from datasetdm_fast.readers import open_data
from datasetdm_fast.training import losses
from datasetdm_fast.training.cache import capture_views
from datasetdm_fast.training.loop import Schedule, fit, loss_of
from datasetdm_fast.training.targets import mirrored_joints, target


@pytest.fixture(scope="module")
def engine():
    return build_engine("torch", load_model("tiny"), {})


@pytest.fixture(scope="module")
def source(engine):
    return open_data("demo:4@1000", engine.model.size)


@pytest.fixture(scope="module")
def cache(engine, source):
    items = list(source)
    return capture_views(engine, [item.image for item in items], [item.caption for item in items], timestep=1, draws=1, mirror=True)


def small(config: DecoderConfig) -> DecoderConfig:
    from dataclasses import replace

    return replace(config, width=16, heads=2, layers=2, feed_forward=32, mask_dim=16, queries=6, upscale=min(config.upscale, 2), depth_width=8)


def test_matching_finds_the_cheapest_assignment():
    torch.manual_seed(0)
    masks = torch.zeros(2, 16, 16)
    masks[0, :8], masks[1, 8:] = 1, 1
    mask_logits = torch.stack([20 * masks[1] - 10, torch.zeros(16, 16), 20 * masks[0] - 10])
    class_logits = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [5.0, 0.0, 0.0]])
    queries, targets = losses.match(class_logits, mask_logits, torch.tensor([0, 1]), masks, 256)
    assert dict(zip(queries.tolist(), targets.tolist())) == {2: 0, 0: 1}


def test_a_wrong_answer_costs_many_times_a_right_one():
    torch.manual_seed(0)
    masks = torch.zeros(1, 16, 16)
    masks[0, 4:12, 4:12] = 1
    right = (torch.tensor([[[20.0, 0, 0], [0, 0, 20.0]]]), torch.stack([40 * masks - 20, -20 * torch.ones(1, 16, 16)], 1))
    wrong = (right[0].flip(1), -right[1])
    cheap, dear = (losses.set_loss(*answer, [torch.tensor([0])], [masks], 256).item() for answer in (right, wrong))
    assert cheap < 5  # the least certain points lie on the edge, where even a right mask is half there
    assert dear > 10 * cheap


def test_an_image_without_things_still_teaches_their_absence():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    loss = losses.set_loss(logits, torch.zeros(1, 3, 8, 8), [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, 16, 16)], 64)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(4)) and (logits.grad[..., 3] < 0).all()


def test_scale_invariant_log_by_its_formula():
    truth = torch.tensor([[1.0, 2.0, 0.0, 4.0]])
    d = np.log([1 / 2, 2 / 2, 4 / 3])
    assert losses.scale_invariant_log(torch.tensor([[2.0, 2.0, 9.0, 3.0]]), truth).item() == pytest.approx(
        math.sqrt((d**2).mean() - 0.5 * d.mean() ** 2), rel=1e-5
    )


def test_gaussians_stand_on_their_points():
    maps = losses.gaussian_heatmaps(torch.tensor([[[3.0, 5.0]]]), 8, 1.0)
    assert maps.flatten().argmax().item() == 5 * 8 + 3 and maps.max() == 1


def test_axis_bins_prefer_the_right_bins():
    points, weights = torch.tensor([[[3.0, 5.0], [0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    sure = torch.zeros(1, 2, 8)
    good_x, good_y = sure.clone(), sure.clone()
    good_x[0, 0, 3], good_y[0, 0, 5] = 20, 20
    assert losses.axis_bins(good_x, good_y, points, weights) < 1e-4 < losses.axis_bins(sure, sure, points, weights)


def test_left_becomes_right_in_a_mirror(source):
    order = mirrored_joints(source.joints)
    assert [source.joints[k] for k in order] == ["head", "neck", "pelvis", "right_hand", "left_hand", "right_foot", "left_foot"]
    item = next(item for item in open_data("demo:40@0", 64) if len(item.keypoints))
    plain, mirrored = target(source, item, "pose", False), target(source, item, "pose", True)
    hand, other = source.joints.index("left_hand"), source.joints.index("right_hand")
    assert mirrored.points[hand].tolist() == pytest.approx([64 - plain.points[other, 0].item(), plain.points[other, 1].item()])


def test_the_cache_holds_what_an_inversion_gives(engine, source, cache):
    assert [view.image for view in cache.views] == [0, 1, 2, 3] * 2 and [view.is_mirrored for view in cache.views] == [False] * 4 + [True] * 4
    fresh = invert(engine, torch.from_numpy(source[2].image[None].copy()), [source[2].caption], 1, [2])
    for level, kept in zip(fresh.features, cache.batch([2]).features):
        for a, b in zip(level, kept):
            assert (a - b).norm() / a.norm() < 2e-3  # half precision


@pytest.mark.parametrize("task", ["semantic", "instance", "depth", "pose", "open-vocabulary"])
def test_a_few_steps_lower_the_loss(engine, source, cache, task):
    config, schedule = configs(engine.model.levels, engine.encode_classes(["ball"]).shape[1], 1)[task]
    config, schedule = small(config), Schedule(steps=45, batch_size=4, rate=6e-3, points=128, sigma=schedule.sigma)
    items = list(source)
    targets = [target(source, items[view.image], task, view.is_mirrored) for view in cache.views]
    words = engine.encode_classes(list(source.thing_classes)).clone() if task == "open-vocabulary" else None

    def loss(decoder) -> float:
        torch.manual_seed(1)
        return sum(loss_of(decoder, cache.batch(range(8)), targets, schedule, words).item() for _ in range(3))

    torch.manual_seed(schedule.seed)
    before = loss(build_decoder(config))
    assert loss(fit(config, cache, targets, schedule, words)) < 0.9 * before


def test_the_same_seed_fits_the_same_decoder(engine, source, cache):
    config, _ = configs(engine.model.levels, 32, 1)["depth"]
    targets = [target(source, source[view.image], "depth", view.is_mirrored) for view in cache.views]
    first, second = (fit(small(config), cache, targets, Schedule(steps=3, batch_size=2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_decoders_of_two_timesteps_cannot_share_a_capture(engine):
    depth, semantic = (configs(engine.model.levels, 32, t)[task][0] for task, t in (("depth", 1), ("semantic", 100)))
    assert capture_timestep([depth]) == 1
    with pytest.raises(ValueError, match="depth 1, semantic 100"):
        capture_timestep([depth, semantic])


def test_evaluate_prints_every_figure(engine, tmp_path, capsys):
    from datasetdm_fast.evaluate import main

    for task, (config, _) in configs(engine.model.levels, engine.encode_classes(["ball"]).shape[1], 1).items():
        torch.manual_seed(0)
        save_decoder(build_decoder(small(config)), tmp_path / task)
    assert main(["--model", "tiny", "--decoder", str(tmp_path), "--data", "demo:3@900000", "--json", "--quiet"]) == 0
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
        (["--decoder", "/nowhere"], 3, "no sub-folder holds a config.json"),
    ],
)
def test_evaluate_refuses_bad_input(engine, tmp_path, capsys, flags, code, said):
    from datasetdm_fast.evaluate import main

    config = configs(engine.model.levels, 32, 1)["depth"][0]
    save_decoder(build_decoder(small(config)), tmp_path / "depth")
    given = {"--model": "tiny", "--decoder": str(tmp_path), **dict(zip(flags[::2], flags[1::2]))}
    assert main([word for pair in given.items() for word in pair]) == code
    assert said in capsys.readouterr().err
