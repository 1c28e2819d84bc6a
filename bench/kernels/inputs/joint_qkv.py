"""Inputs of the operation joint_qkv: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = 2) -> Iterator[tuple[str, tuple]]:
    for name, counts, heads, width, of in (
        ("SD 3.5 medium", (4096, 333), 24, 64, 0),
        ("FLUX, two streams", (4096, 512), 24, 128, 1),
        ("Z-Image", (4224,), 30, 128, batch),
    ):
        packed = [empty(batch, count, 3 * heads * width) for count in counts]
        norms = [(empty(width), empty(width)) for _ in counts]
        turns = empty(of, sum(counts), width // 2, 2).float() if of else None
        yield name, (packed, norms, turns, heads, width, 1e-6)


def cases() -> list[Case]:
    def streams(rows, counts, heads, width, *, of=1, more=0, has_norms=True, has_turns=True):
        packed = [noise(rows, count, 3 * heads * width + more) for count in counts]
        norms = [tuple(noise(2, width) + 1) if has_norms else (None, None) for _ in counts]
        turns = noise(of, sum(counts), width // 2, 2) if has_turns else None
        return (packed, norms, turns, heads, width, 1e-6), (rows, sum(counts), 3, heads, width)

    return [
        Case("smallest", *streams(1, [1], 1, 2)),
        Case("one stream, a row of places each, heads that are no power of two", *streams(3, [7], 3, 12, of=3)),
        Case("SD 3 without norms, learned places", *streams(2, [9, 5], 2, 64, has_norms=False, has_turns=False)),
        Case("SD 3.5, learned places", *streams(2, [9, 5], 3, 64, more=8, has_turns=False)),
        Case("FLUX.1's heads, with rows of decoders", *streams(2, [17, 6], 2, 128, more=33)),
    ]
