"""The native forms of the network's operations: every instruction set against the reference, and slices of a batch on
several threads.
"""

import math
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.kernels.inputs import cases_of
from bench.machine.measure import with_peak
from datasetdm_fast import _C
from datasetdm_fast.engine.engines.device import Lanes
from datasetdm_fast.kernels import OPS, attention, cpu
from datasetdm_fast.kernels.noise import noise

NATIVE = ("attention", "geglu", "group_norm_silu", "layer_norm")
CASES = [pytest.param(OPS[name], case, id=f"{name}: {case.reason}") for name in NATIVE for case in cases_of(name)]
VECTORS = _C.depth_head_vector_bytes()


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def converted(inputs, dtype) -> list:
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in inputs]


@pytest.fixture
def with_vectors(monkeypatch, request):
    """The extension's functions with one instruction set, writing into memory full of NaN."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for name in ("attention", "group_norm", "layer_norm", "geglu"):
        inner = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *arguments, inner=inner: inner(*arguments, request.param))
    monkeypatch.setattr(torch, "empty_like", lambda x, **keywords: torch.full_like(x, torch.nan, **keywords))
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda x, *shape: torch.full(shape[0] if isinstance(shape[0], tuple) else shape, torch.nan, dtype=x.dtype),
    )


@pytest.mark.parametrize("with_vectors", VECTORS, indirect=True)
@pytest.mark.parametrize(("op", "case"), CASES)
@torch.inference_mode()
def test_says_what_the_reference_says(op, case, with_vectors):
    truth = op.reference(*converted(case.inputs, torch.float64))
    for dtype, budget in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        inputs = converted(case.inputs, dtype)
        plain, ours = distance(op.reference(*inputs), truth), op.native(*inputs)
        assert ours.shape == truth.shape and ours.dtype == dtype
        assert distance(ours, truth) <= max(1.3 * plain, budget), (dtype, plain)


def alternating(dtype=torch.float32, mean: float = 0.0) -> Tensor:
    """[2, 38]: one more and one less than the mean in turn, in every row and every column."""
    return (mean + torch.tensor([[1, -1], [-1, 1]]).repeat(1, 19)).to(dtype)


def normalised(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rows by themselves, or all of them as the cells of one group."""
    if name == "layer_norm":
        return OPS[name].native(x, weight, bias, eps)
    cells = x.T[None, :, None].contiguous(memory_format=torch.channels_last)
    return OPS[name].native(cells, weight, bias, 1, eps, False)[0, :, 0].T


@pytest.mark.parametrize("with_vectors", VECTORS, indirect=True)
@pytest.mark.parametrize("name", ["layer_norm", "group_norm_silu"])
@torch.inference_mode()
def test_norms_of_a_variance_of_one(name, with_vectors):
    """By hand: with an eps of 3 all is halved; with none, in bf16, ties go to the even neighbour, as in PyTorch; far
    from zero nothing is lost but what the mean itself rounds to.
    """
    ones, bias = torch.ones(38), torch.arange(38) / 256
    assert torch.equal(normalised(name, alternating(), ones, 0 * ones, 3.0), alternating() / 2)
    found = normalised(name, alternating(torch.bfloat16), ones.bfloat16(), bias.bfloat16(), 0.0)
    assert torch.equal(found, (alternating() + bias).bfloat16())
    far = normalised(name, alternating(mean=4099.0), ones, 0 * ones, 1e-5)
    assert (far - alternating()).abs().max() <= 1e-3


@pytest.mark.parametrize("mean", [1023.3, 4099.3])
@torch.inference_mode()
def test_a_group_of_many_cells_far_from_zero_keeps_its_variance(mean):
    """Of ten channels with levels of their own: sums or squares joined in fp32 are ten times as far off."""
    x = mean + torch.arange(10)[:, None, None] / 8 + torch.tensor([1.0, -1.0]).repeat(32, 16)
    x = x[None].contiguous(memory_format=torch.channels_last)
    given = torch.ones(10), torch.zeros(10)
    found = OPS["group_norm_silu"].native(x, *given, 1, 1e-5, False)
    truth = OPS["group_norm_silu"].reference(*(one.double() for one in (x, *given)), 1, 1e-5, False)
    assert (found - truth).abs().max() <= 0.015


@pytest.mark.parametrize("with_vectors", VECTORS, indirect=True)
@torch.inference_mode()
def test_silu_of_numbers_far_below_zero_is_nothing(with_vectors):
    """A norm of numbers that are all alike gives its bias."""
    bias = torch.tensor([-20.0, -90, -200, -1000, -1e6, 20] * 3)
    x = torch.ones(1, 18, 1, 2).contiguous(memory_format=torch.channels_last)
    found = OPS["group_norm_silu"].native(x, torch.ones(18), bias, 18, 1e-5)
    expected = torch.nn.functional.silu(bias)[:, None, None].expand_as(found)
    assert torch.allclose(found, expected, atol=1e-31)


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_factors_in_pairs_are_rounded_as_pytorch_rounds_and_a_nan_stays(vector_bytes):
    """Each row times the unit matrix; among the NaN is one that rounding would carry over to zero."""
    bits = torch.arange(0x3F800000, 0x3F800000 + 64 * 0x2000, 0x2000, dtype=torch.int32)  # every fourth is a tie
    rows = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)]).view(4, 32).contiguous()
    odd = torch.zeros(1, 32)
    odd.view(torch.int32)[0, 5], odd[0, 7] = 0x7FFFFFFF, math.inf
    weight, bias, out = cpu.pair_inputs(cpu.panels(torch.eye(32))), torch.zeros(32), torch.full((5, 32), math.nan)
    x = torch.cat([rows, odd])
    product = _C.Convolution(weight.data_ptr(), bias.data_ptr(), 0, 32, 32, 1, 1, 0, True)
    product.run(x.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), 1, 1, 5, 1, vector_bytes)
    assert torch.equal(out[:4], rows.bfloat16().float()) and out[4].isnan().all()


@torch.inference_mode()
def test_attention_reads_packed_heads_where_they_lie():
    packed = torch.randn(2, 19, 3 * 5 * 24, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.unflatten(-1, (3, 5, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)  # one text for all images
    ours = attention.native(q, k, v)
    assert distance(ours, attention.reference(*(x.double() for x in (q, k, v)))) <= 1e-6
    assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("name", "shapes", "last"),
    [
        pytest.param("layer_norm", ((4, 64), (64,), (1,)), (1e-5,), id="a bias of one number"),
        pytest.param("group_norm_silu", ((1, 64, 8, 8), (32,), (32,)), (4, 1e-5), id="a weight for half the channels"),
        pytest.param("group_norm_silu", ((1, 64, 8, 8), (64,), (32,)), (4, 1e-5), id="a bias for half the channels"),
        pytest.param("attention", ((2, 2, 4, 8), (2, 2, 5, 8), (2, 2, 3, 8)), (), id="fewer values than keys"),
        pytest.param("attention", ((2, 2, 4, 8), (2, 2, 5, 7), (2, 2, 5, 8)), (), id="narrow keys"),
        pytest.param("attention", ((2, 2, 4, 8), (3, 2, 5, 8), (3, 2, 5, 8)), (), id="keys of other images"),
    ],
)
@torch.inference_mode()
def test_shapes_that_do_not_fit_are_refused_where_they_would_be_read_beyond_their_end(name, shapes, last):
    given = [noise(*shape) for shape in shapes]
    if given[0].ndim == 4 and name != "attention":
        given[0] = given[0].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        OPS[name].native(*given, *last)


@torch.inference_mode()
def test_attention_over_the_keys_of_one_image():
    q, k, v = (noise(batch, 2, 5, 8) for batch in (3, 1, 1))
    assert distance(attention.native(q, k, v), attention.reference(*(x.double() for x in (q, k, v)))) <= 1e-6


@pytest.mark.parametrize("with_vectors", VECTORS, indirect=True)
@torch.inference_mode()
def test_attention_in_pairs_reads_nothing_beside_an_odd_width_or_after_an_odd_number_of_keys(with_vectors):
    """Neither what an earlier call left in the memory of this thread, nor the row after the last."""
    for width, keys in ((7, 6), (8, 5)):
        attention.native(*torch.full((3, 1, 2, 256, 16), math.nan, dtype=torch.bfloat16))
        q, k, v = torch.full((3, 1, 2, keys + 1, width), math.nan, dtype=torch.bfloat16)[..., :keys, :]
        for x in (q, k, v):
            x.copy_(noise(1, 2, keys, width))
        expected = attention.reference(*(x.double() for x in (q, k, v)))
        assert distance(attention.native(q, k, v), expected) <= 2**-8


@pytest.mark.parametrize("with_vectors", VECTORS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_attention_hides_nothing_that_is_not_finite(dtype, with_vectors):
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            given = [noise(2, 3, 9, 16 + k)[..., :16].to(dtype).contiguous() for k in range(3)]
            given[place][1, 2, 4, 5] = bad
            found, expected = attention.native(*given), attention.reference(*given)
            assert torch.equal(found.isfinite(), expected.isfinite()) and not found.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 9, 16), (2, 3, 300, 40)])
@torch.inference_mode()
def test_attention_by_tiles_hides_nothing_either(shape, monkeypatch):
    """PyTorch's own in bf16 hides NaN in a query over few keys, and infinite keys among many."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            given = [noise(*shape).bfloat16() for _ in range(3)]
            given[place][1, 2, 4, 5] = bad
            found, expected = attention.native(*given), attention.reference(*given)
            assert not found[~expected.isfinite()].isfinite().any() and found[0].isfinite().all()


TILES = pytest.mark.skipif(not _C.multiplies_tiles(), reason="this CPU multiplies no tiles of bf16")


@TILES
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(1, 1, 2), (65, 31, 18), (64, 128, 32), (63, 129, 40), (130, 300, 80), (33, 77, 48), (9, 16, 64)],
)
@torch.inference_mode()
def test_attention_by_tiles_says_what_the_reference_says(queries, keys, width, monkeypatch):
    """Heads side by side in one tensor, one image's keys for all, and later scores that outweigh earlier ones."""
    packed = noise(2, queries, 3, 5, width + 2)[..., :width].bfloat16()
    q = packed.permute(2, 0, 3, 1, 4)[1]
    k = (noise(5, keys, width) * torch.linspace(0.2, 9, keys)[:, None]).bfloat16().expand(2, -1, -1, -1)
    v = noise(keys, 2, 5, width, scale=3).bfloat16().permute(1, 2, 0, 3)
    truth = attention.reference(*(x.double() for x in (q, k, v)))
    answers = []
    for count in (1, 40):  # more threads than heads
        monkeypatch.setattr(attention, "threads", lambda *_, count=count: count)
        monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: torch.full(shape, torch.nan, dtype=x.dtype))
        answers.append(attention.native(q, k, v))
        monkeypatch.undo()
    assert torch.equal(*answers) and answers[0].transpose(1, 2).is_contiguous()
    assert distance(answers[0], truth) <= max(1.3 * distance(attention.plain(q, k, v), truth), 2**-8)
    monkeypatch.setattr(_C, "tiled_attention", None)  # which it was that answered
    with pytest.raises(TypeError):
        attention.native(q, k, v)


@TILES
def test_attention_by_tiles_refuses_what_it_cannot_read():
    x = torch.zeros(64, dtype=torch.bfloat16)
    right = [x.data_ptr(), [64, 8, 8]] * 4 + [1, 1, 2, 2, 8, 1.0, 1]
    for place, wrong in ((1, [64, 8]), (2, 0), (8, 0), (12, 7), (13, 0.0), (14, 0)):
        with pytest.raises((RuntimeError, ValueError)):
            _C.tiled_attention(*right[:place], wrong, *right[place + 1 :])


@torch.inference_mode()
def test_threads_do_not_change_a_bit(monkeypatch):
    results = []
    for count in (1, 3):
        for module in {OPS[name] for name in NATIVE}:
            monkeypatch.setattr(module, "threads", lambda *_, count=count: count)
        results.append([OPS[name].native(*case.inputs) for name in NATIVE for case in cases_of(name)])
    assert all(torch.equal(one, three) for one, three in zip(*results))


def test_tensors_that_native_forms_would_misread_get_the_plain_form():
    x, weight = noise(4, 8), noise(8)
    with torch.inference_mode():
        assert cpu.is_native(x, weight) and cpu.is_native(x.bfloat16())
        for wrong in ((x, weight.bfloat16()), (x.mT, weight), (x[:0], weight), (x.half(),), (x.to("meta"),)):
            assert not cpu.is_native(*wrong)
        narrow = noise(2, 8, 3, 5).bfloat16().contiguous(memory_format=torch.channels_last)
        ours = OPS["group_norm_silu"].native(narrow, weight, weight, 2, 1e-5)
        assert torch.equal(ours, OPS["group_norm_silu"].reference(narrow, weight, weight, 2, 1e-5))


def test_gradients_get_the_plain_form():
    x = torch.randn(3, 8, requires_grad=True)
    assert not cpu.is_native(x)
    OPS["geglu"].native(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda at: _C.geglu(0, 0, at, 1, 1, 1), "null"),
        (lambda at: _C.geglu(2, at, at, 1, 1, 1), "storage is 2"),
        (lambda at: _C.geglu(0, at, at, 0, 1, 1), "empty"),
        (lambda at: _C.layer_norm(0, at, at, at, at, 1, 1, 1e-5, 0), "threads is 0"),
        (lambda at: _C.group_norm(0, at, at, at, at, 1, 1, 3, 2, 1e-5, True, 1), "3 channels do not make 2 groups"),
        (lambda at: _C.geglu(0, at, at, 1, 1, 1, 7), "no vectors of 7 bytes"),
        (lambda at: _C.attention(0, at, [1], at, [1], at, [1], at, [1], 1, 1, 1, 1, 1, 1.0, 1), "strides"),
        (lambda at: _C.attention(0, *[at, [1, 1, 1]] * 4, 1, 1, 1, 0, 1, 1.0, 1), "1 queries, 0 keys"),
    ],
)
def test_refuses(call, told):
    memory = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match=told):
        call(memory.ctypes.data)


CONVOLUTION = """
import os, resource, signal, threading
import numpy as np
from datasetdm_fast import _C

def answer(threads):
    out = np.zeros((1, 99, 99), np.float32)
    given = [np.ones(shape, np.float32) for shape in ((1, 4, 4, 9, 1), 1, (9, 1))]
    _C.depth_head_add(*given, 9, out, threads)
    return out
"""
NO_THREADS = """
alone, size = answer(1), int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**21, size + 2**21))
assert all((answer(4) == alone).all() for _ in range(5))
"""
BUSY = """
from concurrent.futures import ThreadPoolExecutor

def is_right(threads):
    barrier.wait()
    return (answer(threads) == alone).all()

with ThreadPoolExecutor(4) as pool:
    alone, barrier = answer(1), threading.Barrier(4, timeout=5)
    assert all(pool.map(is_right, [1] * 4))
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**21, size + 2**21))
    assert all(pool.map(is_right, [4] * 400))
"""
NO_MEMORY = """
x, out, strides = np.ones((2, 4, 16), np.float32), np.zeros((2, 4, 16), np.float32), [64, 16, 16]

def attend(keys, threads):
    arrays = [part for one in (x, x, x, out) for part in (one.ctypes.data, strides)]
    _C.attention(0, *arrays, 2, 1, 4, keys, 16, 0.25, threads)

for threads in (1, 2):
    attend(4, threads)
    try:
        attend(2**52, threads)
        raise AssertionError
    except MemoryError:
        attend(4, threads)
        assert (out == 1).all()
"""
FORKS = """
def work():
    while True:
        answer(2)

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
for _ in range(400):
    if not (child := os.fork()):
        signal.alarm(5)
        answer(2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
FIRST = """
def work(begun):
    begun.set()  # who waits for it runs as soon as this thread lets go
    while True:
        answer(1)

for _ in range(8):
    if not (child := os.fork()):
        begun = threading.Event()
        threading.Thread(target=work, args=(begun,), daemon=True).start()
        begun.wait()
        break  # and the child ends
    assert os.waitpid(child, 0)[1] == 0
"""
DAEMONS = """
def work():
    while True:
        _C.png_encode(np.zeros((300, 300), np.uint8))

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(NO_THREADS, id="the system has no more threads"),
        pytest.param(BUSY, id="nor for a second caller"),
        pytest.param(NO_MEMORY, id="a thread finds no memory"),
        pytest.param(FORKS, id="children of a fork beside calls"),
        pytest.param(DAEMONS, id="the interpreter ends beside calls"),
        pytest.param(FIRST, id="the interpreter ends within the first call"),
    ],
)
def test_threads_that_fail_or_are_missing_end_no_process_and_stop_no_call(program):
    command = [sys.executable, "-c", CONVOLUTION + program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_lanes_keep_the_order_and_share_the_threads():
    lanes, threads = Lanes(), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        seen = lanes.map(
            lambda number: (number, torch.get_num_threads(), torch.is_inference_mode_enabled()),
            [(k,) for k in range(2)],
        )
        assert seen == [(0, 2, True), (1, 2, True)] and torch.get_num_threads() == 4
        torch.set_num_threads(1)
        assert lanes.map(lambda number: torch.get_num_threads(), [(k,) for k in range(3)]) == [1, 1, 1]
    finally:
        torch.set_num_threads(threads)


def test_lanes_are_as_many_as_are_asked_for_and_follow_the_number_of_threads():
    lanes, threads = Lanes(), torch.get_num_threads()
    try:
        for count, most, share in ((4, 0, 2), (8, 0, 4), (4, 0, 2), (4, 1, 4)):
            torch.set_num_threads(count)
            assert lanes.map(lambda _: torch.get_num_threads(), [(k,) for k in range(2)], most) == [share] * 2
        torch.set_num_threads(4)
        names = lanes.map(lambda _: threading.get_ident(), [(k,) for k in range(40)], 2)
        assert len({*names}) <= 2 and threading.get_ident() not in names
    finally:
        torch.set_num_threads(threads)


def test_lanes_of_one_thread_have_one_whatever_the_number_of_slices():
    lanes, threads = Lanes(is_single=True), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for slices in (1, 2, 6):
            for most in (0, 1, 2):
                found = lanes.map(lambda _: torch.get_num_threads(), [(k,) for k in range(slices)], most)
                assert found == [1] * slices and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_after_an_interrupt_while_lanes_start_they_start_anew(monkeypatch):
    lanes, threads = Lanes(), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert lanes.map(lambda number: number, [(1,), (2,)]) == [1, 2]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("concurrent.futures.ThreadPoolExecutor.map", Mock(side_effect=KeyboardInterrupt))
            lanes.map(lambda number: number, [(1,), (2,), (3,)])
        assert torch.get_num_threads() == 4
        assert lanes.map(lambda _: torch.get_num_threads(), [(1,), (2,)]) == [2, 2]
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_a_lane_is_the_callers():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            Lanes().map(lambda number: 1 // number, [(1,), (0,)])
    finally:
        torch.set_num_threads(threads)


def test_callers_of_other_numbers_of_slices_share_the_lanes():
    lanes, threads, told = Lanes(), torch.get_num_threads(), {}

    def call(count: int) -> None:
        told[count] = [lanes.map(lambda number: number, [(k,) for k in range(count)]) for _ in range(50)]

    callers = [threading.Thread(target=call, args=(count,)) for count in (2, 3, 4)]
    try:
        torch.set_num_threads(4)
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(threads)
    assert told == {count: [list(range(count))] * 50 for count in (2, 3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_threads_share_the_groups_of_a_single_image_and_change_no_bit(dtype):
    levels = torch.linspace(-50, 200, 111)[:, None]  # as in an image with a horizon: no block is like all
    x = (noise(1, 35, 111, 93) + levels).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, before = noise(35).to(dtype), noise(35).to(dtype), torch.get_num_threads()
    try:
        said = []
        for count in (1, 2, 3, 4, 9):  # of 7 groups
            torch.set_num_threads(count)
            assert cpu.threads(x) == count
            said.append(OPS["group_norm_silu"].native(x, weight, bias, 7, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, said[0]) for one in said)
    truth = OPS["group_norm_silu"].reference(*(one.double() for one in (x, weight, bias)), 7, 1e-5)
    assert distance(said[0], truth) <= (1e-6 if dtype == torch.float32 else 2**-8)


@torch.inference_mode()
def test_a_norm_of_bf16_holds_no_image_in_fp32():
    x = torch.randn(1, 64, 512, 512, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    OPS["group_norm_silu"].native(x[..., :8, :8], weight, bias, 32, 1e-5)  # pages of the library
    y, most = with_peak(lambda: OPS["group_norm_silu"].native(x, weight, bias, 32, 1e-5))
    assert y.shape == x.shape and most <= 1.25 * x.nbytes  # in fp32 the image alone takes twice as much


def test_the_time_of_each_kind_of_work_is_told_by_thread():
    x, weight = torch.randn(64, 64), torch.ones(64)
    norm, attend = OPS["layer_norm"].native, attention.native
    with torch.inference_mode():
        _C.take_times(True)
        begin = time.perf_counter()
        norm(x, weight, weight, 1e-5)
        attend(*x.view(1, 1, 4, 64, 16).expand(3, -1, -1, -1, -1))
        whole = time.perf_counter() - begin
        (times,) = _C.take_times(False)
        norm(x, weight, weight, 1e-5)
    assert set(times) == {"norm", "attention"} and 0 < sum(times.values()) < whole
    assert _C.take_times(False) == []  # none are taken now


def test_a_product_within_a_convolution_counts_as_convolution():
    """Not twice, so that the kinds of work of a thread never add up to more than its time."""
    image, weight, bias = (torch.randn(*shape) for shape in ((1, 8, 8, 8), (8, 72), (8,)))
    weight, out = cpu.panels(weight), torch.empty(1, 8, 8, 8)
    convolution = _C.Convolution(weight.data_ptr(), bias.data_ptr(), 0, 8, 8, 3, 1, 1)
    _C.take_times(True)
    convolution.run(image.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), 1, 8, 8, 1)
    (times,) = _C.take_times(False)
    assert set(times) == {"convolution"}
