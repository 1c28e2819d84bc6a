"""verify: agrees with what agrees, and fails on each planted error; the command's output and exit codes."""

import functools
import inspect
import json
import platform
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rendered import rendered, write_run
from skips import IS_LONG

from bench.decoders import load_decoders
from datasetdm_fast import generate
from datasetdm_fast import verify as command
from datasetdm_fast.config import HALF, SPEEDS
from datasetdm_fast.data import (
    AttentionSums,
    DepthMap,
    Instances,
    Keypoints,
    ProjectedCapture,
    Quarantined,
    Request,
    SemanticMap,
)
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.engines.fast.on_gpu import GpuEngine
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.prompts import Plan, PromptLine
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.models.packed import PackedUpsample
from datasetdm_fast.engine.sampling.schedule import SamplerState
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.agreement import admission, comparing, observe, verify
from datasetdm_fast.runs.agreement.observe import (
    free_running_distances,
    relative,
    teacher_forced_distances,
)
from datasetdm_fast.runs.agreement.verify import EXACT, ROUNDED, GateRow, Verdict, evaluate_gates
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.workers import spawn
from datasetdm_fast.version import __version__

SMALL = dict(
    width=12,
    heads=2,
    layers=2,
    feed_forward=16,
    mask_dim=8,
    queries=5,
    depth_width=8,
    text_width=32,
    capture_timestep=1,
    min_area=0,
)
KINDS = {
    "semantic": ("segmentation", {"classes": ("wall", "ball", "cone")}),
    "depth": ("depth", {}),
    "pose": ("simcc", {"joints": ("head", "hand"), "limbs": ((0, 1),)}),
}
PROMPTS = ("a red ball beside a cube", "two cats", "a person at night")
STEPS = 2


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("decoders")
    for task, (kind, names) in KINDS.items():
        save_decoder(build_decoder(upstream(kind, task=task, levels=model.levels, **SMALL, **names)), root / task)
    return root


@pytest.fixture(scope="module")
def reference(model, folder):
    return build_engine("torch", model, load_decoders(folder), device="cpu")


@pytest.fixture
def engine(model, reference):
    return build_engine("fast", model, reference.decoders, device="cpu")


@functools.cache
def recipe_of(reference, **sampling):
    return make_recipe(reference, tuple(KINDS), guidance=5.0, **{"steps": STEPS, **sampling})


@pytest.fixture(scope="module", autouse=True)
def one_observation_of_a_batch(reference):
    """What the reference makes of a batch by one recipe is observed once: it takes most of a comparison."""
    observed, look = {}, verify.observe

    def observe_once(engine, batch, recipe, *more, **named):
        if engine is not reference or more:
            return look(engine, batch, recipe, *more, **named)
        key = id(recipe), *(request.index for request in batch), named["perturbations"], observe.ROUNDING
        if key not in observed:
            observed[key] = look(engine, batch, recipe, **named), recipe
        return observed[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "observe", observe_once)
        yield


def judged(engine, reference, number: int = 3, **sampling) -> verify.Verdict:
    recipe = recipe_of(reference, **sampling)
    requests = [Request(k, prompt, 40 + k) for k, prompt in enumerate(PROMPTS[:number])]
    return verify.verify(engine, reference, requests, recipe, batch_size=2, is_whole=True)


def failed(verdict: verify.Verdict) -> set[str]:
    return {row.measure for row in verdict.rows if not row.is_passed}


def test_the_fast_engine_agrees(engine, reference):
    verdict = judged(engine, reference)
    assert verdict.agrees, verdict.table()
    assert verdict.facts["number"] == 3 and verdict.rows[0].measure == "weights" and verdict.rows[0].limit == (0, 0)
    measures = {row.measure for row in verdict.rows}
    assert measures == {
        "weights",
        "text",
        "call",
        "sampler",
        *(f"level {name}" for name in ("low", "mid", "high", "highest")),
        "image",
        "averages of attention",
        "encoded image",
        "free latents",
        "free image",
    } | {name for task in KINDS for name in (task, f"outputs {task}", f"free {task}")}
    document = verdict.document()
    assert (
        json.loads(json.dumps(document))["agrees"]
        and document["engine"]["device_name"]
        and document["versions"]["python"]
    )
    assert "agree" in verdict.table().splitlines()[-1]


def from_changed_features(engine: FastEngine, deep: torch.Tensor, *inputs) -> torch.Tensor:
    return engine._call(engine._start_deep, *inputs, (deep * 1.01,))[0]


def by_a_whole_call(engine: FastEngine, deep: torch.Tensor, *inputs) -> torch.Tensor:
    return engine.denoise(*inputs)


@pytest.mark.parametrize("wrong", [None, from_changed_features, by_a_whole_call])
def test_calls_from_deep_features_are_those_of_the_reference(engine, reference, wrong, monkeypatch):
    if wrong:
        monkeypatch.setattr(FastEngine, "denoise_from", wrong)
    verdict = judged(engine, reference, steps=6, sampler="ddim", speed="cache3")
    assert ("call" in failed(verdict)) == bool(wrong) and verdict.agrees == (not wrong), verdict.table()
    assert verdict.facts["speed"] == "cache3" and "at the speed cache3" in verdict.table()


# The planted errors ---------------------------------------------------------------------------------------------------


def one_weight(engine: FastEngine) -> None:
    resnets = [block for block, step in zip(engine.unet.blocks, engine.unet.steps) if step.reads == "time"]
    resnets[len(resnets) // 2].conv1.weight.mul_(1.01)


def one_number(engine: FastEngine) -> None:
    weight = engine.unet.conv_in.weight
    weight[tuple(np.unravel_index(int(weight.abs().argmax()), weight.shape))] *= 1.01


def one_feature_pair(engine: FastEngine) -> None:
    steps = list(engine.unet.steps)
    first, second = [k for k, step in enumerate(steps) if step.reads == "text"][:2]
    slots = steps[first].slot, steps[second].slot
    steps[second], steps[first] = (steps[k]._replace(slot=slot) for k, slot in zip((second, first), slots))
    engine.unet.steps = steps


def one_head_of_the_maps(engine: FastEngine) -> None:
    engine.projection.maps[2][1][:, 1].zero_()


def one_head_of_the_network(engine: FastEngine) -> None:
    transformers = [block for block, step in zip(engine.unet.blocks, engine.unet.steps) if step.reads == "text"]
    (transformer,) = [block for block in transformers if block.blocks[0].slot[:2] == (2, 0)]
    layer = transformer.blocks[0].text_out.weight
    layer[:, : layer.shape[1] // transformer.blocks[0].heads].zero_()


def one_weight_of_a_decoder(engine: FastEngine) -> None:
    layer = engine._stored_decoders["semantic"].transformer_ffn_layers[1].linear2
    layer.weight = torch.nn.Parameter(layer.weight * 1.01, requires_grad=False)  # the reference keeps its own


def one_weight_of_the_image_encoder(engine: FastEngine) -> None:
    next(engine.image_encoder.parameters()).mul_(1.01)


def averages_of_attention(engine: FastEngine) -> None:
    form = engine.ops.attention_average
    engine.ops.attention_average = lambda *given: form(*given[:-1], given[-1] * 1.01)


def halves(engine: FastEngine) -> None:
    inner = engine._encode_keys_values
    engine._encode_keys_values = lambda context, images: inner(torch.cat(context.chunk(2)[::-1]), images)


PLANTED = {
    one_weight: {"call", "level low"},
    one_number: {"call"},
    one_feature_pair: {"level highest"},
    one_head_of_the_maps: {"level high"},
    one_head_of_the_network: {"call", "level high"},
    one_weight_of_a_decoder: {"outputs semantic"},
    one_weight_of_the_image_encoder: {"weights", "encoded image"},
    averages_of_attention: {"averages of attention"},
    halves: {"call", "level low", "free latents"},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_error_fails(engine, reference, plant):
    engine.prepare(1)
    plant(engine)
    verdict = judged(engine, reference, number=2)
    assert not verdict.agrees and PLANTED[plant] <= failed(verdict), verdict.table()
    if plant in (one_feature_pair, one_head_of_the_maps, averages_of_attention):
        assert "call" not in failed(verdict)  # the image is as it was: only the labels' source is wrong


@pytest.mark.parametrize(
    "plant", PLANTED if IS_LONG else (one_number, one_weight_of_a_decoder), ids=lambda plant: plant.__name__
)
def test_a_planted_error_fails_in_bf16_too(model, reference, plant):
    """Most of these hide in what rounding does anyway; the weights themselves are compared, too."""
    engine = build_engine("fast", model, reference.decoders, dtype="bf16", device="cpu")
    engine.prepare(1)
    plant(engine)
    if plant in (one_feature_pair, averages_of_attention, halves):  # no weight is wrong, but what is done with them
        assert failed(judged(engine, reference, number=1))
    else:
        assert not verify.weights_row(engine, reference).is_passed


def test_weights_of_another_model_are_noticed(model, reference):
    other = load_model("tiny")
    assert verify.weights_row(build_engine("fast", other, reference.decoders, device="cpu"), reference).is_passed
    with torch.no_grad():
        weight = other.modules["unet"].conv_out.weight
        weight[0, 0, 0, 0] += 0.01 * weight.abs().max()
    row = verify.weights_row(build_engine("fast", other, reference.decoders, dtype="bf16", device="cpu"), reference)
    assert not row.is_passed and row.median == pytest.approx(0.01, rel=1e-3)


def test_a_wrong_step_of_the_sampler_is_noticed(engine, reference, monkeypatch):
    right = SamplerState.step

    def wrong(state, k, output):
        state.latents = right(state, k, output) + (1e-4 if k else 0)
        return state.latents

    monkeypatch.setattr(SamplerState, "step", wrong)
    assert failed(judged(engine, reference, number=1)) == {"sampler"}  # too little for what runs on its own


def test_a_weight_that_is_no_number_is_noticed_where_no_prompt_reads_it(engine, reference):
    engine.text_encoder.encoder.words[-1, 0] = float("nan")
    row = verify.weights_row(engine, reference)
    assert not row.is_passed and json.loads(json.dumps(row.median)) == row.median


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_of_the_size_of_stable_diffusion_are_those_of_the_model(dtype, monkeypatch):
    """Of a large upsampling convolution a CPU holds the rounded taps alone, not their sums."""
    monkeypatch.setattr("datasetdm_fast.engine.models.packed.LARGEST_HELD", 0)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)  # for then it holds them
    demo = load_model("demo")
    demo.modules["unet"], demo.modules["vae"]  # noqa: B018  as the reference engine builds them
    engine = build_engine("fast", demo, dtype=dtype, device="cpu")
    upsamples = [layer for layer in engine.image_decoder.modules() if isinstance(layer, PackedUpsample)]
    assert upsamples and all(layer.weight is None for layer in upsamples) and engine.weight_distance() == 0
    upsamples[-1]._minimal[0] *= 1.01
    assert 1e-3 < engine.weight_distance() < 0.1
    engine.image_decoder.layers[-1] = torch.nn.Identity()  # a weight that is not held is farther than any
    assert engine.weight_distance() > 1e300


def test_weights_are_computed_with_on_the_host_wherever_their_module_lies(engine, monkeypatch):
    """A product of weights rounds otherwise on a GPU, to which the reference engine moves the modules."""
    asked, cpu = [], torch.Tensor.cpu
    module = engine.model.modules["unet"]  # as the reference engine builds it; without it weights are read from files
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: asked.append(x.data_ptr()) or cpu(x))
    state = GpuEngine._sources(engine, "unet")["unet"].state
    assert {value.data_ptr() for value in module.state_dict().values()} <= set(asked)
    assert all(value.device.type == "cpu" for value in state.values())


# Other engines and precisions -----------------------------------------------------------------------------------------


def test_rounded_arithmetic_is_judged_beside_the_references_own_drift(model, reference, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)  # for with tiles a small UNet stays in fp32
    engine = build_engine("fast", model, reference.decoders, dtype="bf16", device="cpu")
    rows = {row.measure: row for row in judged(engine, reference, number=2).rows}
    assert rows["call"].floor and rows["call"].limit[0] >= ROUNDED["call"][0] and rows["call"].median > EXACT["call"][1]
    assert rows["call"].is_passed and rows["level low"].is_passed


def test_answers_may_move_as_far_as_rounding_alone_moves_those_of_the_reference(engine, reference, monkeypatch):
    rows = {row.measure: row for row in judged(engine, reference, number=1).rows}
    assert rows["outputs semantic"].floor and rows["outputs semantic"].limit == EXACT["outputs"]
    assert rows["level low"].floor is None
    monkeypatch.setattr(observe, "ROUNDING", 1e-2)  # as if a decoder were that sensitive
    wider = {row.measure: row for row in judged(engine, reference, number=1).rows}
    assert wider["outputs semantic"].limit[0] > EXACT["outputs"][0] and wider["level low"].limit == EXACT["level"]


def test_without_decoders_features_and_maps_are_compared(model):
    reference, engine = (build_engine(name, model, device="cpu") for name in ("torch", "fast"))
    recipe = make_recipe(reference, (), steps=STEPS)
    verdict = verify.verify(engine, reference, [Request(0, "a ball", 1)], recipe, 1)
    measures = {row.measure for row in verdict.rows}
    assert verdict.agrees and {"level low", "level highest"} <= measures and "encoded image" not in measures
    one_feature_pair(engine)
    assert "level highest" in failed(verify.verify(engine, reference, [Request(0, "a ball", 1)], recipe, 1))


def test_what_is_no_number_is_infinitely_far():
    truth = torch.ones(2, 3)
    broken = truth.clone()
    broken[1, 0] = float("nan")
    assert relative(broken, truth).tolist() == [0.0, float("inf")]
    (row,) = evaluate_gates({"call": relative(broken, truth)[None]}, EXACT, {})
    assert not row.is_passed and row.worst == 1 and json.loads(json.dumps(row.p99)) == row.p99


def test_gates_give_way_to_the_references_own_drift():
    (row,) = evaluate_gates({"call": np.full((4, 2), 0.02)}, ROUNDED, {"call": np.full((4, 2), 0.018)})
    assert row.is_passed and row.limit == pytest.approx((0.027, 0.04))


def test_one_flipped_cell_of_few_images_is_what_rounding_does_to_the_reference_too():
    runs = np.array([[1e-6], [4e-4], [2e-6], [1e-6]])
    (row,) = evaluate_gates({"outputs semantic": np.array([[4.2e-4]])}, EXACT, {"outputs semantic": runs})
    assert row.is_passed and row.limit == pytest.approx((6e-4, 1e-2))
    (row,) = evaluate_gates({"call": np.array([[4.2e-4]])}, EXACT, {"call": runs})
    assert not row.is_passed


def test_gates_are_never_stricter_than_without_a_drift():
    (row,) = evaluate_gates({"call": np.full((4, 2), 0.01)}, ROUNDED, {"call": np.full((4, 2), 1e-9)})
    assert row.is_passed and row.limit == ROUNDED["call"] == (1e-2, 4e-2)


def test_gates_do_not_give_way_where_the_reference_leaves_the_range_of_the_precision():
    beyond = np.full((4, 2), np.inf)
    (row,) = evaluate_gates({"call": beyond}, ROUNDED, {"call": beyond})
    assert not row.is_passed and row.limit == ROUNDED["call"]
    assert np.isfinite([row.median, row.p99, *row.floor]).all()  # JSON has no other numbers


@pytest.mark.parametrize(
    ("median", "p99", "is_passed"), [(1, 2, True), (0, 0, True), (1.01, 2, False), (1, 2.01, False), (9, 9, False)]
)
def test_a_measure_passes_where_both_its_figures_reach_their_limits(median, p99, is_passed):
    assert GateRow("call", median, p99, (1, 2), None, 0).is_passed == is_passed


def test_one_bad_sample_of_a_hundred_is_found_and_named():
    distances = np.zeros((3, 100))
    distances[1, 70] = 1.0
    (row,) = evaluate_gates({"level low": distances}, EXACT, {})
    assert (row.worst, row.median, row.p99) == (70, 0, 0)  # a hundredth of a hundredth may be rounding
    (row,) = evaluate_gates({"level low": distances[1:2]}, EXACT, {})
    assert (row.worst, row.median, row.p99, row.is_passed) == (70, 0, 1, False) and row.limit == EXACT["level"]
    (row,) = evaluate_gates({"call": np.array([[0.6, 0.0], [0.6, 1.0]])}, EXACT, {})
    assert row.worst == 1  # by its farthest call


def test_distances_of_labels():
    grid = np.zeros((4, 4), np.uint8)
    other = grid.copy()
    other[0, 0] = 1
    confidence = np.ones((4, 4), np.float32)
    assert (
        LABEL_KINDS["semantic"].distance(
            SemanticMap(other, confidence, ("a", "b")), SemanticMap(grid, confidence, ("a", "b"))
        )
        == 1 / 16
    )
    near = np.full((4, 4), 2.0, np.float32)
    assert LABEL_KINDS["depth"].distance(DepthMap(near * 1.1, 10.0), DepthMap(near, 10.0)) == pytest.approx(0.1)
    unknown = np.where(other, 0, near).astype(np.float32)  # where a file has rounded 0.4 mm to 0
    assert LABEL_KINDS["depth"].distance(DepthMap(near * 1.1, 10.0), DepthMap(unknown, 10.0)) == pytest.approx(0.1)
    assert LABEL_KINDS["depth"].distance(DepthMap(near, 10.0), DepthMap(near * 0, 10.0)) == 0
    assert np.isnan(LABEL_KINDS["depth"].distance(DepthMap(near, 10.0), DepthMap(near * np.nan, 10.0)))
    points = np.zeros((1, 2, 3), np.float32)
    moved = points.copy()
    moved[0, 0, 0] = 3
    kinds = np.ones((1, 2), np.int64)
    assert (
        LABEL_KINDS["pose"].distance(
            Keypoints(moved, kinds, np.ones(1), ("a", "b")), Keypoints(points, kinds, np.ones(1), ("a", "b"))
        )
        == 1.5
    )
    unseen = np.array([[2, 0]])  # the second joint has no place
    alone = LABEL_KINDS["pose"].distance(*(Keypoints(one, unseen, np.ones(1), ("a", "b")) for one in (moved, points)))
    either = (Keypoints(moved, unseen, np.ones(1), ("a", "b")), Keypoints(points, 0 * kinds, np.ones(1), ("a", "b")))
    assert alone == LABEL_KINDS["pose"].distance(*either) == LABEL_KINDS["pose"].distance(*either[::-1]) == 3
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, 2:] = True, True

    def instances(order, ids=(0, 0)):
        return Instances(masks[list(order)], np.array(ids), np.ones(len(order), np.float32), ("a", "b"))

    assert (
        LABEL_KINDS["instance"].distance(instances((1, 0)), instances((0, 1))) == 0
        and LABEL_KINDS["instance"].distance(instances((0, 1), (0, 1)), instances((0, 1))) == 0.5
    )
    assert LABEL_KINDS["instance"].distance(instances(()), instances(())) == 0


# The command ----------------------------------------------------------------------------------------------------------


def line(folder, *more: str) -> list[str]:
    return [
        "--model",
        "tiny",
        "--decoder",
        str(folder),
        "--number",
        "2",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--prompts",
        "a <b>cat</b>",
        "--device",
        "cpu",
        "--quiet",
        *more,
    ]


def test_the_command_says_what_it_found(folder, capsys, monkeypatch):
    told = []

    @contextmanager
    def shown(*given):
        told.append(given)
        yield lambda: told.append("call")

    monkeypatch.setattr(command, "CountProgress", shown)
    assert command.main(line(folder, "--json", "--no-quiet")) == 0
    assert told[0] == (False, "verify", told.count("call")) and told.count("call") > 6
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["agrees"] and document["number"] == 2 and document["decoders"] == sorted(KINDS)
    assert "measure" in said.err and "agree" in said.err


def test_disagreement_is_exit_four(folder, capsys, monkeypatch):
    read = FastEngine._read_weights

    def spoilt(self, versions):
        read(self, versions)
        one_weight(self)

    monkeypatch.setattr(FastEngine, "_read_weights", spoilt)
    assert command.main(line(folder)) == 4
    said = capsys.readouterr()
    assert "DISAGREE" in said.out and said.err.splitlines()[0].startswith(
        "verify: outputs of fast do not match those of torch in "
    )
    assert said.err.splitlines()[1] == "Choose another --engine."  # fp32 is what it had


def test_an_engine_is_not_compared_with_itself(folder, capsys):
    for name in ("fast", "torch"):
        assert command.main(line(folder, "--engine", name, "--against", name)) == 2
        assert f"--against {name}: it is the engine to check itself" in capsys.readouterr().err
    assert command.main(line(folder, "--engine", "fast", "--dtype", "bf16", "--against", "fast")) != 2


@pytest.mark.parametrize(
    "more",
    [
        *(("--number", "0"), ("--engine", "warp"), ("--task", "instance")),
        *(("--threads", "-1"), ("--threads", str(10**20)), ("--number", str(10**9)), ("--classes", "\udcff")),
        ("--batch-size", str(10**9)),
    ],
    ids=ascii,
)
def test_what_cannot_be_compared_is_refused(folder, more, capsys):
    assert command.main(line(folder, *more)) in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) >= 1


def test_a_speed_that_one_engine_lacks_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(FastEngine, "speeds", ())
    assert command.main(line(folder, "--speed", "cache3")) == 2
    assert "--speed cache3: the engine fast keeps no deep features" in capsys.readouterr().err


def test_an_observation_led_by_itself_changes_nothing(reference):
    recipe = make_recipe(reference, tuple(KINDS), steps=STEPS)
    requests = [Request(0, "a ball", 3)]
    truth = observe.observe(reference, requests, recipe)
    again = observe.observe(reference, requests, recipe, truth)
    distances = teacher_forced_distances(again, truth) | free_running_distances(again, truth)
    assert all((values == 0).all() for values in distances.values())
    noise = torch.randn(truth.seen[0].shape[1:], generator=torch.Generator().manual_seed(3))
    assert truth.seen[0][0].equal(noise * recipe.schedule.noise_scale), "it begins where `generate` does"


@pytest.mark.parametrize(("share", "is_passed"), [(0.9, True), (1.1, False)])
def test_what_differs_by_more_than_rounding_fails_in_fp32(share, is_passed):
    for measure in ("text", "sampler", "call", "level low", "averages of attention", "encoded image"):
        for median, farthest in ((share * 1e-5, 0), (0, share * 4e-5)):
            (row,) = evaluate_gates({measure: np.array([[median] * 98 + [farthest] * 3])}, EXACT, {})
            assert row.is_passed == is_passed


def test_engines_that_were_compared_before_several_processes_start_are_let_go(tmp_path, monkeypatch):
    """They would hold the memory of the first process's GPU."""
    opened, open_engine = [], inspect.unwrap(engines.open_engine)

    def noted(*arguments, **named):
        engine, told = open_engine(*arguments, **named)
        opened.append(weakref.ref(engine))
        return engine, told

    def started(*_):
        alive.append(opened[0]())

    alive = []
    monkeypatch.setattr(engines, "open_engine", noted)
    monkeypatch.setattr(spawn.Supervisor, "work", started)
    flags = ["--number", "2", "--steps", "2", "--task", "depth", "--ranks", "2", "--verify", "1", "--quiet"]
    generate.main([*flags, "--out", str(tmp_path / "run")])
    assert alive == [None]


def run(folder, *line) -> int:
    few = "--engine fast --model tiny --steps 2 --number 2 --batch-size 1 --task semantic --verify 1".split()
    return generate.main([*few, "--prompts", "a ball", "--out", str(folder), *line])


@pytest.mark.usefixtures("one_engine_of_a_kind")
def test_a_run_is_compared_with_the_reference_before_it_begins(tmp_path, capsys, monkeypatch):
    """Where they do not agree nothing is written; the verdict holds until device, versions or engine change."""
    assert run(tmp_path / "run", "--limit", "1") == 0
    verdict = json.loads((tmp_path / "run" / "run.json").read_text())["verified"]
    assert verdict["agrees"] and verdict["number"] == 1 and verdict["setting"]["torch"] == torch.__version__
    assert "agrees in all" in capsys.readouterr().err
    wrong = FastEngine.denoise_and_capture
    monkeypatch.setattr(
        FastEngine,
        "denoise_and_capture",
        lambda engine, *given: (lambda output, capture: (output * 1.01, capture))(*wrong(engine, *given)),
    )
    assert run(tmp_path / "run", "--quiet") == 0  # the same setting: not compared again
    assert "agrees with `torch` on 1 of its samples" in (tmp_path / "run" / "README.md").read_text()
    assert run(tmp_path / "other") == 4
    assert "do not match those of torch in call" in capsys.readouterr().err and not (tmp_path / "other").exists()
    monkeypatch.undo()
    monkeypatch.setattr("datasetdm_fast.runs.agreement.comparing.__version__", "another")
    assert run(tmp_path / "run") == 0 and "nothing to do" in capsys.readouterr().err
    assert run(tmp_path / "third", "--engine", "torch") == 2
    assert not (tmp_path / "third").exists()


@pytest.mark.usefixtures("one_engine_of_a_kind")
@pytest.mark.parametrize("labeller", ["attention", "decoder,attention"])
def test_labels_from_attention_are_compared_too(labeller, tmp_path, capsys, monkeypatch):
    few = "--engine fast --steps 2 --number 2 --classes ball,cube --verify 1 --prompts".split()
    line = [*few, "a red ball beside a cube", "--labeller", labeller, "--out"]
    if labeller != "attention":
        line = ["--task", "semantic", *line]
    assert generate.main([*line, str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())["verified"]
    measures = {"averages of attention", "attention", "free attention", "text"}
    assert measures <= {row["measure"] for row in told["measures"]}
    assert ("semantic" in {row["measure"] for row in told["measures"]}) == ("decoder" in labeller)
    capsys.readouterr()
    right = FastEngine.denoise_and_average

    def wrong(engine, *given):
        output, sums = right(engine, *given)
        return output, type(sums)(sums.cells, sums.tokens.flip(2))

    monkeypatch.setattr(FastEngine, "denoise_and_average", wrong)
    assert generate.main([*line, str(tmp_path / "other")]) == 4 and not (tmp_path / "other").exists()
    said = capsys.readouterr().err
    assert "averages of attention" in said and "call" not in said.partition("torch in")[2]


def test_a_verdict_holds_until_a_plan_changes(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "folder", tmp_path, raising=False)
    (tmp_path / "unet.plan").write_bytes(b"plan")
    first = comparing.setting_of(reference)
    assert comparing.setting_of(reference) == first
    (tmp_path / "unet.plan").write_bytes(b"another plan")
    assert comparing.setting_of(reference) != first


def test_a_verdict_holds_for_a_precision_and_versions_on_any_device_of_a_kind():
    facts = {"device": "cuda:1", "dtype": "fp16", "device_name": "A"}
    engine = SimpleNamespace(fingerprint=lambda: facts, device=SimpleNamespace(type="cpu"))
    versions = {"python": platform.python_version(), "datasetdm_fast": __version__}
    assert comparing.setting_of(engine) == {"dtype": "fp16", "device_name": "A", **versions}


def test_calls_of_a_comparison_are_those_of_the_reference_and_two_of_the_engine_in_batches_of_the_run():
    job = SimpleNamespace(plan=SimpleNamespace(batch_size=2), recipe=SimpleNamespace(schedule=range(7)))
    assert [comparing.count_calls(job, number) for number in (1, 2, 5)] == [21, 21, 63]


def test_samples_to_compare_are_spread_over_the_run(tmp_path):
    assert comparing.choose_samples(tmp_path) == []
    (tmp_path / "state").mkdir()
    with Ledger(tmp_path / LEDGER) as ledger:
        ledger.commit([Row(Request(index, "a", index), {}) for index in range(8)])
    assert comparing.choose_samples(tmp_path) == [*range(8)]
    for first, count, chosen in ((8, 12, [0, 1, 3, 4, 6, 7, 9, 10]), (12, 20, [0, 2, 5, 7, 10, 12, 15, 17])):
        with Ledger(tmp_path / LEDGER) as ledger:
            ledger.commit([Row(Request(index, "a", index), {}) for index in range(first, count)])
        assert comparing.choose_samples(tmp_path) == chosen


def test_a_stored_verdict_holds_for_as_many_samples_and_the_same_setting(monkeypatch):
    monkeypatch.setattr(comparing, "setting_of", lambda engine: {"engine": engine})
    stored = {"agrees": True, "number": 8, "setting": {"engine": "fast"}}
    assert [comparing.still_holds(stored, "fast", number) for number in (4, 8, 9)] == [True, True, False]
    assert not comparing.still_holds(stored, "ort", 8) and not comparing.still_holds(None, "fast", 8)
    assert not comparing.still_holds({**stored, "agrees": False}, "fast", 8)


@pytest.mark.parametrize(("dtype", "is_exact"), [("fp32", True), ("bf16", False)])
def test_engines_that_disagree_are_told_what_may_help(dtype, is_exact):
    verdict = Verdict([], {"dtype": dtype}, {"dtype": "fp32"}, {})
    assert verdict.agrees and verdict.remedy.startswith("Choose another --engine." if is_exact else "Try --dtype fp32")


def test_the_weights_of_every_decoder_that_both_have_are_compared():
    def engine(**values):
        decoders = {task: torch.nn.Linear(1, 1, bias=False) for task in values}
        for task, value in values.items():
            torch.nn.init.constant_(decoders[task].weight, value)
        return SimpleNamespace(decoders=decoders, model=None)

    for depth, is_passed in ((2.0, True), (2.5, False)):
        row = verify.weights_row(engine(semantic=1.0, depth=depth, pose=3.0), engine(semantic=1.0, depth=2.0))
        assert row.is_passed == is_passed and (row.median > 0) == (not is_passed)


def test_a_sample_is_as_far_from_the_stored_one_as_its_picture_and_each_of_its_labels(tmp_path):
    write_run(tmp_path / "run", 2)
    held = json.loads((tmp_path / "run" / "run.json").read_text())
    job, made = SimpleNamespace(document=held, folder=tmp_path / "run"), rendered(1)
    depth = made.annotations["depth"]
    brighter = np.where(made.image < 255, made.image + 1, made.image)
    other = replace(
        made,
        image=brighter.astype(np.uint8),
        annotations=made.annotations | {"depth": replace(depth, metres=depth.metres * 1.1)},
    )
    with Ledger(tmp_path / "run" / LEDGER, read_only=True) as ledger:
        same, far = (comparing._distances(job, ledger.row(1), each) for each in (made, other))
    names = ("image", "semantic", "instance", "depth", "pose", "open-vocabulary")
    assert same == dict.fromkeys((f"free {name}" for name in names), 0)
    share = (brighter != made.image).mean()
    assert far.pop("free image") == pytest.approx(share**0.5 / 255)
    assert far.pop("free depth") == pytest.approx(0.1, rel=0.01) and not any(far.values())


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize(("failed", "holds"), [([], True), ([], False), (["image", "depth"], False)])
def test_a_run_is_compared_once_and_its_verdict_kept(tmp_path, monkeypatch, is_stored, failed, holds):
    noted, told, asked, calls = [], [], [], []
    verdict = SimpleNamespace(failed=failed, rows=[0] * 9, remedy="Try another.")
    monkeypatch.setattr(comparing, "still_holds", lambda *given: asked.append(given) or holds)
    monkeypatch.setattr(comparing, "compare_with_reference", lambda job, number, call: verdict)
    monkeypatch.setattr(comparing, "count_calls", lambda job, number: 10 * number)
    monkeypatch.setattr(comparing, "describe_verdict", lambda verdict, engine: {"agrees": True, "of": engine.name})
    monkeypatch.setattr(admission, "note", lambda *given: noted.append(given))
    before = {"verified": {"number": 5}}
    job = Job(tmp_path, None, SimpleNamespace(name="fast"), None, {"verified": {"number": 4}})
    screen = admission.Screen(told.append, lambda title, count: calls.append((title, count)) or nullcontext())
    with pytest.raises(GateFailed, match="--verify 3: .* fast .*image, depth; nothing") if failed else nullcontext():
        checked = admission._verify(job, before if is_stored else None, 3, screen)
    assert asked == [({"number": 5 if is_stored else 4}, job.engine, 3)]
    if failed or holds:
        assert not noted and calls == ([("verify", 30)] if failed else [])
        samples = count_noun(5 if is_stored else 4, "sample")
        assert told == ([] if failed else [f"verified   {samples} agreed before, with this engine and device"])
        return
    facts = {"agrees": True, "of": "fast"}
    assert checked.document == {"verified": facts} and noted == [(tmp_path, "verified", facts)] * is_stored
    assert told == ["verified   fast agrees in all 9 measures with torch on 3 samples"]


@pytest.mark.parametrize(("half", "failed"), [("", []), ("bf16", []), ("bf16", ["image", "depth"])])
def test_auto_takes_half_precision_where_the_first_samples_agree_in_it(tmp_path, monkeypatch, half, failed):
    asked, told, seen = [], [], []
    plan = SimpleNamespace(number=9)

    def prepare_job(spec, stored, dtype):
        asked.append((stored, dtype))
        return Job(tmp_path, plan, SimpleNamespace(name=dtype), None, {"a": 1}, half="" if dtype == "fp32" else half)

    verdict = SimpleNamespace(failed=failed, rows=[0] * 9)
    monkeypatch.setattr(admission, "prepare_job", prepare_job)
    monkeypatch.setattr(comparing, "compare_with_reference", lambda job, number, call: seen.append(number) or verdict)
    monkeypatch.setattr(comparing, "count_calls", lambda job, number: number)
    monkeypatch.setattr(comparing, "describe_verdict", lambda verdict, engine: {"of": engine.name})
    job = admission._choose_precision(None, admission.Screen(told.append, lambda *_: nullcontext()))
    if not half:
        assert job.document == {"a": 1} and not seen and not told
        return
    facts = {"precision": {"tried": "bf16", "number": 4, "failed": failed}}
    assert job.document == {"a": 1} | facts | ({} if failed else {"verified": {"of": HALF}})
    assert asked == [(None, HALF)] + [(None, "fp32")] * bool(failed) and seen == [4] and job.half == ""
    agree = "bf16, as it agrees in all 9 measures with torch on 4 samples"
    assert told == [
        f"precision  {'fp32, as bf16 does not agree with torch in image, depth on 4 samples' if failed else agree}"
    ]


def test_a_verdict_is_told_as_a_table_and_kept_as_a_document():
    rows = [
        GateRow("image", 1e-3, 2e-2, (1e-2, 1e-2), None, 3),
        GateRow("outputs open-vocabulary", 1e-3, 2e-3, (1e-2, 1e-2), (1e-4, 2e-4), 0),
    ]
    sides = [{"engine": name, "dtype": "bf16", "device_name": "cpu"} for name in ("fast", "torch")]
    facts = {"number": 1, "speed": "fast25", "model": "demo", "calls": 25}
    verdict = Verdict(rows, *sides, facts)
    head, first, second, last = verdict.table().splitlines()
    assert head.split() == ["measure", "median", "p99", "limits", "own", "drift", "worst"]
    assert first.split() == ["image", "1.0e-03", "2.0e-02", "1.0e-02", "1.0e-02", "3", "FAILED"]
    assert second.split()[2:] == ["1.0e-03", "2.0e-03", "1.0e-02", "1.0e-02", "1.0e-04", "2.0e-04", "0"]
    told = "fast (bf16, cpu) and torch (bf16, cpu) DISAGREE on 1 image of demo, 25 calls each at the speed fast25"
    assert last == told and len({line.find("e-0") for line in (first, second)}) == 1
    stored = verdict.document()
    assert stored["agrees"] is False and verdict.failed == ["image"] and stored["calls"] == 25
    assert [row["passed"] for row in stored["measures"]] == [False, True]
    assert (stored["engine"]["engine"], stored["against"]["engine"]) == ("fast", "torch")
    usual = Verdict(rows[1:], *sides, facts | {"speed": SPEEDS[0], "number": 2}).table().splitlines()[-1]
    assert usual.endswith("agree on 2 images of demo, 25 calls each")


def test_labels_of_other_packages_have_the_gates_of_their_kind(monkeypatch):
    gates = SimpleNamespace(exact=1, free_exact=2, rounded=3, free_rounded=4)
    monkeypatch.setattr(verify, "LABEL_KINDS", {"flow": SimpleNamespace(gates=gates)})
    assert [limits[measure] for limits in (EXACT, ROUNDED) for measure in ("flow", "free flow")] == [1, 2, 3, 4]


def test_a_sample_that_was_set_aside_is_as_far_as_can_be_in_every_measure():
    row = SimpleNamespace(labels={"semantic": {}, "depth": {}})
    far = comparing._distances(None, row, Quarantined(Request(0, "a ball", 0), "NaN"))
    assert far == dict.fromkeys(("free image", "free semantic", "free depth"), comparing.FAR)


@pytest.mark.parametrize(
    ("before", "now", "gates"), [("fp32", "fp32", EXACT), ("fp32", "bf16", ROUNDED), ("bf16", "fp32", ROUNDED)]
)
def test_stored_samples_are_held_to_the_limits_of_fp32_only_where_both_engines_are(
    tmp_path, monkeypatch, before, now, gates
):
    (tmp_path / "state").mkdir()
    requests = [Request(index, "a", index) for index in range(4)]
    with Ledger(tmp_path / LEDGER) as ledger:
        ledger.commit([Row(request, {}) for request in requests])
    seen = []

    def generate(batches, *_):
        for batch in batches:
            seen.append(([request.index for request in batch.requests], len(batch.padded)))
            yield batch, batch.padded

    monkeypatch.setattr(comparing.driver, "generate", generate)
    monkeypatch.setattr(comparing, "_distances", lambda job, row, *_: {"free image": row.request.index / 1000})
    job = SimpleNamespace(
        plan=Plan(lambda index: PromptLine(0, "a"), (), 4, 0, 2, "", 4),
        folder=tmp_path,
        engine=SimpleNamespace(fingerprint=lambda: {"dtype": now}),
        document={"engine": {"dtype": before}},
        recipe=None,
        generator=None,
    )
    (row,) = comparing.compare_with_stored(job, [0, 2, 3])
    assert seen == [([0, 2], 2), ([3], 2)] and (row.median, row.p99, row.worst) == (0.002, 0.003, 2)
    assert row.limit == gates["free image"]


@pytest.mark.parametrize(("asked", "compared"), [(0, []), (2, [2]), (9, [3])])
def test_no_more_samples_are_compared_than_a_run_has(monkeypatch, asked, compared):
    job, numbers = SimpleNamespace(plan=SimpleNamespace(number=3), differing=(), document={}), []
    monkeypatch.setattr(admission, "prepare_job", lambda *_, **__: job)
    monkeypatch.setattr(admission, "_verify", lambda job, stored, number, screen: numbers.append(number) or job)
    monkeypatch.setattr(admission, "tries_half", lambda spec, stored: False)
    spec = SimpleNamespace(sampling=SimpleNamespace(speed=SPEEDS[0]))
    assert admission.admit_job(spec, None, None, verify=asked) is job and numbers == compared


def test_the_text_of_prompts_and_of_class_prompts_and_every_output_of_a_decoder_are_compared():
    def seen(prompt, classes):
        texts = [SimpleNamespace(context=torch.tensor([[[float(value)]]])) for value in (prompt, classes)]
        image = np.zeros((1, 2, 2, 3), np.uint8)
        return SimpleNamespace(text=texts[0], class_text=texts[1], latents=torch.ones(1, 1), images=image, labels={})

    for prompt, classes, distance in ((1.0, 1.0, 0.0), (1.5, 1.0, 0.5), (1.0, 1.25, 0.25)):
        found = observe.free_running_distances(seen(prompt, classes), seen(1.0, 1.0))
        assert found["text"].tolist() == [distance]
    truth = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    observed = {"a": torch.ones(2, 3), "b": torch.tensor([[1.0] * 3, [1.5] * 3])}
    assert observe._farthest(observed, truth) == pytest.approx([0, 0.5])
    cells, tokens = torch.ones(2, 1), torch.ones(2, 1)
    one, other = AttentionSums(cells, tokens), AttentionSums(cells, tokens * torch.tensor([[1.0], [1.5]]))
    assert observe.averages_distance(other, one) == pytest.approx([0, 0.5])
    assert observe.averages_distance(AttentionSums(other.tokens, cells), one) == pytest.approx([0, 0.5])


@pytest.mark.parametrize(("distance", "is_refused"), [(0.0, False), (1.0, True)])
def test_engines_that_continue_a_run_are_noted_beside_those_before(tmp_path, monkeypatch, distance, is_refused):
    before, noted, told = {"engine": {"engine": "ort"}}, [], []
    engine = SimpleNamespace(name="fast", fingerprint=lambda: {"engine": "fast"})
    plan, recipe = SimpleNamespace(batch_size=2), SimpleNamespace(schedule=range(10))
    job = Job(tmp_path, plan, engine, recipe, {"mixed": [before]}, differing=("engine",))
    row = GateRow("free image", distance, distance, (0.5, 0.5), None, 0)
    monkeypatch.setattr(comparing, "choose_samples", lambda folder: [0, 4, 9])
    monkeypatch.setattr(comparing, "compare_with_stored", lambda *_: [row])
    monkeypatch.setattr(admission, "note", lambda *given: noted.append(given))
    calls = []
    screen = admission.Screen(told.append, lambda title, count: calls.append(count) or nullcontext())
    if is_refused:
        with pytest.raises(GateFailed, match="fast does not reproduce its samples, free image beyond the limit in 3"):
            admission._check_engine(job, screen)
        assert not noted
        return
    checked = admission._check_engine(job, screen)
    measure = {"measure": "free image", "median": 0.0, "p99": 0.0, "limit": (0.5, 0.5), "floor": None, "worst": 0}
    entry = {"engine": {"engine": "fast"}, "number": 3, "measures": [measure | {"passed": True}]}
    assert checked.document["mixed"] == [before, entry] and checked.differing == () and calls == [20]
    assert noted == [(tmp_path, "mixed", [before, entry])] and told[-1].endswith("fast reproduces 3 samples of the run")


def test_a_capture_is_changed_by_rounding_alone_and_alike_for_one_seed():
    capture = ProjectedCapture((torch.ones(1, 2, 40, 40), torch.full((1, 1, 2, 2), 4.0)), {"depth": ()})
    first, again, other = (observe.perturb_capture(capture, seed) for seed in (1, 1, 2))
    for k, total in enumerate(capture.sums):
        assert torch.equal(first.sums[k], again.sums[k]) and not torch.equal(first.sums[k], other.sums[k])
        assert 0 < ((first.sums[k] - total) / total).abs().max() < 8 * observe.ROUNDING
    changes = (first.sums[0] - 1).double()
    assert changes.std() == pytest.approx(observe.ROUNDING, rel=0.1) and abs(changes.mean()) < 0.1 * observe.ROUNDING
    assert first.slices == capture.slices
