"""PyTorch operators as ONNX nodes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.export.onnx.graph import TYPES, Extent, Size, Value

BLOCKED = -1e30  # added to the score of a cell that is not to be seen: exp of it is exactly 0
LARGEST_FLOAT = torch.finfo(torch.float32).max


def _as(value: Any, dtype: torch.dtype) -> Value:
    """A constant takes the type of what it meets, and so do truths."""
    if value.tensor is None and value.dtype == torch.bool:
        return to(value, dtype)
    if value.tensor is not None and value.dtype != dtype and value.dtype.is_floating_point:
        return Value(value.graph, value.name, value.shape, dtype, value.tensor)
    return value


def _operands(*operands: Any) -> list[Value]:
    """The operands as Values of one type: that of those which are no constants."""
    values = [operand for operand in operands if isinstance(operand, Value)]
    graph = values[0].graph
    dtype = next((value.dtype for value in values if value.tensor is None), values[0].dtype)

    def convert(operand: Any) -> Value:
        if isinstance(operand, Value):
            return operand
        return graph.constant(operand, None if isinstance(operand, Tensor) else dtype)

    return [_as(convert(operand), dtype) for operand in operands]


def _broadcast(*shapes: Sequence[Size]) -> tuple[Size, ...]:
    length = max(map(len, shapes))
    padded = [(1,) * (length - len(shape)) + tuple(shape) for shape in shapes]
    result = []
    for sizes in zip(*padded):
        wide = [size for size in dict.fromkeys(sizes) if size != 1]
        if len(wide) > 1:
            raise ValueError(f"export: shapes {[list(map(str, shape)) for shape in shapes]} do not broadcast")
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _elementwise(kind: str, dtype: torch.dtype | None = None) -> Callable[..., Value]:
    def operator(*operands: Any) -> Value:
        first, *others = values = _operands(*operands)
        return first.emit(kind, *others, shape=_broadcast(*(value.shape for value in values)), dtype=dtype)

    return operator


def silu(x: Value, inplace: bool = False) -> Value:
    return x * x.sigmoid()


def gelu(x: Value, approximate: str = "none") -> Value:
    """The exact one, in the form in which runtimes look for it; or its approximation."""
    if approximate == "tanh":
        return x * (((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)).tanh() + 1.0) * 0.5
    return x * ((x / math.sqrt(2)).emit("Erf") + 1.0) * 0.5


def to(x: Value, dtype: torch.dtype | torch.device, *_: Any, **__: Any) -> Value:
    if not isinstance(dtype, torch.dtype) or dtype == x.dtype:
        return x
    return x.emit("Cast", dtype=dtype, to=TYPES[dtype])


def conv2d(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    pair = [tuple(size) if isinstance(size, (tuple, list)) else (size, size) for size in (stride, padding, dilation)]
    (strides, pads, dilations), kernel = pair, weight.shape[2:]
    assert groups == 1 and dilations == (1, 1)
    sides = tuple((side + 2 * pad - k) // step + 1 for side, pad, k, step in zip(x.shape[2:], pads, kernel, strides))
    is_fixed = bias is not None and bias.tensor is not None
    inputs = [_as(value, x.dtype) for value in ((weight, bias) if is_fixed else (weight,))]
    options = {"kernel_shape": kernel, "strides": strides, "pads": (*pads, *pads)}
    out = x.emit("Conv", *inputs, shape=(x.shape[0], weight.shape[0], *sides), **options)
    return out if bias is None or is_fixed else out + bias.reshape(1, -1, 1, 1)


def linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    if x.ndim == 1:
        return linear(x.unsqueeze(0), weight, bias).reshape(weight.shape[0])
    out = matmul(x, weight.transpose(-2, -1))
    return out if bias is None else out + bias


def matmul(x: Value, y: Value) -> Value:
    x, y = _operands(x, y)
    batch = _broadcast(x.shape[:-2], y.shape[:-2])
    rows = (x.shape[-2],) if x.ndim > 1 else ()
    return x.emit("MatMul", y, shape=(*batch, *rows, y.shape[-1]))


def layer_norm(
    x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5
) -> Value:
    """Along the last axis; by ONNX's definition summed in fp32 whatever the type."""
    scale = _as(x.graph.constant(torch.ones(shape[-1])) if weight is None else weight, x.dtype)
    shifts = () if bias is None else (_as(bias, x.dtype),)
    return x.emit("LayerNormalization", scale, *shifts, axis=-1, epsilon=eps, stash_type=1)


def rms_norm(x: Value, shape: Sequence[int], weight: Value, eps: float) -> Value:
    wide = to(x, torch.float32)
    square = (wide * wide).emit("ReduceMean", x.graph.integers([-1]), shape=(*x.shape[:-1], 1), keepdims=1)
    return to(wide / (square + eps).emit("Sqrt"), x.dtype) * weight


def batch_norm(
    x: Value, mean: Value, variance: Value, weight: None, bias: None, training: bool, momentum: float, eps: float
) -> Value:
    """By stored statistics, without an affine part."""
    assert weight is None and bias is None and not training
    ones, zeros = x.graph.constant(torch.ones(mean.shape)), x.graph.constant(torch.zeros(mean.shape))
    return x.emit("BatchNormalization", ones, zeros, mean, variance, epsilon=eps)


def softmax(x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return (x if dtype is None else x.to(dtype)).emit("Softmax", axis=dim % x.ndim)


def scaled_dot_product_attention(
    q: Value, k: Value, v: Value, attn_mask: Value | None = None, is_causal: bool = False
) -> Value:
    """Each place over those of the mask, or over itself and those before it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if is_causal:
        return softmax(scores + torch.full((q.shape[2], q.shape[2]), BLOCKED).triu(1), -1) @ v
    assert attn_mask is not None
    return softmax(masked_fill(scores, ~attn_mask, BLOCKED), -1, torch.float32).to(q.dtype) @ v


def where(condition: Value, x: Value, y: Any) -> Value:
    x, y = _operands(x, y)
    return condition.emit("Where", x, y, shape=_broadcast(condition.shape, x.shape, y.shape), dtype=x.dtype)


def masked_fill(x: Value, mask: Value, value: float) -> Value:
    return where(~mask, x, value)


def logsumexp(x: Value, dim: int) -> Value:
    """By its definition a runtime may leave the range of numbers."""
    axis = x.graph.integers([dim % x.ndim])
    largest = x.emit("ReduceMax", axis, shape=(*x.shape[:-1], 1), keepdims=1)
    total = (x - largest).emit("Exp").emit("ReduceSum", axis, shape=(*x.shape[:-1], 1), keepdims=1)
    return reshape(total.emit("Log") + largest, *x.shape[:-1])


def embedding(ids: Value, weight: Value, *_: Any, **__: Any) -> Value:
    return weight.emit("Gather", ids, shape=(*ids.shape, weight.shape[1]), axis=0)


def interpolate(x: Value, size: tuple[int, int], mode: str, align_corners: bool = False, **_: Any) -> Value:
    """Bilinear with half-pixel centres."""
    assert mode == "bilinear" and not align_corners
    shape, scales = (*x.shape[:2], *size), [new / old for new, old in zip(size, x.shape[2:])]
    if all(float(np.float32(scale)) == scale for scale in scales):
        sizes = ["", x.graph.store(torch.tensor([1.0, 1.0, *scales]), torch.float32)]
    else:  # a ratio that rounds could also round the size
        sizes = ["", "", x.graph.shape(shape)]
    return x.emit("Resize", *sizes, shape=shape, mode="linear", coordinate_transformation_mode="half_pixel")


def pixel_shuffle(x: Value, times: int) -> Value:
    batch, channels, height, width = x.shape
    shape = (batch, channels // times**2, height * times, width * times)
    return x.emit("DepthToSpace", shape=shape, blocksize=times, mode="CRD")


def pixel_unshuffle(x: Value, times: int) -> Value:
    batch, channels, height, width = x.shape
    cells = reshape(x, batch, channels, height // times, times, width // times, times)
    return permute(cells, 0, 1, 3, 5, 2, 4).flatten(1, 3)


def pad(x: Value, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    assert mode == "constant"
    if not any(pads):
        return x
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for place in range(len(pads) // 2):
        begins[-1 - place], ends[-1 - place] = pads[2 * place], pads[2 * place + 1]
    shape = [size + first + last if first or last else size for size, first, last in zip(x.shape, begins, ends)]
    filling = [x.graph.constant(value, x.dtype)] if value else []
    return x.emit("Pad", x.graph.integers([*begins, *ends]), *filling, shape=shape)


def cat(values: Sequence[Value], dim: int = 0) -> Value:
    first, *others = values = _operands(*values)
    axis, sizes = dim % first.ndim, [value.shape[dim] for value in values]
    total = sizes[0] * len(sizes) if isinstance(sizes[0], Extent) and len(set(sizes)) == 1 else sum(sizes)
    return first.emit("Concat", *others, shape=(*first.shape[:axis], total, *first.shape[axis + 1 :]), axis=axis)


def stack(values: Sequence[Value], dim: int = 0) -> Value:
    return cat([unsqueeze(value, dim) for value in values], dim)


def repeat(x: Value, times: int, *others: int) -> Value:
    assert set(others) <= {1}
    return x if times == 1 else cat([x] * times)


def split(x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Value]:
    axis = dim % x.ndim
    sizes = [sizes] * (x.shape[axis] // sizes) if isinstance(sizes, int) else sizes
    if len(sizes) == 1:
        return [x]
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    if isinstance(x.shape[axis], Extent):
        return x.graph.emit("Split", [x], shapes, x.dtype, axis=axis, num_outputs=len(sizes))
    return x.graph.emit("Split", [x, x.graph.integers(sizes)], shapes, x.dtype, axis=axis)


def chunk(x: Value, count: int, dim: int = 0) -> list[Value]:
    return split(x, [x.shape[dim % x.ndim] // count] * count, dim)


def unbind(x: Value, dim: int = 0) -> list[Value]:
    axis = dim % x.ndim
    return [reshape(part, *x.shape[:axis], *x.shape[axis + 1 :]) for part in split(x, [1] * x.shape[axis], axis)]


def permute(x: Value, *order: Any) -> Value:
    axes = [axis % x.ndim for axis in (order[0] if isinstance(order[0], (tuple, list)) else order)]
    if x.origin and x.origin[0] == "Transpose":
        _, x, before = x.origin
        axes = [before[axis] for axis in axes]
    if axes == sorted(axes):
        return x
    out = x.emit("Transpose", shape=[x.shape[axis] for axis in axes], perm=axes)
    out.origin = ("Transpose", x, tuple(axes))
    return out


def transpose(x: Value, first: int, second: int) -> Value:
    axes = list(range(x.ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return permute(x, axes)


def reshape(x: Value, *shape: Any) -> Value:
    sizes = _solve_sizes(x.shape, shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    if x.origin and x.origin[0] == "Reshape":
        x = x.origin[1]
    if tuple(sizes) == x.shape:
        return x
    out = x.emit("Reshape", x.graph.shape(sizes, is_reshape=True), shape=sizes)
    out.origin = ("Reshape", x, ())
    return out


def _solve_sizes(whole: Sequence[Size], sizes: Sequence[Size]) -> list[Size]:
    """The sizes, a -1 among them as what is left of the shape `whole` once the others are taken from it."""
    if -1 not in sizes:
        return list(sizes)
    place = sizes.index(-1)
    parts = [*sizes[:place], *sizes[place + 1 :]]
    total: Any = math.prod(whole, start=Extent(1, ()))
    taken: Any = math.prod(parts, start=Extent(1, ()))
    letters = list(total.letters)
    for letter in taken.letters:
        letters.remove(letter)
    left = Extent(total.times, tuple(letters)) // taken.times
    return [*sizes[:place], left if left.letters else left.times, *sizes[place + 1 :]]


def flatten(x: Value, start: int = 0, end: int = -1) -> Value:
    start, end = start % x.ndim, end % x.ndim
    return reshape(x, *x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def unflatten(x: Value, dim: int, sizes: Sequence[Size]) -> Value:
    dim %= x.ndim
    return reshape(x, *x.shape[:dim], *_solve_sizes([x.shape[dim]], list(sizes)), *x.shape[dim + 1 :])


def expand(x: Value, *sizes: Any) -> Value:
    padded = (1,) * (len(sizes) - x.ndim) + x.shape
    shape = [old if isinstance(new, int) and new == -1 else new for old, new in zip(padded, sizes)]
    if tuple(shape) == x.shape:
        return x
    return x.emit("Expand", x.graph.shape(shape), shape=shape)


def repeat_interleave(x: Value, times: Size, dim: int) -> Value:
    assert dim == 0
    rest = x.shape[1:]
    return expand(unsqueeze(x, 1), x.shape[0], times, *rest).reshape(x.shape[0] * times, *rest)


def unsqueeze(x: Value, dim: int) -> Value:
    axis = dim % (x.ndim + 1)
    return reshape(x, *x.shape[:axis], 1, *x.shape[axis:])


def getitem(x: Value, index: Any) -> Value:
    """Slices, places, None and Ellipsis; of rows that are counted at run time the last."""
    index = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index[place : place + 1] = [slice(None)] * (x.ndim - sum(part is not None for part in index) + 1)
    axis = 0
    for part in index:
        if part is None:
            x = unsqueeze(x, axis)
        elif isinstance(part, int):
            rows = x[(slice(None),) * axis + (slice(part, part + 1 or None),)]
            x = reshape(rows, *x.shape[:axis], *x.shape[axis + 1 :])
            continue
        elif isinstance(part, slice) and isinstance(part.start, Extent):
            x = chunk(x, x.shape[axis] // -part.start, axis)[-1]
        elif part != slice(None):
            start, stop, step = part.indices(x.shape[axis])
            shape = (*x.shape[:axis], len(range(start, stop, step)), *x.shape[axis + 1 :])
            x = x.emit("Slice", *(x.graph.integers([number]) for number in (start, stop, axis, step)), shape=shape)
        axis += 1
    return x


def isfinite(x: Value) -> Value:
    """By a comparison, which is false of NaN on every device; nothing but overflow reaches the largest float."""
    assert x.dtype == torch.float32
    return x.emit("Abs") < LARGEST_FLOAT


def every(x: Value, dim: int) -> Value:
    """Whether all of a row [B, S] are true; runtimes find the smallest of floats, not of truths."""
    assert dim == 1 and x.ndim == 2
    smallest = to(x, torch.float32).emit("ReduceMin", x.graph.integers([1]), shape=x.shape[:1], keepdims=0)
    return to(smallest, torch.bool)


def mean(x: Value, dim: int) -> Value:
    """Along an axis, which goes."""
    axis = dim % x.ndim
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    return x.emit("ReduceMean", x.graph.integers([axis]), shape=shape, keepdims=0)


def total(x: Value, dim: int) -> Value:
    """How many of a row [B, S] are true."""
    assert x.dtype == torch.bool and dim == 1
    return to(x, torch.int64).emit("ReduceSum", x.graph.integers([1]), shape=x.shape[:1], keepdims=0)


def argmax(x: Value, dim: int) -> Value:
    return x.emit("ArgMax", shape=x.shape[:dim] + x.shape[dim + 1 :], dtype=torch.int64, axis=dim, keepdims=0)


def gather(x: Value, dim: int, index: Value) -> Value:
    return x.emit("GatherElements", index, shape=index.shape, axis=dim)


def clamp(x: Value, low: float, high: float) -> Value:
    return x.emit("Clip", *(x.graph.constant(limit, x.dtype) for limit in (low, high)))


def _unary(kind: str) -> Callable[..., Value]:
    return lambda x, inplace=False: x.emit(kind)


OPERATORS = {kind.lower(): _unary(kind) for kind in "Cos Sin Tanh Relu Sigmoid Floor Neg".split()}
OPERATORS |= {kind.lower(): _elementwise(kind) for kind in ("Add", "Sub", "Mul", "Div")}
OPERATORS |= {"add_": OPERATORS["add"], "sub_": OPERATORS["sub"], "exp_": _unary("Exp"), "all": every, "sum": total}
OPERATORS |= {"lt": _elementwise("Less", torch.bool), "eq": _elementwise("Equal", torch.bool)}
OPERATORS |= {"logical_not": _unary("Not"), "remainder": _elementwise("Mod")}
OPERATORS |= {
    "addcmul": lambda x, first, second: x + first * second,
    "addmm_": lambda x, a, b: OPERATORS["add"](x, a @ b),
}
OPERATORS |= {"contiguous": lambda x: x, "float": lambda x: to(x, torch.float32), "long": lambda x: to(x, torch.int64)}
OPERATORS |= {"new_zeros": lambda x, *sizes: x.graph.constant(torch.zeros(sizes))}
FUNCTIONS: tuple[Callable[..., Any], ...] = (silu, gelu, to, conv2d, linear, matmul, layer_norm, batch_norm, softmax)
FUNCTIONS += (scaled_dot_product_attention, embedding, interpolate, pixel_shuffle, pad, cat, split, chunk, unbind)
FUNCTIONS += (permute, transpose, reshape, flatten, unflatten, expand, repeat_interleave, unsqueeze, getitem, clamp)
FUNCTIONS += (isfinite, mean, rms_norm, where, masked_fill, logsumexp, pixel_unshuffle, stack, repeat, argmax, gather)
OPERATORS |= {function.__name__: function for function in FUNCTIONS}
