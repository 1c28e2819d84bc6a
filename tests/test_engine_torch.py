"""The reference engine: capture, per-image semantics in a batch, and agreement with the stock pipeline."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from datasetdm_fast.config import CACHED, ENGINES, EngineKind
from datasetdm_fast.data import Capture, Text, join_texts
from datasetdm_fast.engine.backbones.sd_reference import capturing_levels, feature_modules, transformers_of
from datasetdm_fast.engine.decoders.checkpoint import seeded_decoders
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import Engine, build_engine, check_engine, check_task, device
from datasetdm_fast.engine.engines.device import engine_call
from datasetdm_fast.engine.engines.fast.engine import as_images
from datasetdm_fast.engine.engines.torch import TorchEngine, _check_capture
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.folder import DEMO
from datasetdm_fast.engine.sampling.schedule import ImageNoise, ReferenceSampler, make_schedule
from datasetdm_fast.errors import Missing, Refused

PROMPTS = ("a red ball beside a cube", "two cats", "", "a person at night, in fog")
SEEDS = (7, 11, 200000, 3)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return build_engine("torch", load_model("tiny"), device="cpu")


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).double().norm() / truth.double().norm().clamp(min=1e-30))


def make(
    engine: TorchEngine, prompts, seeds, steps: int, guidance: float = 5.0, profile: str = "0.3.0"
) -> tuple[torch.Tensor, Capture]:
    """Final latents and Capture of the prompts as one batch."""
    side, schedule = engine.model.size // 8, make_schedule(engine.model.scheduler, "pndm", steps, profile)
    context = join_texts([engine.encode_text([""] * len(prompts)), engine.encode_text(prompts)])
    state = ReferenceSampler(schedule, guidance, ImageNoise(seeds, (4, side, side)).draw())
    for k, time in enumerate(schedule.timesteps[:-1]):
        state.step(k, engine.denoise(state.latents, time, context))
    output, capture = engine.denoise_and_capture(state.latents, schedule.timesteps[-1], context)
    return state.step(len(schedule) - 1, output), capture


def stock(engine: TorchEngine) -> StableDiffusionPipeline:
    """diffusers' own pipeline over the same modules."""
    model = engine.model
    pipeline = StableDiffusionPipeline(
        vae=model.modules["vae"],
        text_encoder=model.modules["text_encoder"],
        tokenizer=model.tokenizers["tokenizer"],
        unet=model.modules["unet"],
        scheduler=PNDMScheduler.from_config(model.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_capture_has_the_shapes_of_the_stage_table(engine):
    _, capture = make(engine, PROMPTS[:2], SEEDS[:2], 2)
    assert sum(len(level) for level in capture.features) == 28 and sum(len(level) for level in capture.maps) == 16
    for level, features, maps in zip(engine.model.levels, capture.features, capture.maps, strict=True):
        assert [tuple(feature.shape) for feature in features] == [
            (2, 2 * channels, level.side, level.side) for channels in level.features
        ]
        assert [tuple(layer.shape) for layer in maps] == [
            (2, heads, level.side**2, level.tokens) for heads in level.heads
        ]
        assert all(torch.allclose(layer.sum(-1), torch.ones(())) for layer in maps)


def test_features_join_both_halves_of_each_image_and_maps_keep_the_conditional_one(engine):
    """With one context in both halves the halves are equal; changing one half changes its own channels only."""
    latents = ImageNoise((1, 2), (4, 16, 16)).draw()
    empty, text = engine.encode_text(["", ""]), engine.encode_text(["a cube", "a ball"])
    _, same = engine.denoise_and_capture(latents, 1, join_texts([text, text]))
    _, other = engine.denoise_and_capture(latents, 1, join_texts([empty, text]))
    for level_same, level_other in zip(same.features, other.features):
        for a, b in zip(level_same, level_other):
            without, with_text = a.chunk(2, dim=1)
            assert relative(without, with_text) <= 1e-5
            assert relative(b.chunk(2, dim=1)[1], with_text) <= 1e-5
    assert relative(other.features[0][-1].chunk(2, dim=1)[0], same.features[0][-1].chunk(2, dim=1)[0]) > 1e-3
    for level_same, level_other in zip(same.maps, other.maps):
        assert all(relative(b, a) <= 1e-5 for a, b in zip(level_same, level_other))


def test_four_prompts_equal_four_runs_of_one(engine):
    latents, capture = make(engine, PROMPTS, SEEDS, 3)
    for k, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS)):
        alone, single = make(engine, [prompt], [seed], 3)
        assert relative(latents[k], alone[0]) <= 1e-5
        for kind in ("features", "maps"):
            for level, level_alone in zip(getattr(capture, kind), getattr(single, kind), strict=True):
                for value, truth in zip(level, level_alone, strict=True):
                    assert relative(value[k], truth[0]) <= 1e-5, kind


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("tiny", 6),
        pytest.param(
            "demo", 10, marks=pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained yet")
        ),
    ],
)
def test_image_is_that_of_the_stock_pipeline(name, steps):
    engine = build_engine("torch", load_model(name), device="cpu")
    pipeline = stock(engine)
    latents, _ = make(engine, PROMPTS[:3], SEEDS[:3], steps, profile="0.14.0")
    images = engine.decode_image(latents).numpy().astype(int)
    for k in range(3):
        theirs = []
        arguments = {
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
            "height": engine.model.size,
            "width": engine.model.size,
            "callback_on_step_end": lambda *given, theirs=theirs: theirs.append(given[-1]["latents"]) or given[-1],
        }
        generator = torch.Generator("cpu").manual_seed(SEEDS[k])
        picture = pipeline(PROMPTS[k], generator=generator, output_type="np", **arguments).images[0]
        assert relative(latents[k], theirs[-1][0]) <= 1e-4
        difference = np.abs(images[k] - np.trunc(picture * 255).astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_text_is_encoded_as_the_stock_pipeline_does(engine):
    theirs, without = stock(engine).encode_prompt(list(PROMPTS[:2]), "cpu", 1, True)
    assert torch.equal(engine.encode_text(PROMPTS[:2]).context, theirs)
    assert torch.equal(engine.encode_text(["", ""]).context, without)
    classes = engine.encode_classes(["ball", "cube"])
    context = engine.encode_text(["ball", "cube"]).context
    assert torch.equal(classes, context.mean(1)) and classes.shape == (2, 32)


def test_plain_calls_are_not_observed(engine):
    unet = engine.model.modules["unet"]
    kinds = {name: type(processor) for name, processor in unet.attn_processors.items()}
    latents, context = ImageNoise([0], (4, 16, 16)).draw(), engine.encode_text(["", "a cube"])
    captured, _ = engine.denoise_and_capture(latents, 1, context)
    assert relative(engine.denoise(latents, 1, context), captured) <= 1e-5
    with (
        pytest.raises(KeyError),
        capturing_levels(feature_modules(unet), transformers_of(unet)),
    ):  # a forward that never came leaves nothing behind either
        pass
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == kinds
    assert not any(module._forward_hooks for module in unet.modules())


def test_pixels_are_cut_not_rounded(engine):
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 2.0]).expand(1, 3, 1, 5)

    class Flat(torch.nn.Module):
        config, dtype = engine.model.modules["vae"].config, torch.float32

        def decode(self, latents, return_dict):
            return (pixels,)

    flat = TorchEngine(engine.model.with_modules(vae=Flat()), device="cpu")
    image = flat.decode_image(torch.zeros(1, 4, 1, 1))
    assert image.dtype == torch.uint8 and image[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255]
    assert torch.equal(as_images(pixels)[0], image)


def test_real_images_are_encoded_by_mean_or_by_each_images_generator(engine):
    images = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = engine.encode_image(images)
    with torch.no_grad():
        posterior = engine.model.modules["vae"].encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert relative(mean, posterior.mean * engine.model.modules["vae"].config.scaling_factor) <= 1e-6
    both = engine.encode_image(images, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    second = engine.encode_image(images[1:], [torch.Generator().manual_seed(2)])
    assert relative(both[1], second[0]) <= 1e-5 and relative(both, mean) > 1e-3


def test_decoders_are_called_by_task(engine):
    class Decoder(torch.nn.Module):
        def forward(self, capture, text=None):
            return {"logits": capture.features[0][0], "text": text}

    with_decoder = build_engine("torch", engine.model, {"semantic": Decoder()}, device="cpu")
    text = torch.ones(1, 32)
    raw = with_decoder.annotate("semantic", Capture(((torch.zeros(1),),), ()), text)
    assert torch.equal(raw["logits"], torch.zeros(1)) and raw["text"] is text
    with pytest.raises(Missing, match="depth"):
        with_decoder.annotate("depth", Capture((), ()))


def test_fingerprint_names_what_decides_rounding(engine):
    fingerprint = engine.fingerprint()
    assert (
        fingerprint["engine"] == "torch"
        and fingerprint["dtype"] == "fp32"
        and fingerprint["torch"] == torch.__version__
    )
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_engines_that_are_not_there_are_named(engine):
    with pytest.raises(Refused, match="warp"):
        build_engine("warp", engine.model)
    with pytest.raises(TypeError, match="speed"):
        build_engine("fast", engine.model, speed="high")


def test_an_engine_is_one_file_and_one_line(engine, tmp_path, monkeypatch):
    (tmp_path / "my_engine.py").write_text(
        "from datasetdm_fast.engine.engines.torch import TorchEngine\n"
        "from datasetdm_fast.errors import Missing\n"
        "class MyEngine(TorchEngine):\n"
        "    def __init__(self, model, decoders, *, dtype, device, provider):\n"
        "        super().__init__(model, decoders, dtype=dtype, device=device)\n"
        "        self.provider = provider\n"
        "def need(provider):\n"
        "    if provider == 'cuda': raise Missing('engine: mine needs a GPU', 'buy one')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refusal = ("provider: {value}, and the engine is {engine}", "drop it")
    mine = EngineKind("my_engine:MyEngine", {"provider": refusal}, ("my_engine:need", "provider"))
    monkeypatch.setitem(ENGINES, "mine", mine)
    monkeypatch.setattr("datasetdm_fast.engine.engines.ENGINE_NAMES", ("auto", *ENGINES))
    assert build_engine("mine", engine.model, device="cpu", provider="cpu").provider == "cpu"
    with pytest.raises(Missing, match="mine needs a GPU"):
        check_engine("mine", provider="cuda")
    with pytest.raises(Refused, match="the engine is torch"):
        check_engine("torch", provider="cpu")


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [("dtype", "fp16", Refused), ("device", "tpu", Refused), ("device", "cuda:99", Missing)],
)
def test_impossible_arithmetic_or_device_is_refused(engine, option, value, error):
    with pytest.raises(error, match=value):
        build_engine("torch", engine.model, **{option: value})


def test_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [str(device.resolve_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(Missing, match="device: cuda:2 is not available, this machine has 2 CUDA devices"):
        device.resolve_device("cuda:2")
    for name in ("meta", "mps", "cuda:-1", "gpu"):
        with pytest.raises(Refused, match=f"device: '{name}' is none of auto, cpu, cuda, cuda:N"):
            device.resolve_device(name)


@pytest.mark.parametrize(
    ("capability", "bf16", "fp8"), [((7, 5), False, False), ((8, 0), True, False), ((8, 9), True, True)]
)
def test_gpus_have_bf16_since_ampere_and_fp8_since_ada(monkeypatch, capability, bf16, fp8):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    place = torch.device("cuda")
    assert (device.multiplies_bf16(place), device.multiplies_fp8(place)) == (bf16, fp8)
    assert device.half_of(place) == "fp16" and device.multiplies_fp8(torch.device("cpu"))


@pytest.mark.parametrize(("precision", "is_rounded"), [("fp16", True), ("bf16", True), ("fp32", False)])
def test_convolutions_alone_are_rounded_to_tf32(precision, is_rounded):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    seen = engine_call(lambda engine: (cudnn.allow_tf32, matmul.allow_tf32))
    try:
        matmul.allow_tf32 = True
        assert seen(SimpleNamespace(device=torch.device("cuda"), precision=precision)) == (is_rounded, False)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def test_what_follows_from_an_engines_other_calls(engine):
    text = Text(torch.arange(12.0).view(1, 3, 4).repeat(2, 1, 1), mask=torch.tensor([[True] * 3, [True, False, True]]))
    other = SimpleNamespace(encode_text=lambda words: text)
    assert Engine.encode_classes(other, ["a", "b"])[:, 0].tolist() == [4.0, 4.0]
    assert Engine.encode_classes(SimpleNamespace(encode_text=lambda _: replace(text, mask=None)), "ab")[0, 0] == 4.0
    text.mask[1, 2] = False
    assert Engine.encode_classes(other, ["a", "b"])[:, 0].tolist() == [4.0, 0.0]
    assert engine.fp32_fallback() is None
    depth = fold(seeded_decoders(engine.model.levels, engine.model.text_width)["depth"])
    narrow = build_engine("fast", engine.model, {"depth": depth}, dtype="bf16", device="cpu", compile=True)
    wide = narrow.fp32_fallback()
    assert [*wide.decoders] == ["depth"], "labels of a retry are read, too"
    assert (wide.precision, wide.is_compiled, wide.model) == ("fp32", True, engine.model)
    assert wide is narrow.fp32_fallback() and wide.fp32_fallback() is None
    assert narrow.fingerprint()["compiled"] == "yes" and "compiled" not in engine.fingerprint()
    with pytest.raises(Missing, match="no decoder for 'depth' was loaded, there are none"):
        check_task("depth", {})
    with pytest.raises(Missing, match="there are pose, depth"):
        check_task("semantic", {"pose": None, "depth": None})


def test_what_another_package_captures_is_what_its_levels_say():
    level = SimpleNamespace(name="low", halves=2, features=(3,), heads=(4,), side=2, tokens=5)
    model = SimpleNamespace(levels=(level,), backbone=SimpleNamespace(title="Some model", package="theirs"))
    feature, layer = torch.zeros(1, 6, 2, 2), torch.zeros(1, 4, 4, 5)
    _check_capture(model, Capture(((feature,),), ((layer,),)))
    for wrong in (((feature[:, :3],), (layer,)), ((feature,), (layer[..., :4],)), ((feature,), ())):
        with pytest.raises(Missing, match="Some model of the package theirs captures .* as level low, and the levels"):
            _check_capture(model, Capture((wrong[0],), (wrong[1],)))

    captured = Capture(((feature,),), ((),))  # as our own references capture is known, and not compared
    reference = SimpleNamespace(capturing=lambda: nullcontext([captured]), predict=lambda *_: "noise")
    engine = SimpleNamespace(device=torch.device("cpu"), model=model, reference=reference)
    with pytest.raises(Missing, match="of the package theirs captures"):
        TorchEngine.denoise_and_capture(engine, None, 5, None)
    model.backbone.package = ""
    assert TorchEngine.denoise_and_capture(engine, None, 5, None) == ("noise", captured)


def test_calls_from_deep_features_are_of_families_that_have_some(engine):
    model = SimpleNamespace(networks={}, backbone=SimpleNamespace(has_deep_features=False))
    assert engine.speeds == (CACHED,) and TorchEngine(model, device="cpu").speeds == ()


def test_on_a_gpu_cudnn_computes_in_exact_fp32_while_other_threads_do(monkeypatch):
    cudnn = torch.backends.cudnn
    names = "enabled", "allow_tf32", "deterministic", "benchmark"
    for name, before in zip(names, (True, True, False, True)):
        monkeypatch.setattr(cudnn, name, before)
    seen = engine_call(lambda engine: [getattr(cudnn, name) for name in names])
    assert seen(SimpleNamespace(device=torch.device("cpu"), precision="fp32")) == [True, True, False, True]
    assert seen(SimpleNamespace(device=torch.device("cuda"), precision="fp32")) == [True, False, True, False]
    assert not cudnn.allow_tf32  # a call of another thread may be under way
