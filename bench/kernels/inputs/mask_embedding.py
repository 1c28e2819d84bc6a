"""Inputs of the operation mask_embedding: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, FEATURES, QUERIES, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    weights, biases = [empty(FEATURES, FEATURES)] * 3, [empty(FEATURES)] * 3
    rows = empty(batch, QUERIES, FEATURES)
    yield f"{batch * QUERIES} rows of {FEATURES}", (rows, empty(FEATURES), empty(FEATURES), 1e-5, weights, biases)


def cases() -> list[Case]:
    def layers(*shape, features):
        channels = shape[-1]
        weights = [noise(count, channels, k, scale=channels**-0.5)[..., 0] for k, count in
                   ((1, channels), (2, channels), (3, features))]  # fmt: skip
        biases = [noise(len(vector) + k)[k:] for k, vector in enumerate(weights)]
        return noise(*shape), noise(channels) + 1, noise(channels + 1)[1:], 1e-5, weights, biases

    return [
        Case("smallest row that varies", layers(1, 2, features=1), (1, 1)),
        Case("ragged in every size", layers(2, 19, 37, features=43), (2, 19, 43)),
        Case("rows that no block holds", layers(1, 3, 300, features=40), (1, 3, 40)),
        Case("upstream's queries, a few of them", layers(1, 5, 256, features=256), (1, 5, 256)),
    ]
