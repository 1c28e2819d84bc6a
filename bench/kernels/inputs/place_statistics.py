"""Inputs of the operation place_statistics: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, Case
from datasetdm_fast.kernels.add_statistics import CHUNK
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in ((8, 1280), (32, 640)):
        yield (
            f"{width} channels of {side} cells",
            (
                empty(batch, side + 1, side + 1, 4 * width).permute(0, 3, 1, 2),
                empty(width),
            ),
        )


def cases() -> list[Case]:
    def build(batch, channels, height, width):
        inputs = noise(batch, 4 * channels, height + 1, width + 1), noise(channels)
        shape, chunks = (batch, channels, 2 * height, 2 * width), -(-4 * height * width // CHUNK)
        return inputs, (shape, (2, batch, chunks, channels))

    return [
        Case("smallest", *build(1, 1, 1, 1)),
        Case("odd planes of several chunks", *build(2, 35, 5, 9)),
        Case("SD 1.x lowest level", *build(1, 640, 8, 8)),
    ]
