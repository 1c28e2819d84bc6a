"""The native depth head: every instruction set, any number of threads, the border, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels import depth_head


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
