"""Inputs of the operation linear_activation: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    yield "SD 3.5 medium", (empty(batch, 4096, 1536), empty(6144, 1536), empty(6144), False)
    yield "Z-Image", (empty(2, 4224, 3840), empty(2 * 10240, 3840), None, True)


def cases() -> list[Case]:
    def layer(batch, rows, width, out, has_gate=False):
        weight = noise(out, width, scale=2 * width**-0.5)
        inputs = noise(batch, rows, width), weight, None if has_gate else noise(out), has_gate
        return inputs, (batch, rows, out // (1 + has_gate))

    return [
        Case("smallest", *layer(1, 1, 1, 1)),
        Case("ragged in every size", *layer(2, 71, 37, 75)),
        Case("whole vectors, ragged in every block", *layer(2, 150, 72, 136)),
        Case("the same with a gate", *layer(2, 150, 72, 272, has_gate=True)),
    ]
