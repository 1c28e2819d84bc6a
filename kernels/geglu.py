"""The gated unit of the transformers' feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads

DEVICES = {"cpu": "native"}


def reference(x: Tensor, has_silu: bool = False) -> Tensor:
    """The first half of `x` [..., 2C] times the exact GELU of the second half; or the SiLU of the first half times the
    second.
    """
    first, second = x.chunk(2, -1)
    return F.silu(first) * second if has_silu else first * F.gelu(second)


def native(x: Tensor, has_silu: bool = False) -> Tensor:
    """`reference` on a CPU; with GELU from csrc/network_ops.cpp, one pass."""
    if has_silu or not is_native(x) or x.shape[-1] % 2:
        return reference(x, has_silu)
    x, channels = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    _C.geglu(STORAGES[x.dtype], x.data_ptr(), out.data_ptr(), out.numel() // channels, channels, threads(x))
    return out
