"""Where the operations meet csrc: which tensors its native forms take, and how these are described to it."""

import torch
import torch.nn.functional as F
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1}
SHARED = 2**18  # elements from which a call is worth a second thread
PRODUCTS = 2**3  # with each element, in the time of one exponential and what else a norm does to it


def is_native(*tensors: Tensor) -> bool:
    """Whether csrc takes these: on the CPU, of one storage it knows, dense along the last axis, without gradients."""
    dtype = tensors[0].dtype
    if dtype not in STORAGES or torch.is_grad_enabled():
        return False
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu or x.stride(-1) != 1 or not x.numel():
            return False
    return True


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies tiles of `dtype` (AMX), as PyTorch's own operations do, and of csrc's the attention:
    several times as fast as pairs of bf16, which an Intel CPU multiplies more slowly than fp32.
    """
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def threads(x: Tensor, products: int = PRODUCTS) -> int:
    """The threads for a call that multiplies each element of `x` this many times, or passes over it once."""
    return torch.get_num_threads() if x.numel() * products >= SHARED * PRODUCTS else 1


PANEL = 16  # outputs that lie side by side


def panels(weight: Tensor) -> Tensor:  # [P, I, 16] of [O, I]
    """The weight as the products of csrc read it: an even number of panels, the last ones filled up with zeros."""
    outputs, inner = weight.shape
    padded = torch.zeros(-(-outputs // (2 * PANEL)) * 2 * PANEL, inner)
    padded[:outputs] = weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pair_inputs(panels: Tensor) -> Tensor:  # [..., (I + 1) / 2, 16, 2] bf16 of [..., I, 16]
    """The panels rounded to bf16, with each two inputs of an output side by side; an odd one beside a zero."""
    even = F.pad(panels, (0, 0, 0, panels.shape[-2] % 2))
    return even.unflatten(-2, (-1, 2)).transpose(-1, -2).to(torch.bfloat16).contiguous()
