"""Weights of the fast engine's networks: where they are placed, and how far they lie from those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from datasetdm_fast.engine.models.packed import weight_as


def place_module(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`module` on the device, its convolutions channels-last."""
    return module.eval().to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def state_distance(value: Tensor, truth: Tensor) -> float:
    """The largest difference of two weights, as a share of the largest number in `truth`; NaN counts as farther than
    any number.
    """
    if not truth.numel():
        return 0.0
    farthest = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    return float(farthest.nan_to_num(nan=torch.finfo(torch.double).max))


def largest_distance(held: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """state_distance of the weight that lies farthest from its truth, in whatever form it is held; a missing one is
    farther than any.
    """
    if not _weight_places(truth) <= _weight_places(held):
        return float(torch.finfo(torch.double).max)
    shared = truth.keys() & held.keys()
    return max((state_distance(held[key], weight_as(held[key], truth[key])) for key in shared), default=0.0)


def _weight_places(names: Iterable[str]) -> set[str]:
    """Where weights stand, by their names: the taps of an Upsample stand where its weight does."""
    return {name.removesuffix(".weight").removesuffix(".taps") for name in names}
