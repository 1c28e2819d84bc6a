"""ONNX graphs, written by running a module's own forward on stand-ins for its tensors.

A Value turns the PyTorch calls of our own networks into nodes that compute the same; a call it does not know
raises, so no graph can silently leave something out. Sizes known only at run time are Extents: 2B is twice whatever
axis 0 of the latents turns out to be. Large constants lie beside the graphs, in a DataFile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

# Every runtime since 2023 reads opset 18; convolutions of bf16 came with 22.
OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
IR_VERSIONS = {18: 8, 22: 10}
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
SMALL = 256  # elements up to which a constant stays in the graph itself
PAGE = 4096  # large tensors start on a page, so that a reader can map them
LARGE = 65536  # bytes
LINE = 64
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    value = tensor.detach().contiguous().cpu()
    value = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
    return memoryview(value.numpy()).cast("B") if value.numel() else memoryview(b"")


def digest(parts: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """SHA-256 of every tensor of the parts under its name; one part is read after the other."""
    total = hashlib.sha256()
    for part, state in parts:
        for name, value in sorted(state.items()):
            total.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(tensor_bytes(value))
    return total.hexdigest()


class DataFile:
    """The tensors that lie beside one or several graphs; a tensor of the same key is written once."""

    def __init__(self, name: str):
        self.name, self.size = name, 0
        self._places: dict[str, tuple[int, int]] = {}
        self._tensors: list[tuple[int, Tensor, torch.dtype]] = []

    def place(self, key: str, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        """Offset and length of the bytes `tensor` will have as `dtype`."""
        if key not in self._places:
            length = tensor.numel() * dtype.itemsize
            step = PAGE if length >= LARGE else LINE
            offset = -(-self.size // step) * step
            self._places[key] = (offset, length)
            self._tensors.append((offset, tensor, dtype))
            self.size = offset + length
        return self._places[key]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The content of the file, one tensor in memory at a time."""
        written = 0
        for offset, tensor, dtype in self._tensors:
            if offset > written:
                yield bytes(offset - written)
            content = tensor_bytes(tensor.to(dtype))
            yield content
            written = offset + len(content)


@dataclass(frozen=True)
class Extent:
    """A length known at run time: `times` the product of the named axes, such as 2B."""

    times: int
    letters: tuple[str, ...]

    def __mul__(self, other: Size) -> Extent:
        times, letters = (other.times, other.letters) if isinstance(other, Extent) else (other, ())
        return Extent(self.times * times, tuple(sorted(self.letters + letters)))

    __rmul__ = __mul__

    def __neg__(self) -> Extent:
        return Extent(-self.times, self.letters)

    def __floordiv__(self, other: Size) -> Any:
        """An Extent; of two along the same axes, the number of times that one holds the other."""
        times, letters = (other.times, other.letters) if isinstance(other, Extent) else (other, ())
        if self.times % times or letters not in ((), self.letters):
            raise ValueError(f"{self} does not divide by {other}")
        return self.times // times if letters else Extent(self.times // times, self.letters)

    def __str__(self) -> str:
        return ("" if self.times == 1 else str(self.times)) + "".join(self.letters)


Size = int | Extent
BATCH = Extent(1, ("B",))
WORDS = Extent(1, ("K",))


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self, name)(*others)


class Value:
    """A tensor of the graph being written; a constant one has its `tensor`."""

    def __init__(
        self, graph: Graph, name: str, shape: Sequence[Size], dtype: torch.dtype, tensor: Tensor | None = None
    ):
        self.graph, self.name, self.dtype, self.tensor = graph, name, dtype, tensor
        self.shape: tuple[Any, ...] = tuple(shape)  # each an int, or an Extent
        self.is_spent = False  # overwritten in place: its name no longer says what it holds
        # of a Reshape or Transpose: its kind, what it was made of, its permutation
        self.origin: tuple[str, Value, tuple[int, ...]] | None = None
        self.device = torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        return _call(name.strip("_") if name.startswith("__") else name, func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.graph.operators:
            raise AttributeError(f"export: a traced tensor has no {name!r}")
        return lambda *args, **kwargs: _call(name, getattr(torch.Tensor, name), (self, *args), kwargs)

    def __bool__(self) -> bool:
        raise TypeError("export: control flow depends on a tensor's values")

    def __iter__(self) -> Iterator[Value]:
        return iter(self.unbind(0))

    def __getitem__(self, index: Any) -> Value:
        return _call("getitem", torch.Tensor.__getitem__, (self, index), {})

    def __rsub__(self, other: Any) -> Value:
        return self.graph.constant(other, self.dtype).sub(self)

    __add__ = __radd__ = _method("add")
    __mul__ = __rmul__ = _method("mul")
    __sub__, __truediv__, __lt__ = _method("sub"), _method("div"), _method("lt")
    __matmul__, __mod__ = _method("matmul"), _method("remainder")
    __neg__, __invert__ = _method("neg"), _method("logical_not")
    mT = T = property(lambda self: self.transpose(-2, -1))

    def emit(
        self,
        kind: str,
        *others: Value | str,
        shape: Sequence[Size] | None = None,
        dtype: torch.dtype | None = None,
        **attributes: Any,
    ) -> Value:
        """The single output of a new node that reads this value and `others`, by default of its shape and dtype."""
        shape = self.shape if shape is None else shape
        (value,) = self.graph.emit(kind, [self, *others], [shape], dtype or self.dtype, **attributes)
        return value


def _call(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of one PyTorch call: computed where all is constant, else what its operator adds to the graph."""
    leaves = list(_leaves([*args, *kwargs.values()]))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    if any(value.is_spent for value in values):
        raise RuntimeError(f"export: {name} reads a tensor that was overwritten in place")
    graph = values[0].graph
    has_extent = any(isinstance(leaf, Extent) for leaf in leaves)
    if all(value.tensor is not None for value in values) and not has_extent:
        return _fold(graph, name, func, args, kwargs)
    if name not in graph.operators:
        raise NotImplementedError(f"export: no ONNX form of {name} is written")
    if name.endswith("_"):
        args[0].is_spent = True
    return graph.operators[name](*args, **kwargs)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _fold(graph: Graph, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The constant result, named by how it was made: equal names mean equal bytes in all graphs of the weights."""

    def unwrap(value: Any) -> Any:
        if isinstance(value, Value):
            return value.tensor
        return type(value)(map(unwrap, value)) if isinstance(value, (list, tuple)) else value

    def wrap(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return graph.constant(value, name=name)
        if isinstance(value, (list, tuple)):
            return type(value)(wrap(part, name and f"{name}[{place}]") for place, part in enumerate(value))
        return value

    with torch.no_grad():
        result = func(*map(unwrap, args), **{key: unwrap(value) for key, value in kwargs.items()})
    leaves = list(_leaves([args, list(kwargs.items())]))
    is_named = all(leaf.name if isinstance(leaf, Value) else not isinstance(leaf, Tensor) for leaf in leaves)
    texts = (leaf.name if isinstance(leaf, Value) else repr(leaf) for leaf in leaves)
    return wrap(result, f"{name}({', '.join(texts)})" if is_named else "")


class Graph:
    """One graph under construction; large constants go to `data`, `operators` maps PyTorch calls to nodes."""

    def __init__(
        self, name: str, data: DataFile, operators: Mapping[str, Callable[..., Any]], opset: int = OPSETS[torch.float32]
    ):
        self.name, self.data, self.operators, self.opset = name, data, operators, opset
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
        """Names `value` for the caller; the node that makes it bears the name, as TensorRT casts to uint8 last."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if read == value.name else read for read in names]
        value.name = name
        self.outputs.append(value)

    def constant(self, value: Any, dtype: torch.dtype | None = None, name: str = "") -> Value:
        """A constant; its bytes are looked up when a node reads it."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        return Value(self, name, tensor.shape, tensor.dtype, tensor)

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value | str],
        shapes: Sequence[Sequence[Size]],
        dtype: torch.dtype,
        **attributes: Any,
    ) -> list[Value]:
        """The outputs of a new node."""
        node = self._unique("/".join([*self.scope[-1:], kind]))
        names = [f"{node}.out{place}" for place in range(len(shapes))] if len(shapes) > 1 else [f"{node}.out"]
        read = [self._read(value) for value in inputs]
        self._nodes.append(
            helper.make_node(kind, read, names, name=node, domain=attributes.pop("domain", None), **attributes)
        )
        return [Value(self, name, shape, dtype) for name, shape in zip(names, shapes)]

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name

    def _read(self, value: Value | str) -> str:
        """The name a node reads `value` by."""
        if isinstance(value, str):
            return value
        return value.name if value.tensor is None else self.store(value.tensor, value.dtype, value.name)

    def store(self, tensor: Tensor, dtype: torch.dtype, name: str = "") -> str:
        """The name of an initializer with the bytes `tensor` has as `dtype`."""
        name = name or f"constant.{hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]}{list(tensor.shape)}"
        name = name if dtype == torch.float32 else f"{name}.{str(dtype).removeprefix('torch.')}"
        if name in self._constants:
            return name
        proto = self._constants[name] = TensorProto(name=name, dims=tensor.shape, data_type=TYPES[dtype])
        if dtype == torch.int64 or tensor.numel() <= SMALL:
            proto.raw_data = bytes(tensor_bytes(tensor.to(dtype)))
        else:
            offset, length = self.data.place(name, tensor, dtype)
            proto.data_location = TensorProto.EXTERNAL
            for key, content in (("location", self.data.name), ("offset", offset), ("length", length)):
                proto.external_data.add(key=key, value=str(content))
        return name

    # Sizes

    def integers(self, numbers: Sequence[Any]) -> str:
        return self.store(torch.tensor(numbers, dtype=torch.int64), torch.int64)

    def shape(self, sizes: Sequence[Any], is_reshape: bool = False) -> str:
        """The name of a one-dimensional int64 tensor that holds these sizes; a Reshape works out one of them itself."""
        dynamic = [place for place, size in enumerate(sizes) if isinstance(size, Extent)]
        if len(dynamic) == 1 and is_reshape:
            return self.integers([-1 if place in dynamic else size for place, size in enumerate(sizes)])
        if not dynamic:
            return self.integers(list(sizes))
        parts = [self._measure(size) if isinstance(size, Extent) else self.integers([size]) for size in sizes]
        return self._length("Concat", parts, len(sizes), axis=0)

    def _length(self, kind: str, inputs: Sequence[str], length: int = 1, **attributes: int) -> str:
        """The name of the one-dimensional int64 tensor that a new node makes."""
        return self.emit(kind, inputs, [[length]], torch.int64, **attributes)[0].name

    def _measure(self, extent: Extent) -> str:
        """The name of a tensor [1] that holds the extent."""
        if extent not in self._sizes:
            factors = [self._axis(letter) for letter in extent.letters] + (
                [self.integers([extent.times])] if extent.times > 1 else []
            )
            total = factors[0]
            for factor in factors[1:]:
                total = self._length("Mul", [total, factor])
            self._sizes[extent] = total
        return self._sizes[extent]

    def _axis(self, letter: str) -> str:
        single = Extent(1, (letter,))
        if single not in self._sizes:
            name, axis = self.axes[letter]
            self._sizes[single] = self._length("Shape", [name], start=axis, end=axis + 1)
        return self._sizes[single]

    # The whole

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished graph; its data file is written apart."""

        def describe(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(
                    value.name,
                    TYPES[value.dtype],
                    [str(size) if isinstance(size, Extent) else size for size in value.shape],
                )
                for value in values
            ]

        nodes, read = self._select_needed()
        constants = [constant for name, constant in self._constants.items() if name in read]
        graph = helper.make_graph(nodes, self.name, describe(self.inputs), describe(self.outputs), constants)
        domains = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in nodes):
            domains.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(
            graph, opset_imports=domains, ir_version=IR_VERSIONS[self.opset], producer_name="datasetdm_fast"
        )
        for key, content in metadata.items():
            model.metadata_props.add(key=key, value=content)
        return model

    def _select_needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes an output depends on and the names they read: an undone transposition leaves one nobody reads."""
        read = {value.name for value in self.outputs}
        needed = []
        for node in reversed(self._nodes):
            if read.intersection(node.output):
                read.update(node.input)
                needed.append(node)
        return needed[::-1], read


def trace_module(module: nn.Module, graph: Graph, prefix: str) -> nn.Module:
    """`module` with its weights as constants of `graph` and its parts named in it; it is of no other use afterwards."""

    def enter(name: str, *_: Any) -> None:
        graph.scope.append(name)

    def leave(*_: Any) -> None:
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
        part.register_forward_pre_hook(partial(enter, place))
        part.register_forward_hook(leave)
    return module
