"""Inputs of the operation linear_add: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.add_statistics import CHUNK
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in (*LEVELS, (8, 1280)):
        cells = side * side
        residual = empty(batch, cells, width)
        yield f"{width} channels", ([empty(batch, cells, width)], empty(width, width), empty(width), residual)
        parts = [empty(batch, cells, count) for count in (2 * width, width)]
        yield f"{3 * width} to {width} channels", (parts, empty(width, 3 * width), empty(width), residual)


def cases() -> list[Case]:
    def build(batch, cells, widths, channels, has_bias=True):
        parts = [noise(batch, cells, width) for width in widths]
        weight = noise(channels, sum(widths), scale=sum(widths) ** -0.5)
        shape, chunks = (batch, cells, channels), -(-cells // CHUNK)
        inputs = parts, weight, noise(channels) if has_bias else None, noise(*shape, 1)[..., 0]
        return inputs, (shape, (2, batch, chunks, channels))

    return [
        Case("smallest", *build(1, 1, (1,), 1)),
        Case("two inputs, ragged in every size", *build(2, 150, (37, 21), 70)),
        Case("two inputs of whole vectors, ragged in every block", *build(2, 256, (72, 40), 200)),
        Case("fewer cells than a chunk", *build(3, 64, (64,), 136)),
        Case("no bias", *build(1, 130, (64,), 33, has_bias=False)),
        Case("SD 1.x first level, the skip beside what comes from below", *build(1, 144, (640, 320), 320)),
    ]
