"""Inputs of the operation linear_norm: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, FEATURES, QUERIES, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for width in (FEATURES, 8 * FEATURES):
        rows = empty(batch, QUERIES, FEATURES)
        vectors = empty(FEATURES), empty(FEATURES)
        inputs = (
            empty(batch, QUERIES, width),
            empty(FEATURES, width),
            empty(FEATURES),
            rows,
            *vectors,
            1e-5,
            width > FEATURES,
        )
        yield f"{width} to {FEATURES} channels", inputs


def cases() -> list[Case]:
    def layer(*shape, width):
        channels = shape[-1]
        weight = noise(channels, width, scale=width**-0.5)
        affine = noise(channels) + 1, noise(channels + 1)[1:]
        return noise(*shape[:-1], width), weight, noise(channels + 2)[2:], noise(*shape, 1)[..., 0], *affine, 1e-5

    return [
        Case("smallest row that varies", layer(1, 2, width=1), (1, 2)),
        Case("ReLU before it, ragged in every size", (*layer(2, 19, 37, width=75), True), (2, 19, 37)),
        Case("rows that no block holds", layer(1, 3, 300, width=40), (1, 3, 300)),
        Case("upstream's queries, a few of them", layer(1, 5, 256, width=256), (1, 5, 256)),
    ]
