"""Decoders that read other blocks of a transformer than their model's levels: engines, probes, training, bad input."""

import json
from dataclasses import replace

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from tiny_pipelines import SIZE

from datasetdm_fast import evaluate, generate, train
from datasetdm_fast.data import Capture
from datasetdm_fast.engine.backbones.flow_models import blocks_read, spread_blocks
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, load_decoder, save_decoder, seeded_decoders
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine, load_decoders
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import call_ranking
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.session import open_session
from datasetdm_fast.training.settings import Inversion, ModelChoice, TrainingData

FAMILIES = {"sd3": {"layers": 5, "width": 48}, "z-image": {"layers": 4}}
PROMPTS = ["a photo of the cat", "the house"]


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request, tmp_path_factory):
    return tiny_pipelines.save(
        tmp_path_factory.mktemp(request.param) / "model", request.param, **FAMILIES[request.param]
    )


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return str(tiny_pipelines.save(tmp_path_factory.mktemp("sd3") / "model", "sd3", **FAMILIES["sd3"]))


def decoder_of(model, kind, blocks=(), **changes):
    """A decoder with seeded weights that reads these blocks."""
    levels = model.reading(spread_blocks(blocks) if blocks else ()).levels
    config = seeded_decoders(levels, model.text_width)[kind].config
    levels = levels if blocks else tuple(replace(level, blocks=()) for level in levels)
    if "word_heads" in changes:
        changes["word_heads"] = tuple(range(sum(sum(level.heads) for level in levels)))
    torch.manual_seed(len(blocks))
    return fold(build_decoder(replace(config, levels=levels, **changes))).requires_grad_(False)


def test_blocks_are_spread_over_the_levels_as_the_models_own_are():
    for depth in (2, 3, 8, 24, 38, 57, 60):
        usual = blocks_read(depth)
        assert spread_blocks([block for level in usual for block in level]) == usual
    assert spread_blocks([4]) == ((4,), (4,), (4,)) and spread_blocks([5, 1]) == ((1, 5), (1,), (5,))


@pytest.mark.parametrize("name", ["torch", "fast", "ort"])
def test_every_engine_serves_decoders_of_several_blocks(folder, name, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path))
    model = load_model(str(folder), size=SIZE)
    decoders = {
        "depth": decoder_of(model, "depth", (0, 2, 3)),
        "semantic": decoder_of(model, "semantic", (1,), word_heads=(), named=("1",)),
        "pose": decoder_of(model, "pose"),
    }
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    engine = build_engine(name, model, decoders, device="cpu")
    text = call_text(engine, PROMPTS, 4.0)
    _, capture = engine.denoise_and_capture(latents, 412.0, text)
    for task, decoder in decoders.items():  # alone, with the blocks that it was trained on
        alone = build_engine("torch", model.reading(decoder.config.blocks), {task: decoder}, device="cpu")
        truth = alone.annotate(task, alone.denoise_and_capture(latents, 412.0, call_text(alone, PROMPTS, 4.0))[1])
        for key, value in engine.annotate(task, capture).items():
            assert float((value - truth[key]).norm() / truth[key].norm()) < 1e-4, (task, key)
    assert decoders["depth"].config.blocks == spread_blocks((0, 2, 3))  # as it was


def test_old_decoders_mean_the_models_own_blocks(sd3, tmp_path):
    model = load_model(sd3, size=SIZE)
    for name, blocks in (("usual", ()), ("chosen", (0, 3))):
        config = decoder_of(model, "depth", blocks).config
        save_decoder(build_decoder(config), tmp_path / name / "depth")
        text = (tmp_path / name / "depth" / "config.json").read_text()
        assert ("blocks" in text) == bool(blocks) and DecoderConfig.from_json(text) == config
        loaded = load_decoders(model, str(tmp_path / name))[0]["depth"]
        engine = build_engine("torch", model, {"depth": loaded}, device="cpu")
        read = [level.blocks for level in engine.model.levels[:-1]]
        assert (*map(tuple, read),) == (spread_blocks(blocks) if blocks else blocks_read(5))


@pytest.mark.parametrize("blocks", [[[0], [1], []], [[1, 0], [0], [1]], [[0, 0], [0], [1]], "all", [["0"], [0], [0]]])
def test_blocks_that_no_decoder_has_are_refused(sd3, blocks):
    document = json.loads(decoder_of(load_model(sd3, size=SIZE), "depth", (0, 1)).config.to_json())
    for level, named in zip(document["levels"], blocks):
        level["blocks"] = named
    with pytest.raises(Refused, match="decoder config: .*blocks"):
        DecoderConfig.from_json(json.dumps(document))


def test_blocks_that_a_model_lacks_are_refused(sd3, tmp_path, capsys):
    deeper = load_model(str(tiny_pipelines.save(tmp_path / "deeper", "sd3", layers=6, width=48)), size=SIZE)
    save_decoder(build_decoder(decoder_of(deeper, "depth", (2, 5)).config), tmp_path / "decoder" / "depth")
    line = ["--prompts", "a ball", "--number", "1", "--steps", "2", "--quiet", "--out", str(tmp_path / "run")]
    assert generate.main([*line, "--model", sd3, "--size", str(SIZE), "--decoder", str(tmp_path / "decoder")]) == 2
    assert "depth decoder: block 5 is not one of the 5 of" in capsys.readouterr().err
    with pytest.raises(Refused, match="pose decoder: Stable Diffusion .* has no blocks to choose"):
        load_model("tiny").reading(((0,), (0,), (0,)), "pose decoder")


@pytest.mark.parametrize(
    ("model", "blocks", "cause"),
    [
        ("sd3", "5", "--blocks: block 5 is not one of the 5 of"),
        ("sd3", "auto,1", "--blocks: 'auto,1' is not auto"),
        ("sd3", "-1", "--blocks: '-1' is not auto"),
        ("tiny", "1", "--blocks: Stable Diffusion"),
        ("tiny", "auto", "--blocks: Stable Diffusion"),
    ],
)
def test_flags_of_blocks_are_refused_in_one_sentence(sd3, model, blocks, cause, tmp_path, capsys):
    line = ["--model", sd3 if model == "sd3" else model, "--size", str(SIZE), "--data", "demo:2", "--dry-run"]
    assert train.main([*line, f"--blocks={blocks}", "--out", str(tmp_path / "out")]) == 2
    assert cause in capsys.readouterr().err and not (tmp_path / "out").exists()


def plant(monkeypatch, named, timestep):
    """Captures of noise; the tokens of these blocks at one timestep tell two halves of the depth of a picture."""
    random = torch.Generator().manual_seed(0)

    def captures(engine, views, items, seeds, inversion):
        for time in inversion.timesteps:
            features, maps = [], []
            for level in engine.model.levels:
                sides = level.side, level.side
                features.append([torch.randn(1, width, *sides, generator=random) for width in level.features])
                maps.append(
                    [torch.rand(1, heads, level.side**2, level.tokens, generator=random) for heads in level.heads]
                )
            first = engine.model.levels[0]
            depth = F.adaptive_avg_pool2d(torch.from_numpy(items[0].depth)[None, None].float(), first.side).log()[0, 0]
            half = torch.arange(first.side)[:, None] < first.side // 2
            for block, part in zip(named, (half, ~half), strict=True):
                if time == timestep and block in first.blocks:
                    features[0][first.blocks.index(block)][0, :8] += 20 * depth * part
            yield Capture(tuple(map(tuple, features)), tuple(map(tuple, maps)))

    monkeypatch.setattr(cache, "captures", captures)


def session_of(folder, blocks=(), **settings):
    choice = ModelChoice(folder, SIZE, engine="fast", device="cpu", blocks=blocks)
    told = []
    return open_session(TrainingData("demo:6"), choice, ("depth",), Inversion((300,)), told.append, **settings), told


def test_probes_find_the_blocks_and_the_call_in_which_the_labels_are(sd3, monkeypatch):
    session, told = session_of(sd3)
    plant(monkeypatch, (0, 4), 650)
    best = call_ranking.with_best(session, ("depth",), calls=True, blocks=True)
    chosen = sorted({block for level in best.engine.model.blocks for block in level})
    assert best.inversion.timesteps == (650,) and {0, 4} <= {*chosen} and best.recipe("depth").config.blocks
    assert best.engine.model.levels[1].blocks == (0,) and best.engine.model.levels[2].blocks == (4,)
    table = [line for line in told if line[:15].isspace()]
    best_row = next(line for line in table if line.split()[0] == "650")
    assert len(table) == 9 and float(best_row.split()[-1]) > 0.5
    assert all(float(line.split()[-1]) < 0.2 for line in table if line is not best_row)
    assert f"blocks     at timestep 650 {','.join(map(str, chosen))} 0." in told[-1]


def test_named_calls_keep_while_blocks_are_ranked(sd3, monkeypatch):
    session, told = session_of(sd3)
    plant(monkeypatch, (3, 2), 300)
    best = call_ranking.with_best(session, ("depth",), calls=False, blocks=True)
    assert best.inversion.timesteps == (300,) and {2, 3} <= {
        block for level in best.engine.model.blocks for block in level
    }
    monkeypatch.setattr(call_ranking.Probe, "score", lambda probe, groups=(0,): 0.0)
    assert call_ranking.with_best(session, ("depth",), calls=False, blocks=True) is session
    assert "as no probe tells anything" in told[-1]


def test_a_decoder_of_named_blocks_is_trained_scored_and_used(sd3, tmp_path, capsys):
    out, run = tmp_path / "decoder", tmp_path / "run"
    common = ["--model", sd3, "--size", str(SIZE), "--quiet"]
    line = [*common, "--data", "demo:3", "--steps", "2", "--draws", "1", "--held-out", "0", "--folds", "no"]
    line += ["--task", "depth", "--cache", "disk", "--cache-dir", str(tmp_path / "cache")]
    shards = []
    for blocks in ((), ("--blocks", "1,2,3"), ("--blocks", "4,0")):
        folder = out if blocks == ("--blocks", "4,0") else tmp_path / f"other{len(blocks)}"
        assert train.main([*line, *blocks, "--out", str(folder)]) == 0
        shards.append(len([*(tmp_path / "cache").glob("*.f16")]))
    assert load_decoder(out / "depth").config.blocks == ((0, 4), (0,), (4,))
    assert "blocks" not in (tmp_path / "other0" / "depth" / "config.json").read_text()
    assert shards == [3, 6, 9]
    capsys.readouterr()
    assert train.main([*line, "--blocks", "1,4", "--out", str(out)]) == 2
    assert "trained with other settings (blocks" in capsys.readouterr().err
    decoders = ["--decoder", str(out)]
    assert evaluate.main([*common, *decoders, "--data", "demo:2@900000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depth"]["absrel"] > 0
    drawn = ["--prompts", "a ball", "--number", "2", "--steps", "3", "--force-domain", "--engine", "fast"]
    assert generate.main([*common, *decoders, *drawn, "--out", str(run)]) == 0
    assert len([*(run / "depth").iterdir()]) == 2
