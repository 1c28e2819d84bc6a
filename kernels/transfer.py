"""Between the host and a device through page-locked memory; of two ways, only to the host does the caller wait."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; more than any dtype needs
LARGEST_PINNED = 2**26  # bytes of page-locked memory a thread keeps; it can never be swapped out
_thread = threading.local()


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A value on `device`; what the host holds is copied to a GPU behind its work, and the host goes on."""
    is_queued = device.type == "cuda" and value.device.type == "cpu"
    return value.pin_memory().to(device, non_blocking=True) if is_queued else value.to(device)


def to_host(*values: Tensor) -> list[np.ndarray]:
    """The values as arrays of their own, or as views of tensors that lie in host memory already."""
    if not values or values[0].device.type != "cuda":
        return [value.cpu().numpy() for value in values]
    if _size(values) <= LARGEST_PINNED:
        return _copy(values)
    if len(values) == 1:
        return [values[0].cpu().numpy()]
    return [array for value in values for array in to_host(value)]


def _size(group: Sequence[Tensor]) -> int:
    return sum(-(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT for value in group)


def _copy(group: Sequence[Tensor]) -> list[np.ndarray]:
    buffer, places, begin = _buffer(_size(group)), [], 0
    for value in group:
        end = begin + value.numel() * value.element_size()
        place = buffer[begin:end].view(value.dtype).view(value.shape)
        place.copy_(value, non_blocking=True)
        places.append(place)
        begin += _size([value])
    torch.cuda.current_stream(group[0].device).synchronize()
    return [place.numpy().copy() for place in places]


def _buffer(size: int) -> Tensor:
    """This thread's page-locked bytes, as many as the largest call so far needed."""
    if getattr(_thread, "bytes", None) is None or len(_thread.bytes) < size:
        _thread.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return _thread.bytes
