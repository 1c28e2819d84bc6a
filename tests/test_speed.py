"""Approximate speeds: which calls they save, and the gate of labels that refuses what makes these worse."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_steps import prepare
from skips import long_test
from stub_engine import StubEngine

from datasetdm_fast import generate
from datasetdm_fast.config import EXACT, USUAL_SAMPLER
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Quarantined, Request, Sample, Trust
from datasetdm_fast.engine.decoders.config import SD1_LEVELS
from datasetdm_fast.engine.engines import build_engine, device
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.engines.fast.joint import JointEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import calls as speed
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.models import fp8
from datasetdm_fast.engine.models.fp8 import Fp8Linear, to_fp8
from datasetdm_fast.engine.models.fused import FusedUNet
from datasetdm_fast.engine.models.layers import Linear, Weights
from datasetdm_fast.engine.models.mmdit import HeadProjection
from datasetdm_fast.engine.models.packed import PackedLinear
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.agreement import admission, speed_gate
from datasetdm_fast.runs.agreement.speed_gate import LabelFigure
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import figures_in_words
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import SamplingSettings

DEMO_DIT = ("--model", "demo-dit")
pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")


@pytest.mark.parametrize("captured", [(45,), (50,), (20, 45)])
def test_cached_calls_follow_a_whole_one(captured):
    cached = speed.cached_calls(51, captured)
    keeping = [call for call in range(51) if call not in cached and call != captured[-1]]
    assert cached.isdisjoint({0, 1, 2, *captured}) and 30 <= len(cached) <= 32
    assert all(min(call - whole for whole in keeping if whole < call) < speed.CACHE_INTERVAL for call in cached)


@pytest.mark.parametrize("wrong", [{0}, {1}, {2}, {5}, {4, 6}])  # 5 is captured, so 3 is the last whole call
def test_a_recipe_that_keeps_other_calls_breaks_its_promise(wrong):
    recipe = SimpleNamespace(facts={"speed": "cache3"}, schedule=range(10), captured=(5,), fp8=set())
    speed_gate.check_promise(SimpleNamespace(**vars(recipe) | {"cached": {4, 7, 8}}))
    with pytest.raises(GateFailed, match="not every third call is whole"):
        speed_gate.check_promise(SimpleNamespace(**vars(recipe) | {"cached": wrong}))


def test_a_recipe_whose_labels_are_all_read_from_attention_keeps_its_promise():
    """No decoder captures any of its calls."""
    engine = StubEngine(64)
    engine.model.levels, engine.model.defaults = SD1_LEVELS, replace(engine.model.defaults, steps=50)
    recipe = make_recipe(engine, ("attention",), classes=("ball",), speed="fast25")
    assert recipe.captured == () and len(recipe.schedule) == 25
    speed_gate.check_promise(recipe)


def test_inner_calls_are_all_but_the_ends_and_the_captured_ones():
    assert speed.inner_calls(6, (2,)) == {1, 3, 4}


@pytest.mark.parametrize(("steps", "is_faster"), [(26, True), (25, False)])
def test_a_model_of_as_few_steps_is_no_faster(steps, is_faster):
    model = SimpleNamespace(defaults=SimpleNamespace(steps=steps), backbone=SimpleNamespace(flow=None, title="A model"))
    with nullcontext() if is_faster else pytest.raises(Refused, match="A model is sampled in 25 steps as it is"):
        assert speed.fast_sampling(SimpleNamespace(model=model), "fast25", USUAL_SAMPLER, 0) == ("dpm-solver++", 25)


@pytest.fixture(scope="module")
def tiny():
    return FastEngine(load_model("tiny"), device="cpu")


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_call_from_its_own_deep_features_is_that_call(tiny, is_fused, monkeypatch):
    latents = torch.randn(3, *tiny.model.latent_shape(), generator=torch.Generator().manual_seed(0))
    text = call_text(tiny, ["a ball", "a cube", "two cones"])
    if is_fused:  # as on a GPU, with the plain operations
        tiny.denoise(latents, 500, text)  # builds the network that it then takes the place of
        network = tiny.model.networks["unet"].read()
        monkeypatch.setattr(tiny, "unet", FusedUNet(network, tiny.ops))
    noise, deep = tiny.denoise_and_keep(latents, 500, text)
    assert len(deep) == 3 and torch.equal(noise, tiny.denoise(latents, 500, text))
    torch.testing.assert_close(tiny.denoise_from(deep, latents, 500, text), noise, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny.denoise_from(0 * deep, latents, 500, text), noise, atol=1e-3)


def test_both_speeds_are_25_calls_of_which_11_are_whole():
    engine = FastEngine(load_model("demo"), device="cpu")
    recipe = make_recipe(engine, (), speed="fast25-cache3")
    assert (recipe.facts["sampler"], len(recipe.schedule), recipe.facts["whole_calls"]) == ("dpm-solver++", 25, 11)
    assert recipe.cached == speed.cached_calls(25, recipe.captured)
    engine.speeds = ()
    with pytest.raises(Refused, match="--speed fast25-cache3: the engine fast keeps no deep features"):
        make_recipe(engine, (), speed="fast25-cache3")


def test_what_a_speed_does_not_go_with_is_refused():
    with pytest.raises(Refused, match="a sampler and steps of its own"):
        make_recipe(StubEngine(64), ("semantic",), steps=6, speed="fast25")
    with pytest.raises(Refused, match="--speed fast25-cache3: it has a sampler and steps of its own"):
        make_recipe(StubEngine(64), ("semantic",), steps=6, speed="fast25-cache3")
    with pytest.raises(Refused, match="keeps no deep features"):
        make_recipe(StubEngine(64), ("semantic",), speed="cache3")
    with pytest.raises(Refused, match="has no fp8 products"):
        make_recipe(StubEngine(64), ("semantic",), speed="fp8")
    with pytest.raises(Refused, match="has no fp8 products of Stable Diffusion 1.x and 2.x") as refused:
        make_recipe(FastEngine(load_model("tiny"), device="cpu"), (), speed="fp8")
    assert refused.value.remedy == "Use --engine fast with an MM-DiT, or drop --speed."
    engine = StubEngine(64)
    engine.speeds = (speed.CACHED,)
    speed.check_call_speed(engine, "cache3", reads_every_call=False)
    with pytest.raises(Refused, match="--speed cache3: labels from attention are read from every call"):
        speed.check_call_speed(engine, "cache3", reads_every_call=True)


def test_products_in_fp8_are_those_of_rounded_factors():
    x, weight = torch.randn(2, 5, 48), torch.randn(32, 48)
    x[0, 0] = 0
    truth = [part.float() * scale for part, scale in map(to_fp8, (x.flatten(0, 1), weight))]
    layer = Fp8Linear(weight, torch.ones(32))
    torch.testing.assert_close(layer(x).flatten(0, 1), truth[0] @ truth[1].T + 1, rtol=1e-2, atol=1e-2)
    total = torch.ones(2, 5, 32)
    layer.add_to(total, x)
    torch.testing.assert_close(total, layer(x), rtol=1e-2, atol=1e-2)  # without bias
    assert (truth[0] - x.flatten(0, 1)).norm() / x.norm() < 0.04


def test_an_fp8_twin_of_a_projection_lacks_the_rows_of_decoders():
    x = torch.randn(2, 5, 32)
    weights = Weights({f"{name}.weight": torch.randn(16, 32) for name in "qkv"})
    source = HeadProjection(weights, tuple("qkv"), ("", ""))
    source.append(torch.randn(8, 32))  # of a call that was interrupted
    source.append(torch.randn(16, 32))
    assert source(x, 2)[1].shape == (2, 5, 16)
    narrow = fp8._twin_of(source)
    product, appended = narrow(x)
    assert isinstance(narrow, fp8.Fp8Projection) and product.shape == (2, 5, 48) and appended.shape == (2, 5, 0)
    torch.testing.assert_close(product, source(x)[0], rtol=0.2, atol=1.0)
    plainly = Linear(Weights({"weight": torch.randn(16, 32)}))
    laid_out, wanted = PackedLinear(plainly), fp8._twin_of(plainly)(x)
    laid_out(x)  # after which its plain weight is gone
    assert laid_out.weight is None and torch.equal(fp8._twin_of(laid_out)(x), wanted)
    odd = Linear(Weights({"weight": torch.randn(16, 24)}))
    assert fp8._twin_of(odd) is odd  # whose inputs no product in fp8 takes


@pytest.mark.gpu
def test_products_in_fp8_of_a_gpu_are_those_of_a_cpu():
    x, weight, bias = torch.randn(3, 40, 64), torch.randn(128, 64), torch.randn(128)
    place = torch.device("cuda")
    assert device.multiplies_fp8(place)
    on_gpu = Fp8Linear(weight.to(place), bias.to(place))(x.to(place))
    torch.testing.assert_close(on_gpu.cpu(), Fp8Linear(weight, bias)(x), rtol=2e-2, atol=2e-1)


def test_calls_in_fp8(monkeypatch):
    engine = build_engine("fast", load_model("demo-dit"), device="cpu")
    recipe = make_recipe(engine, (), speed="fp8")
    assert recipe.fp8 == set(range(1, len(recipe.schedule) - 1)) - set(recipe.captured)
    latents = torch.randn(2, *engine.model.latent_shape(), generator=torch.Generator().manual_seed(0))
    text = call_text(engine, ["a ball", "a cube"])
    exact, rounded = engine.denoise(latents, 500, text), engine.denoise_in_fp8(latents, 500, text)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.1
    torch.testing.assert_close(engine.denoise(latents, 500, text), exact, rtol=0, atol=0)
    with pytest.raises(GateFailed, match="captured calls are in fp8"):
        speed_gate.check_promise(replace(recipe, fp8=frozenset(range(len(recipe.schedule)))))
    monkeypatch.setattr(device, "multiplies_fp8", lambda device: False)
    with pytest.raises(Refused, match="the GPU has no fp8 products"):
        make_recipe(engine, (), speed="fp8")


@pytest.mark.parametrize(
    ("measure", "exact", "value", "passes"),
    [
        ("IoU semantic", 0.95, 0.941, True),
        ("IoU semantic", 0.95, 0.939, False),
        ("PCK pose", 0.9, 0.95, True),
        ("PCK pose", 0.9, 0.88, False),
        ("REL depth", 0.005, 0.0069, True),
        ("REL depth", 0.005, 0.0071, False),
        ("doubtful", 0.1, 0.12, False),
        ("IoU semantic", 0.95, float("nan"), False),
    ],
)
def test_a_figure_may_be_worse_by_its_limit_alone(measure, exact, value, passes):
    assert LabelFigure(measure, exact, value, speed_gate.MOST_LOST[measure.split()[0]]).is_passed is passes
    assert LabelFigure("IoU a", 0.75, 0.5, 0.25).is_passed and LabelFigure("REL a", 0.5, 0.75, 0.25).is_passed


def test_a_figure_is_of_the_kind_of_its_label():
    points = np.float32([[[0, 0, 1], [9, 9, 1]], [[3, 3, 1], [4, 4, 1]]])
    people = Keypoints(points, np.array([[2, 2], [0, 0]]), np.ones(2), ("a", "b"))  # nothing of the second is shown
    assert speed_gate._agreement("pose", people, people) == ("PCK", 1)
    assert speed_gate._agreement("depth", depth := DepthMap(np.ones((2, 2), np.float32), 4.0), depth) == ("REL", 0)


def test_what_an_image_does_not_show_counts_as_what_a_label_leaves_out_does(monkeypatch):
    points, nothing = np.float32([[[0, 0, 1], [9, 9, 1]], [[50, 50, 1], [60, 60, 1]]]), np.zeros((0, 2, 3), np.float32)
    people = Keypoints(points, np.full((2, 2), 2), np.ones(2), ("a", "b"))
    one, none = (
        replace(people, points=some, visibility=people.visibility[: len(some)]) for some in (points[:1], nothing)
    )
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, 2:] = True, True
    things = Instances(masks, np.array([0, 0]), np.ones(2), ("a",))
    first = Instances(masks[:1], np.array([0]), np.ones(1), ("a",))
    for task, name, all_of_them, some, share in (
        ("pose", "PCK", people, one, 0.5),
        ("pose", "PCK", people, none, 0),
        ("instance", "IoU", things, first, 0.5),
        ("instance", "IoU", things, Instances(masks[:0], np.zeros(0, int), np.zeros(0), ("a",)), 0),
    ):
        for pair in ((all_of_them, some), (some, all_of_them)):
            assert speed_gate._agreement(task, *pair) == (name, share)
    assert np.isnan(speed_gate._agreement("pose", none, none)[1])
    monkeypatch.setattr(speed_gate, "kind_of", lambda task: SimpleNamespace(overlap=lambda *_: None))
    assert speed_gate._agreement("edges", things, first) is None  # labels without areas, of another package


def test_joints_are_found_near_theirs():
    points = np.zeros((1, 3, 3), np.float32)
    points[0, 1, :2], points[0, 2, :2] = (0, 100), (50, 50)
    truth = Keypoints(points, np.array([[2, 2, 0]]), np.ones(1), ("a", "b", "c"))
    moved = points.copy()
    moved[0, 1, 0] += 11  # of a person 100 pixels tall
    assert speed_gate._share_of_joints(truth, truth) == 1
    assert speed_gate._share_of_joints(replace(truth, points=moved), truth) == 0.5
    assert speed_gate._share_of_joints(replace(truth, points=points[:0]), truth) == 0
    assert np.isnan(speed_gate._share_of_joints(truth, replace(truth, visibility=np.array([[0, 0, 0]]))))
    twice = Keypoints(np.repeat(points, 2, 0), np.array([[2, 2, 0]] * 2), np.ones(2), ("a", "b", "c"))
    assert speed_gate._share_of_joints(twice, truth) == 1  # not more than all, where two persons are near
    corners = np.float32([[[0, 0, 1], [10, 0, 1], [10, 100, 1], [0, 100, 1]]])  # a tenth of the longer side is 10
    tall = Keypoints(corners, np.full((1, 4), 2), np.ones(1), tuple("abcd"))
    for away, share in ((9, 1), (10, 1), (11, 0)):
        assert speed_gate._share_of_joints(replace(tall, points=corners + np.float32([away, 0, 0])), tall) == share


@pytest.mark.parametrize(
    ("model", "has_seeds", "number", "images"),
    [
        ("a/b", True, 7, 7),
        ("a/b", True, 700, 200),
        ("a/b", False, 7, 200),
        ("demo", True, 70, 64),
        ("demo", False, 7, 64),
    ],
)
def test_images_that_judge_a_speed_have_seeds_of_the_run_or_other_ones(model, has_seeds, number, images):
    plan = SimpleNamespace(has_seeds=has_seeds, number=number)
    assert speed_gate.count_images(SimpleNamespace(document={"config": {"model": model}}, plan=plan)) == images


def test_samples_that_were_set_aside_count_as_doubtful_and_are_compared_with_nothing(monkeypatch):
    def sample(metres, is_doubtful=False):
        trust = Trust(reasons=("a",) * is_doubtful)
        depth = DepthMap(np.full((2, 2), metres, np.float32), 10.0)
        return Sample(Request(0, "a", 0), np.zeros((2, 2, 3), np.uint8), {"depth": depth}, trust=trust)

    aside = Quarantined(Request(0, "a", 0), "NaN")
    made = [sample(2.0), sample(3.0, True), aside, sample(4.0)]
    answers, pictures = iter([made, [sample(4.0), sample(3.0), sample(9.0), aside]]), []
    monkeypatch.setattr(speed_gate, "_results", lambda *_: next(answers))
    monkeypatch.setattr(speed_gate, "inversion_recipe", lambda *_: None)
    monkeypatch.setattr(speed_gate, "inversion_generator", pictures.append)
    recipe = SimpleNamespace(size=2, tasks=("depth",))
    figures = speed_gate._figures(SimpleNamespace(engine=None), recipe, None, lambda: None)
    assert figures == {"REL depth": pytest.approx(0.25), "doubtful": 0.5} and len(pictures) == 1
    answers = iter([made, made])
    monkeypatch.setattr(speed_gate, "_agreement", lambda *_: ("PCK", float("nan")))  # no image shows a joint
    assert speed_gate._figures(SimpleNamespace(engine=None), recipe, None, lambda: None)["PCK depth"] == 1


def test_a_speed_is_judged_by_each_figure_beside_that_of_exact_images(monkeypatch):
    held = {"exact": {"IoU semantic": 0.9, "REL depth": 0.1, "doubtful": 0.0}}
    held["speed"] = {"IoU semantic": 0.895, "REL depth": 0.2, "doubtful": 0.0}
    for name in ("check_promise", "check_call"):
        monkeypatch.setattr(speed_gate, name, lambda *_: None)
    monkeypatch.setattr(speed_gate, "_place", lambda job, recipe, exact: recipe)
    monkeypatch.setattr(speed_gate, "_cached", lambda place, measure: held[place if place == "exact" else "speed"])
    monkeypatch.setattr(speed_gate, "count_images", lambda job: 64)
    job = SimpleNamespace(recipe=SimpleNamespace(facts={"speed": "fast25"}), plan=SimpleNamespace(number=500))
    verdict = speed_gate.judge_speed(job, "exact", lambda: None)
    assert (verdict["name"], verdict["number"], verdict["passed"]) == ("fast25", 64, False)
    rows = {row["measure"]: (row["exact"], row["speed"], row["limit"], row["passed"]) for row in verdict["measures"]}
    assert rows["IoU semantic"] == (0.9, 0.895, 0.01, True) and rows["REL depth"] == (0.1, 0.2, 0.002, False)
    assert figures_in_words(verdict["measures"]).startswith("IoU semantic 0.8950 for 0.9000, REL depth 0.2000 for")
    held["speed"]["REL depth"] = 0.101
    assert speed_gate.judge_speed(job, "exact", lambda: None)["passed"]


@pytest.mark.parametrize(
    ("captures", "attention", "labels"), [({}, None, 0), ({"a": 0}, None, 2), ({}, 1, 10), ({"a": 0}, 1, 12)]
)
def test_calls_of_a_judgement_are_those_that_no_file_holds(tmp_path, monkeypatch, captures, attention, labels):
    exact = SimpleNamespace(schedule=range(51), captured=(49, 50), captures=captures, attention=attention)
    job = SimpleNamespace(recipe=SimpleNamespace(schedule=range(25)), plan=SimpleNamespace(batch_size=10))
    monkeypatch.setattr(speed_gate, "count_images", lambda job: 64)
    monkeypatch.setattr(speed_gate, "TIMESTEPS", range(10))
    monkeypatch.setattr(speed_gate, "_place", lambda job, recipe, exact: tmp_path / str(len(recipe.schedule)))
    assert speed_gate.count_calls(job, exact) == 7 * (25 + 51 + 2 * labels)
    (tmp_path / "51").touch()
    assert speed_gate.count_calls(job, exact) == 7 * (25 + labels)


def test_figures_are_measured_once_and_anew_where_their_file_is_damaged(tmp_path):
    path, asked = tmp_path / "speed" / "a.json", []

    def measure():
        asked.append(path.exists())
        return {"IoU semantic": 0.5}

    for content in (None, "", '{"a"', "[1]"):
        if content is not None:
            path.write_text(content)
        assert [speed_gate._cached(path, measure) for _ in range(2)] == [{"IoU semantic": 0.5}] * 2
    assert asked == [False, True, True, True]


@pytest.mark.parametrize("passed", [True, False])
def test_a_speed_is_held_against_the_recipe_without_it(monkeypatch, passed):
    told, asked = [], []
    row = {"measure": "IoU semantic", "exact": 0.9, "speed": 0.8, "limit": 0.01, "passed": passed}
    verdict = {"number": 2, "passed": passed, "measures": [row]}
    monkeypatch.setattr(admission, "recipe_of", lambda sampling, *_, **__: asked.append(sampling.speed) or "exact")
    monkeypatch.setattr(speed_gate, "count_calls", lambda job, exact: 9)
    monkeypatch.setattr(speed_gate, "judge_speed", lambda job, exact, call: verdict)
    source = SimpleNamespace(classes=(), listed=(), table=None)
    spec = SimpleNamespace(source=source, sampling=SamplingSettings(speed="fast25"), labels=())
    job = Job(None, None, SimpleNamespace(device=torch.device("cpu")), None, {"a": 1})
    screen = admission.Screen(told.append, lambda *_: nullcontext())
    with (
        nullcontext() if passed else pytest.raises(GateFailed, match="labels of 2 images fit worse .*IoU semantic 0.8")
    ):
        assert admission._judge_speed(job, spec, screen).document == {"a": 1, "speed": verdict}
    assert asked == [EXACT] and len(told) == passed


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A cache of these tests' own: figures of exact images are measured once for all."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture
def run(tmp_path, figures, one_engine_of_a_kind, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(figures))
    monkeypatch.setattr(speed_gate, "DEMO_IMAGES", 2)
    line = ["--out", str(tmp_path / "run"), "--number", "2", "--task", "semantic,depth", "--quiet"]
    return tmp_path / "run", lambda *flags: generate.main([*line, *flags])


def test_fast25_is_dpm_solver_with_25_calls():
    assert (speed.FAST_SAMPLER, speed.FAST_STEPS) == ("dpm-solver++", 25)


@pytest.mark.parametrize(
    ("name", "constant", "value", "reason"),
    [
        ("fast25", "FAST_STEPS", 6, "6 calls, not 25"),
        ("cache3", "CACHE_INTERVAL", 12, "not every third call"),
        ("fast25-cache3", "FAST_STEPS", 6, "6 calls, not 25"),
        ("fast25-cache3", "CACHE_INTERVAL", 12, "not every third call"),
    ],
)
def test_a_speed_that_is_not_what_it_is_called_is_refused(run, name, constant, value, reason, monkeypatch, capsys):
    folder, make = run
    monkeypatch.setattr(speed, constant, value)
    assert make("--speed", name) == 4 and not folder.exists()
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "call", "factor"),
    [("fp8", "denoise_in_fp8", 2), ("fp8", "denoise_in_fp8", float("nan")), ("cache3", "denoise_from", 2)],
)
def test_calls_that_are_not_nearly_the_exact_ones_are_refused(run, name, call, factor, monkeypatch, capsys):
    folder, make = run
    kind, flags = (JointEngine, DEMO_DIT) if name == "fp8" else (FastEngine, ())
    method = getattr(kind, call)
    monkeypatch.setattr(kind, call, lambda self, *inputs: factor * method(self, *inputs))
    monkeypatch.setattr(speed_gate, "_figures", lambda *_: pytest.fail("images were made"))
    assert make("--speed", name, *flags) == 4 and not folder.exists()
    found = re.search(rf"--speed {name}: a call is (\S+) from the exact one", capsys.readouterr().err)
    assert found and float(found[1]) == pytest.approx(factor - 1, abs=0.02, nan_ok=True)  # less what fp8 rounds


def test_products_in_fp8_with_scales_that_are_wrong_by_a_twentieth_are_refused(run, monkeypatch, capsys):
    folder, make = run
    monkeypatch.setattr(fp8, "to_fp8", lambda x: (to_fp8(x)[0], 1.025 * to_fp8(x)[1]))  # of both factors
    assert make("--speed", "fp8", "--dtype", "fp32", *DEMO_DIT) == 4 and not folder.exists()
    assert "--speed fp8: an output of a product is 0.06" in capsys.readouterr().err


def test_one_scale_of_a_product_in_fp8_that_is_wrong_by_a_twentieth_is_refused():
    """A call of it is no farther from the exact one than without that fault."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    layer = Fp8Linear(weight, None).check(weight)
    for factor in (1.05, 0.95, float("nan")):
        scale, layer.scale = layer.scale, layer.scale.clone()
        layer.scale[0, 5] *= factor
        with pytest.raises(GateFailed, match=f"an output of a product is {'nan' if factor != factor else '0.0[456]'}"):
            layer.check(weight)
        layer.scale = scale


def test_deep_features_of_an_earlier_call_are_refused_before_an_image_is_made(run, monkeypatch, capsys):
    folder, make = run
    keep, kept = FastEngine.denoise_and_keep, []

    def stale(self, *inputs):
        noise, deep = keep(self, *inputs)
        kept.append(deep)
        return noise, kept[0]

    monkeypatch.setattr(FastEngine, "denoise_and_keep", stale)
    monkeypatch.setattr(speed_gate, "_figures", lambda *_: pytest.fail("images were made"))
    assert make("--speed", "cache3") == 4 and not folder.exists()
    assert re.search(r"--speed cache3: a call is 0.\d+ from the exact one, beyond 0.05;", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["cache3", "fast25-cache3"])
def test_deep_features_of_another_call_are_refused_by_the_labels(run, name, monkeypatch, capsys):
    folder, make = run
    denoise_from, first = FastEngine.denoise_from, {}

    def from_the_first(self, deep, *inputs):
        return denoise_from(self, first.setdefault(len(first) // 99, deep), *inputs)

    monkeypatch.setattr(FastEngine, "denoise_from", from_the_first)
    assert make("--speed", name) == 4 and not folder.exists()
    assert f"--speed {name}: labels of 2 images fit worse" in capsys.readouterr().err


def test_a_run_is_judged_once_and_says_so(run, monkeypatch, capsys):
    folder, make = run
    monkeypatch.setattr(speed_gate, "MOST_LOST", dict.fromkeys(speed_gate.MOST_LOST, 0.1))  # of 2 images
    assert make("--speed", "fast25", "--limit", "1") == 0
    document = json.loads((folder / "run.json").read_text())
    assert document["config"]["speed"] == document["sampling"]["speed"] == "fast25"
    assert document["sampling"]["calls"] == 25 and document["speed"]["passed"] is True
    assert {row["measure"] for row in document["speed"]["measures"]} == {"IoU semantic", "REL depth", "doubtful"}
    assert "fast25, approximate" in (folder / "README.md").read_text()

    def refuse(*_):
        raise AssertionError("it was judged again")

    monkeypatch.setattr(speed_gate, "_figures", refuse)
    assert make("--speed", "fast25") == 0  # resumed, and another run of the same settings
    assert make("--speed", "fast25", "--out", f"{folder}-other", "--seed", "5") == 0
    assert make("--speed", "cache3") == 2 and make() == 2
    assert "speed" in capsys.readouterr().err
    shards = ("--layout", "shards", "--out", f"{folder}-shards")
    assert make("--speed", "fast25", *shards) == 0
    assert json.loads(Path(f"{folder}-shards/run.json").read_text())["speed"] == document["speed"]


@pytest.mark.parametrize("differing", [(), ("dtype",)])
def test_an_engine_that_differs_from_that_of_a_run_is_held_to_its_samples_before_it_goes_on(monkeypatch, differing):
    checked = []
    job = SimpleNamespace(differing=differing, document={}, plan=SimpleNamespace(number=3))
    monkeypatch.setattr(admission, "prepare_job", lambda spec, stored, mixes: job)
    monkeypatch.setattr(admission, "_check_engine", lambda job, screen: checked.append("samples") or job)
    monkeypatch.setattr(admission, "_verify", lambda job, stored, number, screen: checked.append(number) or job)
    monkeypatch.setattr(admission, "tries_half", lambda spec, stored: False)
    spec = SimpleNamespace(sampling=SimpleNamespace(speed=EXACT))
    assert admission.admit_job(spec, {}, None, verify=8) is job
    assert checked == (["samples"] if differing else []) + [3]


def test_figures_are_of_their_settings_and_those_of_exact_images_serve_every_speed(tmp_path, monkeypatch):
    config = RunConfig(out=str(tmp_path / "run"), number=2, task=("depth",))
    keys, exact_keys = set(), set()
    for changes in ({}, {"guidance": 2.0}, {"speed": "cache3"}, {"task": ("semantic",)}):
        job = prepare(replace(config, **{"speed": "fast25", **changes}))
        exact = make_recipe(job.engine, job.recipe.tasks, speed=EXACT, guidance=changes.get("guidance", 0.0))
        keys.add(speed_gate._place(job, job.recipe, exact))
        exact_keys.add(speed_gate._place(job, exact, exact))
    assert len(keys) == 4 and len(exact_keys) == 3
    planted = [
        {"model": {"digests": {**job.document["model"]["digests"], "unet": "sha256:0"}}},
        {"decoders": {"semantic": {"digest": "sha256:0"}}},
        {"engine": job.document["engine"] | {"dtype": "bf16"}},
        {"config": job.document["config"] | {"prompts": "sha256:0"}},
        {},
    ]
    jobs = [replace(job, document=job.document | change) for change in planted]
    keys.update(speed_gate._place(one, one.recipe, exact) for one in jobs)
    assert len(keys) == 4 + len(planted) - 1
    keys.add(speed_gate._place(job, job.recipe, replace(exact, facts={**exact.facts, "guidance": 9.0})))
    with monkeypatch.context() as patch:
        patch.setattr(speed_gate, "count_images", lambda job: 63)
        keys.add(speed_gate._place(job, job.recipe, exact))
    assert len(keys) == 4 + len(planted) - 1 + 2
    listed = []
    monkeypatch.setattr(speed_gate, "digest", lambda files: listed.extend(files) or "")
    speed_gate._place(job, job.recipe, exact)
    assert {path.name for path in listed} >= {"speed_gate.py", "fp8.py", "driver.py", "layer_norm.py"}


@long_test
@pytest.mark.parametrize("name", ["fast25", "cache3", "fast25-cache3", "fp8"])
def test_a_kill_and_two_processes_make_the_same_bytes(run, name, monkeypatch):
    _, make = run
    monkeypatch.setattr(speed_gate, "MOST_LOST", dict.fromkeys(speed_gate.MOST_LOST, 1.0))  # of 2 images
    flags = ["--speed", name, "--number", "6", "--batch-size", "1", "--dtype", "fp32"]
    flags += DEMO_DIT if name == "fp8" else ()
    places = [run[0].with_name(place) for place in ("whole", "killed", "pair")]
    whole, killed, pair = ([*flags, "--out", str(place)] for place in places)
    assert make(*whole) == 0 and make(*pair, "--ranks", "2") == 0 and make(*killed, "--limit", "1") == 0
    line = [sys.executable, "-m", "datasetdm_fast.generate", *killed, "--task", "semantic,depth", "--quiet"]
    with subprocess.Popen(line) as process:
        while process.poll() is None and len([*places[1].glob("images/*.png")]) < 3:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and make(*killed) == 0
    first, *others = (
        {
            path.relative_to(place): path.read_bytes()
            for path in place.rglob("*")
            if path.is_file() and path.parent.name != "state"
        }
        for place in places
    )
    assert [[path for path in first if other[path] != first[path]] for other in others] == [[], []]
    assert json.loads(first[Path("run.json")])["speed"]["name"] == name


def test_fp8_on_a_cpu_says_that_it_saves_no_time(tmp_path, monkeypatch, capsys):
    verdict = {"name": "fp8", "number": 4, "passed": True, "measures": []}
    monkeypatch.setattr(speed_gate, "judge_speed", lambda *_: verdict)
    line = ["--out", str(tmp_path / "run"), "--number", "1", "--task", "depth", "--steps", "2", "--speed", "fp8"]
    assert generate.main([*line, *DEMO_DIT]) == 0
    assert "fp8 rounds on a CPU as on a GPU, and saves no time here" in capsys.readouterr().err


def test_a_captured_call_before_the_last_is_a_whole_one_that_others_follow():
    assert speed.cached_calls(12, (4, 9)) == {3, 5, 6, 8, 11}
