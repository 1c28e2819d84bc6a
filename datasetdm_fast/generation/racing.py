"""Which of the installed engines calls the UNet fastest on this CPU, for `--engine auto`."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from datasetdm_fast.config import ENGINES
from datasetdm_fast.engines import build_engine, check_engine
from datasetdm_fast.engines.engine import Engine
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.stages import FACTOR

if TYPE_CHECKING:
    from torch import Tensor

LEAST_RUN = 600.0  # seconds; building the other engines would not pay in a shorter one
LEAST_GAIN = 1.03  # times as fast as the opened engine; less could be chance
ROUNDS = 5
FARTHEST = {"fp32": 1e-4, "bf16": 5e-2}  # relative distance of an engine's noise from that of the one that was opened


def fastest(opened: Engine, batch_size: int, calls: int) -> tuple[Engine, str]:
    """The engine for `calls` UNet calls with `batch_size` images on the CPU of the one that was opened, and a line
    about the race where there was one; engines that are not installed or do not agree take no part.
    """
    if opened.name not in ENGINES or opened.device.type != "cpu" or not (names := _others(opened.name)):
        return opened, ""
    import torch

    side = opened.model.size // FACTOR
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 4, side, side, generator=generator)
    context = opened.encode_text([""] * batch_size + ["a ball"] * batch_size)
    timestep = float(opened.model.scheduler["num_train_timesteps"] // 2)
    truth = opened.denoise(latents, timestep, context)
    if _seconds(opened, latents, timestep, context) * calls < LEAST_RUN:
        return opened, ""
    dtype = opened.fingerprint()["dtype"]
    entries = {opened.name: opened}
    for name in names:
        try:
            other = build_engine(name, opened.model, opened.decoders, dtype=dtype, device=str(opened.device))
        except (Missing, Refused):  # it has no such precision, or cannot write its graphs
            continue
        found = other.denoise(latents, timestep, context)
        if float((found - truth).norm() / truth.norm()) <= FARTHEST[dtype]:
            entries[name] = other
    rounds = [
        {name: _seconds(engine, latents, timestep, context) for name, engine in entries.items()} for _ in range(ROUNDS)
    ]
    taken = {name: statistics.median(one[name] for one in rounds) for name in entries}
    best = min(taken, key=taken.get)
    if taken[best] * LEAST_GAIN > taken[opened.name]:
        best = opened.name
    ranking = ", ".join(f"{name} {taken[name]:.3g} s" for name in sorted(taken, key=taken.get))
    return entries[best], f"{best} of {ranking} a call"


def _others(opened: str) -> list[str]:
    names = []
    for name, kind in ENGINES.items():
        if kind.races and name != opened:
            try:
                check_engine(name)
                names.append(name)
            except Missing:
                pass
    return names


def _seconds(engine: Engine, latents: Tensor, timestep: float, context: Tensor) -> float:
    begin = time.perf_counter()
    engine.denoise(latents, timestep, context)
    return time.perf_counter() - begin
