"""The lean models and the fast engine, stage by stage against the reference engine on the same weights."""

import math
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from small_unets import FEW_ATTENTIONS, with_small_unet
from transformers import CLIPTextConfig, CLIPTextModel

from bench.decoders import load_decoders
from datasetdm_fast.data import AttentionSums, ProjectedCapture, Text, join_texts
from datasetdm_fast.engine.backbones import Latents
from datasetdm_fast.engine.backbones.latent_space import sample_posterior
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast import FastEngine, on_cpu, on_gpu
from datasetdm_fast.engine.engines.fast import engine as base
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.presets import seed_network
from datasetdm_fast.engine.models import fused, packed
from datasetdm_fast.engine.models.capture import (
    AttentionSlot,
    CaptureHook,
    KeptFeature,
    ProjectedSums,
    ProjectingReader,
    Projection,
    RawCapture,
    RawReader,
    SummedAttention,
)
from datasetdm_fast.engine.models.layers import GroupNorm, LayerNorm, Upsample, Weights, sigmoid
from datasetdm_fast.engine.models.mmdit import turns_of
from datasetdm_fast.engine.models.text_encoder import TextEncoder
from datasetdm_fast.engine.models.unet import AttentionBlock, TextTable, TimeTable, UNet
from datasetdm_fast.engine.models.vae import ImageDecoder, ImageEncoder, has_usual_form
from datasetdm_fast.engine.sampling.schedule import ImageNoise, ReferenceSampler, make_schedule
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import attention, attention_capture, plain, pyramid
from datasetdm_fast.kernels.attention import probabilities
from datasetdm_fast.stages import Level

PROMPTS = ("a red ball beside a cube", "two cats", "a person at night, in fog")
STAGE = 1e-5  # relative L2 of one stage in fp32
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
)
KINDS = {"semantic": "segmentation", "open-vocabulary": "open-vocabulary", "depth": "depth", "pose": "simcc"}


def second_generation(tiny):
    """The tiny model with heads per level, linear projections, one layer a block and v-prediction, as SD 2.x has
    them, and prompts of 48 tokens instead of the 77 of all others.
    """
    config = dict(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=[1, 2, 4, 4],
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=True,
        layers_per_block=1,
    )
    unet = seed_network("unet", config, seed=3)
    scheduler = {**tiny.scheduler, "prediction_type": "v_prediction"}
    known = tiny.networks["text_encoder"].config
    text = seed_network("text_encoder", {**known, "max_position_embeddings": 48}, seed=4)
    return replace(tiny, networks={**tiny.networks, "unet": unet, "text_encoder": text}, scheduler=scheduler)


def decoders_for(model) -> dict:
    torch.manual_seed(7)
    decoders = {}
    for task, kind in KINDS.items():
        names = {} if task == "open-vocabulary" else {"classes": ("wall", "ball", "cone")} if task == "semantic" else {}
        names |= {"joints": ("head", "hand")} if task == "pose" else {}
        decoders[task] = fold(
            build_decoder(upstream(kind, task=task, levels=model.levels, **SMALL, **names))
        ).requires_grad_(False)
    return decoders


class Pair:
    """Both engines over one model and one set of decoders."""

    def __init__(self, model):
        self.model, decoders = model, decoders_for(model)
        self.torch, self.fast = (build_engine(name, model, decoders, device="cpu") for name in ("torch", "fast"))


@pytest.fixture(scope="module", params=["SD 1.x", "SD 2.x"])
def pair(request) -> Pair:
    tiny = load_model("tiny")
    return Pair(tiny if request.param == "SD 1.x" else second_generation(tiny))


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).double().norm() / truth.double().norm().clamp(min=1e-30))


def inputs(engine, batch: int) -> tuple[torch.Tensor, Text]:
    latents = ImageNoise(range(batch), (4, 16, 16)).draw()
    return latents, join_texts([engine.encode_text([""] * batch), engine.encode_text(PROMPTS[:batch])])


@pytest.mark.parametrize("batch", [1, 3])
def test_every_feature_and_map(pair, batch):
    latents, text = inputs(pair.torch, batch)
    noise, truth = pair.torch.denoise_and_capture(latents, 321, text)
    ours, capture = pair.fast.denoise_and_capture_raw(latents, 321, text)
    assert relative(ours, noise) <= STAGE and relative(pair.fast.denoise(latents, 321, text), noise) <= STAGE
    for kind in ("features", "maps"):
        for level, expected in zip(getattr(capture, kind), getattr(truth, kind), strict=True):
            for place, (value, right) in enumerate(zip(level, expected, strict=True)):
                assert value.shape == right.shape and relative(value, right) <= STAGE, (kind, place)


@pytest.mark.parametrize("batch", [1, 3])
def test_level_sums_and_labels(pair, batch):
    """Every decoder reads its own part of the stacked sums and says what it says of the features and maps
    themselves.
    """
    latents, text = inputs(pair.torch, batch)
    noise, raw = pair.torch.denoise_and_capture(latents, 1, text)
    ours, sums = pair.fast.denoise_and_capture(latents, 1, text)
    assert (
        isinstance(sums, ProjectedCapture) and relative(ours, noise) <= STAGE and (sums.batch, sums.side) == (batch, 16)
    )
    words = pair.torch.encode_classes(["ball", "cube"]).expand(batch, -1, -1)
    for task, decoder in pair.torch.decoders.items():
        own = sums.of(task)
        for place, level in enumerate(pair.model.levels):
            weight = decoder.projections().get(level.name)
            if weight is None:
                assert own.sums[place].shape == (batch, 0, level.side, level.side)
                continue
            assert (
                relative(own.sums[place], pyramid.reference(raw.features[place], raw.maps[place], weight, level.side))
                <= STAGE
            ), (task, level.name)
        text = words if task == "open-vocabulary" else None
        expected = pair.torch.annotate(task, raw, text)
        for given in (sums, raw):
            answer = pair.fast.annotate(task, given, text)
            assert all(relative(answer[name], value) <= 1e-4 for name, value in expected.items()), task


def test_image_stages(pair):
    latents, _ = inputs(pair.torch, 3)
    truth, ours = pair.torch.decode_image(latents), pair.fast.decode_image(latents)
    difference = (truth.int() - ours.int()).abs()
    assert ours.shape == (3, 128, 128, 3) and difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3
    assert relative(pair.fast.encode_image(truth), pair.torch.encode_image(truth)) <= STAGE
    drawn = [
        engine.encode_image(truth, [torch.Generator().manual_seed(seed) for seed in range(3)])
        for engine in (pair.fast, pair.torch)
    ]
    assert relative(*drawn) <= STAGE


def test_a_prompt_has_as_many_tokens_as_the_model(pair):
    tokens = pair.model.networks["text_encoder"].config.max_position_embeddings
    assert pair.fast.encode_text(PROMPTS).context.shape[1] == pair.model.levels[0].tokens == tokens


def test_text_stages(pair):
    assert relative(*(engine.encode_text(PROMPTS).context for engine in (pair.fast, pair.torch))) <= STAGE
    assert relative(pair.fast.encode_classes(["ball"]), pair.torch.encode_classes(["ball"])) <= STAGE


def free(engine, batch: int, steps: int = 6) -> torch.Tensor:
    latents, text = inputs(engine, batch)
    schedule = make_schedule(engine.model.scheduler, "pndm", steps)
    state = ReferenceSampler(schedule, 5.0, latents)
    for k, time in enumerate(schedule.timesteps):
        state.step(k, engine.denoise(state.latents, time, text))
    return state.latents


@pytest.mark.parametrize("batch", [1, 3])
def test_free_running_latents(pair, batch):
    assert relative(free(pair.fast, batch), free(pair.torch, batch)) <= 1e-4


def test_a_batch_says_what_its_images_say_alone(pair):
    latents, text = inputs(pair.fast, 3)
    noise, sums = pair.fast.denoise_and_capture(latents, 41, text)
    for b in range(3):
        alone, own = pair.fast.denoise_and_capture(latents[b : b + 1], 41, text[[b, 3 + b]])
        assert relative(noise[[b, 3 + b]], alone) <= STAGE
        assert all(relative(value[b : b + 1], truth) <= STAGE for value, truth in zip(sums.sums, own.sums))


def test_without_decoders_the_capture_is_raw(pair):
    engine = build_engine("fast", pair.model, device="cpu")
    latents, text = inputs(engine, 1)
    assert len(engine.denoise_and_capture(latents, 1, text)[1].features[0]) == len(pair.model.levels[0].features)
    with pytest.raises(Missing, match="depth"):
        engine.annotate("depth", None)


def test_each_image_has_its_own_negative_prompt(pair):
    latents, _ = inputs(pair.fast, 3)
    texts = [pair.torch.encode_text(some) for some in (["fog", "", "rain"], PROMPTS)]
    noise = pair.fast.denoise(latents, 500.0, join_texts(texts))
    assert relative(noise, pair.torch.denoise(latents, 500.0, join_texts(texts))) <= STAGE


def test_texts_are_read_again_when_they_change(pair):
    """The same tensor is read once; another one, or the same written to, is read anew."""
    engine, reads = build_engine("fast", pair.model, device="cpu"), []
    engine.prepare(2)
    inner = engine.texts.forward
    engine.texts.forward = lambda text: reads.append(len(text)) or inner(text)
    latents, text = inputs(engine, 2)
    first = engine.denoise(latents, 5, text)
    engine.denoise(latents, 6, text)
    assert reads == [1, 2]  # the empty prompt once, then the prompts of both images
    text.context[3] = text.context[2]
    second = engine.denoise(latents, 5, text)
    assert reads == [1, 2, 2] and relative(second, first) > 1e-4
    assert relative(second, pair.torch.denoise(latents, 5, text)) <= STAGE
    with torch.inference_mode():
        untracked = text.map(torch.clone)
    engine.denoise(latents, 5, untracked)
    engine.denoise(latents, 5, untracked)
    assert reads == [1, 2, 2, 2, 2]
    text.context[:2] = text.context[2]  # another text for the unconditional rows
    engine.denoise(latents, 5, text)
    assert reads[-2:] == [1, 2]


def test_weights_changed_in_place_are_read_again():
    model = load_model("tiny")
    engine = build_engine("fast", model, device="cpu")
    latents, text = inputs(engine, 1)
    before = engine.denoise(latents, 5, text)
    model.modules["unet"].conv_out.weight.mul_(2)
    after = engine.denoise(latents, 5, text.map(torch.clone))
    assert relative(after, before) > 0.1
    assert relative(after, build_engine("torch", model, device="cpu").denoise(latents, 5, text)) <= STAGE


def test_the_first_call_of_an_engine_may_have_a_text_that_another_encoded():
    model = load_model("tiny")
    engines = [build_engine("fast", model, device="cpu") for _ in range(2)]
    latents, text = inputs(engines[0], 1)
    first, second = (engine.denoise(latents, 5, text) for engine in engines)
    assert torch.equal(first, second)


def test_weights_of_text_encoder_and_autoencoder_changed_in_place_are_read_again():
    model = load_model("tiny")
    engine = build_engine("fast", model, device="cpu")
    latents, _ = inputs(engine, 1)
    image = engine.decode_image(latents)
    calls = {
        "text_encoder": lambda engine: engine.encode_text(["a ball"]).context,
        "vae": lambda engine: engine.encode_image(image),
    }
    before = {name: call(engine) for name, call in calls.items()}
    for name, call in calls.items():
        for weight in model.modules[name].parameters():
            weight.detach().mul_(1.2)
        after, truth = call(engine), call(build_engine("torch", model, device="cpu"))
        assert relative(after, before[name]) > 0.01 and relative(after, truth) <= STAGE
    engine.decode_image(latents)
    model.modules["vae"].post_quant_conv.weight.detach().mul_(2)
    truth = build_engine("torch", model, device="cpu").decode_image(latents)
    assert (engine.decode_image(latents).int() - truth.int()).abs().max() <= 1


def test_an_autoencoder_in_fp32_for_images_beyond_fp16_is_read_again_too():
    model = load_model("tiny")
    engine = build_engine("fast", model, device="cpu")
    latents, _ = inputs(engine, 1)
    before = engine._wide_image_decoder(latents)
    model.modules["vae"].post_quant_conv.weight.detach().mul_(2)
    engine.prepare(1)
    assert relative(engine._wide_image_decoder(latents), before) > 0.01


def test_whatever_was_made_of_changed_weights_is_made_anew():
    """Biases of timesteps, keys of texts and of class prompts, and deep features."""
    model = with_small_unet(load_model("tiny"), FEW_ATTENTIONS)
    engine = build_engine("fast", model, device="cpu")
    latents, text = inputs(engine, 2)
    words, zeros = engine.encode_text(["ball", "cube"]), torch.zeros(2, 256, 77)

    def call(engine):
        again = text.map(torch.clone)  # the same text is taken to be of the same weights
        _, sums = engine.denoise_and_average(latents, 5, again, words, AttentionSums(torch.zeros(2, 256, 256), zeros))
        return [engine.denoise(latents, 5, again), sums.cells, sums.tokens, *engine.denoise_and_keep(latents, 5, again)]

    unet, seen = model.modules["unet"], [call(engine)]
    for weight in (
        unet.time_embedding.linear_2.weight,
        unet.up_blocks[3].attentions[0].transformer_blocks[0].attn2.to_k.weight,
        unet.up_blocks[3].attentions[0].transformer_blocks[0].ff.net[2].weight,
    ):
        weight.mul_(3)
        seen.append(call(engine))
        fresh = call(build_engine("fast", model, device="cpu"))
        assert all(map(torch.equal, seen[-1], fresh)) and not torch.equal(seen[-1][-1], seen[-2][-1])


def test_class_prompts_of_another_text_or_side_are_read_anew():
    engine = build_engine("fast", model := with_small_unet(load_model("tiny"), FEW_ATTENTIONS), device="cpu")
    latents, text = inputs(engine, 1)
    words = [engine.encode_text([word]) for word in ("ball", "a cube")]
    for classes, cells in ((words[0], 256), (words[1], 256), (words[1], 4), (words[0], 256)):
        sums = AttentionSums(torch.zeros(1, 4, 4), torch.zeros(1, cells, 77))
        found = [
            each.denoise_and_average(latents, 5, text, classes, sums)[1].tokens
            for each in (engine, build_engine("fast", model, device="cpu"))
        ]
        assert torch.equal(*found) and found[0].shape[1] == cells


def test_every_network_of_an_engine_counts_in_its_distance_from_the_model():
    model = load_model("tiny")
    engine = build_engine("fast", model, {"depth": decoders_for(model)["depth"]}, device="cpu")
    engine.encode_image(torch.zeros(1, 128, 128, 3, dtype=torch.uint8))
    names = ("times", "texts", "unet", "projection", "text_encoder", "image_decoder", "image_encoder")
    for module in (*(getattr(engine, name) for name in names), engine._stored_decoders["depth"]):
        value = next(iter(packed.weights_of(module).values()))
        kept = value.clone()
        with torch.inference_mode():
            value.add_(1)
            assert engine.weight_distance() > 0
            value.copy_(kept)
    assert engine.weight_distance() == 0


def test_an_autoencoder_that_leaves_fp16_is_stored_in_fp32_and_others_are_tried_again(monkeypatch):
    monkeypatch.setattr(base, "resolve_precision", lambda name, device: name)
    model = load_model("tiny")
    narrow = [FastEngine(replace(model), dtype=dtype, device="cpu").image_dtype for dtype in ("fp16", "bf16")]
    assert narrow == [torch.float16, torch.bfloat16]
    monkeypatch.setattr(type(model), "latents", replace(model.latents, leaves_fp16=True))
    wide = [FastEngine(replace(model), dtype=dtype, device="cpu").image_dtype for dtype in ("fp16", "bf16")]
    assert wide == [torch.float32, torch.bfloat16]

    engine = FastEngine(model, dtype="fp32", device="cpu")
    engine.prepare(1)
    kept = engine._wide_image_decoder
    engine.prepare(1)
    assert engine._wide_image_decoder is kept
    model.modules["vae"].post_quant_conv.bias.detach().add_(1)
    engine.prepare(1)
    assert engine._wide_image_decoder is not kept

    pixels = torch.zeros(2, 3, 4, 4)
    pixels[1, 0, 0, 0] = math.inf
    for dtype, is_retried in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        engine = SimpleNamespace(
            image_dtype=dtype,
            _pixels=lambda latents: base.as_images(pixels),
            _wide_image_decoder=lambda latents: torch.ones(2, 3, 4, 4, dtype=latents.dtype),
        )
        images, is_finite = FastEngine._decode_part(engine, torch.zeros(2, 4, 2, 2))
        assert is_finite.tolist() == [True, is_retried] and int(images[0, 0, 0, 0]) == (255 if is_retried else 127)


def test_weights_of_a_decoder_changed_in_place_are_read_again():
    model, decoders = load_model("demo"), {"semantic": load_decoders("demo")["semantic"]}
    engine = build_engine("fast", model, decoders, device="cpu")
    latents, text = inputs(engine, 1)
    _, capture = engine.denoise_and_capture_raw(latents, 5, text)
    before = engine.annotate("semantic", capture)
    for weight in decoders["semantic"].parameters():
        weight.detach().mul_(1.1)
    truth = build_engine("fast", model, decoders, device="cpu").annotate("semantic", capture)
    for name, value in engine.annotate("semantic", capture).items():
        assert torch.equal(value, truth[name])
    assert relative(truth["pred_masks"], before["pred_masks"]) > 0.1


def test_a_changed_timestep_embedding_is_read_before_the_first_call():
    model = load_model("tiny")
    engine = build_engine("fast", model, device="cpu")
    latents, text = inputs(engine, 1)
    words = engine.encode_text(["ball"])
    sums = AttentionSums(torch.zeros(1, 16, 16), torch.zeros(1, 16, words.context.shape[1]))
    before, _ = engine.denoise_and_average(latents, 5, text, words, sums)
    for call in (engine.denoise, lambda *given: engine.denoise_and_average(*given, words, sums)[0]):
        model.modules["unet"].time_embedding.linear_1.weight.mul_(2)
        after = call(latents, 5, text.map(torch.clone))
        truth = build_engine("torch", model, device="cpu").denoise(latents, 5, text)
        assert relative(after, before) > 0.01 and relative(after, truth) <= STAGE


def test_one_call_of_the_text_encoder_and_the_timetable_is_enough(pair):
    engine = build_engine("fast", pair.model, device="cpu")
    engine.prepare(1)
    calls, inner = [], engine.times.forward
    engine.times.forward = lambda timestep: calls.append(float(timestep)) or inner(timestep)
    latents, text = inputs(engine, 1)
    for time in (5, 9, 5, 9.0):
        engine.denoise(latents, time, text)
    assert calls == [5, 9]


def test_bf16_stays_within_its_budget(pair):
    """Against fp32, as the gates of that precision have it; sums stay fp32 in storage."""
    latents, text = inputs(pair.torch, 2)
    noise, _ = pair.torch.denoise_and_capture(latents, 321, text)
    engine = FastEngine(pair.model, pair.torch.decoders, dtype="bf16", device="cpu")
    ours, sums = engine.denoise_and_capture(latents, 321, text)
    assert ours.dtype == torch.float32 and all(value.dtype == torch.float32 for value in sums.sums)
    assert relative(ours, noise) <= 5e-2
    assert engine.fingerprint()["dtype"] == "bf16"


def test_weights_of_half_precision_are_those_that_are_multiplied_as_they_are_stored():
    """Of a U-Net that stores fp32 between its products those of the autoencoder alone."""
    matrix, half, full = torch.zeros(2, 2), torch.bfloat16, torch.float32
    backbone = SimpleNamespace(of_kind=lambda kind: ("text_encoder", "text_encoder_2"))
    asked: dict[str, tuple] = {}
    networks = {
        name: SimpleNamespace(read=lambda *given, name=name: asked.update({name: given}))
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    for unet_dtype in (half, full):
        engine = SimpleNamespace(
            model=SimpleNamespace(networks=networks, backbone=backbone), unet_dtype=unet_dtype, dtype=half
        )
        assert set(on_cpu.CpuEngine._sources(engine)) == set(networks) and asked["text_encoder_2"] == ()
        for name, dtype in (("unet", unet_dtype), ("vae", half)):
            choose, computed_as = asked[name]
            assert computed_as == choose("mid_block.conv.weight", matrix) == dtype
            assert choose("conv.bias", matrix[0]) == full and choose("conv.bias", matrix[0].long()) == torch.int64
            for part in (
                "time_embedding.linear_1",
                "resnets.0.time_emb_proj",
                "add_embedding.linear_1",
                "upsamplers.0.conv",
            ):
                assert choose(f"{part}.weight", matrix) == full
    assert list(on_cpu.CpuEngine._sources(engine, "vae")) == ["vae"]


def test_arithmetic_a_cpu_cannot_do_is_refused(pair):
    with pytest.raises(Refused, match="fp16"):
        build_engine("fast", pair.model, dtype="fp16", device="cpu")
    assert build_engine("auto", pair.model, device="cpu").name == "fast"


# Exact rearrangements, in fp64 ----------------------------------------------------------------------------------------


def test_upsampling_by_places_is_exact():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 3, 3, 3, generator=generator).double(), torch.randn(5, generator=generator).double()
    layer = Upsample(Weights({"weight": weight, "bias": bias}))
    for size in ((1, 1), (2, 3), (7, 4)):
        x = torch.randn(2, 3, *size, generator=generator).double()
        doubled = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        assert relative(layer(x), torch.nn.functional.conv2d(doubled, weight, bias, padding=1)) <= 1e-12


def test_capture_of_attention_is_exact():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, cells, 8, generator=generator).double() for cells in (16, 7, 7))
    weight = torch.randn(5, 3 * 7, 1, 1, generator=generator).double()
    output, projected = attention_capture.plain(q, k, v, weight.reshape(5, 3, 7).permute(1, 2, 0))
    assert relative(output, attention.plain(q, k, v)) <= 1e-12
    assert (
        relative(
            projected.transpose(1, 2).unflatten(2, (4, 4)), pyramid.reference([], [probabilities(q, k)], weight, 4)
        )
        <= 1e-12
    )


def test_a_text_is_sliced_anew_where_fewer_images_are_worked_on_at_once(pair, monkeypatch):
    latents, text = inputs(pair.fast, 3)
    together = pair.fast.denoise(latents, 500.0, text)
    monkeypatch.setattr(on_cpu, "slice_of", lambda batch: 1)
    assert relative(pair.fast.denoise(latents, 500.0, text), together) <= STAGE


def test_of_a_call_of_two_halves_a_level_of_one_reads_that_of_the_prompt():
    weight = torch.tensor([[[1.0], [10.0]]])  # of one half, two channels and one output
    hook = ProjectedSums(SimpleNamespace(widths=[1], sides=[1], features=[[weight]]), torch.zeros(2, 4, 8, 8), plain)
    hook.feature((0, 0), torch.tensor([[5.0, 6], [7, 8], [1, 2], [3, 4]])[..., None, None])
    assert hook.result()[0].flatten().tolist() == [21, 43]


def test_summing_is_exact(pair):
    """Features and maps added one by one give the concatenated level under its 1x1 convolution."""
    generator = torch.Generator().manual_seed(0)
    projection = Projection(pair.model.levels, pair.torch.decoders).double()
    hook = ProjectedSums(projection, torch.zeros(2, 4, 16, 16), plain)
    hook.sums = [total.double() for total in hook.sums]
    kept = [([], []) for _ in pair.model.levels]
    for place, level in enumerate(pair.model.levels):
        for number, channels in enumerate(level.features):
            x = torch.randn(4, channels, level.side, level.side, generator=generator).double()
            hook.feature((place, number), x)
            kept[place][0].append(torch.cat(x.chunk(2), 1))
        for number, heads in enumerate(level.heads):
            q, k = (
                torch.randn(4, heads, cells, 4, generator=generator).double() for cells in (level.side**2, level.tokens)
            )
            assert relative(hook.attend(AttentionSlot(place, number), q, k, k), attention.plain(q, k, k)) <= 1e-12
            kept[place][1].append(probabilities(q[2:], k[2:]))
    sums = ProjectedCapture(hook.result(), projection.tasks)
    for task, decoder in pair.torch.decoders.items():
        for place, level in enumerate(pair.model.levels):
            if (weight := decoder.projections().get(level.name)) is not None:
                assert (
                    relative(sums.of(task).sums[place], pyramid.reference(*kept[place], weight.double(), level.side))
                    <= 1e-12
                )


@torch.inference_mode()
def test_networks_for_a_gpu_are_exact(pair):
    """Biases as shifts, residuals inside products and skips without concatenation change nothing but rounding; sums
    of biases are taken once, in fp32."""
    model, latents = pair.model, torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    row, hooks, found = TimeTable(model.modules["unet"])(torch.tensor(500.0)).double(), [], []
    text = TextTable(model.modules["unet"]).double()(inputs(pair.fast, 2)[1].context.double())
    for kind in (UNet, fused.FusedUNet):
        hooks.append(RawCapture(model.levels, plain))
        found.append(kind(model.modules["unet"], plain).double()(latents, row, text, hooks[-1]))
    assert relative(found[1], found[0]) <= 1e-6
    for ours, plainly in zip(hooks[1].features.values(), hooks[0].features.values(), strict=True):
        assert relative(ours, plainly) <= 1e-6
    images = [
        kind(model.modules["vae"], plain, model.latents).double()(latents)
        for kind in (ImageDecoder, fused.FusedImageDecoder)
    ]
    assert relative(images[1], images[0]) <= 1e-6


def test_a_user_is_told_once_that_kernels_are_being_compiled(monkeypatch, capsys):
    engine = object.__new__(on_gpu.GpuEngine)
    engine.device = torch.device("cpu")
    monkeypatch.setattr(on_gpu, "SECONDS_BEFORE_MESSAGE", 0.0)
    monkeypatch.setattr(on_gpu.GpuEngine, "_has_reported", False)

    def compiled(device, dtype):  # until the message is there, where one is due
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join(60)

    monkeypatch.setattr(base, "operations", compiled)
    for _ in range(2):
        engine._operations(torch.float16)
    assert capsys.readouterr().err == f"{on_gpu.COMPILING}\n"


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_graphs_say_what_eager_calls_say(pair, dtype):
    engine = FastEngine(pair.model, pair.torch.decoders, dtype=dtype, device="cuda")
    for batch in (1, 3, 1):
        latents, text = inputs(engine, batch)
        latents = latents.cuda()
        for time in (981, 321, 1):
            noise, sums = engine.denoise_and_capture(latents, time, text)
            plain = engine.denoise(latents, time, text)
            with torch.inference_mode():
                expected, *levels = engine._capture_projected(*engine._inputs(latents, time, text))
            budget = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}[dtype]
            assert relative(noise, expected) <= budget and relative(plain, expected) <= budget
            assert all(relative(value, truth) <= budget for value, truth in zip(sums.sums, levels))
    assert len(engine._calls.graphs) == 4


@pytest.mark.gpu
def test_no_call_of_the_loop_waits_for_the_device(pair):
    engine = FastEngine(pair.model, pair.torch.decoders, device="cuda")
    latents, text = inputs(engine, 2)
    schedule = make_schedule(engine.model.scheduler, "pndm", 4)
    for is_counted in (False, True):  # the first round records the graphs and fills the timetable
        state = ReferenceSampler(schedule, 5.0, latents.cuda())
        torch.cuda.set_sync_debug_mode("error" if is_counted else "default")
        try:
            for k, time in enumerate(schedule.timesteps):
                call = engine.denoise_and_capture if k == len(schedule) - 1 else engine.denoise
                output = call(state.latents, time, text)
                state.step(k, output[0] if isinstance(output, tuple) else output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(state.latents.isfinite().all())


@pytest.mark.gpu
def test_a_moved_buffer_is_noticed(pair):
    engine = FastEngine(pair.model, device="cuda")
    latents, text = inputs(engine, 1)
    engine.denoise(latents.cuda(), 5, text)
    (graph,) = engine._calls.graphs.values()
    graph.inputs[0] = graph.inputs[0].clone()
    with pytest.raises(AssertionError, match="moved"):
        engine.denoise(latents.cuda(), 5, text)


def test_a_picture_is_drawn_from_its_posterior_by_its_own_generator():
    """Of a mean of 3 and a standard deviation of 4."""
    moments = torch.tensor([3.0, 2 * math.log(4)]).view(1, 2, 1, 1)
    noise = [float(torch.randn(1, generator=torch.Generator().manual_seed(seed))) for seed in (5, 6, 7)]
    wanted = pytest.approx([3 + 4 * value for value in noise])

    def sources():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    pictures = torch.zeros(3, 256, 256, 3, dtype=torch.uint8)  # of which a call takes one
    drawn = base.encode_in_chunks(
        lambda part, own: base.sample_moments(moments.expand(len(part), -1, -1, -1), own), pictures, sources()
    )
    assert drawn.flatten().tolist() == wanted
    posterior = torch.full((3, 1, 1, 1), 3.0), torch.tensor(4.0)
    assert sample_posterior(*posterior, sources()).flatten().tolist() == wanted
    assert base.sample_moments(moments, None).tolist() == [[[[3.0]]]] == sample_posterior(*posterior, None)[:1].tolist()


def test_spreads_of_a_posterior_are_bounded_as_in_diffusers():
    moments = torch.tensor([0.0, 0.0, 0.0, 12.0, 19.0, 25.0]).view(1, 6, 1, 1)
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(5))
    ours = base.sample_moments(moments, [torch.Generator().manual_seed(5)])
    torch.testing.assert_close(ours, theirs)


def test_sums_of_attention_are_averaged_over_calls():
    found = AttentionSums(torch.full((1, 2, 2), 6.0), torch.full((1, 2, 3), 9.0)).over(3)
    assert (found.cells == 2).all() and (found.tokens == 3).all()


# Parts of the networks against those of the libraries -----------------------------------------------------------------


def varied(module, seed=3):
    """With norms and biases that differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator) / 8)
    return module.eval().requires_grad_(False)


def small_unet(**settings):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (9, 12), "layers_per_block": 1, "cross_attention_dim": 10, "norm_num_groups": 3}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "attention_head_dim": (1, 2)}
    return varied(UNet2DConditionModel(**sizes, norm_eps=3e-4, **{**blocks, **settings}))


@pytest.mark.parametrize("is_plain", [True, False])
@torch.inference_mode()
def test_what_a_timestep_adds_is_what_diffusers_modules_add(is_plain):
    """Waves of an odd width in both orders, with pooled text, the size of the image and an embedded guidance."""
    waves = {"freq_shift": 1, "flip_sin_to_cos": False} if is_plain else {"freq_shift": 0.5, "flip_sin_to_cos": True}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 6, "time_cond_proj_dim": 7}
    module = small_unet(**waves, **({} if is_plain else {**added, "projection_class_embeddings_input_dim": 41}))
    pooled, width = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), 8
    times = TimeTable(module, 64)(torch.tensor(321.0), *(() if is_plain else (pooled, 4.5)))
    embedding = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, torch.tensor([3.5]), 7)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    embedded = module.get_time_embed(torch.zeros(2, 4, width, width), 321.0)
    embedded = module.time_embedding(embedded, None if is_plain else embedding)
    if not is_plain:
        embedded = embedded + module.get_aug_embed(embedded, None, {"text_embeds": pooled, "time_ids": sizes})
    blocks = [*module.down_blocks, module.mid_block, *module.up_blocks]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    rows = [resnet.time_emb_proj(torch.nn.functional.silu(embedded)) + resnet.conv1.bias for resnet in resnets]
    torch.testing.assert_close(times.expand(2, -1), torch.cat(rows, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [UNet, fused.FusedUNet])
def test_norms_add_the_numbers_of_diffusers_to_a_variance(kind):
    module = small_unet(addition_embed_type=None)

    def numbers(network, *kinds):
        return Counter(float(layer.eps) for layer in network.modules() if isinstance(layer, kinds))

    ours = kind(module, plain)
    assert numbers(ours, GroupNorm) == numbers(module, torch.nn.GroupNorm) and 1e-6 in numbers(ours, GroupNorm)
    assert numbers(ours, LayerNorm) == numbers(module, torch.nn.LayerNorm)


@pytest.mark.parametrize("settings", [{}, {"mid_block_add_attention": False, "use_quant_conv": False}])
@torch.inference_mode()
def test_an_autoencoder_is_that_of_diffusers(settings):
    torch.manual_seed(0)
    settings = settings | ({"use_post_quant_conv": False} if settings else {})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (6, 9), "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 3}
    module = varied(AutoencoderKL(**sizes, **blocks, **settings))
    images, latents = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 6, 4)
    torch.testing.assert_close(ImageEncoder(module, plain)(images), module.encode(images).latent_dist.parameters)
    decoder = ImageDecoder(module, plain)
    torch.testing.assert_close(decoder(latents), module.decode(latents).sample)
    for space, unscaled in (
        (Latents(3, 8, scale=0.5, shift=0.0), latents / 0.5),
        (Latents(3, 8, mean=(1.0, 2, 3), std=(4.0, 5, 6)), None),
    ):
        decoder.latents = space
        if unscaled is None:
            unscaled = latents * torch.tensor(space.std).view(3, 1, 1) + torch.tensor(space.mean).view(3, 1, 1)
        torch.testing.assert_close(decoder(latents), module.decode(unscaled).sample, rtol=1e-4, atol=1e-4)
    usual = {"norm_num_groups": 3, "act_fn": "silu", **{key: list(value) for key, value in blocks.items()}}
    assert has_usual_form(SimpleNamespace(**usual)) and has_usual_form(SimpleNamespace(norm_num_groups=3))
    for other in ({"act_fn": "relu"}, {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}):
        assert not has_usual_form(SimpleNamespace(**usual | other))
    assert not has_usual_form(SimpleNamespace(act_fn="silu"))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_a_text_encoder_is_that_of_transformers_for_short_texts_too(activation):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=9,
        hidden_act=activation,
        layer_norm_eps=3e-4,
        eos_token_id=19,
    )
    module, ids = varied(CLIPTextModel(config)), torch.randint(0, 19, (2, 6))
    output = module(ids, output_hidden_states=True)
    before, last = TextEncoder(module, plain).states(ids)
    torch.testing.assert_close(before, output.hidden_states[-2])
    torch.testing.assert_close(last, output.last_hidden_state)


def test_a_sigmoid_has_its_gradient_where_an_exponential_has_none():
    x = torch.tensor([-200.0, 0.0, 3.0], requires_grad=True)
    sigmoid(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([0.0, 0.25, 0.0451767], abs=1e-6)
    torch.testing.assert_close(sigmoid(x.detach()), torch.sigmoid(x))


def test_a_raw_capture_is_fp32_and_the_mean_over_the_blocks_of_a_transformer():
    hook = RawCapture([Level("low", 1, (2,), (1,), 3, halves=1), Level("mid", 1, (1,), (), 3)], plain, rows=2)
    hook.feature((0, 0), torch.tensor([[5.0, 6], [7, 8]])[..., None, None].bfloat16())
    hook.feature((1, 0), torch.tensor([[5.0], [7]])[..., None, None].bfloat16())
    for block, value in enumerate((1.0, 3.0)):
        hook.add_map(AttentionSlot(0, 0, block, 2), torch.full((1, 1, 1, 3), value).bfloat16())
    found = hook.result()
    assert [[part.flatten().tolist() for part in level] for level in found.features] == [[[7, 8]], [[5, 7]]]
    assert found.maps[0][0].flatten().tolist() == [2, 2, 2] and found.maps[1] == ()
    assert {part.dtype for part in (*found.features[0], *found.maps[0])} == {torch.float32}


def test_heads_turn_by_angles_of_double_precision():
    places = torch.tensor([[[0.0, 3.0], [1001.0, 511.0]]])
    found = turns_of(places, (4, 8), 300.0)
    assert found.dtype == torch.float32 and found.shape == (1, 2, 6, 2)
    for row, (first, second) in enumerate(((0, 3), (1001, 511))):
        angles = [first / 300 ** (k / 4) for k in (0, 2)] + [second / 300 ** (k / 8) for k in (0, 2, 4, 6)]
        wanted = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
        torch.testing.assert_close(found[0, row], wanted, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", [UNet, fused.FusedUNet])
@torch.inference_mode()
def test_a_network_of_different_widths_is_that_of_diffusers(kind):
    """Of two blocks in each transformer, those of the highest level among them; from its deep features, too."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "transformer_layers_per_block": 2}
    module = small_unet(**blocks, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    latents, text, step = torch.randn(2, 4, 8, 6), torch.randn(4, 5, 10), torch.tensor(321.0)
    expected = module(latents.repeat(2, 1, 1, 1), step, text).sample
    network = kind(module, plain)
    given = latents, TimeTable(module)(step), TextTable(module)(text)
    found = network(*given, kept := KeptFeature(network.deep, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    from_deep = network.forward_from(*given, kept.value, CaptureHook(plain))
    torch.testing.assert_close(from_deep, expected, rtol=1e-4, atol=1e-4)
    for block in network.modules():
        if isinstance(block, AttentionBlock):
            block.rows = 50  # of up to 192
    torch.testing.assert_close(network(*given, CaptureHook(plain)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_level_sums_its_features_and_the_mean_map_of_the_blocks_of_a_transformer(dtype):
    level = Level("low", 2, (3, 5), (2,), 4)
    weight, latents = torch.randn(6, level.channels, 1, 1), torch.zeros(1, 4, 16, 16)
    decoder = SimpleNamespace(projections=lambda: {"low": weight})
    summed = ProjectedSums(Projection([level], {"it": decoder}), latents, plain)
    hooks = summed, RawCapture([level], plain)
    for place, channels in enumerate(level.features):
        x = torch.randn(2, channels, 2, 2).to(dtype)
        for hook in hooks:
            hook.feature((0, place), x)
    for block in range(2):
        q, k = (torch.randn(2, 2, 4, 3).to(dtype) for _ in range(2))
        slot = AttentionSlot(0, 0, block, 2)
        if dtype == torch.float32 and block:  # whose answer is known
            summed.on_queries(slot, q, k)
        else:
            summed.attend(slot, q, k, k)
        hooks[1].on_queries(slot, q, k)
    raw = hooks[1].result()
    truth = pyramid.reference(raw.features[0], raw.maps[0], weight, 2)
    assert relative(summed.result()[0], truth) <= (2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_sums_of_self_attention_leave_the_answers_of_both_halves_in_their_order():
    q, k, v = torch.randn(3, 4, 2, 4, 3)
    sums = AttentionSums(torch.ones(2, 4, 4), torch.zeros(2, 4, 3))
    hook = SummedAttention([2, 2], sums, {}, plain)  # one of two layers
    torch.testing.assert_close(hook.attend_self(AttentionSlot(0, 0), q, k, v), attention.plain(q, k, v))
    torch.testing.assert_close(hook.cells, 1 + probabilities(q[2:], k[2:]).mean(1) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 6])
def test_decoders_read_as_many_tokens_of_a_text_as_they_know(tokens, dtype):
    """Of two blocks of one level, whose shares are exp(q k / sqrt(d) - the logarithm of the sum)."""
    levels = Level("low", 2, (3, 3), (2, 2), 4, 1, (5, 7)), Level("highest", 2, (3,), (), 4, 1)
    weight = torch.randn(6, levels[0].channels, 1, 1)
    projection = Projection(levels, {"it": SimpleNamespace(projections=lambda: {"low": weight})})
    raw, summed = RawReader(levels, 1, 4), ProjectingReader(projection, 1, 4, plain)
    features, maps, added = [], [], []
    for block in levels[0].blocks:
        seen, appended = torch.randn(2, 4 + tokens, 3).to(dtype), torch.randn(1, 4 + tokens, 6)
        q, k = (torch.randn(2, 2, 4 + tokens, 4).to(dtype) for _ in range(2))
        sums = torch.randn(2, 2, 4 + tokens)
        for reader in (raw, summed):
            reader.begin = 4
            reader.read(block, seen, appended, q, k, sums, None)
        shares = (q[-1:, :, :4].float() @ k[-1:, :, 4:].float().mT / 2 - sums[-1:, :, :4, None]).exp()
        features.append(seen[-1:, :4].float().mT.unflatten(2, (2, 2)))
        maps.append(torch.nn.functional.pad(shares, (0, max(0, 4 - tokens)))[..., :4])
        added.append(appended[:, :4])
    found = raw.capture(torch.zeros(1, 3, 2, 2))
    for ours, truth in ((found.features[0], features), (found.maps[0], maps)):
        for part, wanted in zip(ours, truth, strict=True):
            torch.testing.assert_close(part, wanted)  # in fp32
    parts = weight[:, 6:, 0, 0].split(8, 1)
    truth = sum(
        torch.einsum("bhst,fht->bsf", share, part.unflatten(1, (2, 4))) + more
        for share, part, more in zip(maps, parts, added)
    )
    (level,) = summed.level_sums(torch.zeros(1, 3, 2, 2)).values()
    torch.testing.assert_close(level, truth.mT.unflatten(2, (2, 2)), rtol=1e-4, atol=1e-4)


def test_doubled_taps_are_held_in_the_type_that_is_known_from_the_start():
    class State(dict):
        computed_as = torch.bfloat16

    state = State(weight=torch.randn(2, 3, 3, 3), bias=torch.zeros(2))
    layer = Upsample(Weights(state))
    assert layer.weight.dtype == torch.bfloat16 and layer.plain_taps().dtype == torch.bfloat16
