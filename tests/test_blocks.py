"""Blocks of csrc: every instruction set against the plain module in fp64, whatever the threads."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.models.blocks import BLOCKS, Packing, UNetBlock, blockwise, with_blocks
from datasetdm_fast.engine.models.capture import CaptureHook
from datasetdm_fast.engine.models.layers import Convolution, Layers, Resnet, Upsample, Weights
from datasetdm_fast.engine.models.unet import TextTable, TimeTable, Transformer, UNet
from datasetdm_fast.kernels import cpu, plain
from datasetdm_fast.kernels.noise import noise

VECTORS = _C.depth_head_vector_bytes()
TEXT, HEADS = 7, 3


def image(*shape: int) -> Tensor:
    return noise(*shape).contiguous(memory_format=torch.channels_last)


def state(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Weights of unit gain and small biases."""
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = noise(*shape) / shape[1:].numel() ** 0.5 if len(shape) > 1 else noise(*shape) / 9 + 1
        found[f"{name}.bias"] = noise(shape[0] + 1)[1:] / 9
    return Weights({name: value.clone() for name, value in found.items()})


def resnet(channels: int, outputs: int) -> Resnet:
    size = torch.Size
    shapes = {"norm1": size([channels]), "conv1": size([outputs, channels, 3, 3]), "norm2": size([outputs])}
    shapes |= {"conv2": size([outputs, outputs, 3, 3])}
    shapes |= {} if channels == outputs else {"conv_shortcut": size([outputs, channels, 1, 1])}
    return Resnet(state(shapes), 4, 1e-5, plain)


def transformer(channels: int) -> Transformer:
    size, block = torch.Size, "transformer_blocks.0."
    square = size([channels, channels])
    shapes = {"norm": square[:1], "proj_in": square, "proj_out": square}
    shapes |= {f"{block}norm{k}": square[:1] for k in (1, 2, 3)}
    shapes |= {f"{block}attn{k}.to_{name}": square for k in (1, 2) for name in ("q", "k", "v", "out.0")}
    shapes |= {f"{block}ff.net.0.proj": size([8 * channels, channels])}
    shapes |= {f"{block}ff.net.2": size([channels, 4 * channels])}
    return Transformer(state(shapes), Layers(4, 1e-5, plain), HEADS, (0, 0))


def case(kind: str) -> tuple[torch.nn.Module, list]:
    if kind == "resnet of many tiles":
        return resnet(32, 48), [image(3, 32, 9, 8), noise(48)]
    if kind == "resnet of few tiles, channels that fill no panel":
        return resnet(20, 20), [image(3, 20, 2, 3), noise(20)]
    if kind == "resnet that narrows":
        return resnet(512, 16), [image(3, 512, 9, 8), noise(16)]
    if kind == "convolution with stride 2":
        return Convolution(state({"": torch.Size([36, 32, 3, 3])}) / "", stride=2), [image(2, 32, 7, 6)]
    if kind.startswith("upsample"):
        side = 1 if kind == "upsample of few tiles" else 5
        return Upsample(state({"": torch.Size([48, 32, 3, 3])}) / ""), [image(3, 32, side, side + 1)]
    if kind == "convolution of few channels":
        return Convolution(state({"": torch.Size([4, 16, 3, 3])}) / "", stride=1), [image(5, 16, 8, 8)]
    batch, rows = (2, 4) if kind == "transformer where the halves part" else (3, 3)
    text = tuple(noise(rows, HEADS, TEXT, 8) for _ in range(2))
    return transformer(24), [image(batch, 24, 3, 3), (text,), CaptureHook(plain)]


CASES = (
    "resnet of many tiles",
    "resnet of few tiles, channels that fill no panel",
    "resnet that narrows",
    "convolution with stride 2",
    "convolution of few channels",
    "upsample of many tiles",
    "upsample of few tiles",
    "transformer",
    "transformer where the halves part",
)


def widened(given):
    if isinstance(given, tuple):
        return tuple(map(widened, given))
    return given.double() if isinstance(given, Tensor) else given


class OfWidth:
    """A block of csrc whose calls take these vectors and this number of threads."""

    def __init__(self, native, threads: int, vector_bytes: int):
        self.native, self.last = native, (threads, vector_bytes)

    def __getattr__(self, name: str):
        return lambda *arguments: getattr(self.native, name)(*arguments[:-1], *self.last)


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("kind", CASES)
@torch.inference_mode()
def test_a_block_says_what_the_plain_module_says(kind, in_pairs, monkeypatch):
    """In fp32, or with the factors of its products rounded to bf16."""
    module, given = case(kind)
    truth = copy.deepcopy(module).double()(*widened(tuple(given)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **keywords: empty(*shape, **keywords).fill_(torch.nan))
    block = BLOCKS[type(module)](module)
    packing = Packing(in_pairs)
    native = block.pack(packing)
    for vector_bytes in VECTORS:
        found = []
        for threads in (1, 2, 5):
            block._packed = OfWidth(native, threads, vector_bytes), packing.held
            found.append(block(*given))
            assert torch.equal(found[0], found[-1])
        assert distance(found[0], truth) <= (2e-2 if in_pairs else 2e-6)
        assert not in_pairs or distance(found[0], truth) >= 1e-4
    assert block.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_a_product_in_pairs_of_an_odd_number_of_inputs(vector_bytes):
    """The last of each row stands beside a zero, not beside the first of the next row."""
    x, weight, bias, out = noise(5, 7), noise(32, 7, scale=2), torch.zeros(32), torch.full((5, 32), torch.nan)
    packed = cpu.pair_inputs(cpu.panels(weight))
    product = _C.Convolution(packed.data_ptr(), bias.data_ptr(), 0, 7, 32, 1, 1, 0, True)
    product.run(x.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), 1, 1, 5, 1, vector_bytes)
    assert distance(out, x.bfloat16().double() @ weight.bfloat16().double().T) <= 1e-6


class Heard(CaptureHook):
    """Keeps what a hook hears of."""

    def __init__(self):
        super().__init__(plain)
        self.features: dict = {}
        self.queries: dict = {}

    def feature(self, slot, x: Tensor) -> None:
        self.features[slot] = x.clone()

    def on_queries(self, slot, q: Tensor, k: Tensor) -> None:
        self.queries[slot] = q @ k.transpose(-1, -2)


class HeardOneByOne(Heard):
    def reads_self(self, cells: int) -> bool:
        return True


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("batch", "in_pairs"), [(1, False), (3, False), (3, True)])
@torch.inference_mode()
def test_a_whole_unet_in_one_call_says_what_the_plain_one_says(batch, in_pairs, monkeypatch):
    """Noise, features and queries, of every instruction set, to the bit on any number of threads."""
    weights = load_model("tiny").networks["unet"].read()
    module = UNet(weights, plain)
    text = torch.stack([noise(TEXT, 32)] * batch + [noise(TEXT + 1, 32)[1:]] * batch)
    given = image(batch, 4, 16, 16), TimeTable(weights)(torch.tensor(321.0)), TextTable(weights)(text)
    given = *given[:2], tuple(table.mT.contiguous().mT for table in given[2])  # as slices of a batch are not contiguous
    truth, told = copy.deepcopy(module).double()(*widened(given), expected := Heard()), expected
    block, empty, most = with_blocks(module, in_pairs), torch.empty, 3e-2 if in_pairs else 4e-6
    assert isinstance(block, UNetBlock) and block.state_dict().keys() == module.state_dict().keys()
    native = block.native()
    monkeypatch.setattr(torch, "empty", lambda *shape, **keywords: empty(*shape, **keywords).fill_(torch.nan))
    for vector_bytes in VECTORS:
        found = []
        for threads in (1, 2, 5):
            own = OfWidth(native, threads, vector_bytes)
            block._packed = own, []
            own.sizes = native.sizes
            found.append(block(*given, CaptureHook(plain)))
            noise_beside = block(*given, heard := Heard())
            assert torch.equal(found[0], found[-1]) and torch.equal(found[0], noise_beside)
            for kept, right in ((heard.features, told.features), (heard.queries, told.queries)):
                assert kept.keys() == right.keys() and kept
                assert all(distance(kept[slot], right[slot]) <= most for slot in right)
        assert distance(found[0], truth) <= most and (not in_pairs or distance(found[0], truth) >= 1e-4)
    block._packed = native, []
    with pytest.raises(ValueError, match="12 x 12 cells do not halve and double"):
        block(image(batch, 4, 12, 12), *given[1:], CaptureHook(plain))
    with pytest.raises(ValueError, match="texts for"):
        block(image(batch + 1, 4, 16, 16), *given[1:], CaptureHook(plain))
    one_by_one = block(*given, heard := HeardOneByOne())
    assert distance(one_by_one, truth) <= most and heard.features.keys() == told.features.keys()


@torch.inference_mode()
def test_a_hook_is_asked_for_the_self_attention_of_every_side(monkeypatch):
    weights, asked = load_model("tiny").networks["unet"].read(), []
    block, hook = with_blocks(UNet(weights, plain)), CaptureHook(plain)
    monkeypatch.setattr(hook, "reads_self", asked.append)
    block(image(1, 4, 16, 24), TimeTable(weights)(torch.tensor(321.0)), TextTable(weights)(noise(2, TEXT, 32)), hook)
    assert asked == [384, 96, 24, 6]


def test_slices_that_begin_together_run_the_same_packed_weights(monkeypatch):
    """A second packing would free the weights that the first slice is reading."""
    block, made = BLOCKS[Resnet](resnet(16, 16)), []
    packed = block.pack

    def slow(packing: Packing):
        made.append(packing)
        time.sleep(0.1)
        return packed(packing)

    monkeypatch.setattr(block, "pack", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: block.native(), range(2))
    assert first is second and len(made) == 1


def test_only_small_blocks_in_fp32_are_replaced():
    small, large = resnet(16, 16), resnet(256, 256)
    network = blockwise(torch.nn.Sequential(small, large, resnet(16, 16).bfloat16()))
    assert [type(layer) for layer in network] == [BLOCKS[Resnet], Resnet, Resnet]


def test_what_does_not_fit_is_refused():
    norm, wide = _C.Norm(64, 64, 16, 4, 1e-5), _C.Norm(64, 64, 32, 4, 1e-5)
    convolution = _C.Convolution(64, 64, 0, 16, 16, 3, 1, 1)
    with pytest.raises(ValueError, match="second norm: 32 channels, expected 16"):
        _C.Resnet(norm, convolution, wide, convolution, None)
    to_wide, from_wide = _C.Convolution(64, 64, 0, 16, 32, 3, 1, 1), _C.Convolution(64, 64, 0, 32, 16, 3, 1, 1)
    for blocks, refusal in (
        ((norm, convolution, norm, from_wide, None), "second convolution: 32 channels, expected 16"),
        ((wide, from_wide, norm, convolution, convolution), "shortcut: 16 channels, expected 32"),
        ((wide, from_wide, norm, convolution, None), "shortcut: 16 channels, expected 32"),
        ((norm, to_wide, wide, from_wide, to_wide), "shortcut's result: 32 channels, expected 16"),
    ):
        with pytest.raises(ValueError, match=refusal):
            _C.Resnet(*blocks)
    with pytest.raises(ValueError, match="a pointer is null"):
        convolution.run(0, 64, 0, 64, 1, 4, 4, 1)
    with pytest.raises(ValueError, match="threads is 0"):
        convolution.run(64, 64, 0, 64, 1, 4, 4, 0)
    with pytest.raises(ValueError, match="no vectors of 8 bytes"):
        convolution.run(64, 64, 0, 64, 1, 4, 4, 1, 8)
    with pytest.raises(ValueError, match="a stride of 1"):
        _C.Upsample(_C.Convolution(64, 64, 0, 16, 16, 3, 2, 1))
    resnet = _C.Resnet(norm, convolution, norm, convolution, None)
    for steps, refusal in (
        ([_C.Step(resnet)], "halves part in 0 steps"),
        ([_C.Step(resnet, joins=True)], "a step of 16 channels reads 32"),
        ([_C.Step(convolution, joins=True)], "only a resnet joins"),
        ([_C.Step(resnet, parts=True)], "halves part in a transformer"),
    ):
        with pytest.raises(ValueError, match=refusal):
            _C.UNet(convolution, steps, norm, convolution)
    joining = _C.Step(
        _C.Resnet(wide, from_wide, norm, convolution, _C.Convolution(64, 64, 0, 32, 16, 1, 1, 0)), joins=True
    )
    with pytest.raises(ValueError, match="more steps join an earlier output than are kept"):
        _C.UNet(convolution, [joining, joining], norm, convolution)
    with pytest.raises(ValueError, match="5 taps"):
        _C.Convolution(64, 64, 0, 16, 16, 5, 1, 2)


def transformer_of(heads: int = 4, wide: int = 128) -> _C.Transformer:
    """Of 16 channels, of weights that are nowhere."""
    norms, sizes = (
        [_C.Norm(64, 64, 16, 4, 1e-5)] * 4,
        ((16, 16), (16, 48), *[(16, 16)] * 3, (16, wide), (64, 16), (16, 16)),
    )
    return _C.Transformer(*norms, *(_C.Linear(64, 64, *size) for size in sizes), heads)


def test_a_transformer_and_a_call_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16 channels do not make 3 heads"):
        transformer_of(heads=3)
    with pytest.raises(ValueError, match="gated unit: 120 channels, expected 128"):
        transformer_of(wide=120)
    norm, convolution = _C.Norm(64, 64, 16, 4, 1e-5), _C.Convolution(64, 64, 0, 16, 16, 3, 1, 1)
    steps = [_C.Step(transformer_of(), parts=True)]
    with pytest.raises(ValueError, match="are of 32 and 16 channels, expected 16"):
        _C.UNet(convolution, steps, _C.Norm(64, 64, 32, 4, 1e-5), convolution)
    unet = _C.UNet(convolution, steps, norm, convolution)
    for outputs, queries, tokens, refusal in (
        ([64], [], 7, "1 outputs for an entry and 1 steps"),
        ([], [64, 64], 7, "2 queries for 1 transformers"),
        ([], [], 0, "0 tokens"),
    ):
        with pytest.raises(ValueError, match=refusal):
            unet.run(64, 64, [64], 64, outputs, queries, 1, 4, 4, tokens, 1)
