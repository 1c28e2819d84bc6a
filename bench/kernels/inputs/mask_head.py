"""Inputs of the operation mask_head: those it is tested on, and those of a model's size."""

from __future__ import annotations

from bench.kernels.inputs import Case
from datasetdm_fast.kernels.noise import noise


def cases() -> list[Case]:
    return [
        Case("smallest", (noise(1, 1, 1), noise(1, 1, 1, 1), 1), (1, 1, 1, 1)),
        Case("as it lies, odd widths", (noise(3, 5, 13), noise(3, 13, 7, 7), 7), (3, 5, 7, 7)),
        Case("down to a memory level of a 128-pixel image", (noise(2, 20, 64), noise(2, 64, 40, 40), 5), (2, 20, 5, 5)),
        Case("cells left out, as it lies", (noise(2, 7, 19), noise(2, 19, 6, 6), 6, True), (2, 7, 6, 6)),
        Case(
            "upstream's first memory level, cells left out",
            (noise(1, 100, 256), noise(1, 256, 160, 160), 20, True),
            (1, 100, 20, 20),
        ),
    ]
