"""Samplers as pure functions: PNDM (PLMS), DDIM and DPM-Solver++(2M) share one linear update whose coefficients are computed once.

Every update is x' = sample * x + sum_j weights[j] * entry_j, where entry_0 belongs to this call and the others to earlier calls. The
coefficients are Python floats indexed by the call, so the loop never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import PROFILES, SAMPLERS
from datasetdm_fast.errors import Refused

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
MEMORY = {"pndm": 3, "ddim": 0, "dpm-solver++": 1}  # earlier entries a sampler reads
SPACING = {"pndm": "leading", "ddim": "leading", "dpm-solver++": "linspace"}  # where the scheduler config does not say


@dataclass(frozen=True)
class Update:
    """Coefficients of one call."""

    sample: float
    weights: tuple[float, ...]  # of this call's entry, then of the earlier ones, newest first
    entry: tuple[float, float] = (0.0, 1.0)  # entry = entry[0] * x + entry[1] * output
    restarts: bool = False  # x is the sample of call 0: the warm-up correction of PLMS
    is_kept: bool = True  # whether later calls read this call's entry


@dataclass(frozen=True)
class Schedule:
    """Timesteps and coefficients of every UNet call of one image."""

    kind: str
    prediction_type: str
    timesteps: tuple[int, ...]
    updates: tuple[Update, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def settled(self) -> int:
        """Calls after which the sample changes no more: with PNDM of profile 0.3.0 the last one only fills the capture, and images can be decoded before it."""
        calls = len(self.updates)
        while calls and self.updates[calls - 1].sample == 1.0 and not any(self.updates[calls - 1].weights):
            calls -= 1
        return calls


@dataclass(frozen=True)
class State:
    """The sample on its way, with what multistep samplers remember."""

    latents: Tensor  # [B, C, h, w]
    history: tuple[Tensor, ...]  # entries of earlier calls, newest first
    origin: Tensor  # latents of call 0


def make_schedule(scheduler: Mapping, sampler: str, steps: int, profile: str = "0.3.0") -> Schedule:
    """The calls of `sampler` for a diffusers scheduler config; `profile` says which diffusers version's PNDM timesteps to follow.

    PNDM repeats its second timestep, so 50 steps are 51 calls; with profile 0.3.0 the last update changes nothing. That profile knows
    neither steps_offset nor set_alpha_to_one, and where the steps do not divide the training steps it makes one call more.
    """
    if sampler not in SAMPLERS:
        raise Refused(f"sampler: {sampler!r} is none of {', '.join(SAMPLERS)}")
    if profile not in PROFILES:
        raise Refused(f"profile: {profile!r} is none of {', '.join(PROFILES)}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Refused(f"prediction_type: the scheduler config says {prediction!r}, supported are epsilon and v_prediction")
    alphas = alphas_cumprod(scheduler)
    least = 2 if sampler == "pndm" else 1
    if not least <= steps <= len(alphas):
        raise Refused(f"steps: {steps} is not within {least} .. {len(alphas)}, the range of {sampler} for this model")
    if sampler == "pndm" and profile == "0.3.0":
        times, updates = _pndm_first_profile(alphas, steps, prediction)
    else:
        times, updates = {"pndm": _pndm, "ddim": _ddim, "dpm-solver++": _dpm_solver}[sampler](scheduler, alphas, steps, prediction)
    return Schedule(sampler, prediction, tuple(times), tuple(updates))


def alphas_cumprod(scheduler: Mapping) -> Tensor:
    """[training steps] fp32 cumulative products of 1 - beta, rounded as diffusers rounds them."""
    if scheduler.get("rescale_betas_zero_snr"):
        raise Refused("rescale_betas_zero_snr: the scheduler config asks for zero terminal SNR, which the samplers here do not support")
    if scheduler.get("trained_betas") is not None:
        return torch.cumprod(1 - torch.tensor(scheduler["trained_betas"], dtype=torch.float32), 0)
    count, start, end = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    name = scheduler.get("beta_schedule", "linear")
    if name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    else:
        raise Refused(f"beta_schedule: the scheduler config says {name!r}, supported are linear and scaled_linear")
    return torch.cumprod(1 - betas, 0)


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """[channels, height, width] fp32 noise of one image, drawn on the CPU from its seed alone."""
    return torch.randn((channels, height, width), generator=torch.Generator("cpu").manual_seed(seed))


def add_noise(scheduler: Mapping, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """`latents` as they would be at `timestep` of the forward process."""
    alpha = float(alphas_cumprod(scheduler)[timestep])
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise


def start(latents: Tensor) -> State:
    return State(latents, (), latents)


def guide(noise: Tensor, guidance: float) -> Tensor:
    """[B, C, h, w] guided output of a CFG batch [2B, C, h, w]."""
    without, with_text = noise.chunk(2)
    return without + guidance * (with_text - without)


def step(schedule: Schedule, k: int, state: State, output: Tensor) -> State:
    """The state after call k, whose guided UNet output is `output`."""
    update = schedule.updates[k]
    sample = state.origin if update.restarts else state.latents
    entry = output.to(sample.dtype)
    if update.entry != (0.0, 1.0):
        entry = update.entry[0] * sample + update.entry[1] * entry
    entries = (entry, *state.history)
    latents = update.sample * sample
    for weight, value in zip(update.weights, entries):
        latents = latents + weight * value
    history = entries[: MEMORY[schedule.kind]] if update.is_kept else state.history
    return State(latents, history, state.origin)


class Walk:
    """A batch on its way through a schedule: what `guide` and `step` say in a dozen small operations, in one per call.

    Earlier entries lie in a ring that is written in place; which of its slots a call reads, and with what weight, is in its row of numbers,
    computed once per run, so nothing here waits for a device.
    """

    def __init__(self, schedule: Schedule, guidance: float, latents: Tensor):
        self.schedule, self.latents, self.origin = schedule, latents, latents
        self.ring = latents.new_zeros((MEMORY[schedule.kind], *latents.shape))
        self.numbers, self.places = _walk_numbers(schedule, guidance, latents.device)

    def step(self, k: int, output: Tensor) -> Tensor:
        """The latents after call k, whose UNet output for both CFG halves is `output`."""
        from datasetdm_fast.kernels import guided_step  # the kernels' coefficients are those of this module

        latents = self.origin if self.schedule.updates[k].restarts else self.latents
        self.latents, entry = guided_step.native(output, latents, self.ring, self.numbers[k]).unbind()
        if self.places[k] is not None:
            self.ring[self.places[k]].copy_(entry)
        return self.latents


@lru_cache(8)
def _walk_numbers(schedule: Schedule, guidance: float, device: torch.device) -> tuple[Tensor, tuple[int | None, ...]]:
    """Per call the numbers of kernels/guided_step.py, and the slot of the ring that keeps its entry."""
    slots, newest, rows, places = MEMORY[schedule.kind], 0, [], []
    for update in schedule.updates:
        earlier = [0.0] * slots
        for age, weight in enumerate(update.weights[1:]):
            earlier[(newest + age) % slots] = weight
        rows.append([guidance, update.sample, *update.entry, update.weights[0], *earlier])
        newest = (newest - 1) % slots if slots and update.is_kept else newest
        places.append(newest if slots and update.is_kept else None)
    return torch.tensor(rows, dtype=torch.float32).to(device), tuple(places)


def _spaced(scheduler: Mapping, sampler: str, count: int, steps: int) -> list[int]:
    """Ascending timesteps for PNDM and DDIM by the config's timestep_spacing."""
    spacing = scheduler.get("timestep_spacing", SPACING[sampler])
    if spacing == "leading":
        times = np.arange(steps) * (count // steps) + scheduler.get("steps_offset", 0)
    elif spacing == "linspace":
        times = np.linspace(0, count - 1, steps).round()
    elif spacing == "trailing":
        times = np.round(np.arange(count, 0, -count / steps))[::-1] - 1
    else:
        raise Refused(f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing")
    return _checked(times, count)


def _checked(times: np.ndarray, count: int) -> list[int]:
    if times.min() < 0 or times.max() >= count or np.unique(times).size < times.size:
        raise Refused(f"steps: {len(times)} steps do not fit into {count} training steps with this spacing and offset, ask for fewer")
    return [int(time) for time in times]


def _transfer(alpha: float, target: float, order: int, prediction: str, **flags: bool) -> Update:
    """PNDM's transfer from one alpha to another (equation 9 of arXiv 2202.09778) with a multistep output."""
    sample = math.sqrt(target / alpha)
    noise = -(target - alpha) / (alpha * math.sqrt(1 - target) + math.sqrt(alpha * (1 - alpha) * target))
    if prediction == "v_prediction":
        sample, noise = sample + noise * math.sqrt(1 - alpha), noise * math.sqrt(alpha)
    weights = (0.5, 0.5) if flags.get("restarts") else ADAMS_BASHFORTH[order - 1]
    return Update(sample, tuple(noise * weight for weight in weights), **flags)


def _plms(pairs: list[tuple[float, float]], prediction: str) -> list[Update]:
    """Updates of the PLMS calls, given the alphas each goes from and to; call 1 redoes call 0 with the mean of both outputs."""
    updates = []
    for k, (alpha, target) in enumerate(pairs):
        if k == 1:
            updates.append(_transfer(alpha, target, 2, prediction, restarts=True, is_kept=False))
        else:
            updates.append(_transfer(alpha, target, min(k, 4) if k else 1, prediction))
    return updates


def _pndm(scheduler: Mapping, alphas: Tensor, steps: int, prediction: str) -> tuple[list[int], list[Update]]:
    values, last, stride = alphas.double().tolist(), len(alphas) - 1, len(alphas) // steps
    final = 1.0 if scheduler.get("set_alpha_to_one", False) else values[0]
    rising = _spaced(scheduler, "pndm", len(alphas), steps)
    times = [*rising[:-1], rising[-2], rising[-1]][::-1]
    pairs = [(values[t], values[t - stride] if t >= stride else final) for t in times]
    pairs[1] = (values[min(times[1] + stride, last)], values[times[1]])
    return times, _plms(pairs, prediction)


def _pndm_first_profile(alphas: Tensor, steps: int, prediction: str) -> tuple[list[int], list[Update]]:
    """diffusers 0.3.0: no offset in the timesteps, one in the alphas, and the last update stays where it is."""
    values, last, stride = alphas.double().tolist(), len(alphas) - 1, len(alphas) // steps
    rising = list(range(0, len(alphas), stride))
    times = [*rising[:-1], rising[-2], rising[-1]][::-1]

    def value(time: int) -> float:
        return values[min(max(time, 0) + 1, last)]  # a stride that divides 999 would step one past the table

    pairs = [(value(t), value(t - stride)) for t in times]
    pairs[1] = (value(times[1] + stride), value(times[1]))
    return times, _plms(pairs, prediction)


def _ddim(scheduler: Mapping, alphas: Tensor, steps: int, prediction: str) -> tuple[list[int], list[Update]]:
    """DDIM with eta 0 (equation 12 of arXiv 2010.02502)."""
    values, stride = alphas.double().tolist(), len(alphas) // steps
    final = 1.0 if scheduler.get("set_alpha_to_one", True) else values[0]
    times, updates = _spaced(scheduler, "ddim", len(alphas), steps)[::-1], []
    for time in times:
        alpha, target = values[time], values[time - stride] if time >= stride else final
        if prediction == "epsilon":
            sample, weight = math.sqrt(target / alpha), math.sqrt(1 - target) - math.sqrt(target * (1 - alpha) / alpha)
        else:
            sample = math.sqrt(target * alpha) + math.sqrt((1 - target) * (1 - alpha))
            weight = math.sqrt((1 - target) * alpha) - math.sqrt(target * (1 - alpha))
        updates.append(Update(sample, (weight,)))
    return times, updates


def _dpm_solver(scheduler: Mapping, alphas: Tensor, steps: int, prediction: str) -> tuple[list[int], list[Update]]:
    """DPM-Solver++(2M), midpoint form (algorithm 2 of arXiv 2211.01095), from the first sigma to zero; entries are clean samples."""
    values, count = alphas.double().tolist(), len(alphas)
    spacing, offset = scheduler.get("timestep_spacing", SPACING["dpm-solver++"]), scheduler.get("steps_offset", 0)
    if spacing == "linspace":
        falling = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        falling = (np.arange(steps + 1) * (count // (steps + 1)))[::-1][:-1] + offset
    elif spacing == "trailing":
        falling = np.arange(count, 0, -count / steps).round() - 1
    else:
        raise Refused(f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing")
    times, updates = _checked(falling, count), []
    log_ratio = [0.5 * math.log(values[t] / (1 - values[t])) for t in times]  # lambda of the paper
    for k, time in enumerate(times):
        kept, noisy = math.sqrt(values[time]), math.sqrt(1 - values[time])
        entry = (1 / kept, -noisy / kept) if prediction == "epsilon" else (kept, -noisy)
        if k == len(times) - 1:
            updates.append(Update(0.0, (1.0,), entry))
            continue
        h, target = log_ratio[k + 1] - log_ratio[k], values[times[k + 1]]
        sample, weight = math.sqrt(1 - target) / noisy, -math.sqrt(target) * math.expm1(-h)
        share = 0.0 if k == 0 else 0.5 * h / (log_ratio[k] - log_ratio[k - 1])
        updates.append(Update(sample, (weight,) if k == 0 else (weight * (1 + share), -weight * share), entry))
    return times, updates
