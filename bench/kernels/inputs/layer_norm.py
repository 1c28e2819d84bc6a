"""Inputs of the operation layer_norm: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        affine = empty(width), empty(width)
        yield f"{width} channels", (empty(batch, side * side, width), *affine, 1e-5)
        yield f"{width} channels, shifted", (empty(batch, side * side, width), *affine, 1e-5, empty(width))
    yield "text encoder", (empty(batch, TOKENS, 768), empty(768), empty(768), 1e-5)


def cases() -> list[Case]:
    def norm(*shape, offset=0.0):
        return noise(*shape) + offset, noise(shape[-1]) + 1, noise(shape[-1] + 1)[1:], 1e-5

    return [
        Case("smallest row that varies", norm(1, 2), (1, 2)),
        Case("an odd row count of odd width, far from zero", norm(3, 7, 19, offset=30), (3, 7, 19)),
        Case("a shift, which the layer before left out", (*norm(3, 5, 33), noise(35)[2:]), (3, 5, 33)),
        Case("text encoder", norm(1, 77, 768), (1, 77, 768)),
        Case("SD 1.x widest transformer", norm(2, 5, 1280), (2, 5, 1280)),
    ]
