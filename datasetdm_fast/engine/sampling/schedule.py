"""A sampling schedule as data, timesteps and coefficients of updates; noise; and latents on their way through it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import PROFILES, SAMPLERS, SCHEDULERS, FlowRule
from datasetdm_fast.errors import Refused, check_choice
from datasetdm_fast.kernels.choice import form_of
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.plugins import load_place

FLOW_PREDICTION = "flow_prediction"
# Settings that change images, for each class: what the samplers here follow, then what diffusers takes where a config
# does not say.
FOLLOWED: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "PNDMScheduler": {"skip_prk_steps": (True, False)},
    "DDIMScheduler": {"clip_sample": (False, True), "thresholding": (False, False)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "dpmsolver++"),
        "solver_order": (2, 2),
        "solver_type": ("midpoint", "midpoint"),
        "final_sigmas_type": ("zero", "zero"),
        "lambda_min_clipped": (-math.inf, -math.inf),
        **dict.fromkeys(
            ("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), (False, False)
        ),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2, 2),
        "solver_type": ("bh2", "bh2"),
        "predict_x0": (True, True),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "solver_p": (None, None),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False, False)
        ),
    },
    "LCMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether the config is of a flow, whose latents at timestep t are (1 - t / 1000) * image + t / 1000 * noise."""
    return bool(
        scheduler.get("_class_name", "").startswith("FlowMatch")
        or scheduler.get("use_flow_sigmas")
        or scheduler.get("prediction_type") == FLOW_PREDICTION
    )


def choose_sampler(scheduler: Mapping[str, Any], sampler: str) -> str:
    """The sampler of this name; "auto" is that of the scheduler config, refused where images would differ."""
    if sampler != "auto":
        return sampler
    named = scheduler.get("_class_name", "PNDMScheduler")
    if named not in SCHEDULERS:
        raise Refused(
            f"scheduler: the model's own, {named}, is none of {', '.join(SCHEDULERS)}",
            f"Name another: --sampler {'euler' if is_flow(scheduler) else 'ddim'}, or sampler= in a program.",
        )
    for name, (followed, default) in FOLLOWED.get(named, {}).items():
        value = scheduler.get(name, default)
        if value is None:  # of a switch it means no
            value = default is not True and default
        if value != followed:
            raise Refused(
                f"scheduler: the model's {named} has {name}={value!r}, which the sampler here does not follow, so its "
                f"images would differ; expected {followed!r}",
                f"Change it, or take the images of --sampler {SCHEDULERS[named]}, or sampler= in a program.",
            )
    return SCHEDULERS[named]


ANOTHER = "Name another model with --model."
ANOTHER_SAMPLER = "Name another with --sampler, or another model."


def alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    """[training steps] fp32 cumulative products of 1 - beta, rounded as diffusers rounds them."""
    if scheduler.get("rescale_betas_zero_snr"):
        raise Refused(
            "rescale_betas_zero_snr: the scheduler config asks for zero terminal SNR, which the samplers here do not "
            "support",
            ANOTHER,
        )
    if scheduler.get("trained_betas") is not None:
        return torch.cumprod(1 - torch.tensor(scheduler["trained_betas"], dtype=torch.float32), 0)
    count, start, end = (
        scheduler.get("num_train_timesteps", 1000),
        scheduler.get("beta_start", 0.0001),
        scheduler.get("beta_end", 0.02),
    )
    name = scheduler.get("beta_schedule", "linear")
    if name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    else:
        raise Refused(
            f"beta_schedule: the scheduler config says {name!r}, supported are linear and scaled_linear", ANOTHER
        )
    return torch.cumprod(1 - betas, 0)


class ImageNoise:
    """Noise of the images of a batch, each drawn on the CPU by a generator with its own seed: draw after draw what a
    pipeline of diffusers draws from it, first the latents, then the noise of one call after another.
    """

    def __init__(self, seeds: Iterable[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.shape, self.device = shape, torch.device(device)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:  # [B, *shape] fp32
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return to_device(noise, self.device)


def add_noise(scheduler: Mapping[str, Any], latents: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """`latents` as they would be at `timestep` of the forward process."""
    signal, noisy = shares_at(scheduler, timestep)
    return signal * latents + noisy * noise


def shares_at(scheduler: Mapping[str, Any], timestep: float) -> tuple[float, float]:
    """The shares of image and noise in the latents of a timestep."""
    if is_flow(scheduler):
        sigma = timestep / scheduler.get("num_train_timesteps", 1000)
        return 1 - sigma, sigma
    alphas = alphas_cumprod(scheduler)
    if timestep >= len(alphas) - 1 or float(timestep).is_integer():
        alpha = float(alphas[min(int(timestep), len(alphas) - 1)])
    else:  # between whole ones by their ratio of noise to signal
        sigma = float(np.interp(timestep, np.arange(len(alphas)), noise_ratios(alphas)))
        alpha = 1 / (sigma**2 + 1)
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def noise_ratios(alphas: Tensor) -> np.ndarray:
    """[training steps] fp32 noise over signal, the sigma of diffusers."""
    return (((1 - alphas) / alphas) ** 0.5).numpy()


def place_ratios(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The timesteps of falling ratios of noise to signal, between whole ones by their logarithms."""
    logarithms, required = np.log(table), np.log(np.maximum(ratios, 1e-10))
    low = (logarithms[:, None] <= required).sum(0).clip(1, len(logarithms) - 1) - 1
    below, above = logarithms[low], logarithms[low + 1]
    share = np.clip((below - required) / (below - above), 0, 1)
    return (1 - share) * low + share * (low + 1)


def respace(scheduler: Mapping[str, Any], sigmas: np.ndarray) -> np.ndarray:
    """Falling sigmas, spaced anew between their ends where the config asks for it (arXiv 2206.00364, equation 5)."""
    if not (is_karras := scheduler.get("use_karras_sigmas")) and not scheduler.get("use_exponential_sigmas"):
        return sigmas
    least, most = (scheduler.get(name) for name in ("sigma_min", "sigma_max"))
    for name, value in (("sigma_min", least), ("sigma_max", most)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise Refused(f"{name}: the scheduler config says {value!r}, expected a number above 0", ANOTHER_SAMPLER)
    least = sigmas[-1].item() if least is None else least
    most = sigmas[0].item() if most is None else most
    if is_karras:
        ends, rho = (most ** (1 / 7.0), least ** (1 / 7.0)), 7.0
        return (ends[0] + np.linspace(0, 1, len(sigmas)) * (ends[1] - ends[0])) ** rho
    return np.exp(np.linspace(math.log(most), math.log(least), len(sigmas)))


def space_times(
    scheduler: Mapping[str, Any], count: int, steps: int, usual: str = "linspace", beyond: int = 0
) -> np.ndarray:
    """[steps] falling timesteps by the config's timestep_spacing, laid out with steps `beyond` the last."""
    spacing, many = scheduler.get("timestep_spacing", usual), steps + beyond
    if spacing == "trailing":  # for 61 steps of 1000 rounding lets arange end with one too many
        return np.arange(count, 0, -count / steps)[:steps].round() - 1
    if spacing == "leading":
        rising = np.arange(many) * (count // many) + scheduler.get("steps_offset", 0)
    elif spacing == "linspace":
        rising = np.linspace(0, count - 1, many)
    else:
        raise Refused(
            f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing",
            "Put one of these into the model's scheduler_config.json.",
        )
    return rising[::-1][:steps]


def whole_times(times: np.ndarray, count: int) -> list[int]:
    """The timesteps as whole numbers."""
    return [int(time) for time in check_times(times.round(), count)]


def check_times(times: np.ndarray, count: int) -> np.ndarray:
    """The timesteps; refuses those that repeat or leave the training steps."""
    if times.min() < 0 or times.max() >= count or np.unique(times).size < times.size:
        raise Refused(
            f"steps: {len(times)} steps do not fit into {count} training steps with this spacing and offset, ask for "
            "fewer",
            "Choose a smaller --steps.",
        )
    return times


@dataclass(frozen=True)
class Update:
    """Coefficients of one call."""

    sample: float
    weights: tuple[float, ...]  # of this call's entry, then of the earlier ones, newest first
    entry: tuple[float, float] = (0.0, 1.0)  # entry = entry[0] * x + entry[1] * output
    restarts: bool = False  # x is the sample of call 0: the warm-up correction of PLMS
    is_kept: bool = True  # whether later calls read this call's entry
    noise: float = 0.0  # of the fresh noise that is added


@dataclass(frozen=True)
class Schedule:
    """Timesteps and coefficients of every call of the network for one image."""

    memory: int  # earlier entries that its updates read
    timesteps: tuple[float, ...]
    updates: tuple[Update, ...]
    noise_steps: tuple[float, ...]  # the training step whose noise the latents of each call hold
    noise_scale: float = 1.0  # of the first latents that are nothing but noise

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def noisy_calls(self) -> int:
        """How many calls add fresh noise."""
        return sum(update.noise != 0 for update in self.updates)


@dataclass(frozen=True)
class FlowSampler:
    """What a sampler does with a flow, whose latents at sigma are (1 - sigma) * image + sigma * noise."""

    # (scheduler config, steps, rule of the family, tokens of an image) -> a timestep a step, and sigmas, one more
    levels: Callable[[Mapping[str, Any], int, FlowRule, int], tuple[list[float], list[float]]]
    updates: Callable[[Mapping[str, Any], list[float]], list[Update]]  # (scheduler config, sigmas) -> one a call
    calls_per_step: int = 1  # of every step but the first


@dataclass(frozen=True)
class Sampler:
    """What the rest must know of a sampler."""

    # (scheduler config, cumulative alphas, steps, prediction type, profile) -> timesteps and updates; None where it
    # samples flows alone
    calls: Callable[[Mapping[str, Any], Tensor, int, str, str], tuple[list[Any], list[Update]]] | None
    memory: int  # earlier entries it reads
    least_steps: int = 1
    orders: tuple[tuple[float, ...], ...] = ()  # weights of one entry, of two, ...: those of its first calls
    # profile -> training steps by which the noise of latents is ahead of the timestep they are called with
    shifts: Mapping[str, int] = field(default_factory=dict)
    # (scheduler config, cumulative alphas, steps) -> noise_scale of its schedules
    noise_scale: Callable[[Mapping[str, Any], Tensor, int], float] | None = None
    # (scheduler config, cumulative alphas, steps) -> noise over signal at each call, where its timestep says another
    ratios: Callable[[Mapping[str, Any], Tensor, int], Sequence[float]] | None = None
    flow: FlowSampler | None = None  # None where it does not sample flows


def make_schedule(
    scheduler: Mapping[str, Any],
    sampler: str,
    steps: int,
    profile: str = "0.3.0",
    strength: float = 1.0,
    flow: FlowRule | None = None,
    tokens: int = 0,
) -> Schedule:
    """The calls of `sampler` for a diffusers scheduler config; `profile` is the diffusers version of PNDM's timesteps.

    "auto" is the sampler that the config is of. `flow` is the rule of a family of flows, None of one with betas; an
    image of `tokens` tokens tells how far the noise levels of some flows are shifted. With a `strength` below 1 only
    that share of the steps is left, the last ones, but at least one.

    PNDM repeats its second timestep, so 50 steps are 51 calls; with profile 0.3.0 the last update changes nothing. That
    profile knows neither steps_offset nor set_alpha_to_one, and where the steps do not divide the training steps it
    makes one call more.
    """
    sampler = choose_sampler(scheduler, sampler)
    check_choice("sampler", sampler, SAMPLERS.names)
    check_choice("profile", profile, PROFILES)
    if is_flow(scheduler) != (flow is not None):
        raise Refused(
            f"scheduler: the model is {'a flow' if flow else 'a model with betas'}, and its scheduler config, "
            f"{scheduler.get('_class_name', 'without a class')}, is of the other kind",
            "Put the scheduler_config.json there that the model was published with.",
        )
    chosen = open_sampler(sampler)
    if (chosen.calls if flow is None else chosen.flow) is None:
        raise Refused(
            f"sampler: {sampler} samples {'flows' if flow is None else 'models with betas'} alone, and this model "
            "is of the other kind",
            "Choose another with --sampler.",
        )
    most = scheduler.get("num_train_timesteps", 1000) if flow else len(alphas_cumprod(scheduler))
    if not chosen.least_steps <= steps <= most:
        raise Refused(
            f"steps: {steps} is not within {chosen.least_steps} .. {most}, the range of {sampler} for this model",
            "Choose another --steps.",
        )
    count = max(round(strength * steps), 1)
    if flow is not None:
        return _flow_schedule(scheduler, chosen, steps, flow, tokens, count)
    whole = _beta_schedule(scheduler, sampler, chosen, steps, profile)
    return whole if strength == 1 else last_calls(whole, count, chosen.orders)


def _beta_schedule(scheduler: Mapping[str, Any], name: str, sampler: Sampler, steps: int, profile: str) -> Schedule:
    """All calls of a sampler for a model with betas."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Refused(
            f"prediction_type: the scheduler config says {prediction!r}, supported are epsilon and v_prediction",
            ANOTHER,
        )
    alphas = alphas_cumprod(scheduler)
    make = partial(checked_calls, sampler, scheduler, alphas, steps, prediction, profile)
    times, updates = SAMPLERS.guard(name, make, "fails")
    scale = sampler.noise_scale(scheduler, alphas, steps) if sampler.noise_scale else 1.0
    noise_steps = [time + sampler.shifts.get(profile, 0) for time in times]
    if sampler.ratios and (ratios := sampler.ratios(scheduler, alphas, steps)):
        noise_steps = np.interp(ratios, noise_ratios(alphas), np.arange(len(alphas))).tolist()
    return Schedule(sampler.memory, tuple(times), tuple(updates), tuple(noise_steps), scale)


def _flow_schedule(
    scheduler: Mapping[str, Any], sampler: Sampler, steps: int, rule: FlowRule, tokens: int, count: int
) -> Schedule:
    """The calls of the last `count` steps of a flow."""
    prediction = scheduler.get("prediction_type", FLOW_PREDICTION)
    if prediction != FLOW_PREDICTION:
        raise Refused(
            f"prediction_type: the scheduler config says {prediction!r}, and a flow's is {FLOW_PREDICTION}", ANOTHER
        )
    if scheduler.get("use_dynamic_shifting") and not tokens:
        raise ValueError("tokens: the noise levels of this model depend on them")
    assert sampler.flow is not None
    times, sigmas = sampler.flow.levels(scheduler, steps, rule, tokens)
    times, sigmas = times[-count:], sigmas[-count - 1 :]
    steps_of_calls = [0, *(step for step in range(1, count) for _ in range(sampler.flow.calls_per_step))]
    levels = [sigma * scheduler.get("num_train_timesteps", 1000) for sigma in sigmas]
    return Schedule(
        sampler.memory,
        tuple(times[step] for step in steps_of_calls),
        tuple(sampler.flow.updates(scheduler, sigmas)),
        tuple(levels[step] for step in steps_of_calls),
    )


def open_sampler(name: str) -> Sampler:
    """The record of a sampler, which is one of SAMPLERS."""
    entry = SAMPLERS[name]
    return load_place(entry) if isinstance(entry, str) else SAMPLERS.check_type(name, entry, Sampler)


def checked_calls(
    sampler: Sampler, scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[float], list[Update]]:
    """Timesteps and updates of a sampler; a ValueError where they are no schedule."""
    assert sampler.calls is not None
    times, updates = sampler.calls(scheduler, alphas, steps, prediction, profile)
    # numbers of Python, whole where they are
    times = [int(time) if float(time).is_integer() else float(time) for time in times]
    updates = list(updates)
    if not times or len(times) != len(updates):
        raise ValueError(f"{len(times)} timesteps for {len(updates)} updates")
    if beyond := [time for time in times if not 0 <= time < len(alphas)]:
        raise ValueError(f"the timestep {beyond[0]} is not within 0 .. {len(alphas) - 1}")
    for call, update in enumerate(updates):
        most = min(call, sampler.memory) + 1
        if not 1 <= len(update.weights) <= most:
            raise ValueError(f"the update of call {call} has {len(update.weights)} weights, expected 1 to {most}")
        if not all(map(math.isfinite, (update.sample, *update.weights, *update.entry, update.noise))):
            raise ValueError(f"the update of call {call} has a coefficient that is not finite")
    return times, updates


def last_calls(schedule: Schedule, count: int, orders: Sequence[Sequence[float]]) -> Schedule:
    """The last `count` calls as a schedule of its own, which begins at first order as it has no earlier entries."""
    first = max(len(schedule) - count, 0)
    if first and schedule.updates[first].restarts:  # it repeats a call that is left out
        first += 1
    updates = list(schedule.updates[first:])
    for k, weights in enumerate(orders[: len(updates)] if first else ()):
        whole = math.fsum(updates[k].weights)
        updates[k] = replace(updates[k], weights=tuple(whole * weight for weight in weights))
    timesteps, noise_steps = schedule.timesteps[first:], schedule.noise_steps[first:]
    return replace(schedule, timesteps=timesteps, updates=tuple(updates), noise_steps=noise_steps)


class ReferenceSampler:
    """A batch on its way through a schedule, step by step: what SamplerState is verified against."""

    def __init__(self, schedule: Schedule, guidance: float, latents: Tensor, noise: Callable[[], Tensor] | None = None):
        self.schedule, self.guidance, self.noise = schedule, guidance, noise
        self.latents = self.origin = latents  # [B, C, h, w]; the latter those of call 0
        self.history: tuple[Tensor, ...] = ()  # entries of earlier calls, newest first

    def step(self, k: int, output: Tensor) -> Tensor:
        """The latents after call k, of an `output` [2B, C, h, w] without and with the text or [B, C, h, w] unguided."""
        update = self.schedule.updates[k]
        sample = self.origin if update.restarts else self.latents
        if len(output) > len(sample):
            without, with_text = output.chunk(2)
            output = without + self.guidance * (with_text - without)
        entry = output.to(sample.dtype)
        if update.entry != (0.0, 1.0):
            entry = update.entry[0] * sample + update.entry[1] * entry
        entries = (entry, *self.history)
        self.latents = update.sample * sample
        for weight, value in zip(update.weights, entries):
            self.latents = self.latents + weight * value
        if update.noise and self.noise:
            self.latents = self.latents + update.noise * self.noise()
        if update.is_kept:
            self.history = entries[: self.schedule.memory]
        return self.latents


class SamplerState:
    """A batch on its way through a schedule, guided and moved on in one operation per call.

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
