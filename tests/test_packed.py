"""Layers whose weights are laid out once for a CPU: every instruction set and form against the plain convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.engine.engines.device import Lanes
from datasetdm_fast.engine.models import packed
from datasetdm_fast.engine.models.layers import Convolution, Linear, Resnet, Upsample, Weights, join_places
from datasetdm_fast.engine.models.packed import (
    FEWEST_TILES,
    NORM_IN_PLACE,
    InPlaceResnet,
    PackedConvolution,
    PackedLinear,
    PackedPlaces,
    PackedUpsample,
    TiledConvolution,
    TiledPlaces,
    convolve_tiles,
    fits_tiles,
    from_tiles,
    in_tiles,
    largest_distance,
    pack_layers,
    weight_as,
    weights_of,
)
from datasetdm_fast.kernels import attention, winograd
from datasetdm_fast.kernels.choice import operations
from datasetdm_fast.kernels.noise import noise

VECTORS = _C.depth_head_vector_bytes()


def image(*shape: int) -> Tensor:
    return noise(*shape).contiguous(memory_format=torch.channels_last)


def weights(outputs: int, channels: int, taps: int = 3) -> Weights:
    weight = noise(outputs, channels, taps, taps) / (taps * channels**0.5)
    return Weights({"weight": weight, "bias": noise(outputs + 1)[1:]})


def distance(value: Tensor, truth: Tensor) -> float:
    assert value.shape == truth.shape
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("vector_bytes", VECTORS)
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width", "is_doubled"),
    [
        pytest.param(1, 16, 16, 4, 4, False, id="one tile"),
        pytest.param(3, 48, 48, 5, 7, False, id="ragged borders, an odd number of panels"),
        pytest.param(2, 272, 32, 9, 4, False, id="more channels than are worked on at once"),
        pytest.param(9, 16, 32, 11, 12, False, id="more tiles than are worked on at once"),
        pytest.param(12, 16, 32, 11, 12, False, id="more tiles than taps are transformed for"),
        pytest.param(2, 32, 48, 3, 5, True, id="doubled cells"),
    ],
)
@torch.inference_mode()
def test_every_instruction_set(vector_bytes, batch, channels, outputs, height, width, is_doubled, monkeypatch):
    """The distance from fp64 stays within four times that of the direct sum, and every element is written."""
    x, given = image(batch, channels, height, width), weights(outputs, channels)
    wide = F.interpolate(x, scale_factor=2) if is_doubled else x
    residual = image(batch, outputs, *wide.shape[-2:])
    truth = F.conv2d(wide.double(), given["weight"].double(), given["bias"].double(), padding=1)
    direct = distance(F.conv2d(wide, given["weight"], given["bias"], padding=1), truth)
    for name in ("winograd", "winograd_taps"):
        inner = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *arguments, inner=inner: inner(*arguments, vector_bytes))
    forms, empty = [form(given["weight"]) for form in (winograd.transform_weight, winograd.in_panels)], torch.empty
    winograd.free_buffers()
    monkeypatch.setattr(torch, "empty", lambda *shape, **keywords: empty(*shape, **keywords).fill_(torch.nan))
    for form in forms:
        for added, expected in ((None, truth), (residual, truth + residual)):
            found = winograd.convolve(x, form, given["bias"], added, is_doubled)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert distance(found, expected) <= max(4 * direct, 5e-7)


@pytest.mark.parametrize("form", [winograd.transform_weight, winograd.in_panels])
def test_minimal_filtering_refuses_what_it_would_read_beyond_its_end(form):
    x, weight, bias, residual = noise(1, 32, 8, 8), noise(64, 32, 3, 3), noise(64), noise(1, 64, 8, 8)
    given = {"x": x, "weight": form(weight), "bias": bias, "residual": residual}
    assert winograd.convolve(**given).shape == (1, 64, 8, 8)
    for name, wrong in (
        ("x", noise(1, 48, 8, 8)),
        ("weight", form(weight.bfloat16())),
        ("weight", form(weight[:32])),
        ("bias", bias[:32]),
        ("residual", residual[..., :4]),
        ("residual", residual.bfloat16()),
    ):
        with pytest.raises(ValueError, match="convolve: "):
            winograd.convolve(**given | {name: wrong})


@pytest.mark.parametrize("form", [winograd.transform_weight, winograd.in_panels])
@torch.inference_mode()
def test_neither_threads_nor_the_batch_change_a_bit(form, monkeypatch):
    x, given = image(5, 32, 13, 9), weights(48, 32)
    prepared = form(given["weight"])
    alone = torch.cat([winograd.convolve(x[k : k + 1], prepared, given["bias"]) for k in range(5)])
    for threads in (1, 2, 3, 200):
        monkeypatch.setattr(winograd, "threads", lambda *_, threads=threads: threads)
        assert torch.equal(winograd.convolve(x, prepared, given["bias"]), alone)


@pytest.mark.parametrize("vector_bytes", VECTORS)
@pytest.mark.parametrize(("channels", "outputs", "is_doubled"), [(16, 16, False), (272, 48, False), (32, 48, True)])
@torch.inference_mode()
def test_every_instruction_set_in_bf16(vector_bytes, channels, outputs, is_doubled, monkeypatch):
    """From bf16 images, weights and residuals; every element is written, whatever the threads and the batch."""
    x, residual = image(5, channels, 10, 7).bfloat16(), image(5, outputs, *((20, 14) if is_doubled else (10, 7)))
    residual = residual.bfloat16()
    given = {name: value.bfloat16() for name, value in weights(outputs, channels).state.items()}
    wide = F.interpolate(x, scale_factor=2) if is_doubled else x
    truth = F.conv2d(wide.double(), given["weight"].double(), given["bias"].double(), padding=1) + residual.double()
    for name in ("winograd", "winograd_taps"):
        inner = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *arguments, inner=inner: inner(*arguments, vector_bytes))
    forms, empty = [form(given["weight"]) for form in (winograd.transform_weight, winograd.in_panels)], torch.empty
    assert torch.equal(winograd.from_panels(forms[1], outputs), given["weight"])
    winograd.free_buffers()
    monkeypatch.setattr(torch, "empty", lambda *shape, **keywords: empty(*shape, **keywords).fill_(torch.nan))
    for form in forms:
        found = []
        for threads in (1, 3):
            monkeypatch.setattr(winograd, "threads", lambda *_, threads=threads: threads)
            found.append(winograd.convolve(x, form, given["bias"], residual, is_doubled))
        alone = winograd.convolve(x[3:4], form, given["bias"], residual[3:4], is_doubled)
        assert found[0].dtype == torch.bfloat16 and found[0].is_contiguous(memory_format=torch.channels_last)
        assert distance(found[0], truth) <= 2e-2
        assert torch.equal(found[0], found[1]) and torch.equal(found[0][3:4], alone)


@pytest.mark.parametrize("vector_bytes", VECTORS)
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [
        pytest.param(1, 16, 48, 12, 12, id="an odd number of panels"),
        pytest.param(5, 48, 16, 11, 13, id="ragged borders, more tiles than are worked on at once"),
    ],
)
def test_gradients_of_every_instruction_set(vector_bytes, batch, channels, outputs, height, width, monkeypatch):
    """The distances from fp64 stay within five times those of PyTorch's own."""
    for name in ("winograd", "winograd_gradient"):
        inner = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *arguments, inner=inner: inner(*arguments, vector_bytes))
    given, out = weights(outputs, channels), image(batch, outputs, height, width)
    leaves = [image(batch, channels, height, width), given["weight"], given["bias"]]

    def gradients(convolution, dtype):
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        return torch.autograd.grad(convolution(*own), own, out.to(dtype))

    truth = gradients(lambda *own: F.conv2d(*own, padding=1), torch.float64)
    direct = gradients(lambda *own: F.conv2d(*own, padding=1), torch.float32)
    for found, plain, wanted in zip(gradients(winograd.convolve_trained, torch.float32), direct, truth):
        assert distance(found, wanted) <= max(5 * distance(plain, wanted), 1e-6)


def test_a_training_under_autocast_rounds_as_pytorch_does():
    x, weight, bias = image(1, 16, 12, 12), noise(16, 16, 3, 3), torch.zeros(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = winograd.convolve_trained(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_threads_change_no_bit_of_a_gradient(monkeypatch):
    x, out = image(5, 48, 13, 9), image(5, 32, 13, 9)
    found = []
    for threads in (1, 2, 200):
        monkeypatch.setattr(winograd, "threads", lambda *_, threads=threads: threads)
        found.append(winograd.gradient(x, out))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_taps_of_an_upsample_are_read_back_where_they_are_transformed_at_every_call(monkeypatch):
    monkeypatch.setattr(packed, "is_held", lambda weight: False)
    upsample = Upsample(weights(48, 32))
    assert torch.equal(PackedUpsample(upsample).plain_taps(), upsample.taps)


def test_what_it_cannot_compute_is_refused():
    for numbers, cause in (
        ((1, 4, 4, 8, 16, 1), "8 channels to 16, expected multiples of 16"),
        ((0, 4, 4, 16, 16, 1), "an empty tensor"),
        ((1, 4, 4, 16, 16, 0), "threads is 0"),
        ((1, 4, 4, 16, 16, 1, 8), "no vectors of 8 bytes"),
    ):
        with pytest.raises(ValueError, match=cause):
            _C.winograd_gradient(64, 64, 64, *numbers)
    with pytest.raises(ValueError, match="a pointer is null"):
        _C.winograd_gradient(64, 64, 0, 1, 4, 4, 16, 16, 1)
    for numbers, cause in (
        ((1, 4, 4, 8, 16, False, 0, 1), "8 channels to 16, expected multiples of 16"),
        ((1, 4, 4, 16, 8, False, 0, 1), "16 channels to 8, expected multiples of 16"),
        ((1, 3, 4, 16, 16, True, 0, 1), "3 x 4 cells are no doubled ones"),
        ((1, 4, 3, 16, 16, True, 0, 1), "4 x 3 cells are no doubled ones"),
        ((0, 4, 4, 16, 16, False, 0, 1), "an empty tensor"),
        ((1, 4, 4, 16, 16, False, 3, 1), "storage is 3"),
        ((1, 4, 4, 16, 16, False, 0, 0), "threads is 0"),
        ((1, 4, 4, 16, 16, False, 0, 1, 8), "no vectors of 8 bytes"),
    ):
        with pytest.raises(ValueError, match=cause):
            _C.winograd(64, 64, 64, 0, 64, *numbers)
    with pytest.raises(ValueError, match="a pointer is null"):
        _C.winograd_taps(64, 64, 64, 0, 64, 0, 1, 4, 4, 16, 16, False, 0, 1)
    with pytest.raises(ValueError, match="storage is 2"):
        _C.winograd_taps(64, 64, 64, 0, 64, 64, 1, 4, 4, 16, 16, False, 2, 1)
    for numbers, cause in (
        ((8, 16, 1), "8 channels to 16"),
        ((16, 16, 0), "threads is 0"),
        ((16, 16, 1, 8), "8 bytes"),
    ):
        with pytest.raises(ValueError, match=cause):
            _C.winograd_weight(64, 64, *numbers)
    with pytest.raises(ValueError, match="a pointer is null"):
        _C.winograd_weight(0, 64, 16, 16, 1)
    with pytest.raises(ValueError, match="a pointer is null"):
        _C.winograd(64, 0, 64, 0, 64, 1, 4, 4, 16, 16, False, 0, 1)


@pytest.mark.parametrize(
    ("batch", "channels", "side", "stride", "padding", "taps"),
    [
        pytest.param(FEWEST_TILES, 32, 4, 1, 1, 3, id="as few tiles as are transformed"),
        pytest.param(FEWEST_TILES - 1, 32, 4, 1, 1, 3, id="fewer"),
        pytest.param(2, 4, 16, 1, 1, 3, id="channels that fill no panel"),
        pytest.param(2, 32, 8, 2, 1, 3, id="stride 2"),
        pytest.param(2, 32, 8, 1, 0, 1, id="1x1"),
    ],
)
def test_a_packed_convolution_says_what_the_plain_one_says(batch, channels, side, stride, padding, taps):
    x, plain = image(batch, channels, side, side), Convolution(weights(32, channels, taps), stride, padding)
    ours, other = PackedConvolution(plain), noise(32)
    truth = F.conv2d(x.double(), plain.weight.double(), None, stride, padding)
    with torch.inference_mode():
        assert distance(ours(x), truth + plain.bias.double()[:, None, None]) <= 2e-6
        residual = image(*truth.shape)
        expected = truth + other.double()[:, None, None] + residual
        assert distance(ours(x, other, residual), expected) <= 2e-6


def test_plain_weights_go_and_can_be_read_back():
    """Only a convolution that may be computed in either form keeps its own."""
    given = [weights(32, 32), weights(32, 32), weights(32, 4), weights(48, 64, 1)]
    network = torch.nn.Sequential(
        *(PackedConvolution(Convolution(one)) for one in given[:3]), PackedLinear(Linear(given[3]))
    )
    few = image(1, 32, 8, 8)
    with torch.inference_mode():
        before = network[1](few)
        for layer, shape in zip(network, ((2, 32, 8, 8), (2, 32, 16, 16), (2, 4, 8, 8), (5, 64))):
            layer(noise(*shape))
        assert [layer.weight is None for layer in network] == [False, False, True, True]
        network[1] = PackedConvolution(Convolution(given[1]))
        network[1](noise(2, 32, 16, 16))
        assert network[1].weight is None and distance(network[1](few), before.double()) <= 2e-6
    held = weights_of(network)
    for place, one in enumerate(given):
        found = held[f"{place}.weight"]
        truth = weight_as(found, one["weight"].reshape(found.shape) if place == 3 else one["weight"])
        assert torch.equal(found, truth)
    assert held["1.weight"].shape != given[1]["weight"].shape


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_a_transformed_weight_is_that_of_fp64(vector_bytes, monkeypatch):
    """The last of an odd number of panels is filled with zeros."""
    inner = _C.winograd_weight
    monkeypatch.setattr(_C, "winograd_weight", lambda *arguments: inner(*arguments, vector_bytes))
    weight = noise(48, 32, 3, 3)
    rows = [[16 / 9, 0, 0], [-1, -1 / 2, -1 / 4], [-1, 1 / 2, -1 / 4], [1 / 9, 1 / 6, 1 / 4], [1 / 9, -1 / 6, 1 / 4]]
    taps = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    truth = torch.einsum("yr,oirs,xs->yxoi", taps, weight.double(), taps).flatten(0, 1)
    found = winograd.transform_weight(weight)
    panels = found.transpose(2, 3).flatten(1, 2)  # [36, outputs, channels]
    assert distance(panels[:, :48], truth) <= 3e-8 and (panels[:, 48:] == 0).all()


def test_panels_are_the_weight_in_another_order():
    for outputs in (48, 32):
        panels = winograd.in_panels(weight := noise(outputs, 32, 3, 3))
        assert torch.equal(winograd.from_panels(panels, outputs), weight)
        assert (panels.transpose(2, 3).transpose(1, 2).flatten(0, 1)[outputs:] == 0).all()


@torch.inference_mode()
def test_a_large_weight_is_transformed_at_each_call(monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.models.packed.LARGEST_HELD", 0)
    x, one = image(2, 32, 16, 16), weights(32, 32)
    fleeting = PackedConvolution(Convolution(one))
    upsample = PackedUpsample(Upsample(one))
    found = [fleeting(x), upsample(x)]
    assert fleeting.weight is upsample.weight is fleeting._transformed is None
    assert torch.equal(weights_of(torch.nn.Sequential(fleeting))["0.weight"], one["weight"])
    assert torch.equal(weights_of(torch.nn.Sequential(upsample))["0.taps"], one["weight"])
    monkeypatch.undo()
    held = PackedConvolution(Convolution(one))(x), PackedUpsample(Upsample(one))(x)
    for ours, other in zip(found, held):
        assert distance(ours, other.double()) <= 1e-6


@torch.inference_mode()
def test_a_residual_stays_as_it_is():
    """It may be an activation that others still read."""
    ours = PackedConvolution(Convolution(weights(16, 16)))
    for side in (2, 16):
        x = image(2, 16, side, side)
        before = x.clone()
        ours(x, residual=x)
        assert torch.equal(x, before)


@torch.inference_mode()
def test_slices_at_once_share_one_packed_weight():
    x, plain = image(8, 32, 16, 16), Convolution(weights(32, 32))
    truth, before = PackedConvolution(plain)(x), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            ours = PackedConvolution(plain)
            assert torch.equal(torch.cat(Lanes().map(ours, [(part,) for part in x.split(2)])), truth)
    finally:
        torch.set_num_threads(before)


BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bf16"
)


@pytest.mark.parametrize(
    ("dtype", "has_tiles", "form", "limit"),
    [
        (torch.float32, True, PackedUpsample, 2e-6),
        (torch.bfloat16, False, PackedUpsample, 1e-2),
        pytest.param(torch.bfloat16, True, PackedPlaces, 1e-2, marks=BF16),
    ],
)
@pytest.mark.parametrize("side", [1, 3, 16])
@torch.inference_mode()
def test_a_packed_upsample_says_what_the_plain_one_says(side, dtype, has_tiles, form, limit, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(packed, "fits_tiles", lambda weight: False)
    plain = Upsample(weights(32, 32))
    truth = plain(image(2, 32, side, side).to(dtype).float())
    (ours,) = pack_layers(torch.nn.Sequential(plain.to(dtype)))
    found = ours(image(2, 32, side, side).to(dtype))
    assert type(ours) is form and found.dtype == dtype and distance(found, truth.double()) <= limit


TILES = pytest.mark.skipif(not _C.multiplies_tiles(), reason="this CPU multiplies no tiles of bf16")
# images of one cell, of odd sides, of several blocks along each axis, and weights of several parts
SHAPES = [(1, 32, 1, 1, 32), (3, 32, 5, 7, 96), (2, 352, 8, 16, 32), (1, 320, 90, 128, 32), (5, 2560, 9, 9, 32)]


@TILES
@pytest.mark.parametrize(("images", "channels", "height", "width", "outputs"), SHAPES)
@torch.inference_mode()
def test_a_convolution_by_tiles_says_what_the_plain_one_says(images, channels, height, width, outputs, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    plain, x = Convolution(weights(outputs, channels)).bfloat16(), image(images, channels, height, width).bfloat16()
    kept = plain.weight.clone()
    residual, bias = image(images, outputs, height, width).bfloat16(), noise(outputs, 2)[:, 0]
    (ours,) = pack_layers(torch.nn.Sequential(plain))
    assert type(ours) is TiledConvolution
    truth = F.conv2d(x.double(), kept.double(), bias.double(), padding=1)
    answers = []
    for count in (1, 3):
        monkeypatch.setattr(packed, "threads", lambda *_, count=count: count)
        answers.append(ours(x, bias, residual))
    assert torch.equal(*answers) and distance(answers[0], truth + residual.double()) <= 2**-8
    assert torch.equal(ours(x[-1:], bias, residual[-1:]), answers[0][-1:])  # whatever else is in a batch
    assert distance(ours(x), truth - bias.double()[:, None, None] + plain.bias.double()[:, None, None]) <= 2**-8
    assert torch.equal(weights_of(nn.Sequential(ours))["0.weight"], kept)


@TILES
@pytest.mark.parametrize(("images", "channels", "height", "width", "outputs"), SHAPES)
@torch.inference_mode()
def test_an_upsample_by_tiles_says_what_the_plain_one_says(images, channels, height, width, outputs, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    plain, x = Upsample(weights(outputs, channels)), image(images, channels, height, width).bfloat16()
    kept = plain.weight.bfloat16()
    (ours,) = pack_layers(torch.nn.Sequential(plain.bfloat16()))
    truth = join_places(F.conv2d(x.double(), kept.double(), plain.bias.double(), padding=1))
    assert type(ours) is TiledPlaces and distance(ours(x), truth) <= 2**-8
    assert torch.equal(weights_of(nn.Sequential(ours))["0.weight"], kept)


@pytest.mark.parametrize("side", [2, 3])
def test_tiles_hold_the_weight_that_they_were_made_of(side):
    weight = noise(64, 96, side, side).bfloat16()
    tiles = in_tiles(weight)
    assert tiles.shape == (2, 3, side, side, 2, 16, 16, 2) and torch.equal(from_tiles(tiles), weight)
    assert (
        tiles[1, 2, 1, 0, 1, 5, 3, 1] == weight[32 + 16 + 3, 64 + 2 * 5 + 1, 1, 0]
    )  # output 3, the pair 5 of channels
    assert not winograd.takes(noise(64, 64, 3, 3).double()) and not fits_tiles(noise(64, 64, 3, 3))


def test_a_convolution_by_tiles_refuses_what_it_cannot_read():
    tiles = in_tiles(noise(32, 64, 3, 3).bfloat16())
    right = [image(1, 64, 4, 4).bfloat16(), tiles, noise(32), image(1, 32, 4, 4).bfloat16()]
    for place, wrong in ((0, image(1, 64, 4, 4)), (0, image(1, 32, 4, 4).bfloat16()), (2, noise(64))):
        with pytest.raises(ValueError, match="convolve: "):
            convolve_tiles(*right[:place], wrong, *right[place + 1 :])
    for wrong in (right[3].float(), right[3][..., :2]):
        with pytest.raises(ValueError, match="convolve: residual"):
            convolve_tiles(*right[:3], wrong)


@TILES
def test_the_compiled_convolution_by_tiles_refuses_what_it_cannot_read():
    right = [image(1, 64, 4, 4).bfloat16(), in_tiles(noise(32, 64, 3, 3).bfloat16()), noise(32)]
    right.append(image(1, 32, 4, 4).bfloat16())
    places = [x.data_ptr() for x in (*right, right[3])]
    for place, wrong in ((0, 0), (2, 0), (4, 0), (5, 0), (8, 48), (9, 16), (10, 1), (11, 0)):
        numbers = [*places, 1, 4, 4, 64, 32, 3, 1]
        numbers[place] = wrong
        with pytest.raises(ValueError):
            _C.tiled_convolution(*numbers)


@torch.inference_mode()
def test_a_cpu_that_multiplies_tiles_takes_no_pairs_of_bf16(monkeypatch):
    """Tiles are PyTorch's: csrc's pairs take three to nine times as long there."""
    monkeypatch.setattr(_C, "winograd", None)  # and whoever calls it fails
    monkeypatch.setattr(_C, "attention", None)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    x, plain = image(2, 32, 16, 16), Convolution(weights(32, 32))
    truth, (q, k, v) = plain(x), noise(3, 1, 2, 32, 16)
    (ours,) = pack_layers(torch.nn.Sequential(plain.bfloat16()))
    assert distance(ours(x.bfloat16()), truth.double()) <= 1e-2
    half = attention.native(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert distance(half, attention.reference(q, k, v).double()) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_spends_its_input_says_what_the_plain_one_says(dtype):
    shapes = {"norm1": (32,), "conv1": (16, 32, 3, 3), "norm2": (16,), "conv2": (16, 16, 3, 3)}
    shapes |= {"conv_shortcut": (16, 32, 1, 1)}
    state = {f"{name}.weight": noise(*shape, scale=0.3) for name, shape in shapes.items()}
    state |= {f"{name}.bias": noise(shape[0], 2)[:, 0] for name, shape in shapes.items()}
    plain = Resnet(Weights(state), 4, 1e-6, operations(torch.device("cpu"), dtype)).to(dtype)
    x = image(2, 32, 12, 12).to(dtype)
    with torch.inference_mode():
        truth = plain(x)
    block = pack_layers(nn.ModuleList([plain]))[0]
    assert block.norm2.op is NORM_IN_PLACE is not block.norm1.op
    with torch.inference_mode():
        answer, spent = block(x), x.clone(memory_format=torch.preserve_format)
        assert distance(answer, truth.double()) <= (1e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(InPlaceResnet(block)(spent), answer) and not spent.untyped_storage().nbytes()


def test_without_onednn_no_layer_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert pack_layers(module) is module and type(module[0]) is torch.nn.Linear


def test_a_weight_is_as_far_as_its_farthest_number_and_a_missing_one_farther_than_any():
    far = torch.finfo(torch.double).max
    truth = {"a.weight": torch.tensor([2.0, -4.0]), "b.bias": torch.zeros(0)}
    assert largest_distance(truth, truth) == 0.0 == largest_distance({}, {})
    assert largest_distance(truth | {"a.weight": torch.tensor([1.0, -4.0])}, truth) == 0.25
    assert largest_distance(truth | {"a.weight": torch.tensor([2.0, torch.nan])}, truth) == far
    assert largest_distance({"a.weight": truth["a.weight"]}, truth) == far
    assert (
        largest_distance({"a.taps": truth["a.weight"], "b.bias": truth["b.bias"], "c.bias": truth["b.bias"]}, truth)
        == 0
    )
    held = {"a.weight": winograd.transform_weight(weight := torch.randn(32, 16, 3, 3))}
    assert largest_distance(held, {"a.weight": weight}) == 0.0 < largest_distance(held, {"a.weight": weight + 1})
