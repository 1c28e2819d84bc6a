"""Latents on their way through a schedule, with classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Schedule
from datasetdm_fast.kernels.choice import form_of


@dataclass(frozen=True)
class State:
    """The sample on its way, with what multistep samplers remember."""

    latents: Tensor  # [B, C, h, w]
    history: tuple[Tensor, ...]  # entries of earlier calls, newest first
    origin: Tensor  # latents of call 0


def start(latents: Tensor) -> State:
    return State(latents, (), latents)


def guide(noise: Tensor, guidance: float) -> Tensor:
    """[B, C, h, w] guided output of a CFG batch [2B, C, h, w]."""
    without, with_text = noise.chunk(2)
    return without + guidance * (with_text - without)


def step(schedule: Schedule, k: int, state: State, output: Tensor, noise: Tensor | None = None) -> State:
    """The state after call k, whose guided output is `output`; `noise` is fresh, for calls that add it."""
    update = schedule.updates[k]
    sample = state.origin if update.restarts else state.latents
    entry = output.to(sample.dtype)
    if update.entry != (0.0, 1.0):
        entry = update.entry[0] * sample + update.entry[1] * entry
    entries = (entry, *state.history)
    latents = update.sample * sample
    for weight, value in zip(update.weights, entries):
        latents = latents + weight * value
    if update.noise and noise is not None:
        latents = latents + update.noise * noise
    history = entries[: schedule.memory] if update.is_kept else state.history
    return State(latents, history, state.origin)


class SamplerState:
    """A batch on its way through a schedule: `guide` and `step` in one operation per call.

    Earlier entries lie in a ring that is written in place; which of its slots a call reads, and with what weight, is in
    its row of numbers, computed once per run, so nothing here waits for a device. Calls that add fresh noise take it
    from `noise`, [B, C, h, w]. Where `rows` is given, every output must have so many.
    """

    def __init__(
        self,
        schedule: Schedule,
        guidance: float,
        latents: Tensor,
        noise: Callable[[], Tensor] | None = None,
        rows: int = 0,
    ):
        assert noise or not schedule.noisy_calls
        self.noise, self.rows = noise, rows
        self.schedule, self.latents, self.origin = schedule, latents, latents
        self.ring = latents.new_zeros((schedule.memory, *latents.shape))
        self.numbers, self.places = _walk_numbers(schedule, guidance, latents.device)
        self.guided_step = form_of("guided_step", latents.device)

    def step(self, k: int, output: Tensor) -> Tensor:
        """The latents after call k, of an `output` [2B, C, h, w] without and with the text or [B, C, h, w] unguided."""
        if self.rows and len(output) != self.rows:
            raise ValueError(f"the output of call {k} has {len(output)} rows, expected {self.rows}")
        latents = self.origin if self.schedule.updates[k].restarts else self.latents
        self.latents, entry = self.guided_step(output, latents, self.ring, self.numbers[k]).unbind()
        if self.places[k] is not None:
            self.ring[self.places[k]].copy_(entry)
        if self.noise and (weight := self.schedule.updates[k].noise):
            self.latents.add_(self.noise(), alpha=weight)
        return self.latents


@lru_cache(8)
def _walk_numbers(schedule: Schedule, guidance: float, device: torch.device) -> tuple[Tensor, tuple[int | None, ...]]:
    """Per call the numbers of kernels/guided_step.py, and the slot of the ring that keeps its entry."""
    slots, newest, rows, places = schedule.memory, 0, [], []
    for update in schedule.updates:
        earlier = [0.0] * slots
        for age, weight in enumerate(update.weights[1:]):
            earlier[(newest + age) % slots] = weight
        rows.append([guidance, update.sample, *update.entry, update.weights[0], *earlier])
        newest = (newest - 1) % slots if slots and update.is_kept else newest
        places.append(newest if slots and update.is_kept else None)
    return torch.tensor(rows, dtype=torch.float32).to(device), tuple(places)
