"""Inputs of the operation group_norm_parts: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import BATCH, LEVELS, Case
from datasetdm_fast.kernels.add_statistics import CHUNK, take_statistics
from datasetdm_fast.kernels.launch import ceil_divide
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    def image(side, width):
        return empty(batch, side, side, width).permute(0, 3, 1, 2)

    for side, width in LEVELS:
        chunks = ceil_divide(side * side, CHUNK)
        parts = [image(side, width), image(side, 2 * width)]
        statistics = [empty(2, batch, chunks, part.shape[1]).float() for part in parts]
        both = empty(3 * width), empty(3 * width), 32, 1e-5
        yield f"{width} channels and {2 * width}", (parts, statistics, None, *both)
        yield f"{width} channels", ([image(side, width)], [], *[empty(width) for _ in range(3)], 32, 1e-5)
    yield "autoencoder", ([image(256, 256)], [], None, empty(256), empty(256), 32, 1e-6)


def cases() -> list[Case]:
    def norm(
        batch, channels, groups, height, width, *, is_measured=True, has_shift=True, offset=0, has_silu=True, rows=()
    ):
        parts = [noise(batch, count, height, width) + offset for count in channels]
        statistics = [take_statistics(part) for part in parts] if is_measured else []
        whole = sum(channels)
        shift = noise(*rows, whole + 2)[..., 2:] if has_shift else None
        affine = noise(whole) + 1, noise(whole + 1)[1:]
        return (parts, statistics, shift, *affine, groups, 1e-5, has_silu), (batch, whole, height, width)

    return [
        Case("smallest plane that varies", *norm(1, (2,), 1, 1, 2)),
        Case("two parts, a group across both, ragged chunks", *norm(2, (21, 12), 3, 13, 15)),
        Case("a small plane in one launch", *norm(2, (60,), 4, 7, 11, is_measured=False)),
        Case("a large one, its statistics taken here", *norm(1, (6,), 2, 17, 19, is_measured=False, has_silu=False)),
        Case("more chunks than a block reads", *norm(2, (36,), 2, 70, 61, has_shift=False)),
        Case("a shift for each image, ragged chunks", *norm(3, (21, 12), 3, 13, 15, rows=(3,))),
        Case("a shift for each image of a small plane", *norm(2, (60,), 4, 7, 11, is_measured=False, rows=(2,))),
        Case("far from zero", *norm(1, (64,), 32, 16, 16, offset=15, is_measured=False)),
        Case("SD 1.x third level, the skip beside it", *norm(1, (1280, 640), 32, 12, 12)),
    ]
