"""Between the host and a device through page-locked memory; of two ways, only to the host does the caller wait."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST_PINNED = 2**26  # bytes of page-locked memory that a call takes, which can never be swapped out


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A value on `device`; what the host holds is copied to a GPU behind its work, and the host goes on."""
    is_queued = device.type == "cuda" and value.device.type == "cpu"
    return value.pin_memory().to(device, non_blocking=True) if is_queued else value.to(device)


def to_host(*values: Tensor) -> list[np.ndarray]:
    """The values as arrays of their own, or as views of tensors that lie in host memory already."""
    if not values or values[0].device.type != "cuda":
        return [value.cpu().numpy() for value in values]
    return _copy(values, sum(value.nbytes for value in values) <= LARGEST_PINNED)


def _copy(values: Sequence[Tensor], is_pinned: bool) -> list[np.ndarray]:
    """Arrays of values of a GPU, by way of memory that PyTorch keeps page-locked for the next time."""
    copies = [value.to("cpu", non_blocking=is_pinned) for value in values]
    torch.cuda.current_stream(values[0].device).synchronize()
    return [value.numpy().copy() for value in copies]
