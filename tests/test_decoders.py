"""P-Decoders: against answers recorded from DatasetDM's own classes, batch against single images, files, refusals,
training.
"""

import importlib
import json
import math
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from upstream_rules import load_upstream

from bench.decoders import load_decoders
from datasetdm_fast import _C, kernels
from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.engine.backbones.sd import levels
from datasetdm_fast.engine.decoders.checkpoint import (
    build_decoder,
    check_fits,
    load_decoder,
    read_decoder,
    round_parameters,
    save_decoder,
    seeded_decoders,
)
from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig, upstream
from datasetdm_fast.engine.decoders.trunk import (
    Decoder,
    SegBlock,
    SpectralConv2d,
    Upscale,
    copy_for_cpu,
    copy_for_gpu,
    fold,
)
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import fused, mask_head, plain

GOLDEN = json.loads((Path(__file__).parent / "golden" / "decoders.json").read_text())
RECORDED = {
    "segmentation": "segmentation",
    "open-vocabulary": "open_vocabulary",
    "depth": "depth",
    "heatmap": "pose_heatmap",
    "simcc": "pose_simcc",
}
OUTPUTS = {"depth": ("depth",), "heatmap": ("heatmaps",), "simcc": ("x", "y")}  # what upstream returns without names
DEMO_LEVELS = levels(
    {"block_out_channels": (24, 48, 48, 48), "layers_per_block": 1, "attention_head_dim": 3}, tokens=7, size=128
)
KINDS = tuple(RECORDED)


def small(kind: str, **changes) -> DecoderConfig:
    sizes = dict(
        levels=DEMO_LEVELS,
        width=16,
        heads=2,
        layers=4,
        feed_forward=32,
        mask_dim=12,
        queries=5,
        depth_width=8,
        text_width=10,
    )
    names = dict(classes=("wall", "ball", "cone"), joints=("head", "hand"), limbs=((0, 1),), capture_timestep=100)
    return upstream(kind, **{**sizes, **names, **changes})


def capture_of(level_table, batch: int, seed: int = 0, dtype=torch.float32) -> Capture:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    features = tuple(
        tuple((draw(batch, 2 * c, level.side, level.side) * 0.5).to(dtype) for c in level.features)
        for level in level_table
    )
    maps = tuple(
        tuple(torch.softmax(draw(batch, heads, level.side**2, level.tokens) * 2, -1).to(dtype) for heads in level.heads)
        for level in level_table
    )
    return Capture(features, maps)


def text_for(config: DecoderConfig, batch: int, words: int = 0):
    if not config.has_text:
        return None
    generator = torch.Generator().manual_seed(5)
    return torch.randn((batch, words, config.text_width) if words else (batch, config.text_width), generator=generator)


def image_of(capture: Capture, index: int) -> Capture:
    return Capture(
        *(
            tuple(tuple(x[index : index + 1] for x in level) for level in part)
            for part in (capture.features, capture.maps)
        )
    )


def distance(ours, theirs) -> float:
    ours, theirs = (
        torch.as_tensor(ours, dtype=torch.float64).flatten(),
        torch.as_tensor(theirs, dtype=torch.float64).flatten(),
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


def randomise(decoder, seed: int = 3):
    """Weights large enough that masks block some cells and sigmas differ from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1))
    return decoder


# ---- upstream's own answers


def seeded_state(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """The weights of the recording: keys in sorted order from one generator, norms around one, u0 of unit length,
    statistics as built.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key in sorted(shapes):
        if "stored_" in key:
            state[key] = torch.ones(shapes[key]) if "var" in key else torch.zeros(shapes[key])
            continue
        drawn = torch.randn(shapes[key], generator=generator)
        if key.endswith("u0"):
            state[key] = F.normalize(drawn, dim=-1)
        else:
            state[key] = 0.02 * drawn + (1 if "norm" in key and key.endswith("weight") else 0)
    return state


def unread_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """What upstream's checkpoints of this kind hold besides what is used."""
    if config.kind == "segmentation":
        return {f"query_{name}_mlp.weight": torch.Size((256, 1024)) for name in ("feat", "embed")}
    if config.kind != "simcc":
        return {}
    with torch.device("meta"):
        whole = build_decoder(upstream("heatmap")).state_dict()
    return {key: value.shape for key, value in whole.items() if key.startswith("high")}


@pytest.fixture(scope="module")
def recorded_inputs():
    generator = torch.Generator().manual_seed(GOLDEN["seed"])
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    features = tuple(
        tuple(draw(1, 2 * c, level.side, level.side) * 0.5 for c in level.features) for level in SD1_LEVELS
    )
    maps = tuple(
        tuple(torch.softmax(draw(heads, level.side**2, level.tokens) * 2, -1)[None] for heads in level.heads)
        for level in SD1_LEVELS
    )
    return Capture(features, maps), draw(1, 1, 768)[:, 0]


# Masked attention looks where mask logits are positive: a cell whose logit is within rounding of zero falls on the one
# side with AVX-512, where the answers were recorded, and on the other with AVX2, in fp32 and in fp64 alike.
FARTHEST = {"segmentation": 1.5e-4}


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_answers_of_upstream(kind, recorded_inputs):
    capture, text = recorded_inputs
    config = upstream(kind)
    # The naive forms of one kind with the masks' transformer and of one without; what they and the native forms compute
    # is held equal in test_kernels.py. Naive, the depth head alone is five trillion operations.
    ops = kernels.reference if kind in ("segmentation", "simcc") else kernels.native
    with Uninitialised():  # all is read from the recording
        decoder = build_decoder(config, ops)
    shapes = {key: value.shape for key, value in decoder.state_dict().items()} | unread_shapes(config)
    load_upstream(decoder, {f"module.{key}": value for key, value in seeded_state(shapes, GOLDEN["seed"]).items()})
    with torch.inference_mode():
        answer = decoder(capture, text)
    names = OUTPUTS.get(kind, ("pred_logits", "pred_masks"))
    for name, recorded in zip(names, GOLDEN[RECORDED[kind]].values(), strict=True):
        assert list(answer[name].shape) == recorded["shape"]
        assert distance(answer[name].flatten()[recorded["at"]], recorded["values"]) <= FARTHEST.get(kind, 1e-4)


class Anything:
    """Stands for what upstream's modules import but its decoders never compute with."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args, **kwargs):
        return Anything()


def normal_init(module, mean=0.0, std=1.0, bias=0.0):
    torch.nn.init.normal_(module.weight, mean, std)


def rearrange(x, pattern, **lengths):
    """What upstream's decoders ask of einops, which they are compared without: axes split, put in order and joined."""
    given, wanted = (re.findall(r"\([^)]*\)|\w+", side) for side in pattern.split("->"))
    for axes, length in zip(given, x.shape, strict=True):
        names = axes.strip("()").split()
        known = math.prod(lengths.get(name, 1) for name in names)
        lengths |= {name: length // known for name in names if name not in lengths}
    order = [name for axes in given for name in axes.strip("()").split()]
    after = [name for axes in wanted for name in axes.strip("()").split()]
    moved = x.reshape([lengths[name] for name in order]).permute([order.index(name) for name in after])
    return moved.reshape([math.prod(lengths[name] for name in axes.strip("()").split()) for axes in wanted])


def test_axes_are_rearranged_as_einops_does():
    x = torch.arange(120).view(2, 3, 4, 5)
    joined = rearrange(x, "b c h w -> b (h w) c")
    assert (joined == x.permute(0, 2, 3, 1).reshape(2, 20, 3)).all()
    assert (rearrange(joined, "b (h w) c -> b c h w", h=4) == x).all()
    assert (rearrange(x, "b c h w-> b (c w) h") == x.permute(0, 1, 3, 2).reshape(2, 15, 4)).all()


@pytest.fixture
def upstream_classes(monkeypatch):
    checkout = os.environ.get("DATASETDM_UPSTREAM")
    if not checkout:
        pytest.skip("DATASETDM_UPSTREAM does not name a checkout of showlab/DatasetDM")
    outside = (
        "black",
        "mmcv",
        "mmcv.cnn",
        "mmcv.runner",
        "torchvision",
        "torchvision.transforms",
        "detectron2",
        "detectron2.layers",
        "detectron2.config",
    )
    for name in (*outside, "fvcore", "fvcore.nn", "fvcore.nn.weight_init"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: normal_init if attribute == "normal_init" else Anything()
        monkeypatch.setitem(sys.modules, name, module)
    einops = types.ModuleType("einops")
    einops.rearrange, einops.repeat = rearrange, Anything()
    monkeypatch.setitem(sys.modules, "einops", einops)
    for name in ("model", "model.segment"):  # as bare folders: their __init__ imports more than the decoders need
        package = types.ModuleType(name)
        package.__path__ = [str(Path(checkout, *name.split(".")))]
        monkeypatch.setitem(sys.modules, name, package)

    class Settings(dict):
        __getattr__ = dict.__getitem__

    settings = Settings(MODEL=Settings(HEAD_INPUT=1024), DATASETS=Settings(IMAGE_SIZE=[512, 512]))
    places = {
        "segmentation": ("model.segment.transformer_decoder", "seg_decorder", {"num_classes": 19, "num_queries": 100}),
        "open-vocabulary": (
            "model.segment.transformer_decoder_semantic",
            "seg_decorder_open_word",
            {"num_classes": 2, "num_queries": 20},
        ),
        "depth": ("model.depth_module", "Depthmodule", {"max_depth": 10}),
        "heatmap": ("model.pose_module_heat", "PoseModule_HeatMap", {"cfg": settings}),
        "simcc": ("model.pose_module", "PoseModule", {"cfg": settings}),
    }

    def build(kind):
        module, name, arguments = places[kind]
        make = getattr(importlib.import_module(module), name)
        return make(*arguments.values()) if kind in ("heatmap", "simcc") else make(**arguments)

    yield build
    for name in [name for name in sys.modules if name.startswith("model.")]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_classes_beside_ours(kind, upstream_classes):
    """Two images in a row through the same state: the second sees the spectral norms that the first moved."""
    theirs, ours = (
        upstream_classes(kind),
        build_decoder(upstream(kind), kernels.plain if kind == "depth" else kernels.reference),
    )
    state = seeded_state({key: value.shape for key, value in theirs.state_dict().items()}, seed=11)
    theirs.load_state_dict(state)
    load_upstream(ours, state, strict=True)
    names = OUTPUTS.get(kind, ("pred_logits", "pred_masks"))
    for image in range(1 if kind == "depth" else 2):
        capture = capture_of(SD1_LEVELS, 1, seed=image)
        text = text_for(ours.config, 1)
        low, *others = (
            capture.maps
        )  # upstream keeps the maps by place in the UNet: three up layers and two down layers a level
        places = {"mid_cross": [low[0][0]], "up_cross": [layer[0] for level in others for layer in level[:3]]}
        places["down_cross"] = [layer[0] for level in others for layer in level[3:]]
        store = types.SimpleNamespace(get_average_attention=lambda places=places: places)
        features = {level.name: list(tensors) for level, tensors in zip(SD1_LEVELS, capture.features)}
        with torch.no_grad():
            expected = theirs(features, store, ["x"], None, *(() if text is None else (text[:, None],)))
            answer = ours(capture, text)
        expected = (
            expected
            if isinstance(expected, dict)
            else dict(zip(names, expected if isinstance(expected, (tuple, list)) else [expected]))
        )
        for name in names:
            assert distance(answer[name], expected[name]) <= 1e-4, f"{name} of image {image}"


# ---- our own promises


@pytest.mark.parametrize("upscale", (0, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_images(kind, upscale):
    config = small(kind, upscale=upscale)
    decoder, capture = randomise(build_decoder(config)).eval(), capture_of(DEMO_LEVELS, 3)
    text = text_for(config, 3)
    with torch.inference_mode():
        together = decoder(capture, text)
        alone = [decoder(image_of(capture, b), None if text is None else text[b : b + 1]) for b in range(3)]
    for name, value in together.items():
        assert distance(value, torch.cat([one[name] for one in alone])) <= 1e-5


@pytest.mark.parametrize("kind", ("depth", "heatmap", "open-vocabulary"))
@pytest.mark.parametrize("normalisation", ("image", "running"))
def test_stored_in_16_bits_the_answers_are_near(kind, normalisation):
    """As a GPU has them: parameters in fp16, statistics and what centres words in fp32; the decoder itself stays."""
    config = small(kind, normalisation=normalisation, text_centre=kind == "open-vocabulary")
    torch.manual_seed(0)  # of what spectral norms start from; one seed in forty is a worse case
    decoder = fold(randomise(build_decoder(config)))
    narrow, capture = copy_for_gpu(decoder, torch.float16, plain), capture_of(DEMO_LEVELS, 2)
    text = text_for(config, 2)
    assert {value.dtype for value in narrow.parameters()} == {torch.float16}
    assert {value.dtype for value in (*narrow.buffers(), *decoder.parameters())} == {torch.float32}
    assert narrow._forward_hooks is not decoder._forward_hooks  # a hook of one is none of the other
    with torch.inference_mode():
        right, found = decoder(capture, text), narrow(capture.to(torch.float16), text)
    for name, value in right.items():
        assert found[name].dtype == torch.float16 and distance(found[name].float(), value) <= 2e-2, name


@pytest.mark.parametrize("form", (plain, fused), ids=("plain", "fused"))
@pytest.mark.parametrize("kind", ("segmentation", "open-vocabulary", "heatmap"))
def test_products_stacked_for_a_gpu_change_rounding_alone(kind, form):
    """In fp32; the fused form runs in Triton's interpreter."""
    decoder = fold(randomise(build_decoder(small(kind, layers=4))))
    ops = SimpleNamespace(**vars(plain) | vars(form))
    capture, text = capture_of(DEMO_LEVELS, 2), text_for(decoder.config, 2)
    with torch.inference_mode():
        right, found = decoder(capture, text), copy_for_gpu(decoder, torch.float32, ops)(capture, text)
    for name, value in right.items():
        assert distance(found[name], value) <= 2e-5, name


def test_shares_of_heads_are_of_the_levels_in_their_order():
    """The first of the first level, which tells none where all its shares are 0."""
    counts = [level.heads for level in DEMO_LEVELS]
    total = sum(map(sum, counts))
    shares = [float(k + 1) for k in range(total)]
    first = sum(counts[0])
    told = small("segmentation", word_heads=(*[0.0] * first, *shares[first:]))
    found, after = told.word_levels(), first
    assert list(found) == [level.name for level in DEMO_LEVELS[1:] if level.heads]
    for level in DEMO_LEVELS[1:]:
        for k, count in enumerate(level.heads):
            assert found[level.name][k] == tuple(float(after + j + 1) for j in range(count))
            after += count
    assert after == total


def test_queries_see_levels_of_rising_sides_and_masks_of_two_and_a_half_cells():
    """20, 40, 80 and 160 of upstream's, whose highest level has 64 cells a side."""
    for side, sides, masks in ((64, [20, 40, 80], 160), (16, [5, 10, 20], 40)):
        decoder = build_decoder(small("segmentation"))
        levels_of_side = levels(
            {"block_out_channels": (24, 48, 48, 48), "layers_per_block": 1, "attention_head_dim": 3},
            tokens=7,
            size=8 * side,
        )
        with torch.inference_mode():
            memory, features = decoder.eval().decode_pixels(capture_of(levels_of_side, 1))
        assert [list(level.shape[2:]) for level in memory] == [[one, one] for one in sides]
        assert features.shape[2:] == (masks, masks)


@pytest.mark.parametrize("storage, third", (("fp16", 0.333251953125), ("fp32", 0.3333333432674408)))
def test_figures_are_those_of_the_weights_that_are_written(storage, third):
    """1 / 3 in half precision is 1365 / 4096."""
    decoder = build_decoder(small("depth"))
    with torch.no_grad():
        next(decoder.parameters()).fill_(1 / 3)
        round_parameters(decoder, storage)
    weight = next(decoder.parameters())
    assert weight.dtype == torch.float32 and weight.unique().tolist() == [third]


@pytest.mark.parametrize("is_blind", (False, True), ids=("masks", "masks without a cell"))
@pytest.mark.parametrize("layers", (1, 4))
def test_the_packed_transformer_of_a_cpu_changes_rounding_alone(layers, is_blind):
    """Of every instruction set, to the bit on any number of threads."""
    decoder = fold(randomise(build_decoder(small("segmentation", layers=layers))))
    if is_blind:  # a query that would see nothing sees all
        with torch.no_grad():
            decoder.mask_embed.layers[-1].weight.zero_()
            decoder.mask_embed.layers[-1].bias.fill_(-1)
    fast = copy_for_cpu(decoder)
    with torch.inference_mode():
        memory, features = decoder.decode_pixels(capture_of(DEMO_LEVELS, 3))
        content, position = decoder.make_queries(3, None)
        content = content * torch.tensor([1.0, 0.5, -2.0])[:, None, None]  # as words of its own make it for each image
        given = content, position, memory, features.abs() if is_blind else features, False
        right = decoder.decode_queries(*given)
        fast.decode_queries(*given)
        native, kept = fast.stacked._packed
        for vector_bytes in _C.depth_head_vector_bytes():
            found = []
            for threads in (1, 2, 5):
                run = SimpleNamespace(run=lambda *given: native.run(*given[:-1], threads, vector_bytes))  # noqa: B023
                fast.stacked._packed = run, kept
                found.append(fast.decode_queries(*given))
                assert all(torch.equal(found[0][name], found[-1][name]) for name in right)
            for name, value in right.items():
                assert distance(found[0][name], value) <= 2e-5, name


def test_the_packed_transformer_keeps_a_nan_to_the_image_that_has_it():
    decoder = fold(randomise(build_decoder(small("segmentation", layers=1))))
    with torch.inference_mode():
        memory, features = decoder.decode_pixels(capture_of(DEMO_LEVELS, 3))
        content, position = decoder.make_queries(3, None)
        content = content.clone()
        content[1, 2, 3] = torch.nan
        found = copy_for_cpu(decoder).decode_queries(content, position, memory, features, False)
    for value in found.values():
        assert value[1, 2].isnan().all() and value[[0, 2]].isfinite().all()


def test_a_packed_transformer_that_does_not_fit_is_refused():
    """Of 16 channels, one layer and one level, of weights that are nowhere."""
    norm, square, wide = _C.Norm(64, 64, 16, 1, 1e-5), _C.Linear(64, 64, 16, 16), _C.Linear(64, 64, 16, 32)
    packed = _C.Linear(64, 64, 16, 48)
    layer = _C.QueryLayer(square, square, packed, square, wide, _C.Linear(64, 64, 32, 16), norm, norm, norm)
    right = [layer], [wide], packed, norm, [square] * 3, square, 4
    for place, wrong, refusal in (
        (0, [_C.QueryLayer(square, square, wide, *[square] * 3, norm, norm, norm)], "a layer does not fit 16 channels"),
        (1, [square], "the memory of level 0 does not fit 1 layers"),
        (1, [], "0 levels and 3 layers"),
        (2, wide, "positions do not fit 1 layers"),
        (4, [square] * 2, "1 levels and 2 layers"),
        (5, _C.Linear(64, 64, 8, 16), "an answer does not fit 16 channels"),
        (6, 3, "16 channels do not make 3 heads"),
    ):
        with pytest.raises(ValueError, match=refusal):
            _C.QueryTransformer(*right[:place], wrong, *right[place + 1 :])
    whole = [64, 64, [64], [64], [64], [4], 64, 64, 1, 5, 1]
    for place, wrong, refusal in (
        (0, 0, "a pointer is null"),
        (2, [0], "1 pointers for 1 levels, or one of them is null"),
        (3, [64, 64], "2 pointers for 1 levels"),
        (5, [0], "a level is empty"),
        (9, 0, "0 queries"),
    ):
        with pytest.raises(ValueError, match=refusal):
            _C.QueryTransformer(*right).run(*whole[:place], wrong, *whole[place + 1 :])


def test_words_asked_together_equal_words_asked_alone():
    decoder = randomise(build_decoder(small("open-vocabulary"))).eval()
    capture, text = capture_of(DEMO_LEVELS, 2), text_for(decoder.config, 2, words=3)
    with torch.inference_mode():
        together = decoder(capture, text)
        alone = [decoder(capture, text[:, word]) for word in range(3)]
    for name, value in together.items():
        assert distance(value, torch.stack([one[name] for one in alone], 1)) <= 1e-5


@pytest.mark.parametrize("wrong", (None, torch.zeros(2, 9), torch.zeros(1, 10), torch.zeros(10)))
def test_open_vocabulary_needs_a_word_per_image(wrong):
    with pytest.raises(Refused, match="expected class embeddings"):
        build_decoder(small("open-vocabulary"))(capture_of(DEMO_LEVELS, 2), wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_sides_follow_the_highest_level(kind):
    config = small(kind)
    with torch.inference_mode():
        answer = build_decoder(config)(capture_of(DEMO_LEVELS, 2), text_for(config, 2))
    expected = {
        "pred_logits": (2, 5, config.logits),
        "pred_masks": (2, 5, 40, 40),
        "depth": (2, 1, 128, 128),
        "heatmaps": (2, 2, 16, 16),
        "x": (2, 2, 128),
        "y": (2, 2, 128),
    }
    assert {name: tuple(value.shape) for name, value in answer.items()} == {name: expected[name] for name in answer}


def test_another_image_size_than_trained():
    larger = levels(
        {"block_out_channels": (24, 48, 48, 48), "layers_per_block": 1, "attention_head_dim": 3}, tokens=7, size=192
    )
    with torch.inference_mode():
        assert build_decoder(small("segmentation"))(capture_of(larger, 1))["pred_masks"].shape[-1] == 60
        with pytest.raises(Refused, match="24 cells"):
            build_decoder(small("simcc"))(capture_of(larger, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind):
    config = small(kind, upscale=2)
    decoder, options = build_decoder(config), {"auxiliary": True} if config.has_queries else {}
    with torch.no_grad():  # upstream starts the depth head too close to zero for a gradient to show
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = {name: module.u0.clone() for name, module in decoder.named_modules() if isinstance(module, SpectralConv2d)}
    answer = decoder(capture_of(DEMO_LEVELS, 2), text_for(config, 2), **options)
    earlier = answer.pop("aux", [])
    assert len(earlier) == (config.layers if config.has_queries else 0)
    sum((one * torch.randn_like(one)).sum() for answers in (answer, *earlier) for one in answers.values()).backward()
    assert [
        name
        for name, parameter in decoder.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ] == []
    assert all(not torch.equal(before[name], decoder.get_submodule(name).u0) for name in before)


def test_outputs_of_every_layer_are_those_of_each_word():
    config = small("open-vocabulary")
    decoder, text = build_decoder(config).eval(), text_for(config, 2, words=3)
    capture = capture_of(DEMO_LEVELS, 2)
    together = decoder(capture, text, auxiliary=True)
    for word in range(3):
        alone = decoder(capture, text[:, word], auxiliary=True)
        for answers, other in zip([together, *together["aux"]], [alone, *alone["aux"]], strict=True):
            for name in answers.keys() - {"aux"}:
                torch.testing.assert_close(answers[name][:, word], other[name], atol=1e-4, rtol=1e-4)


def test_spectral_norm_gradient():
    """The gradient goes through the norm as well: d/dW of W / sigma(W), against finite differences."""
    layer = SpectralConv2d(3, 4, 3).double().eval()

    def call(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (torch.ones(1, 3, 4, 4, dtype=torch.float64),))

    # The power iteration is held fixed, as upstream does, so it must have converged for the difference quotient to
    # agree.
    layer.u0.copy_(torch.linalg.svd(layer.weight.detach().flatten(1))[0][:, :1].T)
    assert torch.autograd.gradcheck(call, (layer.weight.detach().clone().requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("kind", ("segmentation", "simcc"))
def test_folded_equals_the_first_image_and_strict_goes_on(kind, tmp_path):
    decoder = randomise(build_decoder(small(kind)))
    save_decoder(decoder, tmp_path)
    folded, strict, capture = load_decoder(tmp_path), read_decoder(tmp_path), capture_of(DEMO_LEVELS, 1)
    assert not any(isinstance(module, SpectralConv2d) for module in folded.modules())
    assert not any(parameter.requires_grad for loaded in (folded, strict) for parameter in loaded.parameters())
    with torch.inference_mode():
        repeated = [folded(capture), folded(capture)]
        moving = [strict(capture), strict(capture)]
    for name in moving[0]:
        assert torch.equal(repeated[0][name], repeated[1][name])
        assert distance(repeated[0][name], moving[0][name]) <= 1e-5
        assert not torch.equal(moving[0][name], moving[1][name])


def test_running_statistics_replace_the_image_own():
    capture = capture_of(DEMO_LEVELS, 2)
    decoder = randomise(build_decoder(small("heatmap", normalisation="running")))
    by_image = randomise(build_decoder(small("heatmap")))
    by_image.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        first = decoder(capture)["heatmaps"]  # training: statistics of the image, the stored ones move
        assert distance(first, by_image(capture)["heatmaps"]) <= 1e-5
        for _ in range(60):
            decoder(capture)
        mixed = decoder.mid_feature_mix_conv
        stored = mixed.stored_mean1.clone()
        answer = decoder.eval()(capture)["heatmaps"]
    assert torch.equal(stored, mixed.stored_mean1)
    assert distance(answer, by_image.eval()(capture)["heatmaps"]) > 1e-3


# Half a unit of fp16 can carry a mask logit over the edge at which attention is blocked, and then an answer jumps.
@pytest.mark.parametrize("storage,tolerance", (("fp32", 0.0), ("fp16", 5e-2)))
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, storage, tolerance, tmp_path):
    config = small(kind, upscale=2 if kind == "depth" else 0)
    decoder, capture = build_decoder(config), capture_of(DEMO_LEVELS, 1)
    save_decoder(decoder, tmp_path, storage)
    loaded = load_decoder(tmp_path)
    assert loaded.config == config
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    with torch.inference_mode():
        expected, answer = decoder.eval()(capture, text_for(config, 1)), loaded(capture, text_for(config, 1))
    for name in expected:
        assert distance(answer[name], expected[name]) <= max(tolerance, 1e-6)


def test_words_that_differ_little_are_told_apart_once_centred(tmp_path):
    words = 7 + 0.05 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    decoder = build_decoder(small("open-vocabulary", text_centre=True)).eval()
    with torch.inference_mode():
        before = (decoder.make_queries(4, words)[0] - decoder.make_queries(4, words)[0].mean(0)).norm()
        decoder.fit_text_centre(words)
        after = (decoder.make_queries(4, words)[0] - decoder.make_queries(4, words)[0].mean(0)).norm()
        assert after > 10 * before
        save_decoder(decoder, tmp_path)
        capture = capture_of(DEMO_LEVELS, 4)
        expected, answer = decoder(capture, words), load_decoder(tmp_path)(capture, words)
    for name in expected:
        assert distance(answer[name], expected[name]) <= 1e-6


def test_a_cell_is_within_a_mask_where_its_probability_rounds_to_a_half():
    found = mask_head.outside(torch.tensor([-1.0, -1e-6, -1e-9, 0.0, 1.0]))
    assert found.tolist() == [True, True, False, False, False]  # -1e-9 is not told from 0


def test_words_are_centred_and_scaled_to_unit_deviation():
    decoder, words = build_decoder(small("open-vocabulary", text_centre=True)), torch.zeros(2, 10)
    words[0], words[1] = 5, 1
    with torch.inference_mode():
        decoder.fit_text_centre(words)
    assert (decoder.text_mean == 3).all() and float(decoder.text_gain) == pytest.approx((19 / 80) ** 0.5)


def test_stored_statistics_move_by_a_tenth_towards_those_of_a_batch_as_torch_has_them():
    block, x = SegBlock(3, 3, kernels.reference, "running").train(), torch.randn(2, 3, 2, 2)
    norm = torch.nn.BatchNorm2d(3, momentum=0.1).train()
    norm(x)
    block.normalise(x, block.stored_mean1, block.stored_var1)
    torch.testing.assert_close(block.stored_mean1, norm.running_mean)
    torch.testing.assert_close(block.stored_var1, norm.running_var)  # of 8 values a channel, over 7


def test_a_single_word_to_centre_is_read_as_it_is():
    word = torch.full((1, 10), 7.0)
    decoder = build_decoder(small("open-vocabulary", text_centre=True)).eval()
    for words in (word, word.repeat(3, 1)):
        with torch.inference_mode():
            decoder.fit_text_centre(words)
            before = decoder.make_queries(1, word)
        assert decoder.text_gain == 1 and not decoder.text_mean.any() and all(part.isfinite().all() for part in before)


def test_config_refusals():
    config = small("segmentation")
    assert DecoderConfig.from_json(config.to_json()) == config
    for change, message in (
        ({"kind": "segmentor"}, "kind is 'segmentor'"),
        ({"task": "semantics"}, "task is 'semantics'"),
        ({"task": "pose"}, "kind is 'segmentation', expected heatmap or simcc for the task pose"),
        ({"normalisation": "batch"}, "normalisation is 'batch'"),
        ({"width": 20, "heads": 8}, "width 20 must divide"),
        ({"width": 6, "heads": 2}, "width 6 must divide into 2 heads and by 4"),
        ({"word_heads": (0.0,) * sum(sum(level.heads) for level in config.levels)}, "nor all of them 0"),
        ({"word_heads": (0.5,)}, "1 word_heads of a segmentation decoder"),
        ({"classes": ()}, "at least one name in classes"),
        ({"task": "semantic", "classes": tuple(map(str, range(256)))}, "256 semantic classes, expected at most 255"),
        ({"named": ("unicorn",)}, "named holds 'unicorn', which is none of its classes"),
        (
            {"levels": (replace(config.levels[0], blocks=(0,)), *config.levels[1:])},
            f"blocks are those of {config.levels[0].name}, expected",
        ),
    ):
        with pytest.raises(Refused, match=message):
            replace(config, **change)
    assert len(replace(config, task="semantic", classes=tuple(map(str, range(255)))).classes) == 255  # 0 to 254
    for text in ("", "{}", "[]", '{"levels": 3}'):
        with pytest.raises(Refused, match="not the JSON of a decoder"):
            DecoderConfig.from_json(text)
    with pytest.raises(Refused, match="unknown fields colour"):
        DecoderConfig.from_json(config.to_json().replace('"kind"', '"colour": 1,\n"kind"'))
    with pytest.raises(Refused, match="task not given"):
        DecoderConfig.from_json('{"kind": "depth", "levels": []}')
    written = json.loads(config.to_json())
    first = written["levels"][0]
    for change, message in (
        ({"levels": [{**first, "halves": 3}, *written["levels"][1:]]}, "a level's halves are 3, expected 1 or 2"),
        ({"classes": ["x"] * 65537}, "more classes or joints than a decoder has"),
        ({"joints": ["x"] * 1025}, "more classes or joints than a decoder has"),
        ({"joints": ["a", "b"], "limbs": [[0, 2]]}, "its limbs do not join two of its joints"),
        ({"joints": ["a", "b"], "limbs": [[0, 1, 1]]}, "its limbs do not join two of its joints"),
    ):
        with pytest.raises(Refused, match=message):
            DecoderConfig.from_json(json.dumps(written | change))
    with pytest.raises(Refused, match="levels are"):
        DecoderConfig.from_json('{"kind": "depth", "task": "depth", "levels": []}')


def test_what_does_not_fit_is_listed():
    decoder = build_decoder(small("heatmap"))
    state = dict(decoder.state_dict())
    state["final_layer.extra"] = state.pop("final_layer.bias")
    state["final_layer.weight"] = torch.zeros(3, 64, 1, 1)
    with pytest.raises(Refused) as refusal:
        load_upstream(decoder, state)
    for part in (
        "3 tensors",
        "missing: final_layer.bias",
        "unexpected: final_layer.extra",
        "final_layer.weight [3, 64, 1, 1] for [2, 64, 1, 1]",
    ):
        assert part in refusal.value.cause


def test_broken_files(tmp_path):
    decoder = build_decoder(small("simcc"))
    with pytest.raises(Missing, match="config.json is not there"):
        load_decoder(tmp_path)
    with pytest.raises(Missing, match="no sub-folder"):
        load_decoders(tmp_path)
    save_decoder(decoder, tmp_path / "a")
    save_decoder(decoder, tmp_path / "b")
    assert list(load_decoders(tmp_path)) == ["pose:a", "pose:b"]
    (tmp_path / "b" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(Refused, match="model.safetensors is truncated or not a safetensors file"):
        load_decoder(tmp_path / "b")
    (tmp_path / "b" / "config.json").unlink()
    assert list(load_decoders(tmp_path)) == ["pose"]
    with pytest.raises(Refused, match="storage is 'int8'"):
        save_decoder(decoder, tmp_path / "c", "int8")
    with pytest.raises(Refused, match="folded"):
        save_decoder(load_decoder(tmp_path / "a"), tmp_path / "c")
    with torch.no_grad():
        decoder.mlp_head_y.bias[2] = float("nan")
    for broken in (
        lambda: save_decoder(decoder, tmp_path / "c"),
        lambda: load_upstream(build_decoder(small("simcc")), decoder.state_dict()),
    ):
        with pytest.raises(Refused, match="mlp_head_y.bias holds NaN"):
            broken()
    assert not (tmp_path / "c").exists()


class Payload:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.usefixtures("pickles_are_read_by_forks")
def test_pickles_may_hold_tensors_only(tmp_path, capsys):
    decoder = build_decoder(small("depth"))
    state = {f"module.{name}": value for name, value in decoder.state_dict().items()}
    torch.save(state, tmp_path / "good.pth")
    assert load_upstream(build_decoder(small("depth")), tmp_path / "good.pth").config.kind == "depth"
    torch.save({**state, "extra": Payload()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("code.pth", "list.pth", "text.pth"):
        with pytest.raises(Refused, match=name):
            load_upstream(build_decoder(small("depth")), tmp_path / name)
    with pytest.raises(Missing, match="none.pth"):
        load_upstream(build_decoder(small("depth")), tmp_path / "none.pth")
    assert "ran code" not in capsys.readouterr().out


def test_levels_of_another_unet():
    check_fits(build_decoder(small("heatmap")), DEMO_LEVELS, "pose")
    with pytest.raises(Refused, match="trained on a model whose level low"):
        check_fits(build_decoder(small("heatmap")), SD1_LEVELS, "pose")
    larger = levels(
        {"block_out_channels": (24, 48, 48, 48), "layers_per_block": 1, "attention_head_dim": 3}, tokens=7, size=256
    )
    check_fits(build_decoder(small("heatmap")), larger, "pose")
    with pytest.raises(Refused, match="128 pixels, but the run makes 256"):
        check_fits(build_decoder(small("simcc")), larger, "pose")


def test_class_words_of_another_text_encoder():
    decoder = build_decoder(small("open-vocabulary", text_width=64))
    check_fits(decoder, DEMO_LEVELS, "open-vocabulary", 64)
    check_fits(decoder, DEMO_LEVELS, "open-vocabulary")  # of a model whose text encoder is not known
    with pytest.raises(Refused, match="trained on a text encoder of width 64, but the model's has 32"):
        check_fits(decoder, DEMO_LEVELS, "open-vocabulary", 32)


def test_sizes_of_a_capture():
    capture = capture_of(DEMO_LEVELS, 1)
    assert (capture.batch, capture.side) == (1, 16)


def test_a_sketch_repeats_the_cells_of_small_levels():
    """As the domains of stored decoders were measured: nothing is blended from cell to cell."""
    decoder = build_decoder(small("depth")).eval()
    drawn = decoder.sketch(capture_of(DEMO_LEVELS, 2))
    low = drawn[:, :16].unflatten(-1, (2, 8)).unflatten(-3, (2, 8))  # 2 x 2 cells on a grid of 16
    assert drawn.shape == (2, 64, 16, 16) and (low == low[..., :1, :, :1]).all() and low.std() > 0
    sums = decoder.level_sums(capture_of(DEMO_LEVELS, 2), DEMO_LEVELS)  # what the fast engines hand over
    assert torch.allclose(decoder.sketch(ProjectedCapture(tuple(sums.values()), {})), drawn, atol=1e-4)


def test_joints_of_upstream_are_those_of_coco_keypoints():
    """As `person_keypoints_val2017.json` has them: names, and a skeleton that counts from 1."""
    names = "nose,left_eye,right_eye,left_ear,right_ear,left_shoulder,right_shoulder,left_elbow,right_elbow,left_wrist,"
    names += "right_wrist,left_hip,right_hip,left_knee,right_knee,left_ankle,right_ankle"
    skeleton = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10]]
    skeleton += [[9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]
    for kind in ("heatmap", "simcc"):
        config = upstream(kind)
        assert ",".join(config.joints) == names and config.score_threshold == 0.2
        assert [[a + 1, b + 1] for a, b in config.limbs] == skeleton


@pytest.mark.parametrize("upscale", [0, 2])
def test_depth_is_a_share_of_the_farthest_that_the_decoder_was_taught(upscale):
    decoder = build_decoder(small("depth", max_depth=80.0, upscale=upscale)).eval()
    last = decoder.last_layer_depth[2]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, math.log(3))  # whose sigmoid is 3 / 4
    with torch.no_grad():
        assert torch.allclose(decoder(capture_of(DEMO_LEVELS, 1))["depth"], torch.tensor(60.0))


def test_an_upscale_is_by_its_factor_and_begins_as_a_plain_resize():
    x = torch.randn(2, 4, 3, 3)
    for times in (2, 3):
        upscale = Upscale(4, 5, times)
        found = upscale(x)
        wanted = F.interpolate(
            F.conv2d(x, upscale.reduce.weight, upscale.reduce.bias), scale_factor=times, mode="bilinear"
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.nn.init.ones_(upscale.detail.bias)
        torch.testing.assert_close(upscale(x), wanted + 1, rtol=1e-5, atol=1e-5)


def test_a_decoder_of_columns_and_rows_names_the_size_in_pixels_that_it_was_trained_on():
    config = small("simcc")
    with pytest.raises(Refused) as stop:
        build_decoder(config)(SimpleNamespace(side=config.side + 1))
    assert stop.value.remedy == f"Use --size {8 * config.side}."


def test_a_seeded_depth_decoder_is_drawn_by_the_number_of_its_inputs():
    head = seeded_decoders(DEMO_LEVELS, 10)["depth"].last_layer_depth
    for place in (0, 2):
        weight = head[place].weight.detach()
        assert float(weight.std() * weight[0].numel() ** 0.5) == pytest.approx(1, abs=0.02)
        assert float(weight.flatten()[0]) == pytest.approx(-0.0636, abs=1e-4)


def test_seeded_decoders_are_as_wide_against_the_unet_as_those_of_upstream():
    with torch.device("meta"), Uninitialised():
        decoders = {width: seeded_decoders(over, 8) for width, over in ((256, SD1_LEVELS), (16, DEMO_LEVELS))}
    for width, each in decoders.items():
        for config in (decoder.config for decoder in each.values()):
            sizes = config.width, config.mask_dim, config.depth_width, config.feed_forward
            assert sizes == (width, width, 4 * width, 8 * width), config.kind


def test_features_of_a_decoder_are_of_the_levels_that_it_reads():
    sums = tuple(torch.ones(1, count, 2, 2) for count in (3, 4, 0, 0))
    assert list(Decoder.level_sums(None, ProjectedCapture(sums, {}), ())) == ["low", "mid"]
