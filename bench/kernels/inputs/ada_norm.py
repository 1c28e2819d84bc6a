"""Inputs of the operation ada_norm: those it is tested on, and those of a model's size."""

from __future__ import annotations

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


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
