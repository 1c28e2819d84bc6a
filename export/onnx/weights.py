"""The bytes of weights: as they are written beside graphs, and the digest that tells them from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

PAGE = 4096  # large tensors start on a page, so that a reader can map them
LARGE = 65536  # bytes
LINE = 64


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
