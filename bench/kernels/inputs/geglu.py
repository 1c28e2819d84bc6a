"""Inputs of the operation geglu: those it is tested on, and those of a model's size."""

from __future__ import annotations

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 2),), (1, 1)),
        Case("odd rows of odd width, deep in both tails", (noise(3, 7, 38, scale=4),), (3, 7, 19)),
        Case("SiLU, a slice of wider rows", (noise(2, 5, 80)[..., 20:54], True), (2, 5, 17)),
        Case("SD 1.x first level, a few tokens", (noise(1, 9, 2560),), (1, 9, 1280)),
    ]
