"""Decoders that read several calls: what they read, their training, and the same labels from every engine."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import SIZE

from datasetdm_fast import evaluate, generate, train
from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.engine.decoders.checkpoint import (
    build_decoder,
    load_decoder,
    read_decoder,
    save_decoder,
    seeded_decoders,
)
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import CapturedCalls, trained_calls
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.engine.tasks.depth import DepthTask
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import call_ranking, session
from datasetdm_fast.training.call_ranking import Probe, truth_of
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.settings import Inversion
from datasetdm_fast.training.trainer import project

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")

TIMES = (780, 520, 260)


def decoder_of(model, kind="depth", times=TIMES):
    """A decoder of several calls whose shares differ by call and level."""
    config = seeded_decoders(model.levels, model.text_width)[kind].config
    torch.manual_seed(1)
    decoder = build_decoder(replace(config, capture_timestep=times))
    with torch.no_grad():
        decoder.call_weights.copy_(torch.randn(len(times), 4) / 10)
    return fold(decoder).requires_grad_(False)


@pytest.fixture(params=["tiny", "sd3"], scope="module")
def model(request, tmp_path_factory):
    """A tiny U-Net, or a tiny MM-DiT."""
    if request.param == "tiny":
        return load_model("tiny")
    folder = tiny_pipelines.save(tmp_path_factory.mktemp("sd3") / "model", "sd3", layers=3, width=48)
    return load_model(str(folder), size=SIZE)


def test_fast_reads_what_the_reference_reads_in_any_batch(model):
    decoders = {"depth": decoder_of(model), "pose": seeded_decoders(model.levels, model.text_width)["pose"]}
    found = {}
    for name in ("torch", "fast"):
        for size in (1, 3) if name == "fast" else (3,):
            engine = build_engine(name, model, decoders, device="cpu")
            pipeline = Pipeline(engine)
            samples = pipeline(["a", "b", "c"], tasks=("depth", "pose"), steps=6, batch_size=size).samples
            found[name, size] = [sample.annotations["depth"].metres for sample in samples]
            recipe = make_recipe(engine, ("depth", "pose"), steps=6)
            calls = recipe.captures["depth"]
            assert len(calls) == 3 and calls[0] < min(calls[2], *recipe.captures["pose"])
            assert recipe.facts["capture_timestep"]["depth"] == [recipe.schedule.timesteps[call] for call in calls]
    for other in (("fast", 3), ("fast", 1)):
        for ours, truth in zip(found[other], found["torch", 3], strict=True):
            assert np.abs(ours - truth).max() <= 1e-3 * truth.max()


def test_a_sum_of_captures_is_what_each_projects_to_by_its_share(model):
    decoder = decoder_of(model)
    engines = [build_engine(name, model, {"depth": decoder}, device="cpu") for name in ("torch", "fast")]
    images = torch.randint(0, 256, (2, model.size, model.size, 3), dtype=torch.uint8)
    raw, sums = (invert_for(engine, ["depth"], images, ["a", "b"], [0, 1])["depth"] for engine in engines)
    assert isinstance(raw, Capture) and isinstance(sums, ProjectedCapture)
    for place, level in enumerate(decoder.config.levels):
        if level.name in decoder.levels_read:
            ours, truth = sums.sums[place], decoder.level(raw, level.name, level.side)
            assert float((ours - truth).abs().max() / truth.abs().max()) < 1e-4
    one = CapturedCalls(engines[1], {"depth": (4, 4, 4)})  # fewer sampler calls than the decoder reads
    one.add(4, ProjectedCapture(tuple(torch.ones(1, 2, 3, 3) for _ in range(4)), {"depth": (slice(0, 2),) * 4}))
    assert all(torch.allclose(total, torch.ones(())) for total in one.read["depth"].sums)


def test_images_are_read_at_all_timesteps_of_their_decoders_from_the_noisiest_on():
    timesteps = {"depth": (260, 780), "pose": 520, "semantic": None}
    readers = {label: SimpleNamespace(capture_timestep=timestep) for label, timestep in timesteps.items()}
    assert trained_calls(readers) == ((780, 520, 260, 0), {"depth": (2, 0), "pose": (1,), "semantic": (3,)})


def test_the_shares_of_calls_are_trained(model):
    decoder = build_decoder(replace(decoder_of(model).config, capture_timestep=TIMES))
    assert torch.allclose(decoder.call_shares(), torch.full((3, 4), 1 / 3))
    levels = [torch.randn(2, 3 * level.side**2, level.channels) for level in decoder.config.levels]
    with torch.enable_grad():
        sum(total.square().sum() for total in project(decoder, levels).sums).backward()
    assert decoder.call_weights.grad.abs().min() > 0
    with torch.no_grad():
        decoder.call_weights.copy_(torch.tensor([[math.log(2) / 10], [0.0], [0.0]]).expand(3, 4))
    assert torch.allclose(decoder.call_shares(), torch.tensor([[0.5], [0.25], [0.25]]).expand(3, 4))
    alone = build_decoder(replace(decoder.config, capture_timestep=520))
    assert "call_weights" not in alone.state_dict()


@pytest.mark.parametrize("times", [[500], [5, 5], list(range(17)), [1.5, 2], [-1, 5], ["5", 6], "auto", True])
def test_timesteps_that_no_decoder_has_are_refused(times):
    document = json.loads(decoder_of(load_model("tiny")).config.to_json()) | {"capture_timestep": times}
    with pytest.raises(Refused, match="capture_timestep is .*expected a timestep"):
        DecoderConfig.from_json(json.dumps(document))


@pytest.mark.parametrize("flag", ["0.78", "-1,5", "", ",".join(map(str, range(17))), "9" * 5000, "1001,5"])
def test_flags_of_timesteps_are_refused_in_one_sentence(flag, tmp_path, capsys):
    code = train.main([f"--timestep={flag}", "--model", "tiny", "--data", "demo:2", "--out", str(tmp_path / "out")])
    assert code == 2 and "--timestep" in capsys.readouterr().err


def test_a_decoder_of_four_calls_is_trained_scored_and_used(tmp_path, capsys):
    out, run = tmp_path / "decoder", tmp_path / "run"
    tiny = ["--model", "tiny", "--size", "64", "--quiet"]
    line = [*tiny, "--data", "demo:3", "--steps", "2", "--draws", "1", "--held-out", "0", "--folds", "no"]
    line += ["--task", "depth", "--cache", "disk", "--cache-dir", str(tmp_path / "cache")]
    assert train.main([*line, "--timestep", "20", "--out", str(tmp_path / "one")]) == 0
    shards = set((tmp_path / "cache").glob("*.f16"))
    assert train.main([*line, "--timestep", "20,780,260,520", "--out", str(out)]) == 0
    assert load_decoder(out / "depth").config.capture_timestep == (780, 520, 260, 20)
    assert len(shards) == 3 and len(set((tmp_path / "cache").glob("*.f16")) - shards) == 9  # one a picture and call
    capsys.readouterr()
    common = [*tiny, "--decoder", str(out)]
    assert evaluate.main([*common, "--data", "demo:2@900000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depth"]["absrel"] > 0
    drawn = ["--prompts", "a ball", "--number", "2", "--steps", "5", "--force-domain"]
    assert generate.main([*common, *drawn, "--out", str(run)]) == 0
    assert '"capture_timestep": [\n      800,\n      600,' in (run / "run.json").read_text()
    save_decoder(read_decoder(out / "depth"), tmp_path / "copy" / "depth")
    assert (tmp_path / "copy" / "depth" / "config.json").read_bytes() == (out / "depth" / "config.json").read_bytes()


def test_probes_tell_what_a_level_explains():
    random = torch.Generator().manual_seed(0)
    truth, noise = torch.randn(300, 2, generator=random), torch.randn(300, 40, generator=random)
    cells = torch.cat([truth @ torch.randn(2, 40, generator=random) + 3, torch.ones(300, 300)], 1)
    for inputs, least, most in ((cells[:, :40], 0.99, 1.0), (cells, 0.99, 1.0), (noise, 0.0, 0.05)):
        probe = Probe([inputs, noise])
        for number in range(5):
            probe.add(number, [inputs[number::5], noise[number::5]], truth[number::5] + 7)
        assert least <= probe.score() <= most and probe.score([1]) < 0.05
        assert abs(probe.score([0, 1]) - probe.score()) < 0.1 and probe.score([]) == 0
    assert Probe([cells]).score() == 0


def test_the_score_of_a_probe_is_that_of_ridge_regression_on_other_images():
    random = torch.Generator().manual_seed(1)
    cells = [torch.randn(30, 3, generator=random).double() + torch.tensor([1.0, -2, 5]) for _ in range(6)]
    truth = [each[:, :2] * 0.3 + torch.randn(30, 2, generator=random) * 0.4 + 1 for each in cells]
    probe = Probe([cells[0].float()])
    for number, (each, told) in enumerate(zip(cells, truth, strict=True)):
        probe.add(number % 5, [each.float()], told)
    scale = cells[0].std(0) * 3**0.5
    missed = spread = 0.0
    for part in range(5):
        own = [number for number in range(6) if number % 5 == part]
        mixed = [torch.cat([each / scale, torch.ones(30, 1)], 1) for each in cells]
        x = torch.cat([mixed[k] for k in range(6) if k not in own])
        y = torch.cat([truth[k] for k in range(6) if k not in own])
        gram = x.T @ x
        ridge = 0.01 * gram.diag() + 1e-9
        ridge[-1] = 0
        weights = torch.linalg.solve(gram + ridge.diag(), x.T @ y)
        for k in own:
            missed += float((truth[k] - mixed[k] @ weights).square().sum())
            spread += float((truth[k] - y.mean(0)).square().sum())
    assert probe.score() == pytest.approx(1 - missed / spread, rel=1e-4) and 0.1 < probe.score() < 0.9


def test_a_probe_is_asked_for_depths_joints_and_shares_of_classes():
    none = torch.zeros(0)
    fields = {"classes": none.long(), "masks": none.view(0, 4, 4).bool(), "depth": none, "points": none}
    empty = TrainingTarget(**fields, weights=none, searched=none)
    depth = torch.tensor([[1.0, 3, 0, 0], [2, 2, 0, 0], [5, 5, 9, 9], [5, 5, 9, 9]])
    told, known = truth_of("depth", replace(empty, depth=depth), 3, 64, 2)
    assert known.tolist() == [True, False, True, True] and torch.allclose(told.exp(), torch.tensor([[2.0], [5], [9]]))
    sparse = torch.zeros(4, 4)  # as a laser measures: few pixels, whose depth is that of their cell
    sparse[0, 0], sparse[3, 2:] = 7.0, torch.tensor([2.0, 4])
    told, known = truth_of("depth", replace(empty, depth=sparse), 3, 64, 2)
    assert known.tolist() == [True, False, False, True] and torch.allclose(told.exp(), torch.tensor([[7.0], [3]]))
    points = replace(empty, points=torch.tensor([[16.0, 48], [0, 0]]), weights=torch.tensor([1.0, 0]))
    told, known = truth_of("pose", points, 3, 64, 2)  # cells lie at 16 and 48 pixels
    across, corner = (math.exp(-((distance / 0.05) ** 2) / 2) for distance in (0.5, 0.5 * 2**0.5))
    assert torch.allclose(told, torch.tensor([[across, 0], [corner, 0], [1, 0], [across, 0]])) and known.all()
    near = truth_of("pose", replace(points, points=torch.tensor([[17.0, 50], [0, 0]])), 3, 64, 2)[0][2, 0]
    assert float(near) == pytest.approx(math.exp(-((5**0.5 / 64 / 0.05) ** 2) / 2))
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2, :1], masks[1, 2:, 2:], masks[2, 0, 1] = True, True, True
    told, known = truth_of("instance", replace(empty, classes=torch.tensor([2, 0, 2]), masks=masks), 3, 64, 2)
    assert told.tolist() == [[0, 0, 0.75], [0, 0, 0], [0, 0, 0], [1, 0, 0]] and known.shape == (4,)
    assert truth_of("instance", empty, 3, 64, 2)[0].tolist() == [[0, 0, 0]] * 4


def test_a_task_of_another_package_is_probed_and_augmented_by_what_it_is_taught(monkeypatch):
    none, depth = torch.zeros(0), torch.tensor([[1.0, 3], [0, 0]])
    target = TrainingTarget(none.long(), none.view(0, 2, 2).bool(), depth, none, none, none)
    for module in (call_ranking, session):
        monkeypatch.setattr(module, "TASKS", {"slopes": DepthTask()})
    assert truth_of("slopes", target, 3, 64, 2)[0].exp().flatten().tolist() == pytest.approx([1, 3])
    strong = TrainingSession.augmentation(SimpleNamespace(address="folder:x", augment="strong"), "slopes")
    assert strong.zoom == 1


def test_a_level_of_one_cell_is_probed_without_a_warning(recwarn):
    assert not call_ranking.mix(torch.ones(1, 3), 8).any() and not recwarn.list


def test_a_channel_that_differs_by_rounding_alone_is_not_probed():
    assert (call_ranking.mix(torch.tensor([[0, 0.0], [1, 1e-9]]), 8) != 0).tolist() == [[True, False], [False, False]]


def test_things_without_a_map_and_images_from_all_over_the_data_are_probed(monkeypatch):
    none = torch.zeros(0)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    target = TrainingTarget(torch.tensor([2]), masks, none, none, none, none)
    asked, seen = [], []

    def plain_views(task, numbers, draws):
        asked.append((task, numbers, draws))
        return SimpleNamespace(target=lambda view: target, item=lambda view: view, seed=lambda view: 70 + view)

    def captures(engine, views, items, seeds, inversion):
        seen.append((items, seeds, inversion.timesteps))
        cells = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(seeds[0]))
        return [cells, 2 * cells]

    monkeypatch.setattr(call_ranking.cache, "captures", captures)
    engine = SimpleNamespace(model=SimpleNamespace(size=4))
    source = LabelledSource(4, 200)
    source.thing_classes = ("a", "b", "c")
    numbers = range(100, 200, 2)
    session = SimpleNamespace(
        split=([*numbers, *numbers], [99, 201]),  # held-out images choose nothing
        plain_views=plain_views,
        source=source,
        engine=engine,
        inversion=Inversion(),
    )
    probes = call_ranking.probe_calls(session, "instance", (9, 5), lambda cells: [[cells], [cells]])
    assert asked == [("instance", [*numbers[::2], *numbers[::2]], 1)] and [len(call) for call in probes] == [2, 2]
    assert seen == [([view], [70 + view], (9, 5)) for view in range(50)]
    products, counts = sum(probes[0][0].products), [float(inputs[-1, -1]) for inputs in probes[0][0].inputs]
    assert products.shape == (4, 3) and products[-1].tolist() == [0, 0, 100] and counts == [40.0] * 5
    source.sequence = lambda number: f"{number // 40}"  # of three videos the frames are images of their own
    ((probe,), _) = call_ranking.probe_calls(session, "instance", (9, 5), lambda cells: [[cells]])
    assert [float(inputs[-1, -1]) for inputs in probe.inputs] == [40] * 5
    source.origins = lambda number: (f"{number // 40}",)  # copies are judged by probes that have not seen their picture
    ((probe,), _) = call_ranking.probe_calls(session, "instance", (9, 5), lambda cells: [[cells]])
    assert [float(inputs[-1, -1]) if inputs.ndim else 0 for inputs in probe.inputs] == [40, 80, 80, 0, 0]
    source.origins = lambda number: ("one",)
    with pytest.raises(Refused, match="two pictures or more"):
        call_ranking.probe_calls(session, "instance", (9,), None)


def test_the_best_call_is_that_of_the_mean_over_levels_and_tasks(monkeypatch):
    engine = build_engine("torch", load_model("tiny"), {}, device="cpu")
    shares = {"depth": [[0.0] * 4, [0.4, 0.2, 0.0, 0.2]] + [[0.1] * 4] * 7, "pose": [[0.1] * 4] * 2 + [[0.3] * 4] * 7}
    told: list[str] = []
    one = TrainingSession("demo:2", engine, None, (0, 1), on_message=told.append)
    asked = []

    def probe_calls(session, task, timesteps, split):
        asked.append(timesteps)
        return [[SimpleNamespace(score=lambda share=share: share) for share in row] for row in shares[task]]

    monkeypatch.setattr(call_ranking, "probe_calls", probe_calls)
    best = call_ranking.with_best(one, ["depth", "pose"], calls=True, blocks=False)
    assert best.inversion.timesteps == (100,)
    assert asked == [[20, 50, 100, 200, 300, 400, 500, 650, 800]] * 2 and told[-1].startswith("timestep   100, whose")
    assert told[2] == f"{50:>19}     0.400    0.200    0.000    0.200    0.200" and len(told) == 21
    shares["depth"] = [[0.0] * 4] * 9
    assert (
        call_ranking.with_best(one, ["depth"], calls=True, blocks=False) is one
        and told[-1] == "timestep   0, as no probe tells anything"
    )


def test_the_call_that_tells_most_is_trained(tmp_path, capsys):
    line = ["--model", "tiny", "--size", "64", "--data", "demo:2", "--task", "depth,pose", "--timestep", "auto"]
    shown = []
    for _ in range(2):
        assert train.main([*line, "--dry-run", "--out", str(tmp_path / "out")]) == 0
        shown.append(
            [text for text in capsys.readouterr().err.splitlines() if "timestep" in text or text[:15].isspace()]
        )
    assert shown[0] == shown[1] and len(shown[0]) == 21
    best = [text.split()[1].rstrip(",") for text in shown[0] if text.startswith("timestep")]
    assert len(best) == 1 and int(best[0]) in {20, 50, 100, 200, 300, 400, 500, 650, 800}
    assert (
        train.main(["--model", "tiny", "--data", "demo:1", "--timestep", "auto", "--out", str(tmp_path / "out")]) == 2
    )
    assert "two pictures" in capsys.readouterr().err
