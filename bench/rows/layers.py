"""The rate of every distinct convolution and linear layer of the UNet by itself: what a network of such layers could
reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine.limits import nearest_limit, rate
from bench.machine.work import HALVES, flops
from bench.setting import Setting
from datasetdm_fast.engines.fast import DTYPES
from datasetdm_fast.stages import FACTOR


class TimedLayer(NamedTuple):
    """One shape of layer: what goes in for one image, and the weight."""

    given: tuple[int, ...]  # without the batch
    weight: tuple[int, ...]
    stride: int

    @property
    def name(self) -> str:
        if len(self.weight) == 2:
            return f"linear {self.weight[1]} to {self.weight[0]}, {self.given[0]} tokens"
        return f"conv {self.weight[2]}x{self.weight[2]} {self.weight[1]} to {self.weight[0]}, {self.given[1]} cells{' halved' if self.stride == 2 else ''}"


def rows(setting: Setting, limits: dict[str, Any], dtype: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """One row a shape at the given batch, with the share of a call's work that it stands for; the largest first."""
    found = shapes(setting)
    made = [row(layer, count, setting, limits, dtype, batch, seconds / len(found)) for layer, count in found.items()]
    whole = sum(one["count"] * one["gflop"] for one in made)
    for one in made:
        one["of_work"] = round(one["count"] * one["gflop"] / whole, 4)
    return sorted(made, key=lambda one: -one["of_work"])


def shapes(setting: Setting) -> Counter[TimedLayer]:
    """Every layer shape of one UNet call, with how often it comes."""
    unet, seen = setting.model.unet, Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _) -> None:
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        given = tuple(inputs[0].shape[1:])
        if isinstance(module, nn.Conv2d) or len(given) == 2:  # the time embedding's are no tokens
            seen[TimedLayer(given, tuple(module.weight.shape), stride)] += 1

    hooks = [
        module.register_forward_hook(note) for module in unet.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    side, width = setting.recipe.size // FACTOR, setting.model.text_encoder.config.hidden_size
    try:
        with torch.inference_mode():
            unet(
                torch.zeros(1, 4, side, side, device=setting.device),
                1,
                torch.zeros(1, setting.model.levels[0].tokens, width, device=setting.device),
            )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def row(
    layer: TimedLayer, count: int, setting: Setting, limits: dict[str, Any], dtype: str, batch: int, seconds: float
) -> dict[str, Any]:
    call, moved = prepared(layer, HALVES * batch, setting.device, DTYPES[dtype])
    with torch.inference_mode():
        work, taken = flops(call), 1 / rate(call, setting.device, seconds)
    facts = {
        "layer": layer.name,
        "count": count,
        "dtype": dtype,
        "batch": batch,
        "gflop": round(work / batch / 1e9, 4),
        "layer_s": taken / batch,
    }
    return {**facts, **nearest_limit(work, moved, 0, taken, limits, dtype)}


def prepared(
    layer: TimedLayer, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """The layer on so many inputs, and the bytes it reads and writes."""
    x, weight = (
        torch.randn(rows, *layer.given, device=device).to(dtype),
        torch.randn(layer.weight, device=device).to(dtype),
    )
    if len(layer.weight) == 2:

        def call() -> Tensor:
            return F.linear(x, weight)
    else:
        x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))

        def call() -> Tensor:
            return F.conv2d(x, weight, stride=layer.stride, padding=layer.weight[2] // 2)

    with torch.inference_mode():
        return call, sum(value.numel() * value.element_size() for value in (x, weight, call()))
