"""Which of the installed engines calls the UNet fastest on this CPU, for `--engine auto`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasetdm_fast.config import ENGINES
from datasetdm_fast.engine.engines import build_engine, check_engine
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.errors import Missing, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.data import Text

LEAST_RUN = 600.0  # seconds; building the other engines would not pay in a shorter one
LEAST_GAIN = 1.03  # times as fast as the opened engine; less could be chance
CHEAP = 2.0  # seconds
MANY_CALLS = 40  # of which one more is no matter
ROUNDS = 5
FARTHEST = {"fp32": 1e-4, "bf16": 5e-2}  # relative distance of an engine's noise from that of the one that was opened


@dataclass(frozen=True)
class Race:
    """The engine a run takes, a line about the race where there was one, and the seconds of a call where known."""

    engine: Engine
    summary: str = ""
    seconds: float = 0.0


def fastest(opened: Engine, batch_size: int, calls: int) -> Race:
    """The engine for `calls` UNet calls on the CPU of the opened one; engines that do not agree take no part."""
    if opened.name not in ENGINES or opened.device.type != "cpu" or not opened.model.backbone.has_plans:
        return Race(opened)
    # Importing what the others need takes about a second, so it comes last.
    if (seconds := probe(opened, batch_size, calls)) * calls < LEAST_RUN or not (names := _others(opened.name)):
        return Race(opened, seconds=seconds)
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, *opened.model.latent_shape(), generator=generator)
    text = call_text(opened, ["a ball"] * batch_size)
    timestep = _middle(opened)
    truth = opened.denoise(latents, timestep, text)
    dtype = opened.fingerprint()["dtype"]
    entries = {opened.name: opened}
    for name in names:
        try:
            other = build_engine(name, opened.model, opened.decoders, dtype=dtype, device=str(opened.device))
        except (Missing, Refused):  # it has no such precision, or cannot write its graphs
            continue
        noise = other.denoise(latents, timestep, text)
        if float((noise - truth).norm() / truth.norm()) <= FARTHEST[dtype]:
            entries[name] = other
    rounds = [
        {name: _seconds(engine, latents, timestep, text) for name, engine in entries.items()} for _ in range(ROUNDS)
    ]
    taken = {name: statistics.median(seconds[name] for seconds in rounds) for name in entries}
    best = min(taken, key=taken.get)
    if taken[best] * LEAST_GAIN > taken[opened.name]:
        best = opened.name
    ranking = ", ".join(f"{name} {taken[name]:.3g} s" for name in sorted(taken, key=taken.get))
    return Race(entries[best], f"{best} of {ranking} a call", taken[best])


def probe(engine: Engine, batch_size: int, calls: int) -> float:
    """Seconds of one UNet call at the batch size of a run of so many calls."""
    import torch

    latents, seconds = torch.zeros(batch_size, *engine.model.latent_shape(), device=engine.device), []
    text = call_text(engine, [""] * batch_size)
    # The first call may also compile; a second one costs a short run of slow calls too much.
    while len(seconds) < 2 and (sum(seconds) < CHEAP or calls >= MANY_CALLS):
        seconds.append(_seconds(engine, latents, _middle(engine), text))
    return min(seconds)


def _middle(engine: Engine) -> float:
    """A timestep in the middle of the noise the model knows."""
    return float(engine.model.scheduler.get("num_train_timesteps", 1000) // 2)


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


def _seconds(engine: Engine, latents: Tensor, timestep: float, text: Text) -> float:
    begin = time.perf_counter()
    engine.denoise(latents, timestep, text).sum().item()  # which waits for a GPU
    return time.perf_counter() - begin
