"""The native depth head, and its gradients: every instruction set, any number of threads, the border, what is
refused.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.engine.decoders.checkpoint import seeded_decoders
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.kernels import depth_head
from datasetdm_fast.training.trainer import project


def head(batch: int, channels: int, hidden: int, side: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(hidden * side)
    shapes = (batch, channels, side, side), (hidden, channels, 3, 3), (hidden,), (1, hidden, 3, 3), (1,)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def end(inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    """Products, bias and taps of the last convolution."""
    x, weight, bias, last, _ = (one.numpy() for one in inputs)
    products = np.einsum("bcyx,oclk->byxlko", x, weight).reshape(len(x), *x.shape[2:], 9, -1)
    return [np.ascontiguousarray(one) for one in (products, bias, last[0].reshape(-1, 9).T)]


def added(inputs: tuple[Tensor, ...], middle: int, full: int, threads: int, vector_bytes: int) -> np.ndarray:
    logits = np.zeros((len(inputs[0]), full, full), inputs[0].numpy().dtype)
    _C.depth_head_add(*end(inputs), middle, logits, threads, vector_bytes)
    return logits


def gradients(inputs: tuple[Tensor, ...], middle: int, full: int, threads: int, vector_bytes: int) -> list[np.ndarray]:
    """Those of products, bias and taps, written over NaN, for a gradient of the logits that is different everywhere."""
    given = end(inputs)
    answers = [np.full_like(one, np.nan) for one in given]
    out = gradient(len(inputs[0]), full).numpy().astype(given[0].dtype)
    _C.depth_head_gradient(*given, middle, out, *answers, threads, vector_bytes)
    return answers


def gradient(batch: int, full: int) -> Tensor:
    return torch.randn(batch, full, full, generator=torch.Generator().manual_seed(full), dtype=torch.float64)


def known_gradients(inputs: tuple[Tensor, ...], middle: int, full: int) -> list[np.ndarray]:
    """The same by PyTorch, from the definition."""
    products, bias, taps = (torch.from_numpy(one).requires_grad_() for one in end(inputs))
    planes = products.permute(0, 3, 4, 1, 2)  # [B, 9, C, h, h]
    for side in (middle, full):
        planes = F.interpolate(planes.flatten(1, 2), size=(side, side), mode="bilinear").unflatten(1, (9, -1))
    around = F.pad(planes, (1, 1, 1, 1))
    shifted = (around[:, tap, :, tap // 3 : tap // 3 + full, tap % 3 : tap % 3 + full] for tap in range(9))
    hidden = F.relu(sum(shifted) + bias[:, None, None])
    logits = F.conv2d(hidden, taps.T.unflatten(1, (3, 3))[None], padding=1)[:, 0]
    found = torch.autograd.grad(logits, (products, bias, taps), gradient(len(products), full))
    return [one.numpy() for one in found]


def distance(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


SHAPES = [  # hidden channels, sides of the cells, in the middle and in full
    (3, 1, 1, 1),  # smallest: every tap but the middle one lies outside
    (33, 3, 7, 17),  # one channel into a second tile
    (40, 6, 15, 66),  # two pixels into a second block
    (32, 5, 5, 5),  # nothing is resized
    (8, 9, 20, 11),  # down at the end
    (5, 4, 60, 7),  # rows in the middle that no pixel reads
]


@pytest.mark.parametrize("vector_bytes", _C.depth_head_vector_bytes())
@pytest.mark.parametrize(("hidden", "side", "middle", "full"), SHAPES)
def test_every_instruction_set_is_exact(vector_bytes, hidden, side, middle, full):
    inputs = head(2, 4, hidden, side)
    expected = depth_head.reference(*inputs[:4], torch.zeros(1, dtype=torch.float64), (middle, full))[:, 0].numpy()
    assert distance(added(inputs, middle, full, 1, vector_bytes), expected) <= 1e-12
    narrow = tuple(one.float() for one in inputs)
    assert distance(added(narrow, middle, full, 1, vector_bytes), expected) <= 2e-6


@pytest.mark.parametrize("vector_bytes", _C.depth_head_vector_bytes())
@pytest.mark.parametrize(("hidden", "side", "middle", "full"), SHAPES)
def test_gradients_of_every_instruction_set_are_exact(vector_bytes, hidden, side, middle, full):
    inputs = head(2, 4, hidden, side)
    expected = known_gradients(inputs, middle, full)
    for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        given = tuple(one.to(dtype) for one in inputs)
        for ours, theirs in zip(gradients(given, middle, full, 1, vector_bytes), expected, strict=True):
            assert distance(ours, theirs) <= budget


def test_threads_do_not_change_a_bit():
    inputs = head(2, 3, 70, 5, torch.float32)
    alone = [added(inputs, 12, 37, 1, 0), *gradients(inputs, 12, 37, 1, 0)]
    for threads in (2, 3, 40):
        for found, expected in zip([added(inputs, 12, 37, threads, 0), *gradients(inputs, 12, 37, threads, 0)], alone):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sides", [(23,), (4, 9, 20)])
def test_one_resize_or_three(sides):
    inputs = head(1, 4, 40, 6)
    assert distance(depth_head.native(*inputs, sides).numpy(), depth_head.reference(*inputs, sides).numpy()) <= 1e-12


def test_inputs_stay_as_they_were():
    inputs = head(1, 1, 1, 1, torch.float32)
    before = [one.clone() for one in inputs]
    depth_head.native(*inputs, (1,))
    assert all(torch.equal(one, other) for one, other in zip(inputs, before))


def test_bf16_is_added_in_fp32():
    inputs = head(1, 64, 48, 8)
    exact = depth_head.reference(*inputs, (20, 64))
    narrow = tuple(one.bfloat16() for one in inputs)
    ours, naive = depth_head.native(*narrow, (20, 64)), depth_head.reference(*narrow, (20, 64))
    assert ours.dtype == torch.bfloat16
    assert distance(ours.double().numpy(), exact.numpy()) <= 2 * distance(naive.double().numpy(), exact.numpy()) + 1e-3


def test_training_is_refused():
    inputs = head(1, 2, 3, 4, torch.float32)
    inputs[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        depth_head.native(*inputs, (8,))
    with torch.no_grad(), pytest.raises(ValueError, match="got a tensor on meta, expected one on the CPU"):
        depth_head.native(*(x.to("meta") for x in inputs), (8,))


def test_wrong_shapes_are_refused():
    products, logits = np.zeros((1, 2, 2, 9, 4), np.float32), np.zeros((1, 8, 8), np.float32)
    bias, last = np.zeros(4, np.float32), np.zeros((9, 4), np.float32)
    for arguments, said in [
        ((products[..., :8, :].copy(), bias, last, 4, logits, 1), "h, h, 9, C"),
        ((products, bias[:3].copy(), last, 4, logits, 1), "bias"),
        ((products, bias, last[:8].copy(), 4, logits, 1), "last"),
        ((products, bias, last[:, :3].copy(), 4, logits, 1), "last"),
        ((products[:, :1].copy(), bias, last, 4, logits, 1), "h, h, 9, C"),
        ((products, bias, last, 4, np.zeros((2, 8, 8), np.float32), 1), "batch of the products"),
        ((products, bias, last, 0, logits, 1), "middle"),
        ((products, bias, last, 4, logits, 0), "threads is 0"),
        ((products, bias, last, 4, logits, 1, 7), "vectors of 7 bytes"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.depth_head_add(*arguments)
    with pytest.raises(TypeError):
        _C.depth_head_add(products, bias, last, 4, logits.astype(np.float64), 1)


def test_a_nan_is_not_hidden_from_a_training():
    products, bias, taps = end(head(1, 2, 3, 4, torch.float32))
    products[0, 1, 2, 4, 1] = np.nan
    logits, answers = np.zeros((1, 4, 4), np.float32), [np.empty_like(one) for one in (products, bias, taps)]
    _C.depth_head_add(products, bias, taps, 4, logits, 1)
    _C.depth_head_gradient(products, bias, taps, 4, np.ones_like(logits), *answers, 1)
    assert np.isnan(logits).any()
    assert np.isnan(answers[2]).all(0).tolist() == [False, True, False] and not np.isnan(answers[2][:, [0, 2]]).any()


@pytest.mark.parametrize("sides", [(23,), (9, 20), (4, 9, 20)])
def test_a_head_in_training_is_the_plain_one(sides):
    inputs = head(2, 4, 70, 6)
    both = []
    for form in (depth_head.apply_trained, depth_head.plain):
        own = [one.clone().requires_grad_() for one in inputs]
        answer = form(*own, sides)
        both.append((answer.detach(), *torch.autograd.grad(answer.square().sum(), own)))
    for found, expected in zip(*both):
        assert found.shape == expected.shape and distance(found.numpy(), expected.numpy()) <= 1e-12


def test_a_training_in_bf16_takes_the_plain_head(monkeypatch):
    monkeypatch.delattr(_C, "depth_head_add")
    inputs = head(1, 2, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (form(*inputs, (8,)) for form in (depth_head.apply_trained, depth_head.plain))
    assert torch.equal(found, expected)


def test_a_decoder_in_training_takes_the_trained_head(monkeypatch):
    taken = []
    monkeypatch.setattr(depth_head, "apply_trained", lambda *arguments: taken.append(1) or depth_head.plain(*arguments))
    model = load_model("tiny")
    decoder = seeded_decoders(model.levels, 32)["depth"]
    levels = [torch.zeros(1, level.side**2, level.channels) for level in model.levels]
    for is_training in (False, True):
        decoder.train(is_training)(project(decoder, levels))
        assert len(taken) == is_training


def test_wrong_shapes_of_a_training_are_refused():
    products, bias, taps = end(head(1, 2, 4, 3, torch.float32))
    out = np.zeros((1, 8, 8), np.float32)
    for gradient, answers, threads, said in [
        (out[:, :7].copy(), (products, bias, taps), 1, "logits must be"),
        (out, (products[:, :2].copy(), bias, taps), 1, "products has another shape"),
        (out, (products, bias[:3].copy(), taps), 1, "bias has another shape"),
        (out, (products, bias, taps[:, :3].copy()), 1, "last has another shape"),
        (out, (products, bias, taps), 0, "threads is 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.depth_head_gradient(products, bias, taps, 4, gradient, *answers, threads)
    with pytest.raises(TypeError):
        _C.depth_head_gradient(products, bias, taps, 4, out.astype(np.float64), products, bias, taps, 1)
