"""Kernels that no GPU has confirmed, beside what is launched today, and the rows where tuning begins.

`--tune` prints a row of one that is faster than what is launched today: then it moves to kernels/. What no GPU confirms
goes out again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import norm_linear
from bench.kernels.described_product import SUFFIX, find_described_sizes, multiply
from datasetdm_fast.kernels import geglu, linear_add, linear_geglu
from datasetdm_fast.kernels.add_statistics import CHUNK, empty_statistics
from datasetdm_fast.kernels.launch import Blocks, block_sizes, round_up


@dataclass(frozen=True)
class Candidate:
    """Another kernel of one operation, or of several that follow one another."""

    reference: Callable[..., Any]
    usual: Callable[..., Any]  # what is launched today
    described: Callable[..., Any]  # the result by rows and inputs; None where there is no row, or no descriptor fits
    rows: Mapping[str, Blocks]  # kind of GPU -> where tuning begins
    BLOCKS: dict[str, Blocks] = field(default_factory=dict)  # the rows in use

    def fused(self, *inputs: Any) -> Any:
        result = self.described(self.BLOCKS, *inputs)
        return self.usual(*inputs) if result is None else result


def _linear_geglu(table: Mapping[str, Blocks], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty((*x.shape[:-1], len(weight) // 2))
    if sizes := find_described_sizes(table, "linear_geglu", x, weight, out):
        multiply(sizes, x, weight, bias, out)
        return out
    return None


def _linear_add(
    table: Mapping[str, Blocks], parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor
) -> tuple[Tensor, Tensor] | None:
    first, *others = (part.contiguous() for part in parts)
    weight, residual = weight.contiguous(), residual.contiguous()
    rows = min(CHUNK, round_up(first.shape[1]))
    sizes = find_described_sizes(table, "linear_add", first, weight, *others, residual)
    if not sizes or first.shape[1] % rows:
        return None
    out, statistics = torch.empty_like(residual), empty_statistics(first, len(weight))
    second, sizes = others[0] if others else None, sizes | {"BLOCK_S": rows}
    multiply(sizes, first, weight, bias, out, second=second, residual=residual, statistics=statistics)
    return out, statistics


# The first product of an MM-DiT's feed-forward layers with its activation applied.


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, has_gate: bool = False) -> Tensor:
    """The GELU, by its formula with a tangent, of `x` [..., K] under `weight` [C, K] and `bias` [C]; with a gate the
    SiLU of the first half of the product times the second [..., C / 2].
    """
    product = F.linear(x, weight, bias)
    return geglu.reference(product, True) if has_gate else F.gelu(product, approximate="tanh")


def _usual_activation(x: Tensor, weight: Tensor, bias: Tensor | None, has_gate: bool = False) -> Tensor:
    product = F.linear(x, weight, bias)
    return geglu.fused(product, True) if has_gate else F.gelu(product, approximate="tanh")


def _linear_activation(
    table: Mapping[str, Blocks], x: Tensor, weight: Tensor, bias: Tensor | None, has_gate: bool = False
) -> Tensor | None:
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty((*x.shape[:-1], len(weight) // (1 + has_gate)))
    if sizes := find_described_sizes(table, "linear_activation", x, weight, out):
        multiply(sizes, x, weight, bias, out, is_joint=True)
        return out
    return None


TILES = {"BLOCK_C": 128, "BLOCK_K": 64, "PROGRAMS": 1}
ROWS = {
    kernel: block_sizes(f"{kernel} {SUFFIX}", 8, 3, bits=(16,), BLOCK_S=128, **TILES)
    for kernel in ("linear_geglu", "linear_activation", "norm_linear", "norm_linear gated")
}
CANDIDATES = {
    "linear_geglu": Candidate(
        linear_geglu.reference, linear_geglu.fused, _linear_geglu, {"sm_90": ROWS["linear_geglu"]}
    ),
    "linear_activation": Candidate(
        linear_activation, _usual_activation, _linear_activation, {"sm_90": ROWS["linear_activation"]}
    ),
    "linear_add": Candidate(
        linear_add.reference,
        linear_add.fused,
        _linear_add,
        {"sm_90": block_sizes(f"linear_add {SUFFIX}", 8, 3, bits=(16,), **TILES)},
    ),
    "norm_linear": Candidate(
        norm_linear.reference,
        norm_linear.usual,
        norm_linear.described,
        {"sm_90": ROWS["norm_linear"] | ROWS["norm_linear gated"]},
    ),
}
