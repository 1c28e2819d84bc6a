"""Inputs of the operation guided_step: those it is tested on, and those of a model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels.inputs import BATCH, Case
from datasetdm_fast.kernels.guided_step import FIXED
from datasetdm_fast.kernels.noise import noise


def sizes(empty: Callable, batch: int = BATCH) -> Iterator[tuple[str, tuple]]:
    for slots in (0, 1, 3):
        latents = empty(batch, 4, 64, 64)
        inputs = empty(2 * batch, 4, 64, 64), latents, empty(slots, *latents.shape), empty(FIXED + slots)
        yield f"{slots} earlier entries", inputs


def cases() -> list[Case]:
    def step(batch, side, weights, sample=0.9, entry=(0.0, 1.0), unread=(), rows=2):
        history = noise(len(weights) - 1, batch, 4, side, side)
        for slot in unread:
            history[slot] = float("nan")
        numbers = torch.tensor([7.5, sample, *entry, *weights])
        return noise(rows * batch, 4, side, side), noise(batch, 4, side, side), history, numbers

    return [
        Case("smallest, no memory: DDIM", step(1, 1, (-0.3,)), (2, 1, 4, 1, 1)),
        Case(
            "odd side, an earlier entry, a clean sample: DPM-Solver++",
            step(3, 5, (0.8, -0.2), 0.4, (1.1, -0.3)),
            (2, 3, 4, 5, 5),
        ),
        Case(
            "second call of PLMS: slots that nothing was written to",
            step(2, 9, (-0.5, -0.5, 0.0, 0.0), unread=(1, 2)),
            (2, 2, 4, 9, 9),
        ),
        Case("odd side, no guidance: Euler of a flow", step(3, 7, (-0.04,), 1.0, rows=1), (2, 3, 4, 7, 7)),
        Case("no guidance, an earlier entry: Heun", step(1, 2, (0.1, -0.1), 1.0, rows=1), (2, 1, 4, 2, 2)),
        Case("PLMS at 512 pixels", step(2, 64, (-0.12, 0.13, -0.08, 0.02)), (2, 2, 4, 64, 64)),
    ]
