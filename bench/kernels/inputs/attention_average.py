"""Inputs of the operation attention_average: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, HEADS, LEVELS, TOKENS, Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    side, width = LEVELS[1]
    q, k, v = empty(batch, side * side, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    yield f"{side * side} cells, heads of {width // HEADS}", (q, k, v, empty(batch, side * side, side * side), 0.2)
    side, width = LEVELS[2]
    q, k = (empty(batch, size, HEADS, width // HEADS).transpose(1, 2) for size in (side * side, TOKENS))
    yield f"{side * side} cells over {TOKENS} tokens", (q, k, k[..., :0], empty(batch, side * side, TOKENS), 0.2)


def cases() -> list[Case]:
    def layer(batch, heads, queries, keys, width, has_values=True):
        q, k = noise(batch, heads, queries, width), noise(batch, heads, keys, width)
        v = noise(batch, heads, keys, width) + 1 if has_values else k[..., :0]
        total = noise(batch, queries, keys).abs() / keys
        return Case(
            f"{heads} heads of {width}, {queries} queries, {keys} keys{', no values' * (not has_values)}",
            (q, k, v, total, 0.2),
            ((batch, heads, queries, v.shape[3]), (batch, queries, keys)),
        )

    return [
        layer(1, 1, 1, 1, 1)._replace(reason="smallest"),
        layer(2, 3, 37, 67, 21)._replace(reason="ragged in every size"),
        layer(1, 1, 9, 13, 320)._replace(reason="heads that are wider than a block"),
        layer(1, 2, 64, 77, 160, has_values=False)._replace(reason="SD 1.x class prompt, no values"),
        layer(1, 3, 64, 64, 16)._replace(reason="tiny preset's heads"),
        layer(1, 2, 130, 130, 80)._replace(reason="SD 1.x second level's heads, several blocks"),
    ]
