"""From the host to a device through page-locked memory."""

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A value on `device`; what the host holds is copied to a GPU behind its work, and the host goes on."""
    is_queued = device.type == "cuda" and value.device.type == "cpu"
    return value.pin_memory().to(device, non_blocking=True) if is_queued else value.to(device)
