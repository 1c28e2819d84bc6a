"""Inputs of the operation ada_norm: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = 2) -> Iterator[tuple[str, tuple]]:
    for name, tokens, width in (("SD 3.5 medium", 4096, 1536), ("FLUX", 4608, 3072)):
        gate, scale, shift = empty(batch, 3, width).unbind(1)
        x, branch = empty(batch, tokens, width), empty(batch, tokens, width)
        yield name, (x, branch, gate, None, scale, shift, None, 1e-6)
        yield f"{name}, first norm", (x, None, None, None, scale, shift, None, 1e-6)
    x, branch, weight, vectors = empty(batch, 4224, 3840), empty(batch, 4224, 3840), empty(3840), empty(1, 2, 3840)
    yield "Z-Image", (x, branch, vectors[:, 0], weight, vectors[:, 1], None, weight, 1e-5)


def cases() -> list[Case]:
    def norm(rows, tokens, width, *, of=0, is_rms=False, has_branch=True, has_vectors=True):
        x, branch = noise(rows, tokens, width) + 2, noise(rows, tokens + 1, width)[:, 1:] if has_branch else None
        gate, scale, shift = noise(of or rows, 3, width).unbind(1)
        weights = [noise(width + k)[k:] + 1 if is_rms else None for k in (0, 1)]
        vectors = (scale, None if is_rms else shift) if has_vectors else (None, None)
        gate = gate if has_branch and has_vectors else None
        return (x, branch, gate, weights[0] if has_branch else None, *vectors, weights[1], 1e-6), (
            (rows, tokens, width),
            (rows, tokens, width),
        )

    return [
        Case("smallest row that varies", *norm(1, 1, 2, has_branch=False)),
        Case("an odd row count of odd width, one vector for all rows", *norm(3, 7, 19, of=1)),
        Case("Z-Image's RMS norms", *norm(2, 5, 48, is_rms=True)),
        Case("Z-Image's RMS norms before a branch", *norm(2, 5, 48, is_rms=True, has_branch=False)),
        Case("Z-Image's texts, which no timestep changes", *norm(1, 9, 33, is_rms=True, has_vectors=False)),
        Case("SD 3.5 medium, a few tokens", *norm(2, 9, 1536)),
    ]
