"""The fast engine of models whose image and text attend to one another, against the reference."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from skips import long_test
from tiny_pipelines import SIZE

from datasetdm_fast import generate, verify
from datasetdm_fast.data import AttentionSums, ProjectedCapture, Request, Text
from datasetdm_fast.engine.backbones import every_backbone
from datasetdm_fast.engine.decoders.checkpoint import seeded_decoders
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast import CHUNK_PIXELS
from datasetdm_fast.engine.engines.fast.engine import as_images
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.models.capture import CallReader
from datasetdm_fast.engine.models.mmdit import MMDiT
from datasetdm_fast.engine.models.vae import has_usual_form
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels import fused, launch
from datasetdm_fast.kernels import plain as plain_forms
from datasetdm_fast.kernels.attention_sums import as_bias, plain, sum_exponentials
from datasetdm_fast.plugins import load_place
from datasetdm_fast.runs.agreement import verify as agreement
from datasetdm_fast.runs.agreement.observe import Rounded

# none of them the sizes of other tests; the guidance of a call
FAMILIES = {
    "sd3": ({"layers": 4, "width": 48}, 4.0),
    "flux1": ({"layers": 3, "singles": 1, "width": 64}, 3.0),
    "flux2-klein": ({"layers": 2, "singles": 2, "width": 64}, 0.0),
    "z-image": ({"layers": 5}, 2.0),
    "qwen-image": ({"layers": 3}, 3.0),
}
needs_triton = pytest.mark.skipif(
    launch.triton is None, reason="triton is not installed; pip install 'datasetdm-fast[triton]'"
)
PROMPTS = ["a photo of the cat", "a", "the house, a photo of the house"]


@pytest.fixture(params=FAMILIES, scope="module")
def opened(request, tmp_path_factory):
    """A model, its decoders, the reference, and latents of three images with their text."""
    sizes, guidance = FAMILIES[request.param]
    folder = tiny_pipelines.save(tmp_path_factory.mktemp(request.param) / "model", request.param, **sizes)
    model = load_model(str(folder), size=SIZE)
    decoders = {task: decoder.eval() for task, decoder in seeded_decoders(model.levels, model.text_width).items()}
    reference = build_engine("torch", model, decoders, device="cpu")
    latents = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model, decoders, reference, latents, call_text(reference, PROMPTS, guidance), guidance


def distance(ours, truth):
    return float((ours.double() - truth.double()).abs().max() / truth.double().abs().max())


def flat(capture):
    return [value for kind in (capture.features, capture.maps) for level in kind for value in level]


def test_in_fp32_it_is_the_reference(opened):
    model, decoders, reference, latents, text, guidance = opened
    engine = build_engine("fast", model, decoders, device="cpu")
    assert engine.name == "fast" and engine.precision == "fp32" and engine.weight_distance() == 0
    assert not model.denoiser.is_built  # its weights are held once
    ours = call_text(engine, PROMPTS, guidance)
    assert torch.equal(ours.context, text.context)
    output, capture = reference.denoise_and_capture(latents, 412.0, text)
    found, projected = engine.denoise_and_capture(latents, 412.0, ours)
    plain, raw = engine.denoise_and_capture_raw(latents, 412.0, ours)
    assert isinstance(projected, ProjectedCapture)
    for value in (found, plain, engine.denoise(latents, 412.0, ours)):
        assert distance(value, output) < 5e-6
    for value, truth in zip(flat(raw), flat(capture), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)
    words = reference.encode_classes(["cat", "house"])
    for task, decoder in decoders.items():
        given = words if decoder.config.is_open else None
        ours, truth = engine.annotate(task, projected, given), reference.annotate(task, capture, given)
        assert all(distance(ours[name], truth[name]) < 1e-4 for name in truth), task
    images = reference.decode_image(latents)
    assert (engine.decode_image(latents).int() - images.int()).abs().max() <= 1
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)] for _ in range(2)]
    for drawn in ((None, None), generators):
        mine, theirs = (each.encode_image(images, part) for each, part in zip((engine, reference), drawn))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    has_own_layers = model.backbone.name != "qwen-image"
    assert (engine.image_decoder is not None) == (engine.image_encoder is not None) == has_own_layers
    assert engine.weight_distance() == 0
    for half in (engine.image_decoder, engine.image_encoder):
        if half is not None:
            bias = next(value for name, value in half.named_parameters() if name.endswith("bias"))
            kept = bias.clone()
            for value in (kept + 1, kept):
                with torch.inference_mode():
                    bias.copy_(value)
                assert (engine.weight_distance() > 0) == (value is not kept)


def test_photos_are_encoded_a_few_at_a_time(opened, monkeypatch):
    engine, read = build_engine("fast", opened[0], device="cpu"), []
    images = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)

    def encode():
        drawn = engine.encode_image(images, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
        return torch.stack([engine.encode_image(images), drawn])

    whole, encode_part = encode(), engine._encode_part
    monkeypatch.setitem(CHUNK_PIXELS, "cpu", 2 * SIZE**2)
    monkeypatch.setattr(engine, "_encode_part", lambda part, some: read.append(len(part)) or encode_part(part, some))
    torch.testing.assert_close(encode(), whole, rtol=1e-4, atol=1e-4)
    assert read == [2, 1, 2, 1]


@pytest.mark.parametrize("preset", ["random-sd35", "random-flux", "random-klein", "random-zimage"])
def test_autoencoders_of_full_size_have_our_layers(preset):
    assert has_usual_form(load_model(preset).configs["vae"])


def test_a_batch_changes_roundings_alone(opened):
    model, decoders, _, latents, _, guidance = opened
    engine = build_engine("fast", model, decoders, device="cpu")
    output, capture = engine.denoise_and_capture(latents, 300.0, call_text(engine, PROMPTS, guidance))
    halves = len(output) // len(latents)
    for place, prompt in enumerate(PROMPTS):
        one, alone = engine.denoise_and_capture(
            latents[place : place + 1], 300.0, call_text(engine, [prompt], guidance)
        )
        assert distance(one, output.unflatten(0, (halves, -1))[:, place]) < 1e-5
        for level, total in zip(alone.sums, capture.sums, strict=True):
            torch.testing.assert_close(level[0], total[place], rtol=1e-4, atol=1e-4)


def test_in_bf16_it_is_near(opened):
    model, decoders, reference, latents, text, guidance = opened
    engine = build_engine("fast", model, decoders, device="cpu", dtype="bf16")
    assert engine.weight_distance() == 0
    for name in set(model.networks) - {"transformer"}:  # copies, and the reference has its own as they were
        types = [next(of.networks[name].module.parameters()).dtype for of in (engine.held, model)]
        assert types == [torch.bfloat16, torch.float32], name
    ours = call_text(engine, PROMPTS, guidance)
    assert ours.context.dtype == torch.float32
    found, projected = engine.denoise_and_capture(latents, 500.0, ours)
    assert found.dtype == torch.float32 and distance(found, reference.denoise(latents, 500.0, text)) < 0.1
    assert all(total.dtype == torch.float32 and total.isfinite().all() for total in projected.sums)
    images = engine.decode_image(latents).int() - reference.decode_image(latents).int()
    assert images.abs().float().mean() < 3
    with torch.no_grad():
        next(engine.held.modules["transformer"].parameters()).view(-1)[0] += 1
    assert engine.weight_distance() > 0
    with pytest.raises(Refused, match="fp16"):
        build_engine("fast", model, decoders, device="cpu", dtype="fp16")


def test_prompts_are_read_by_the_copies_that_lie_with_the_engine(opened):
    """On a GPU the model's own encoders lie on the CPU, in fp32."""
    model, _, reference, *_ = opened
    text = build_engine("fast", model, dtype="bf16", device="cpu").encode_text(PROMPTS[:1])
    whole = reference.encode_text(PROMPTS[:1])
    assert text.context.dtype == torch.float32 and torch.equal(text.context, text.context.bfloat16().float())
    assert not torch.equal(text.context, whole.context) and distance(text.context, whole.context) < 0.03


def test_what_is_made_of_an_output_in_bf16_is_made_in_fp32(opened):
    model, _, _, latents, text, guidance = opened
    engine = build_engine("fast", model, device="cpu", dtype="bf16")
    with torch.inference_mode():
        raw = engine.network(latents.bfloat16(), torch.tensor(500.0), text.cast(torch.bfloat16)).float()
        is_guided = len(text) > len(latents) and text.guidance is not None
        assert torch.equal(
            engine.denoise(latents, 500.0, text), engine.joint.guide(raw, guidance) if is_guided else raw
        )
        output, capture = engine.denoise_and_capture_raw(latents, 500.0, text)
        clean = engine.joint.cells(latents - 0.5 * output[-len(latents) :])
    assert is_guided or torch.equal(capture.features[-1][0], clean)


def test_rotary_frequencies_stay_in_fp32(opened):
    """In bf16 they would turn the last of 512 tokens by a radian too much, as transformers' own loading does not."""
    model, _, reference, *_ = opened
    copies = [build_engine("fast", model, dtype="bf16", device="cpu").held, Rounded(reference, torch.bfloat16).model]
    for name in model.backbone.of_kind("text_encoder"):
        buffers = dict(model.networks[name].module.named_buffers())
        assert any("inv_freq" in each for each in buffers) == (model.backbone.name not in ("sd3", "flux1"))
        for copied in copies:
            module = copied.networks[name].module
            assert next(module.parameters()).dtype == torch.bfloat16
            for each, value in module.named_buffers():
                assert torch.equal(value, buffers[each]) and value.dtype == buffers[each].dtype, each


@pytest.mark.parametrize("opened", ["qwen-image"], indirect=True)
def test_images_of_an_autoencoder_in_bf16_are_rounded_once(opened):
    model, _, _, latents, *_ = opened
    engine = build_engine("fast", model, dtype="bf16", device="cpu")
    assert engine.image_decoder is None  # of another form, so the copy of the model's own decodes
    decoded = engine.reference.decode(latents)
    assert decoded.dtype == torch.bfloat16 and torch.equal(engine.decode_image(latents), as_images(decoded)[0])


def test_averages_of_attention_are_the_references(opened):
    model, decoders, reference, latents, text, _ = opened
    if not model.backbone.has_text_maps:
        return
    engine = build_engine("fast", model, decoders, device="cpu")
    zero = AttentionSums(torch.zeros(3, model.levels[0].side ** 2, 0), torch.zeros(3, model.levels[0].side ** 2, 512))
    (_, ours), (_, truth) = (each.denoise_and_average(latents, 500.0, text, text, zero) for each in (engine, reference))
    torch.testing.assert_close(ours.tokens, truth.tokens, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("opened", ["sd3", "flux1", "qwen-image"], indirect=True)
@pytest.mark.parametrize("name", ["denoise_and_average", "_read_concepts"])
def test_verify_notices_wrong_attention_to_a_text(opened, name, monkeypatch):
    model, *_, guidance = opened
    engine, requests = build_engine("fast", model, device="cpu"), [Request(0, PROMPTS[0], 3)]
    bare = TorchEngine(model, device="cpu")
    recipe = make_recipe(bare, (), steps=2, guidance=guidance)

    def failed():
        return agreement.verify(engine, bare, requests, recipe, 1, is_whole=True).failed

    assert not failed()
    right = getattr(engine, name)

    def wrong(*given):
        output, sums = right(*given)
        return output, AttentionSums(sums.cells, sums.tokens * 1.01)

    monkeypatch.setattr(engine, name, wrong)
    assert failed() == ["averages of attention"]


def test_verify_and_generate_take_it(tmp_path, capsys):
    folder = str(tiny_pipelines.save(tmp_path / "model", "sd3", layers=3))
    line = ["--model", folder, "--size", str(SIZE), "--decoder", "random", "--task", "semantic,depth", "--steps", "2"]
    line += ["--guidance", "4", "--prompts", "a photo of the cat", "--number", "2", "--quiet"]
    compared = [word for word in line if word not in ("--guidance", "4")]
    for dtype in ("fp32", "bf16"):
        assert verify.main([*compared, "--engine", "fast", "--dtype", dtype, "--json"]) == 0, capsys.readouterr()
    runs = [tmp_path / "fast", tmp_path / "torch"]
    for run in runs:
        assert generate.main([*line, "--engine", run.name, "--force-domain", "--out", str(run)]) == 0
    assert json.loads((runs[0] / "run.json").read_text())["engine"]["engine"] == "fast"
    for path in sorted(runs[0].glob("images/*.png")):
        ours, truth = (np.asarray(Image.open(run / "images" / path.name)).astype(int) for run in runs)
        assert abs(ours - truth).max() <= 1
    assert generate.main([*line, "--out", str(tmp_path / "auto")]) == 0
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["engine"]["engine"] == "fast"


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 12, 64])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_an_attention_on_a_gpu(width, is_masked, dtype):
    query, key, value = torch.randn(3, 2, 4, 40, width, device="cuda", dtype=dtype)
    mask = torch.arange(40, device="cuda") < 33 if is_masked else torch.ones(40, device="cuda", dtype=torch.bool)
    mask = mask.expand(2, 1, 1, 40)
    output, sums = plain(query, key, value, mask if is_masked else None)
    scores = (query.double() @ key.double().mT / width**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(sums.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_masked", [False, True])
def test_sums_of_an_attention(is_masked):
    query, key, value = torch.randn(3, 2, 4, 40, 16, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(40) < torch.tensor([[33], [25]] if is_masked else [[40], [40]]))[:, None, None]
    scores = (query.double() @ key.double().mT / 4).masked_fill(~mask, -torch.inf)
    given = mask if is_masked else None
    output, sums = plain(query, key, value, given)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), rtol=1e-5, atol=1e-5)
    gapped = [torch.stack([part, torch.full_like(part, torch.nan)], -1)[..., 0] for part in (query, key, value)]
    torch.testing.assert_close(plain(*gapped, given), (output, sums))
    # the calls of a GPU, without one: shapes alone
    on_gpu = plain(*(part if part is None else part.to("meta") for part in (query, key, value, given)))
    assert [part.shape for part in on_gpu] == [output.shape, sums.shape]
    for found in (sums, sum_exponentials(query, key, as_bias(given, query.dtype))):
        torch.testing.assert_close(found.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@needs_triton
@torch.inference_mode()
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=long_test) if name == "z-image" else name for name in FAMILIES]
)
def test_kernels_of_the_network_are_its_plain_forms(family):
    module = tiny_pipelines.build(family).transformer
    backbone = next(record for record in every_backbone() if record.name == family)
    networks = [
        MMDiT(module.config, load_place(backbone.network_plan)(module.config, module.state_dict()), ops).eval()
        for ops in (plain_forms, SimpleNamespace(**vars(plain_forms) | vars(fused)))
    ]
    channels, pooled = module.config.in_channels, getattr(module.config, "pooled_projection_dim", 1)
    side, width = 8, networks[0].text.weight.shape[1]
    draw = torch.Generator().manual_seed(5)
    if family in ("flux1", "qwen-image"):
        channels //= 4
    latents = torch.randn(1, channels, side // 2, side // 2, generator=draw)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7]) if family in ("z-image", "qwen-image") else None
    context, vector = torch.randn(2, 7, width, generator=draw), torch.randn(2, pooled, generator=draw)
    text, outputs = Text(context, vector, mask, 3.0), []
    for network in networks:
        maps, shares = [], network.ops.attention_shares
        cells = latents.shape[-1] ** 2 // networks[0].plan.patch ** 2
        reader = CallReader([1], 1, cells, lambda *read, maps=maps, shares=shares: maps.append(shares(*read[3], None)))
        outputs.append((network(latents, torch.tensor(300.0), text, reader), maps[0]))
    for value, truth in zip(*outputs):
        assert distance(value, truth) < 1e-5
