"""The native depth head, and its end in training: every instruction set, any number of threads, the border, what is
refused.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.decoders.seeded import untrained_decoders
from datasetdm_fast.kernels import depth_head
from datasetdm_fast.loading import load_model
from datasetdm_fast.training.loop import projected


def head(batch: int, channels: int, hidden: int, side: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(hidden * side)
    shapes = (batch, channels, side, side), (hidden, channels, 3, 3), (hidden,), (1, hidden, 3, 3), (1,)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def added(inputs: tuple[Tensor, ...], middle: int, full: int, threads: int, vector_bytes: int) -> np.ndarray:
    x, weight, bias, last, _ = (one.numpy() for one in inputs)
    products = np.ascontiguousarray(np.einsum("bcyx,oclk->byxlko", x, weight).reshape(len(x), *x.shape[2:], 9, -1))
    logits = np.zeros((len(x), full, full), x.dtype)
    _C.depth_head_add(
        products, bias, np.ascontiguousarray(last[0].reshape(-1, 9).T), middle, logits, threads, vector_bytes
    )
    return logits


def distance(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("vector_bytes", _C.depth_head_vector_bytes())
@pytest.mark.parametrize(
    ("hidden", "side", "middle", "full"),
    [
        (3, 1, 1, 1),  # smallest: every tap but the middle one lies outside
        (33, 3, 7, 17),  # one channel into a second tile
        (40, 6, 15, 66),  # two pixels into a second block
        (32, 5, 5, 5),  # nothing is resized
        (8, 9, 20, 11),  # down at the end
    ],
)
def test_every_instruction_set_is_exact(vector_bytes, hidden, side, middle, full):
    inputs = head(2, 4, hidden, side)
    expected = depth_head.reference(*inputs[:4], torch.zeros(1, dtype=torch.float64), (middle, full))[:, 0].numpy()
    assert distance(added(inputs, middle, full, 1, vector_bytes), expected) <= 1e-12
    narrow = tuple(one.float() for one in inputs)
    assert distance(added(narrow, middle, full, 1, vector_bytes), expected) <= 2e-6


def test_threads_do_not_change_a_bit():
    inputs = head(2, 3, 70, 5, torch.float32)
    alone = added(inputs, 12, 37, 1, 0)
    for threads in (2, 3, 40):
        np.testing.assert_array_equal(added(inputs, 12, 37, threads, 0), alone)


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


def test_wrong_shapes_are_refused():
    products, logits = np.zeros((1, 2, 2, 9, 4), np.float32), np.zeros((1, 8, 8), np.float32)
    bias, last = np.zeros(4, np.float32), np.zeros((9, 4), np.float32)
    for arguments, said in [
        ((products[..., :8, :].copy(), bias, last, 4, logits, 1), "h, h, 9, C"),
        ((products, bias[:3].copy(), last, 4, logits, 1), "bias"),
        ((products, bias, last[:8].copy(), 4, logits, 1), "last"),
        ((products, bias, last, 4, np.zeros((2, 8, 8), np.float32), 1), "batch of the products"),
        ((products, bias, last, 0, logits, 1), "middle"),
        ((products, bias, last, 4, logits, 0), "threads is 0"),
        ((products, bias, last, 4, logits, 1, 7), "vectors of 7 bytes"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.depth_head_add(*arguments)
    with pytest.raises(TypeError):
        _C.depth_head_add(products, bias, last, 4, logits.astype(np.float64), 1)


def end(batch: int, channels: int, height: int, width: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    """A wide map, its bias, the taps of the last convolution and a gradient of its answer."""
    generator = torch.Generator().manual_seed(channels * width)
    shapes = (batch, channels, height, width), (channels,), (9, channels), (batch, height, width)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def end_reference(hidden: Tensor, bias: Tensor, taps: Tensor) -> Tensor:
    weight = taps.T.unflatten(1, (3, 3))[None]
    return F.conv2d(F.relu(hidden + bias[:, None, None]), weight, padding=1)[:, 0]


def ended(inputs: tuple[Tensor, ...], threads: int = 1, vector_bytes: int = 0) -> list[np.ndarray]:
    """The answer and the gradients of what it is made of, written over NaN."""
    hidden, bias, taps, gradient = (one.numpy() for one in inputs)
    answers = [np.full_like(one, np.nan) for one in (gradient, hidden, bias, taps)]
    _C.hidden_convolution(hidden, bias, taps, answers[0], threads, vector_bytes)
    _C.hidden_convolution_gradient(hidden, bias, taps, gradient, *answers[1:], threads, vector_bytes)
    return answers


@pytest.mark.parametrize("vector_bytes", _C.depth_head_vector_bytes())
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),  # every tap but the middle one lies outside
        (2, 3, 5, 4),  # narrower than a vector
        (2, 5, 33, 16),  # one row into a second band
        (1, 4, 70, 67),  # three bands, a ragged last vector
    ],
)
def test_the_end_in_training_and_its_gradients_by_every_instruction_set(vector_bytes, shape):
    inputs = end(*shape)
    known = [one.clone().requires_grad_() for one in inputs[:3]]
    answer = end_reference(*known)
    truth = [answer.detach(), *torch.autograd.grad(answer, known, inputs[3])]
    for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for found, expected in zip(ended(tuple(one.to(dtype) for one in inputs), 1, vector_bytes), truth):
            assert distance(found, expected.numpy()) <= budget


def test_threads_do_not_change_a_bit_of_a_training():
    inputs = end(3, 7, 41, 37, torch.float32)
    alone = ended(inputs)
    for threads in (2, 3, 40):
        for found, expected in zip(ended(inputs, threads), alone):
            np.testing.assert_array_equal(found, expected)


def test_a_nan_is_not_hidden_from_a_training():
    inputs = end(1, 2, 4, 20, torch.float32)
    for place in (0, 19):  # of a whole vector and of what is left
        hidden = inputs[0].clone()
        hidden[0, 1, 2, place] = torch.nan
        answer, to_hidden, _, to_last = ended((hidden, *inputs[1:]))
        assert np.isnan(answer).sum() == 6 and np.isnan(to_last).sum() == 9 and not np.isnan(to_last[:, 0]).any()
        assert not np.isnan(to_hidden).any()


@pytest.mark.parametrize("sides", [(23,), (9, 20)])
def test_a_head_in_training_is_the_plain_one(sides):
    inputs = head(2, 4, 70, 6)  # six channels into a second part
    gradients = []
    for form in (depth_head.trained, depth_head.plain):
        own = [one.clone().requires_grad_() for one in inputs]
        answer = form(*own, sides)
        gradients.append((answer.detach(), *torch.autograd.grad(answer.square().sum(), own)))
    for found, expected in zip(*gradients):
        assert found.shape == expected.shape and distance(found.numpy(), expected.numpy()) <= 1e-12


def test_a_training_in_bf16_takes_the_plain_head(monkeypatch):
    monkeypatch.delattr(_C, "hidden_convolution")
    inputs = head(1, 2, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (form(*inputs, (8,)) for form in (depth_head.trained, depth_head.plain))
    assert torch.equal(found, expected)


def test_a_decoder_in_training_takes_the_trained_head(monkeypatch):
    taken = []
    monkeypatch.setattr(depth_head, "trained", lambda *arguments: taken.append(1) or depth_head.plain(*arguments))
    model = load_model("tiny")
    decoder = untrained_decoders(model.levels, 32)["depth"]
    levels = [torch.zeros(1, level.side**2, level.channels) for level in model.levels]
    for is_training in (False, True):
        decoder.train(is_training)(projected(decoder, levels))
        assert len(taken) == is_training


def test_wrong_shapes_of_a_training_are_refused():
    hidden, bias, taps, plane = (one.numpy() for one in end(1, 4, 3, 5, torch.float32))
    out = np.zeros_like(plane)
    for arguments, said in [
        ((hidden[0], bias, taps, out, 1), "B, C, H, W"),
        ((hidden, bias[:3].copy(), taps, out, 1), "bias"),
        ((hidden, bias, taps[:8].copy(), out, 1), "last"),
        ((hidden, bias, taps, np.zeros((1, 5, 3), np.float32), 1), "the plane"),
        ((hidden, bias, taps, out, 0), "threads is 0"),
        ((hidden, bias, taps, out, 1, 7), "vectors of 7 bytes"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.hidden_convolution(*arguments)
    for answers, said in [
        ((hidden[:, :3].copy(), bias, taps), "hidden has another shape"),
        ((hidden, bias[:3].copy(), taps), "bias has another shape"),
        ((hidden, bias, taps[:, :3].copy()), "last has another shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.hidden_convolution_gradient(hidden, bias, taps, plane, *answers, 1)
    with pytest.raises(TypeError):
        _C.hidden_convolution(hidden, bias, taps, out.astype(np.float64), 1)
