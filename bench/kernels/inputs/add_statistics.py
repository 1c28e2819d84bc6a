"""Inputs of the operation add_statistics: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.add_statistics import CHUNK
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in (*LEVELS, (8, 1280)):
        x, residual = (empty(batch, side, side, width).permute(0, 3, 1, 2) for _ in range(2))
        yield f"{width} channels at {side} cells", (x, residual, empty(width))
    yield f"{width} channels, nothing added", (x, None, None)


def cases() -> list[Case]:
    def build(batch, channels, height, width, has_residual=True, has_bias=True, offset=0):
        x, residual = (noise(batch, channels, height, width) + offset, noise(channels, batch, height, width))
        shape, chunks = (batch, channels, height, width), -(-height * width // CHUNK)
        residual = residual.transpose(0, 1) if has_residual else None
        return (x, residual, noise(channels) if has_bias else None), (shape, (2, batch, chunks, channels))

    return [
        Case("smallest: one cell, one channel", *build(1, 1, 1, 1)),
        Case("odd planes of several chunks, the last ragged", *build(2, 33, 13, 21)),
        Case("a bias alone, channels of several blocks", *build(1, 130, 5, 5, has_residual=False)),
        Case("nothing added", *build(2, 7, 9, 9, False, False, offset=4)),
        Case("SD 1.x lowest level", *build(1, 1280, 8, 8)),
    ]
