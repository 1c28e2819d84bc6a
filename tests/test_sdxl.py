"""Stable Diffusion XL by the fast engine, against its oracle: blocks of several depths, one row an image and two."""

import weakref
from dataclasses import replace

import pytest
import tiny_pipelines
import torch

from datasetdm_fast import verify as verify_command
from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import Request
from datasetdm_fast.engine.backbones.sdxl import SDXL
from datasetdm_fast.engine.decoders.checkpoint import seeded_decoders
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import in_memory, load_model
from datasetdm_fast.engine.loading.in_memory import model_of
from datasetdm_fast.engine.loading.model import ConfigFile
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.models.capture import RawCapture
from datasetdm_fast.engine.models.fused import FusedUNet
from datasetdm_fast.engine.models.unet import TextTable, TimeTable, UNet
from datasetdm_fast.kernels import plain
from datasetdm_fast.runs.agreement.verify import verify

PROMPTS = ("a red car", "", "two dogs and a long text")
CASES = {  # sizes of the pipeline, guidance of its images
    "guided": ({}, 5.0),
    "of one half": ({"depths": (0, 2, 3), "width": 48, "text": 24}, 1.0),
    "distilled": ({"guidance_embedding": 17}, 3.0),
}


@pytest.fixture(scope="module", params=CASES)
def model(request):
    sizes, guidance = CASES[request.param]
    torch.manual_seed(0)
    found = model_of(tiny_pipelines.build("sdxl", **sizes), tiny_pipelines.SIZE)
    return replace(found, defaults=replace(found.defaults, guidance=guidance), scale=guidance)


def engines(model, has_decoders=True):
    decoders = seeded_decoders(model.levels, model.text_width) if has_decoders else {}
    decoders = {task: fold(decoder) for task, decoder in decoders.items()}
    return [build_engine(name, model, decoders, device="cpu") for name in ("fast", "torch")]


@pytest.mark.parametrize("batch, speed", [(1, {"steps": 2}), (3, {"steps": 6, "speed": "cache3"})])
def test_the_fast_engine_agrees_with_the_oracle(model, batch, speed):
    fast, reference = engines(model)
    recipe = make_recipe(reference, tuple(fast.decoders), sampler="ddim", **speed)
    requests = [Request(number, prompt, number) for number, prompt in enumerate(PROMPTS[:batch])]
    verdict = verify(fast, reference, requests, recipe, batch, is_whole=True)
    assert verdict.agrees, verdict.table()
    assert {"averages of attention", "level low", "level highest"} <= {row.measure for row in verdict.rows}


def test_verify_takes_a_saved_folder(tmp_path, capsys):
    line = ["--model", str(tiny_pipelines.save(tmp_path / "model", "sdxl")), "--decoder", "random", "--task", "depth"]
    line += ["--size", str(tiny_pipelines.SIZE), "--steps", "2", "--prompts", "a red car", "--number", "1", "--quiet"]
    assert verify_command.main([*line, "--engine", "fast", "--json"]) == 0, capsys.readouterr()


def test_features_and_maps_are_those_of_the_oracle(model):
    fast, reference = engines(model, has_decoders=False)
    recipe = make_recipe(reference, (), steps=2, sampler="ddim")
    verdict = verify(fast, reference, [Request(0, PROMPTS[0], 7)], recipe, 1)
    assert verdict.agrees and ATTENTION not in verdict.facts["decoders"], verdict.table()


@torch.inference_mode()
def test_the_network_for_a_gpu_is_exact(model):
    """A bias for each image as shift, and what the tokens of several blocks lack, in fp64."""
    (fast, _), unet = engines(model, has_decoders=False), model.modules["unet"]
    latents = torch.randn(2, *model.latent_shape()).double()
    text = call_text(fast, PROMPTS[:2])
    rows = TimeTable(unet, model.size)(torch.tensor(500.0), text.pooled, text.guidance).double()
    tables, hooks, found = TextTable(unet).double()(text.context.double()), [], []
    for kind in (UNet, FusedUNet):
        hooks.append(RawCapture(model.levels, plain, len(text) // 2))
        found.append(kind(unet, plain).double()(latents, rows, tables, hooks[-1]))
    pairs = [(found[1], found[0]), *((hooks[1].features[slot], right) for slot, right in hooks[0].features.items())]
    pairs += [(hooks[1].maps[slot], right) for slot, right in hooks[0].maps.items()]
    assert all((ours - right).norm() <= 1e-6 * right.norm() for ours, right in pairs)


def test_an_autoencoder_that_leaves_fp16_is_stored_in_fp32(model):
    """As diffusers' pipeline does where `force_upcast` is set; that of Stable Diffusion 1.x ignores it."""
    engine = engines(model, has_decoders=False)[0]
    assert model.latents.leaves_fp16 and engine.image_dtype == torch.float32
    assert not load_model("demo").latents.leaves_fp16
    engine.dtype = torch.float16  # as on a GPU
    assert engine.image_dtype == torch.float32
    assert not SDXL.latents({"vae": ConfigFile({**model.configs["vae"], "force_upcast": False})}).leaves_fp16
    rest = {key: value for key, value in model.configs["vae"].items() if key != "force_upcast"}
    for more in ({}, {"latents_mean": [1.0] * 4, "latents_std": None}, {"latents_std": [1.0] * 4}):
        found = SDXL.latents({"vae": ConfigFile(rest | more)})
        assert found.leaves_fp16 and found.mean == () and found.scale == 0.21


def test_latents_of_channels_with_their_own_mean_and_spread_are_decoded():
    pipeline = tiny_pipelines.build("sdxl")
    numbers = {"latents_mean": [0.5, -1.0, 0.2, 2.0], "latents_std": [3.0, 1.0, 0.5, 2.0]}
    pipeline.vae = tiny_pipelines.vae(4, scaling_factor=0.5, **numbers)
    model = model_of(pipeline, tiny_pipelines.SIZE)
    latents = torch.randn(2, *model.latent_shape())
    fast, truth = (build_engine(name, model, device="cpu").decode_image(latents).int() for name in ("fast", "torch"))
    assert model.latents.mean == (0.5, -1.0, 0.2, 2.0) and model.latents.std == (6.0, 2.0, 1.0, 4.0)
    assert (fast - truth).abs().max() <= 1


def test_of_a_pipeline_in_memory_one_network_is_copied_at_a_time(monkeypatch):
    read, copied = in_memory.state_of, []

    def read_alone(module, name):
        assert all(tensor() is None for tensor in copied), f"another network's weights are there beside the {name}"
        state = read(module, name)
        copied.extend(map(weakref.ref, state.values()))
        return state

    monkeypatch.setattr(in_memory, "state_of", read_alone)
    assert len(model_of(tiny_pipelines.build("sdxl"), tiny_pipelines.SIZE).networks) == 4 and len(copied) > 100
