"""Inputs of the operation linear_geglu: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        yield (
            f"{width} to {4 * width} channels",
            (
                empty(batch, side * side, width),
                empty(8 * width, width),
                empty(8 * width),
            ),
        )


def cases() -> list[Case]:
    def layer(batch, rows, width, channels):
        weight = noise(2 * channels, width, scale=2 * width**-0.5)
        return (noise(batch, rows, width), weight, noise(2 * channels)), (batch, rows, channels)

    return [
        Case("smallest", *layer(1, 1, 1, 1)),
        Case("ragged in every size", *layer(2, 71, 37, 75)),
        Case("whole vectors, ragged in every block", *layer(2, 150, 72, 136)),
        Case("SD 1.x first level, a few tokens", *layer(1, 9, 320, 1280)),
    ]
