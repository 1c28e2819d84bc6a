"""Group normalisation and SiLU of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels import group_norm_parts
from datasetdm_fast.kernels.cpu import STORAGES, is_native, threads
from datasetdm_fast.kernels.noise import Probe, noise

DEVICES = {"cpu": "native", "untuned": "fused"}


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True) -> Tensor:
    """SiLU of the normalised `x` [B, C, h, w]; without SiLU where the norm stands alone."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if has_silu else x


def native(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True, *, in_place: bool = False
) -> Tensor:
    """`reference` on a CPU over a channels-last image, from csrc/network_ops.cpp: statistics, norm and SiLU without a
    map between; `in_place` in the memory of the image, where that lies as it is read.
    """
    fits = x.ndim == 4 and weight.shape == bias.shape == x.shape[1:2]
    if not fits or not is_native(weight, bias) or not is_native(x.permute(0, 2, 3, 1)) or x.dtype != weight.dtype:
        return reference(x, weight, bias, groups, eps, has_silu)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
    places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    _C.group_norm(STORAGES[x.dtype], *places, batch, height * width, channels, groups, eps, has_silu, threads(x))
    return out


def fused(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool = True) -> Tensor:
    """The result of `reference`, channels-last."""
    return group_norm_parts.fused([x], [], None, weight, bias, groups, eps, has_silu)


def probe() -> Probe:
    x = noise(1, 1280, 16, 16).contiguous(memory_format=torch.channels_last)
    return x, noise(1280) + 1, noise(1281)[1:], 32, 1e-5
