"""Inputs of the operation query_attention: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, FEATURES, HEADS, QUERIES, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side in (20, 40, 80):
        q, keys = empty(batch, QUERIES, FEATURES), empty(batch, side * side, 2, FEATURES)
        places = empty(QUERIES, FEATURES), empty(side * side, FEATURES)
        logits = empty(batch, QUERIES, side * side)
        yield f"{QUERIES} queries over {side * side} cells", (q, *keys.unbind(2), HEADS, *places, logits)
    q, k, v = empty(batch, QUERIES, 3, FEATURES).unbind(2)
    yield f"{QUERIES} queries over each other", (q, k, v, HEADS, empty(QUERIES, FEATURES), empty(QUERIES, FEATURES))


def cases() -> list[Case]:
    def attention(batch, heads, queries, cells, width, share=None):
        channels = heads * width
        k, v = noise(batch, cells, 2, channels).unbind(2)
        logits = None if share is None else noise(batch, queries, cells) + torch.tensor(share).logit()
        places = noise(queries, channels, 1)[..., 0], noise(batch, cells, channels, 1)[..., 0]
        return noise(batch, queries, channels), k, v + 1, heads, *places, logits

    def several_blocks():
        *inputs, logits = attention(2, 2, 35, 150, 24, 0.5)
        inputs[4] = noise(2, 35, 48, 1)[..., 0]  # places of queries by word, one for each image
        logits[0, 3] = -1.0  # sees all, as it blocked every cell
        logits[1, :, :128] = -2.0
        return *inputs, logits

    return [
        Case("smallest", attention(1, 1, 1, 1, 1, 0.5), (1, 1, 1)),
        Case("of each other, without a mask", attention(3, 2, 20, 20, 16), (3, 20, 32)),
        Case("ragged; a query and blocks of cells wholly blocked", several_blocks(), (2, 35, 48)),
        Case("upstream's heads, some of its cells", attention(1, 2, 40, 100, 32, 0.3), (1, 40, 64)),
    ]
