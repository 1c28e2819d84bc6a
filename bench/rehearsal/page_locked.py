"""Arrays of the host over page-locked memory, which a GPU may be copying while the host writes to them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

UNLIKELY = b"\xa5"  # a small number in every type
WRITING = (np.copyto, np.place, np.put, np.putmask)  # to their first argument


class PageLocked(np.ndarray):
    """An array whose `on_write` hears of every write through it, or through a view of it, before it is made."""

    on_write: Callable[[], None] | None = None  # None: memory of its own, as a copy has

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, PageLocked) and source.on_write and np.may_share_memory(self, source):
            self.on_write = source.on_write

    def __setitem__(self, place: Any, value: Any) -> None:
        written(self)
        super().__setitem__(place, value)

    def fill(self, value: Any) -> None:
        written(self)
        super().fill(value)

    def copy(self, order: str = "C") -> np.ndarray:
        return np.array(self, order=order)

    def __array_ufunc__(self, ufunc, method: str, *inputs: Any, out: tuple = (), **named: Any) -> Any:
        written(*out)
        if out:
            named["out"] = tuple(map(plain, out))
        result = getattr(ufunc, method)(*map(plain, inputs), **named)
        return out[0] if len(out) == 1 else result

    def __array_function__(self, function, types, args, kwargs) -> Any:
        written(*args[:1] if function in WRITING else (), kwargs.get("out"))
        return super().__array_function__(function, types, args, kwargs)


def written(*arrays: Any) -> None:
    """Tells those that hear of it that they are written to."""
    for array in arrays:
        if isinstance(array, PageLocked) and array.on_write:
            array.on_write()


def plain(value: Any) -> Any:
    """The same memory as an array of NumPy's own."""
    return value.view(np.ndarray) if isinstance(value, PageLocked) else value


class Watch:
    """The memory of an array, looked at for what is written to it past NumPy, by `readinto` or through a memoryview;
    the last look is when nothing shows it any more.
    """

    def __init__(self, own: np.ndarray, content: bytearray, on_change: Callable[[], None]):
        self.content, self.seen, self.on_change = content, bytes(content), on_change
        self.alive = weakref.ref(own, lambda _: self.look())

    def look(self) -> None:
        if self.seen != self.content:
            self.seen = bytes(self.content)
            self.on_change()


def filled(shape: tuple[int, ...], dtype: str, value: Any) -> tuple[np.ndarray, bytearray]:
    """An array without a shape whose elements are `value`, or what nobody writes where that is None, and its memory."""
    count = math.prod(shape)
    content = (
        bytearray(np.full(count, value, dtype).tobytes())
        if value is not None
        else bytearray(UNLIKELY * count * np.dtype(dtype).itemsize)
    )
    return np.frombuffer(content, dtype), content
