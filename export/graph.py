"""ONNX graphs, written by running a module's own forward on stand-ins for its tensors.

A Value answers the PyTorch calls of the lean models with the nodes that compute the same; whatever it does not know raises, so no graph
can silently leave something out. Sizes known only at run time are Extents: 2B is twice whatever axis 0 of the latents turns out to be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from datasetdm_fast.export.weights import DataFile, tensor_bytes, value_of

# Every runtime since 2023 reads opset 18; convolutions of bf16 came with 22.
OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
IR_VERSIONS = {18: 8, 22: 10}
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
BLOCKED = -1e30  # added to the score of a cell that is not to be seen: exp of it is exactly 0
LARGEST = torch.finfo(torch.float32).max
SMALL = 256  # elements up to which a constant stays in the graph itself
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Extent:
    """A length known at run time: `times` the product of the named axes, such as 2B."""

    times: int
    letters: tuple[str, ...]

    def __mul__(self, other: Size) -> Extent:
        times, letters = (other.times, other.letters) if isinstance(other, Extent) else (other, ())
        return Extent(self.times * times, tuple(sorted(self.letters + letters)))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Extent:
        if self.times % other:
            raise ValueError(f"{self} does not divide by {other}")
        return Extent(self.times // other, self.letters)

    def __str__(self) -> str:
        return ("" if self.times == 1 else str(self.times)) + "".join(self.letters)


Size = int | Extent


class Value:
    """A tensor of the graph being written; a constant one has its `tensor`."""

    def __init__(self, graph: Graph, name: str, shape: Sequence[Size], dtype: torch.dtype, tensor: Tensor | None = None):
        self.graph, self.name, self.shape, self.dtype, self.tensor = graph, name, tuple(shape), dtype, tensor
        self.is_spent = False  # overwritten in place: its name no longer says what it holds
        self.origin: tuple[str, Value, tuple[int, ...]] | None = None  # of a Reshape or Transpose: its kind, what it was made of, its permutation
        self.device = torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        return _call(name.strip("_") if name.startswith("__") else name, func, args, kwargs or {})

    def __getattr__(self, name: str):
        if name.startswith("__") or name not in OPERATORS:
            raise AttributeError(f"export: a traced tensor has no {name!r}")
        return lambda *args, **kwargs: _call(name, getattr(torch.Tensor, name), (self, *args), kwargs)

    def __bool__(self) -> bool:
        raise TypeError("export: control flow depends on a tensor's values")

    def __iter__(self) -> Iterator[Value]:
        return iter(self.unbind(0))

    def __getitem__(self, index) -> Value:
        return _call("getitem", torch.Tensor.__getitem__, (self, index), {})

    def __add__(self, other):
        return self.add(other)

    def __sub__(self, other):
        return self.sub(other)

    def __rsub__(self, other):
        return self.graph.constant(other, self.dtype).sub(self)

    def __mul__(self, other):
        return self.mul(other)

    def __truediv__(self, other):
        return self.div(other)

    def __lt__(self, other):
        return self.lt(other)

    def __matmul__(self, other):
        return self.matmul(other)

    def __neg__(self):
        return self.neg()

    __radd__, __rmul__ = __add__, __mul__


def _each(found: object) -> Iterator[Value]:
    if isinstance(found, Value):
        yield found
    elif isinstance(found, (list, tuple)):
        for one in found:
            yield from _each(one)


def _call(name: str, func: Callable, args: Sequence, kwargs: Mapping):
    """The result of one PyTorch call: computed where everything is constant, else what its operator adds to the graph."""
    values = list(_each([*args, *kwargs.values()]))
    if any(value.is_spent for value in values):
        raise RuntimeError(f"export: {name} reads a tensor that was overwritten in place")
    graph = values[0].graph
    has_extent = any(isinstance(one, Extent) for one in _leaves([*args, *kwargs.values()]))
    if all(value.tensor is not None for value in values) and not has_extent:
        return _folded(graph, name, func, args, kwargs)
    if name not in OPERATORS:
        raise NotImplementedError(f"export: no ONNX form of {name} is written")
    if name.endswith("_"):
        args[0].is_spent = True
    return OPERATORS[name](*args, **kwargs)


def _leaves(found: object) -> Iterator[object]:
    if isinstance(found, (list, tuple)):
        for one in found:
            yield from _leaves(one)
    else:
        yield found


def _folded(graph: Graph, name: str, func: Callable, args: Sequence, kwargs: Mapping):
    """The constant result, named by how it was made, so that equal names mean equal bytes in every graph over the same weights."""

    def real(one):
        if isinstance(one, Value):
            return one.tensor
        return type(one)(map(real, one)) if isinstance(one, (list, tuple)) else one

    with torch.no_grad():
        result = func(*map(real, args), **{key: real(one) for key, one in kwargs.items()})
    given = list(_leaves([args, list(kwargs.items())]))
    is_named = all(one.name if isinstance(one, Value) else not isinstance(one, Tensor) for one in given)
    told = f"{name}({', '.join(one.name if isinstance(one, Value) else repr(one) for one in given)})" if is_named else ""

    def wrapped(one, name):
        if isinstance(one, Tensor):
            return graph.constant(one, name=name)
        if isinstance(one, (list, tuple)):
            return type(one)(wrapped(part, name and f"{name}[{place}]") for place, part in enumerate(one))
        return one

    return wrapped(result, told)


class Graph:
    """One graph under construction; large constants go to `data`."""

    def __init__(self, name: str, data: DataFile, opset: int = OPSETS[torch.float32]):
        self.name, self.data, self.opset = name, data, opset
        self.scope: list[str] = []  # the modules whose forward is running, for the names of their nodes
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.axes: dict[str, tuple[str, int]] = {}  # letter -> input and its axis
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, int] = {}
        self._sizes: dict[Extent, str] = {}

    # What a graph is made of

    def input(self, name: str, shape: Sequence[Size], dtype: torch.dtype) -> Value:
        for axis, size in enumerate(shape):
            if isinstance(size, Extent) and size.times == len(size.letters) == 1:
                self.axes.setdefault(size.letters[0], (name, axis))
        value = Value(self, name, shape, dtype)
        self._names[name] = 1
        self.inputs.append(value)
        return value

    def output(self, name: str, value: Value) -> None:
        """Gives `value` to the caller as `name`; the node that makes it does so under that name, as TensorRT casts to uint8 only at the very end."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if one == value.name else one for one in names]
        value.name = name
        self.outputs.append(value)

    def constant(self, value: Tensor | float | Sequence, dtype: torch.dtype | None = None, name: str = "") -> Value:
        """A constant; its bytes are looked up when a node reads it."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        return Value(self, name, tensor.shape, tensor.dtype, tensor)

    def emit(self, kind: str, inputs: Sequence[Value | str | None], shape: Sequence[Size], dtype: torch.dtype, name: str = "", **attributes) -> Value:
        """The single output of a new node."""
        return self.emit_several(kind, inputs, [shape], dtype, [name] if name else None, **attributes)[0]

    def emit_several(self, kind: str, inputs: Sequence, shapes: Sequence[Sequence[Size]], dtype: torch.dtype, names=None, **attributes) -> list[Value]:
        node = self._unique("/".join([*self.scope[-1:], kind]))
        names = names or ([node + ".out"] if len(shapes) == 1 else [f"{node}.out{place}" for place in range(len(shapes))])
        read = [self._read(value) for value in inputs]
        self._nodes.append(helper.make_node(kind, read, names, name=node, domain=attributes.pop("domain", None), **attributes))
        return [Value(self, name, shape, dtype) for name, shape in zip(names, shapes)]

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name

    def _read(self, value: Value | str | None) -> str:
        """The name a node reads `value` by."""
        if value is None or isinstance(value, str):
            return value or ""
        return value.name if value.tensor is None else self.stored(value.tensor, value.dtype, value.name)

    def stored(self, tensor: Tensor, dtype: torch.dtype, name: str = "") -> str:
        """The name of an initializer with the bytes `tensor` has as `dtype`."""
        name = name or f"constant.{hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]}{list(tensor.shape)}"
        name = name if dtype == torch.float32 else f"{name}.{str(dtype).removeprefix('torch.')}"
        if name in self._constants:
            return name
        proto = self._constants[name] = TensorProto(name=name, dims=tensor.shape, data_type=TYPES[dtype])
        if dtype == torch.int64 or tensor.numel() <= SMALL:
            proto.raw_data = bytes(tensor_bytes(value_of(tensor).to(dtype)))
        else:
            offset, length = self.data.place(name, tensor, dtype)
            proto.data_location = TensorProto.EXTERNAL
            for key, content in (("location", self.data.name), ("offset", offset), ("length", length)):
                proto.external_data.add(key=key, value=str(content))
        return name

    # Sizes

    def integers(self, numbers: Sequence[int]) -> str:
        return self.stored(torch.tensor(numbers, dtype=torch.int64), torch.int64)

    def shape(self, sizes: Sequence[Size], is_reshape: bool = False) -> str:
        """The name of a one-dimensional int64 tensor that holds these sizes; a Reshape works out one of them itself."""
        dynamic = [place for place, size in enumerate(sizes) if isinstance(size, Extent)]
        if len(dynamic) == 1 and is_reshape:
            return self.integers([-1 if place in dynamic else size for place, size in enumerate(sizes)])
        if not dynamic:
            return self.integers(list(sizes))
        parts = [self._measured(size) if isinstance(size, Extent) else self.integers([size]) for size in sizes]
        return self.emit("Concat", parts, [len(sizes)], torch.int64, axis=0).name

    def _measured(self, extent: Extent) -> str:
        """The name of a tensor [1] that holds the extent."""
        if extent not in self._sizes:
            factors = [self._axis(letter) for letter in extent.letters] + ([self.integers([extent.times])] if extent.times > 1 else [])
            total = factors[0]
            for factor in factors[1:]:
                total = self.emit("Mul", [total, factor], [1], torch.int64).name
            self._sizes[extent] = total
        return self._sizes[extent]

    def _axis(self, letter: str) -> str:
        single = Extent(1, (letter,))
        if single not in self._sizes:
            name, axis = self.axes[letter]
            self._sizes[single] = self.emit("Shape", [name], [1], torch.int64, start=axis, end=axis + 1).name
        return self._sizes[single]

    # The whole

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished graph; its data file is written apart."""

        def described(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(value.name, TYPES[value.dtype], [str(size) if isinstance(size, Extent) else size for size in value.shape])
                for value in values
            ]

        nodes, read = self._needed()
        constants = [constant for name, constant in self._constants.items() if name in read]
        graph = helper.make_graph(nodes, self.name, described(self.inputs), described(self.outputs), constants)
        domains = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in nodes):
            domains.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSIONS[self.opset], producer_name="datasetdm_fast")
        for key, content in metadata.items():
            model.metadata_props.add(key=key, value=content)
        return model

    def _needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that an output depends on, and every name they read: a transposition that was undone leaves a node nobody reads."""
        read = {value.name for value in self.outputs}
        needed = []
        for node in reversed(self._nodes):
            if read.intersection(node.output):
                read.update(node.input)
                needed.append(node)
        return needed[::-1], read


def traced(module: nn.Module, graph: Graph, prefix: str) -> nn.Module:
    """`module` with its weights as constants of `graph` and its parts named in it; it is of no other use afterwards."""

    def entered(name: str):
        def enter(*_):
            graph.scope.append(name)

        return enter

    def leave(*_):
        graph.scope.pop()

    for name, part in module.named_modules():
        place = f"{prefix}.{name}" if name else prefix
        for held in (part._parameters, part._buffers):
            for key, tensor in held.items():
                if isinstance(tensor, Value):
                    held[key] = graph.constant(tensor.tensor, name=tensor.name)
                elif tensor is not None:
                    held[key] = graph.constant(tensor.detach(), name=f"{place}.{key}")
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            hooks.clear()
        part.register_forward_pre_hook(entered(place))
        part.register_forward_hook(leave)
    return module


# Operators: the PyTorch calls of the lean models, by name ---------------------------------------------------------------------------------


def _as(value: Value, dtype: torch.dtype) -> Value:
    """A constant takes the type of what it meets."""
    if value.tensor is not None and value.dtype != dtype and value.dtype.is_floating_point:
        return Value(value.graph, value.name, value.shape, dtype, value.tensor)
    return value


def _operands(*given) -> list[Value]:
    """The operands as Values of one type: that of those which are no constants."""
    values = [one for one in given if isinstance(one, Value)]
    graph = values[0].graph
    dtype = next((one.dtype for one in values if one.tensor is None), values[0].dtype)
    return [_as(one if isinstance(one, Value) else graph.constant(one, None if isinstance(one, Tensor) else dtype), dtype) for one in given]


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


def _elementwise(kind: str, dtype: torch.dtype | None = None):
    def operator(*given) -> Value:
        values = _operands(*given)
        first = values[0]
        return first.graph.emit(kind, values, _broadcast(*(value.shape for value in values)), dtype or first.dtype)

    return operator


def _unary(kind: str):
    def operator(x: Value, inplace: bool = False) -> Value:
        return x.graph.emit(kind, [x], x.shape, x.dtype)

    return operator


def silu(x: Value, inplace: bool = False) -> Value:
    return x * x.sigmoid()


def gelu(x: Value, approximate: str = "none") -> Value:
    """The exact one, in the form in which runtimes look for it."""
    assert approximate == "none"
    return x * (x.graph.emit("Erf", [x / math.sqrt(2)], x.shape, x.dtype) + 1.0) * 0.5


def to(x: Value, dtype: torch.dtype | torch.device, *_, **__) -> Value:
    if not isinstance(dtype, torch.dtype) or dtype == x.dtype:
        return x
    return x.graph.emit("Cast", [x], x.shape, dtype, to=TYPES[dtype])


def conv2d(x: Value, weight: Value, bias: Value | None = None, stride=1, padding=0, dilation=1, groups: int = 1) -> Value:
    pair = [tuple(one) if isinstance(one, (tuple, list)) else (one, one) for one in (stride, padding, dilation)]
    (strides, pads, dilations), kernel = pair, weight.shape[2:]
    assert groups == 1 and dilations == (1, 1)
    sides = tuple((side + 2 * pad - k) // step + 1 for side, pad, k, step in zip(x.shape[2:], pads, kernel, strides))
    is_fixed = bias is not None and bias.tensor is not None
    inputs = [x, _as(weight, x.dtype), *([_as(bias, x.dtype)] if is_fixed else [])]
    out = x.graph.emit("Conv", inputs, (x.shape[0], weight.shape[0], *sides), x.dtype, kernel_shape=kernel, strides=strides, pads=(*pads, *pads))
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
    return x.graph.emit("MatMul", [x, y], (*batch, *rows, y.shape[-1]), x.dtype)


def layer_norm(x: Value, shape: Sequence[int], weight: Value, bias: Value, eps: float = 1e-5) -> Value:
    """Along the last axis; by ONNX's definition summed in fp32 whatever the type."""
    return x.graph.emit("LayerNormalization", [x, _as(weight, x.dtype), _as(bias, x.dtype)], x.shape, x.dtype, axis=-1, epsilon=eps, stash_type=1)


def batch_norm(x: Value, mean: Value, variance: Value, weight=None, bias=None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Value:
    """By stored statistics, without an affine part."""
    assert weight is None and bias is None and not training
    ones, zeros = x.graph.constant(torch.ones(mean.shape)), x.graph.constant(torch.zeros(mean.shape))
    return x.graph.emit("BatchNormalization", [x, ones, zeros, mean, variance], x.shape, x.dtype, epsilon=eps)


def softmax(x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    x = x if dtype is None else x.to(dtype)
    return x.graph.emit("Softmax", [x], x.shape, x.dtype, axis=dim % x.ndim)


def scaled_dot_product_attention(q: Value, k: Value, v: Value, is_causal: bool) -> Value:
    """Each place over itself and those before it."""
    assert is_causal
    later = torch.full((q.shape[2], q.shape[2]), BLOCKED).triu(1)
    return softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + later, -1) @ v


def embedding(ids: Value, weight: Value, *_, **__) -> Value:
    return ids.graph.emit("Gather", [weight, ids], (*ids.shape, weight.shape[1]), weight.dtype, axis=0)


def interpolate(x: Value, size: tuple[int, int], mode: str, align_corners: bool = False, **_) -> Value:
    """Bilinear with half-pixel centres."""
    assert mode == "bilinear" and not align_corners
    shape = (*x.shape[:2], *size)
    options = dict(mode="linear", coordinate_transformation_mode="half_pixel")
    scales = [new / old for new, old in zip(size, x.shape[2:])]
    if all(float(np.float32(scale)) == scale for scale in scales):
        return x.graph.emit("Resize", [x, "", x.graph.stored(torch.tensor([1.0, 1.0, *scales]), torch.float32)], shape, x.dtype, **options)
    # A ratio that rounds could also round the size.
    return x.graph.emit("Resize", [x, "", "", x.graph.shape(shape)], shape, x.dtype, **options)


def pixel_shuffle(x: Value, times: int) -> Value:
    batch, channels, height, width = x.shape
    return x.graph.emit("DepthToSpace", [x], (batch, channels // times**2, height * times, width * times), x.dtype, blocksize=times, mode="CRD")


def pad(x: Value, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    assert mode == "constant" and not value
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for place in range(len(pads) // 2):
        begins[-1 - place], ends[-1 - place] = pads[2 * place], pads[2 * place + 1]
    shape = [size + first + last if first or last else size for size, first, last in zip(x.shape, begins, ends)]
    return x.graph.emit("Pad", [x, x.graph.integers([*begins, *ends])], shape, x.dtype)


def cat(values: Sequence[Value], dim: int = 0) -> Value:
    values = _operands(*values)
    first, axis = values[0], dim % values[0].ndim
    sizes = [value.shape[axis] for value in values]
    total = sizes[0] * len(sizes) if isinstance(sizes[0], Extent) and len(set(sizes)) == 1 else sum(sizes)
    return first.graph.emit("Concat", values, (*first.shape[:axis], total, *first.shape[axis + 1 :]), first.dtype, axis=axis)


def split(x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    axis = dim % x.ndim
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    if isinstance(x.shape[axis], Extent):
        return x.graph.emit_several("Split", [x], shapes, x.dtype, axis=axis, num_outputs=len(sizes))
    return x.graph.emit_several("Split", [x, x.graph.integers(sizes)], shapes, x.dtype, axis=axis)


def chunk(x: Value, count: int, dim: int = 0) -> list[Value]:
    return split(x, [x.shape[dim % x.ndim] // count] * count, dim)


def unbind(x: Value, dim: int = 0) -> list[Value]:
    axis = dim % x.ndim
    return [reshape(part, *x.shape[:axis], *x.shape[axis + 1 :]) for part in split(x, [1] * x.shape[axis], axis)]


def permute(x: Value, *axes) -> Value:
    axes = [axis % x.ndim for axis in (axes[0] if isinstance(axes[0], (tuple, list)) else axes)]
    if x.origin and x.origin[0] == "Transpose":
        _, x, before = x.origin
        axes = [before[axis] for axis in axes]
    if axes == sorted(axes):
        return x
    out = x.graph.emit("Transpose", [x], [x.shape[axis] for axis in axes], x.dtype, perm=axes)
    out.origin = ("Transpose", x, tuple(axes))
    return out


def transpose(x: Value, first: int, second: int) -> Value:
    axes = list(range(x.ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return permute(x, axes)


def reshape(x: Value, *sizes) -> Value:
    sizes = list(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)
    if -1 in sizes:
        place = sizes.index(-1)
        sizes[place] = _quotient(x.shape, sizes[:place] + sizes[place + 1 :])
    if x.origin and x.origin[0] == "Reshape":
        x = x.origin[1]
    if tuple(sizes) == x.shape:
        return x
    out = x.graph.emit("Reshape", [x, x.graph.shape(sizes, is_reshape=True)], sizes, x.dtype)
    out.origin = ("Reshape", x, ())
    return out


def _quotient(whole: Sequence[Size], parts: Sequence[Size]) -> Size:
    """The size that is left of a shape once `parts` are taken from it."""
    total, taken = math.prod(whole, start=Extent(1, ())), math.prod(parts, start=Extent(1, ()))
    letters = list(total.letters)
    for letter in taken.letters:
        letters.remove(letter)
    left = Extent(total.times, tuple(letters)) // taken.times
    return left if left.letters else left.times


def flatten(x: Value, start: int = 0, end: int = -1) -> Value:
    start, end = start % x.ndim, end % x.ndim
    return reshape(x, *x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def unflatten(x: Value, dim: int, sizes: Sequence[Size]) -> Value:
    dim, sizes = dim % x.ndim, list(sizes)
    if -1 in sizes:
        place = sizes.index(-1)
        sizes[place] = _quotient([x.shape[dim]], sizes[:place] + sizes[place + 1 :])
    return reshape(x, *x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def expand(x: Value, *sizes) -> Value:
    padded = (1,) * (len(sizes) - x.ndim) + x.shape
    shape = [old if isinstance(new, int) and new == -1 else new for old, new in zip(padded, sizes)]
    if tuple(shape) == x.shape:
        return x
    return x.graph.emit("Expand", [x, x.graph.shape(shape)], shape, x.dtype)


def repeat_interleave(x: Value, times: Size, dim: int) -> Value:
    assert dim == 0
    if times == 1:
        return x
    rest = x.shape[1:]
    return expand(unsqueeze(x, 1), x.shape[0], times, *rest).reshape(x.shape[0] * times, *rest)


def unsqueeze(x: Value, dim: int) -> Value:
    axis = dim % (x.ndim + 1)
    return reshape(x, *x.shape[:axis], 1, *x.shape[axis:])


def getitem(x: Value, index) -> Value:
    """Slices, None and Ellipsis."""
    index = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index[place : place + 1] = [slice(None)] * (x.ndim - sum(one is not None for one in index) + 1)
    axis = 0
    for one in index:
        if one is None:
            x = unsqueeze(x, axis)
        elif one != slice(None):
            start, stop, step = one.indices(x.shape[axis])
            shape = (*x.shape[:axis], len(range(start, stop, step)), *x.shape[axis + 1 :])
            x = x.graph.emit("Slice", [x, *(x.graph.integers([number]) for number in (start, stop, axis, step))], shape, x.dtype)
        axis += 1
    return x


def isfinite(x: Value) -> Value:
    """By a comparison, which is false of NaN on every device; a maximum may pass over it. Nothing but overflow comes to the largest float."""
    assert x.dtype == torch.float32
    return x.graph.emit("Abs", [x], x.shape, x.dtype) < LARGEST


def every(x: Value, dim: int) -> Value:
    """Whether all of a row [B, S] are true; runtimes find the smallest of floats, not of truths."""
    assert dim == 1 and x.ndim == 2
    smallest = x.graph.emit("ReduceMin", [to(x, torch.float32), x.graph.integers([1])], x.shape[:1], torch.float32, keepdims=0)
    return to(smallest, torch.bool)


def clamp(x: Value, low: float, high: float) -> Value:
    return x.graph.emit("Clip", [x, *(x.graph.constant(limit, x.dtype) for limit in (low, high))], x.shape, x.dtype)


OPERATORS = {
    "add": _elementwise("Add"),
    "add_": _elementwise("Add"),
    "sub": _elementwise("Sub"),
    "mul": _elementwise("Mul"),
    "div": _elementwise("Div"),
    "lt": _elementwise("Less", torch.bool),
    "contiguous": lambda x: x,
    "float": lambda x: to(x, torch.float32),
    "neg": _unary("Neg"),
    "exp": _unary("Exp"),
    "cos": _unary("Cos"),
    "sin": _unary("Sin"),
    "relu": _unary("Relu"),
    "sigmoid": _unary("Sigmoid"),
    "floor": _unary("Floor"),
    "silu": silu,
    "gelu": gelu,
    "to": to,
    "conv2d": conv2d,
    "linear": linear,
    "matmul": matmul,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "softmax": softmax,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "embedding": embedding,
    "interpolate": interpolate,
    "pixel_shuffle": pixel_shuffle,
    "pad": pad,
    "cat": cat,
    "split": split,
    "chunk": chunk,
    "unbind": unbind,
    "permute": permute,
    "transpose": transpose,
    "reshape": reshape,
    "flatten": flatten,
    "unflatten": unflatten,
    "expand": expand,
    "repeat_interleave": repeat_interleave,
    "unsqueeze": unsqueeze,
    "getitem": getitem,
    "clamp": clamp,
    "isfinite": isfinite,
    "all": every,
}
