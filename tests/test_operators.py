"""Every operator and operation that graphs are written with, by ONNX Runtime, against PyTorch in fp32 or double."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels.inputs import cases_of
from datasetdm_fast.export.onnx import graph as graph_module
from datasetdm_fast.export.onnx import operations
from datasetdm_fast.export.onnx.graph import DataFile, Extent, Graph
from datasetdm_fast.export.onnx.operators import OPERATORS
from datasetdm_fast.kernels import reference
from datasetdm_fast.kernels.noise import noise


def run_graph(function, *tensors: Tensor) -> list[Tensor]:
    """function(*tensors) as ONNX Runtime computes its graph, which knows no first axis but that of parameters."""
    graph, first = Graph("some", data := DataFile("some.data"), OPERATORS), Extent(1, ("B",))
    values = [
        graph.constant(x.detach(), name=f"x{place}")
        if isinstance(x, nn.Parameter)
        else graph.input(f"x{place}", [first, *x.shape[1:]], x.dtype)
        for place, x in enumerate(tensors)
    ]
    answers = listed(function(*values))
    for place, value in enumerate(answers):
        graph.output(f"y{place}", value)
    proto, shapes = graph.model({}), [[str(size) for size in value.shape] for value in answers]
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    read = {value.name for value in graph.inputs}
    found = session.run(None, {f"x{k}": x.numpy() for k, x in enumerate(tensors) if f"x{k}" in read})
    for y, shape in zip(found, shapes, strict=True):
        assert not data.size and [*map(str, y.shape[1:])] == shape[1:]
    return [torch.from_numpy(y) for y in found]


def listed(answer) -> list:
    return [*answer] if isinstance(answer, (list, tuple)) else [answer]


X, Y = noise(3, 4, 5, 6), noise(3, 4, 5, 6) + 1
ROWS, MANY = noise(3, 7), noise(3, 2, 5, 8)
UNEVEN = torch.tensor([[1.0, 2.0, float("nan")], [3e38, -1.0, 0.0], [float("-inf"), 1.0, 2.0]])
KEPT = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])
WIDE, BIAS, NARROW, NARROW_BIAS, ROW, OFFSET, MEANS, SPREADS = (
    nn.Parameter(x, requires_grad=False)
    for x in (noise(6, 4, 3, 3), noise(6), noise(5, 7), noise(5), noise(7), noise(7) + 1, noise(4), noise(4).abs())
)
SMALL, WHOLE = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), nn.Parameter(torch.tensor([3.0, 5.0]), requires_grad=False)
OPTIONS = {
    "add, a constant before it": (lambda x: 2.0 - x * 3 / 4 + 1, X),
    "constants of another shape": (lambda x: x * torch.arange(5.0).reshape(5, 1) + torch.ones(6) / 7, X),
    "silu": (lambda x: F.silu(x), X),
    "gelu": (lambda x: F.gelu(x), 3 * X),
    "gelu by a tangent": (lambda x: F.gelu(x, approximate="tanh"), 3 * X),
    "trigonometry": (lambda x: x.cos() + torch.sin(x).tanh(), X),
    "relu, floor and their like": (lambda x: F.relu(-x) + (4 * x).floor() + x.sigmoid(), X),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), X, WIDE, BIAS),
    "conv2d of two strides": (lambda x, w: F.conv2d(x, w, stride=2, padding=(1, 0)), X, WIDE),
    "conv2d of a bias for each call": (lambda x, w, y: F.conv2d(x, w, y.reshape(6)), X, WIDE, torch.ones(1, 6)),
    "linear": (lambda x, w, b: F.linear(x, w, b), ROWS, NARROW, NARROW_BIAS),
    "linear of a row": (lambda x, w, b: F.linear(x.mean(0), w, b), ROWS, NARROW, NARROW_BIAS),
    "matmul of a matrix each": (lambda x, y: x @ y.mT, X, Y),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (7,), w, b, 0.5), ROWS, ROW, OFFSET),
    "layer norm without weights": (lambda x: F.layer_norm(x, (7,), eps=0.5), ROWS),
    "rms norm": (lambda x, w: F.rms_norm(x, (7,), w, 0.5), ROWS, ROW),
    "batch norm": (lambda x, m, v: F.batch_norm(x, m, v, eps=0.5), X, MEANS, SPREADS),
    "softmax": (lambda x: torch.softmax(x, 1) + x.softmax(-1), X),
    "causal attention": (lambda q: F.scaled_dot_product_attention(q, q + 1, 2 * q, is_causal=True), MANY),
    "masked attention": (
        lambda q, mask: F.scaled_dot_product_attention(q, q + 1, 2 * q, attn_mask=mask.unsqueeze(1).unsqueeze(1)),
        MANY,
        torch.tensor([[True, True, False, True, False]] * 2 + [[False, True, False, False, False]]),
    ),
    "where": (lambda x: torch.where(x < 0.25, x, 7.0), ROWS),
    "where a mask does not say": (lambda x: x.masked_fill(x < 0.25, 7.0), ROWS),
    "logsumexp out of range": (lambda x: torch.logsumexp(300 * x, -1), ROWS),
    "words of a table": (lambda x, w: F.embedding(x, w), torch.tensor([[1, 4], [0, 0]]), NARROW),
    "resize by a ratio": (lambda x: F.interpolate(x, (10, 12), mode="bilinear"), X),
    "resize to a size": (lambda x: F.interpolate(x, (7, 4), mode="bilinear", align_corners=False), X),
    "pixels of channels": (lambda x: F.pixel_shuffle(x, 2), X),
    "channels of pixels": (lambda x: F.pixel_unshuffle(x[:, :, :4], 2), X),
    "padding": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.25), X),
    "padding by zeros": (lambda x: F.pad(x, (0, 2)), X),
    "no padding": (lambda x: F.pad(x, (0, 0)) + 1, X),
    "join": (lambda x, y: torch.cat([x, y[:, :1]], 1), X, Y),
    "join rows": (lambda x, y: torch.cat([x, y]), X, Y),
    "stack": (lambda x, y: torch.stack([x, y], 2), X, Y),
    "stack at the end": (lambda x, y: torch.stack([x, y], -1), X, Y),
    "repeat": (lambda x: x.repeat(3, 1), ROWS),
    "split": (lambda x: x.split([1, 4, 2], 1), ROWS),
    "split evenly": (lambda x: x.split(2, 3), X),
    "chunk": (lambda x: x.chunk(2, 1), X),
    "chunk rows": (lambda x: (x.repeat(2, 1) * torch.arange(7.0)).chunk(2), ROWS),
    "unbind": (lambda x: x.unbind(2), X),
    "permute": (lambda x: x.permute(0, 2, -1, 1) + 1, X),
    "permute twice": (lambda x: x.permute(0, 2, 3, 1).transpose(1, 2) + 1, X),
    "reshape": (lambda x: x.reshape(-1, 2, 60) + 1, X),
    "flatten": (lambda x: x.flatten(1, 2).unflatten(-1, (2, -1)) + 1, X),
    "flatten all": (lambda x: x.flatten(2) + 1, X),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 3, -1) + 1, ROWS),
    "expand by axes in front": (lambda x: x.mean(0).expand(4, -1) + 1, ROWS),
    "repeat each": (lambda x: x.repeat_interleave(3, 0), ROWS),
    "slices": (lambda x: x[:, 1:3, ..., ::2] + x[:, -3:-1, :, 1::2], X),
    "places": (lambda x: x[:, 2, :, 3] + x[:, -1, :, -2], X),
    "a new axis": (lambda x: x[:, None, ..., 1:2] + 1, X),
    "finite": (lambda x: x.isfinite().all(1), UNEVEN),
    "finite, each": (lambda x: torch.isfinite(x), UNEVEN),
    "counted": (lambda x: x.sum(1), KEPT),
    "all": (lambda x: x.all(1), KEPT),
    "not": (lambda x: ~x, KEPT),
    "truths as numbers": (lambda x: x.float() * 2.0, KEPT),
    "equal": (lambda x: torch.eq(x, 1.0), KEPT.float()),
    "remainder": (lambda x: x % 5, torch.tensor([[7, 3, 10]])),
    "mean": (lambda x: x.mean(1) + x.mean(-2).mean(2).mean(1)[:, None, None], X),
    "argmax": (lambda x: x.argmax(2), X),
    "gather": (lambda x, index: x.gather(1, index), ROWS, torch.tensor([[6, 0], [1, 1], [5, 2]])),
    "clamp": (lambda x: x.clamp(-0.5, 0.25), X),
    "sum of products": (lambda x, y: torch.addcmul(x, y, y + 1), X, Y),
    "in place": (lambda x, y: (x * 1.0).add_(y).sub_(1.0).exp_(), X, Y),
    "a product added": (lambda x, w: (x[:, :5] * 1.0).addmm_(x, w.T), ROWS, NARROW),
    "zeros": (lambda x: x + x.new_zeros(7), ROWS),
    "an output that others read": (lambda x: (y := x + 1, y * 2), ROWS),
    "a constant in two types": (lambda x, w: (x * w, (x.to(torch.float16) * w).float()), SMALL, WHOLE),
    "constants made with other options": (lambda x, w: (x + w.clamp(max=0.0)) * w.clamp(max=2.0), ROWS, ROW),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_operator_computes_what_pytorch_does(name):
    function, *tensors = OPTIONS[name]
    for found, expected in zip(run_graph(function, *tensors), listed(function(*tensors)), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_scores_are_summed_in_fp32(dtype):
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    q = graph.input("q", [Extent(1, ("B",)), 2, 5, 8], dtype)
    mask = graph.input("mask", [Extent(1, ("B",)), 1, 1, 5], torch.bool)
    for answer in (F.scaled_dot_product_attention(q, q, q, attn_mask=mask), operations.attention(q, q, q)):
        assert answer.dtype == dtype
    nodes = graph._nodes
    around = [nodes[k - 1 : k + 2] for k, node in enumerate(nodes) if node.op_type == "Softmax"]
    assert [[node.op_type for node in three] for three in around] == [["Cast", "Softmax", "Cast"]] * 2
    assert all(three[0].attribute[0].i == onnx.TensorProto.FLOAT for three in around)


def test_a_length_known_at_run_time_may_be_that_of_two_axes():
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    x, y = (graph.input(name, [Extent(1, (name,)), 2], torch.float32) for name in "BK")
    pairs = (x.unsqueeze(1) + y).flatten(0, 1)
    graph.output("pairs", pairs.unsqueeze(1).expand(-1, 3, -1) + 0.0)
    session = onnxruntime.InferenceSession(graph.model({}).SerializeToString(), providers=["CPUExecutionProvider"])
    given = noise(3, 2), noise(5, 2)
    (found,) = session.run(None, dict(zip("BK", (x.numpy() for x in given), strict=True)))
    expected = (given[0][:, None] + given[1]).flatten(0, 1)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(torch.from_numpy(found), expected)


# Operations -----------------------------------------------------------------------------------------------------------

WEIGHTS = {"group_norm_silu": (1, 2), "layer_norm": (1, 2), "depth_head": (1, 2, 3, 4), "attention_shares": (4,)}
CASES = {
    f"{form.__name__}-{case.reason}": (form, case.inputs)
    for form in operations.FORMS
    if form.__name__ in vars(reference)
    for case in cases_of(form.__name__)[1:4]
    if case.inputs[-1] is not None and len(case.inputs) <= form.__code__.co_argcount
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_computes_what_its_reference_does(name, monkeypatch):
    """By another epsilon than all models have, and of a decoder as wide as several chunks."""
    monkeypatch.setattr(graph_module, "SMALL", 2**20)
    form, inputs = CASES[name]
    inputs = [0.5 if isinstance(value, float) else value for value in inputs]
    for place in WEIGHTS.get(form.__name__, ()):
        inputs[place] = nn.Parameter(inputs[place], requires_grad=False)
    places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]

    def fill_in(*values):
        given = dict(zip(places, values, strict=True))
        return form(*(given.get(place, value) for place, value in enumerate(inputs)))

    (found,) = run_graph(fill_in, *(inputs[place] for place in places))
    expected = getattr(reference, form.__name__)(
        *(value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs)
    )
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= 1e-5 * expected.double().norm()


@pytest.mark.parametrize("form", [operations.attention_maps, operations.plain_attention_maps])
def test_attention_gives_its_maps(form):
    q, k, v = noise(2, 3, 6, 8), noise(2, 3, 5, 8), noise(2, 3, 5, 8) + 1
    answer, maps = run_graph(form, q, k, v)
    torch.testing.assert_close(maps, ((q / 8**0.5) @ k.mT).softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer, maps @ v, rtol=1e-5, atol=1e-5)


def test_the_attention_of_onnx_runtime_is_the_same():
    q, k, v = noise(2, 3, 6, 8), noise(2, 3, 5, 8), noise(2, 3, 5, 8) + 1
    (answer,) = run_graph(operations.one_node_attention, q, k, v)
    torch.testing.assert_close(answer, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)
