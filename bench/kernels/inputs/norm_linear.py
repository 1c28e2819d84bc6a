"""Inputs of the operation norm_linear: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.noise import noise
from datasetdm_fast.kernels.norm_linear import fold


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        for name, out in {"queries": width, "queries, keys and values": 3 * width, "gate": 8 * width}.items():
            norm = empty(width), empty(width), 1e-5, empty(width)
            bias, has_gate = (empty(out), True) if name == "gate" else (None, False)
            inputs = *fold(norm, empty(out, width), bias), has_gate
            yield f"{width} channels, {name}", (empty(batch, side * side, width), *inputs)


def cases() -> list[Case]:
    def layer(*shape, out, has_gate=False, offset=0.0, is_folded=True, has_shift=True):
        width = shape[-1]
        norm = noise(width) + 1, noise(width + 1)[1:], 1e-5, noise(width + 2)[2:] if has_shift else None
        weight, bias = noise(out, width, scale=width**-0.5), noise(out) if has_gate else None
        inputs = fold(norm, weight, bias) if is_folded else (norm, weight, bias, None)
        return (noise(*shape) + offset, *inputs, has_gate), (*shape[:-1], out // (1 + has_gate))

    return [
        Case("smallest row that varies", *layer(2, 4, out=5)),
        Case("ragged in every size", *layer(2, 71, 37, out=75)),
        Case("as it is, with a gate", *layer(1, 5, 64, out=48, has_gate=True, is_folded=False)),
        Case("whole vectors, ragged in every block", *layer(2, 150, 72, out=200)),
        Case("the same with a gate, without a shift", *layer(2, 150, 72, out=400, has_gate=True, has_shift=False)),
        Case("30 deviations away, far from zero", *layer(3, 7, 320, out=320, offset=30.0)),
    ]
