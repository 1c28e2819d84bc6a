"""The first product of an MM-DiT's feed-forward layers with its activation applied."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels import geglu
from datasetdm_fast.kernels.described_product import find_described_sizes, multiply
from datasetdm_fast.kernels.launch import Blocks, is_served
from datasetdm_fast.kernels.noise import noise

DEVICES = {"untuned": "fused"}
BLOCKS: dict[str, Blocks] = {"untuned": {}}


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, has_gate: bool = False) -> Tensor:
    """The GELU, by its formula with a tangent, of `x` [..., K] under `weight` [C, K] and `bias` [C]; with a gate the
    SiLU of the first half of the product times the second [..., C / 2].
    """
    return _activate(F.linear(x, weight, bias), has_gate, geglu.reference)


def _activate(product: Tensor, has_gate: bool, gated: Callable[[Tensor, bool], Tensor]) -> Tensor:
    return gated(product, True) if has_gate else F.gelu(product, approximate="tanh")


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, has_gate: bool = False) -> Tensor:
    """The result of `reference`, in one launch on a GPU for which BLOCKS have a row."""
    fits = weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])
    if not is_served("linear_activation", x, weight, bias, fits=fits and (len(weight) % 2 == 0 or not has_gate)):
        return reference(x, weight, bias, has_gate)
    x, weight, channels = x.contiguous(), weight.contiguous(), len(weight) // (1 + has_gate)
    if described := find_described_sizes(BLOCKS, "linear_activation", x, weight, x.new_empty(channels)):
        out = x.new_empty((*x.shape[:-1], channels))
        multiply(described, x, weight, bias, out, is_joint=True)
        return out
    return _activate(F.linear(x, weight, bias), has_gate, geglu.fused)


def probe() -> tuple[Any, ...]:
    """Inputs on which a device is checked against the reference."""
    return noise(1, 9, 320), noise(2560, 320, scale=2 * 320**-0.5), noise(2560), True
