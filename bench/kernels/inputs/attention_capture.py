"""Inputs of the operation attention_capture: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, FEATURES, HEADS, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for side, width in LEVELS:
        q = empty(batch, side * side, HEADS, width // HEADS).transpose(1, 2)
        k, v = empty(batch, TOKENS, 2, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        yield f"heads of {width // HEADS}", (q, k, v, empty(HEADS, TOKENS, FEATURES))
    q, k, v = (empty(batch, size, 10, 64).transpose(1, 2) for size in (1024, TOKENS, TOKENS))
    yield "heads of 64", (q, k, v, empty(10, TOKENS, FEATURES))


def cases() -> list[Case]:
    def layer(batch, heads, queries, tokens, width, features):
        q, k, v = (
            noise(batch, heads, queries, width),
            noise(batch, heads, tokens, width),
            noise(batch, heads, tokens, width) + 1,
        )
        return Case(
            f"{heads} heads of {width}, {queries} queries, {tokens} tokens, {features} features",
            (q, k, v, noise(heads, tokens, features)),
            ((batch, heads, queries, width), (batch, queries, features)),
        )

    return [
        layer(1, 1, 1, 1, 1, 1)._replace(reason="smallest"),
        layer(1, 1, 5, 30, 8, 4)._replace(reason="tokens and widths that split into nothing"),
        layer(2, 3, 21, 13, 11, 9)._replace(reason="ragged in every size"),
        layer(1, 3, 64, 77, 32, 32)._replace(reason="demo model's middle"),
        layer(2, 2, 21, 248, 40, 33)._replace(reason="LongCLIP's tokens, more than are held at once"),
        layer(1, 1, 9, 77, 320, 4)._replace(reason="heads that are wider than a block"),
        layer(1, 2, 80, 77, 40, 100)._replace(reason="SD 1.x first level's heads, several blocks of features"),
        layer(2, 2, 16, 77, 80, 64)._replace(reason="SD 1.x second level's heads"),
        layer(1, 1, 40, 77, 64, 33)._replace(reason="SD 2.x heads, an odd width of the level"),
        layer(1, 2, 16, 77, 160, 256)._replace(reason="SD 1.x lowest level's heads, its whole width"),
    ]
