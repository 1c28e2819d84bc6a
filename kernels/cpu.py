"""Where the operations meet csrc: which tensors its native forms take, and how these are described to it."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1}
SHARED = 2**18  # elements from which a call is worth a second thread
PRODUCTS = 2**3  # with each element, in the time of one exponential and what else a norm does to it


def is_native(*tensors: Tensor) -> bool:
    """Whether csrc takes these tensors: on the CPU, of one storage it knows, dense along the last axis, and without
    gradients.
    """
    dtype = tensors[0].dtype
    if dtype not in STORAGES or torch.is_grad_enabled():
        return False
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu or x.stride(-1) != 1 or not x.numel():
            return False
    return True


def threads(x: Tensor, products: int = PRODUCTS) -> int:
    """The threads for a call that multiplies each element of `x` this many times, or passes over it once."""
    return torch.get_num_threads() if x.numel() * products >= SHARED * PRODUCTS else 1
