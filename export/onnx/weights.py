"""Weights that are computed when they are written: a model is exported without a second copy of it in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PAGE = 4096  # large tensors start on a page, so that a reader can map them
LARGE = 65536  # bytes
LINE = 64


class Deferred(torch.Tensor):
    """A tensor that remembers how it is made of others; only `value_of` computes it."""

    @staticmethod
    def __new__(cls, like: Tensor, make: Callable[[Made], Tensor]) -> Deferred:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device="cpu")

    def __init__(self, like: Tensor, make: Callable[[Made], Tensor]):
        self.like, self.make = like, make  # the same without memory; the calls that give it

    @classmethod
    def of(cls, value: Tensor) -> Deferred:
        return cls(value.to("meta"), lambda _: value)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}

        def compute(made: Made) -> Any:
            if compute not in made:
                positional, named = _with_each((args, kwargs), lambda value: _materialise(value, made))
                made[compute] = func(*positional, **named)
            return made[compute]

        positional, named = _with_each((args, kwargs), _shape_of)
        shapes = func(*positional, **named)
        if isinstance(shapes, Tensor):
            return cls(shapes, compute)

        def part(place: int) -> Callable[[Made], Tensor]:
            return lambda made: compute(made)[place]

        return type(shapes)(cls(shape, part(place)) for place, shape in enumerate(shapes))

    def __repr__(self) -> str:  # printing must not compute
        return f"Deferred({list(self.shape)}, {self.dtype})"


Made = dict[Callable[..., Any], Tensor | Sequence[Tensor]]  # what was computed already on the way to one tensor


def _shape_of(tensor: Tensor) -> Tensor:
    """The tensor without memory."""
    return tensor.like if isinstance(tensor, Deferred) else tensor.to("meta")


def _with_each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The arguments of a call with another in the place of each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _with_each(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_with_each(part, change) for part in value])
    return value


def _materialise(tensor: Tensor, made: Made) -> Tensor:
    return tensor.make(made) if isinstance(tensor, Deferred) else tensor.detach()


def value_of(tensor: Tensor) -> Tensor:
    """The tensor itself, a Deferred one computed."""
    with torch.no_grad():
        return _materialise(tensor, {})


def defer_weights(module: nn.Module) -> SimpleNamespace:
    """What the lean models read of a diffusers or transformers module, its weights deferred, and of the host wherever
    an engine has put the module.
    """
    state = {name: Deferred.of(value.cpu()) for name, value in module.state_dict().items()}
    return SimpleNamespace(config=module.config, state_dict=lambda: state)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; of Deferred ones computed here."""
    value = value_of(tensor).contiguous().cpu()
    value = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
    return memoryview(value.numpy()).cast("B") if value.numel() else memoryview(b"")


def digest(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 of every parameter and buffer under its name."""
    total = hashlib.sha256()
    for part in sorted(modules):
        for name, value in sorted(modules[part].state_dict().items()):
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
            content = tensor_bytes(value_of(tensor).to(dtype))
            yield content
            written = offset + len(content)
