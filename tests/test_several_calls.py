"""Decoders that read several calls: what they read, their training, and the same labels from every engine."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import SIZE

from datasetdm_fast import evaluate, generate, train
from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, fold, load_decoder, save_decoder, seeded_decoders
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import CapturedCalls
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.call_ranking import Probe
from datasetdm_fast.training.trainer import project

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
        for size in (1, 5) if name == "fast" else (5,):
            engine = build_engine(name, model, decoders, device="cpu")
            pipeline = Pipeline(engine)
            samples = pipeline(["a", "b", "c", "d", "e"], tasks=("depth", "pose"), steps=6, batch_size=size).samples
            found[name, size] = [sample.annotations["depth"].metres for sample in samples]
            recipe = make_recipe(engine, ("depth", "pose"), steps=6)
            calls = recipe.captures["depth"]
            assert len(calls) == 3 and calls[0] < min(calls[2], *recipe.captures["pose"])
            assert recipe.facts["capture_timestep"]["depth"] == [recipe.schedule.timesteps[call] for call in calls]
    for other in (("fast", 5), ("fast", 1)):
        for ours, truth in zip(found[other], found["torch", 5], strict=True):
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


def test_the_shares_of_calls_are_trained(model):
    decoder = build_decoder(replace(decoder_of(model).config, capture_timestep=TIMES))
    assert torch.allclose(decoder.call_shares(), torch.full((3, 4), 1 / 3))
    levels = [torch.randn(2, 3 * level.side**2, level.channels) for level in decoder.config.levels]
    with torch.enable_grad():
        sum(total.square().sum() for total in project(decoder, levels).sums).backward()
    assert decoder.call_weights.grad.abs().min() > 0
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
    line = ["--model", "tiny", "--data", "demo:3", "--steps", "2", "--draws", "1", "--held-out", "0", "--folds", "no"]
    line += ["--task", "depth", "--cache", "disk", "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    assert train.main([*line, "--timestep", "20", "--out", str(tmp_path / "one")]) == 0
    shards = set((tmp_path / "cache").glob("*.f16"))
    assert train.main([*line, "--timestep", "20,780,260,520", "--out", str(out)]) == 0
    assert load_decoder(out / "depth").config.capture_timestep == (780, 520, 260, 20)
    assert len(shards) == 3 and len(set((tmp_path / "cache").glob("*.f16")) - shards) == 9  # one a picture and call
    capsys.readouterr()
    common = ["--model", "tiny", "--decoder", str(out), "--quiet"]
    assert evaluate.main([*common, "--data", "demo:2@900000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depth"]["absrel"] > 0
    drawn = ["--prompts", "a ball", "--number", "2", "--steps", "5", "--force-domain"]
    assert generate.main([*common, *drawn, "--out", str(run)]) == 0
    assert '"capture_timestep": [\n      800,\n      600,' in (run / "run.json").read_text()
    save_decoder(load_decoder(out / "depth", strict=True), tmp_path / "copy" / "depth")
    assert (tmp_path / "copy" / "depth" / "config.json").read_bytes() == (out / "depth" / "config.json").read_bytes()


def test_probes_tell_what_a_level_explains():
    random = torch.Generator().manual_seed(0)
    truth, noise = torch.randn(300, 2, generator=random), torch.randn(300, 40, generator=random)
    cells = torch.cat([truth @ torch.randn(2, 40, generator=random) + 3, torch.ones(300, 300)], 1)
    for inputs, least, most in ((cells[:, :40], 0.99, 1.0), (cells, 0.99, 1.0), (noise, 0.0, 0.05)):
        probe = Probe(inputs)
        for number in range(5):
            probe.add(number, inputs[number::5], truth[number::5] + 7)
        assert least <= probe.score() <= most
    assert Probe(cells).score() == 0


def test_the_call_that_tells_most_is_trained(tmp_path, capsys):
    line = ["--model", "tiny", "--data", "demo:2", "--task", "depth,pose", "--timestep", "auto"]
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
    assert "two images" in capsys.readouterr().err
