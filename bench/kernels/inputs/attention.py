"""Inputs of the operation attention: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, HEADS, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.attention import MANY_KEYS
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        cells, wide = side * side, width // HEADS
        q, k, v = empty(batch, cells, 3, HEADS, wide).permute(2, 0, 3, 1, 4).unbind(0)
        text = empty(batch, TOKENS, 2, HEADS, wide).permute(2, 0, 3, 1, 4).unbind(0)
        yield f"{cells} cells, heads of {wide}", (q, k, v)
        yield f"{cells} cells over {TOKENS} tokens, heads of {wide}", (q, *text)


def cases() -> list[Case]:
    def build_packed(batch, heads, cells, width):
        return tuple(noise(batch, cells, 3, heads, width).unbind(2)[i].transpose(1, 2) for i in range(3))

    def build_crossed(batch, heads, queries, tokens, width):
        return (
            noise(batch, heads, queries, width),
            noise(batch, heads, tokens, width),
            noise(batch, heads, tokens, width) + 1,
        )

    def many_keys(width):
        q, k, v = build_packed(2, 2, MANY_KEYS + 6, width)
        return q[:, :, :70], k, v

    return [
        Case("smallest", build_crossed(1, 1, 1, 1, 1), (1, 1, 1, 1)),
        Case("ragged in every size", build_crossed(2, 3, 37, 67, 21), (2, 3, 37, 21)),
        Case("tiny preset's heads", build_packed(1, 3, 64, 16), (1, 3, 64, 16)),
        Case("SD 1.x first level's heads, packed", build_packed(2, 2, 130, 40), (2, 2, 130, 40)),
        Case("SD 1.x second level over text", build_crossed(1, 2, 64, 77, 80), (1, 2, 64, 80)),
        Case("SD 1.x lowest level's heads", build_packed(1, 2, 64, 160), (1, 2, 64, 160)),
        Case(
            "SD 2.x heads, scores that overflow exp", tuple(8 * x for x in build_packed(1, 1, 96, 64)), (1, 1, 96, 64)
        ),
        Case("SD 1.x first level's heads, as many keys as a kernel of our own takes", many_keys(40), (2, 2, 70, 40)),
    ]
