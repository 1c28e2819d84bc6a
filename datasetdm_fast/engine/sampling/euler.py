"""Euler's method: of models with betas, plain or with fresh noise at every call, and of flows; and Heun's, of flows."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.engine.sampling.flow import euler_levels
from datasetdm_fast.engine.sampling.schedule import (
    ANOTHER_SAMPLER,
    FlowSampler,
    Sampler,
    Update,
    check_times,
    noise_ratios,
    place_ratios,
    respace,
    space_times,
)
from datasetdm_fast.errors import Refused

FOLLOWED = {  # what is supported of settings that change images
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
}


def euler(
    scheduler: Mapping[str, Any],
    alphas: Tensor,
    steps: int,
    prediction: str,
    profile: str,
    *,
    is_ancestral: bool = False,
) -> tuple[list[float], list[Update]]:
    """Euler's method in the ratio of noise to signal (arXiv 2206.00364, algorithm 1, without churn)."""
    times, sigmas = levels(scheduler, alphas, steps, is_ancestral=is_ancestral)
    updates = []
    for k in range(steps):
        sigma, target, noise = sigmas[k], sigmas[k + 1], 0.0
        if is_ancestral:  # so much of `target` that the marginals stay those of the forward process
            noise = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
        # latents have unit variance, those of diffusers over sqrt(sigma^2 + 1); the last are as diffusers has them
        before, after = math.hypot(sigma, 1), 1.0 if k == steps - 1 else math.hypot(target, 1)
        change = math.sqrt(target**2 - noise**2) - sigma
        sample, weight = before, change
        if prediction == "v_prediction":  # whose noise is (sigma * x + v) / sqrt(sigma^2 + 1), x of unit variance
            sample, weight = sample + change * sigma / before, change / before
        updates.append(Update(sample / after, (weight / after,), noise=noise / after))
    return times, updates


def levels(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, *, is_ancestral: bool = False
) -> tuple[list[float], list[float]]:
    """Timesteps, and sigmas with the last one, rounded as EulerDiscreteScheduler rounds them."""
    times, table = check_times(space_times(scheduler, len(alphas), steps), len(alphas)), noise_ratios(alphas)
    times = times.astype(np.float32)
    sigmas, last = np.interp(times, np.arange(len(table)), table), 0.0
    if not is_ancestral:
        for name, values in FOLLOWED.items():
            if (value := scheduler.get(name)) is not None and value not in values:
                supported = " or ".join(map(str, values))
                raise Refused(f"{name}: the scheduler config says {value!r}, supported is {supported}", ANOTHER_SAMPLER)
        respaced = respace(scheduler, sigmas)
        if respaced is not sigmas:
            sigmas, times = respaced, place_ratios(respaced, table).astype(np.float32)
        last = float(table[0]) if scheduler.get("final_sigmas_type") == "sigma_min" else 0.0
    whole = [int(time) if time.is_integer() else time for time in times.tolist()]
    return whole, [*sigmas.astype(np.float32).tolist(), last]


def noise_scale(scheduler: Mapping[str, Any], alphas: Tensor, steps: int, *, is_ancestral: bool = False) -> float:
    """What diffusers' first latents are at unit variance: sigma times the noise, but not with spacing `leading`."""
    if scheduler.get("timestep_spacing", "linspace") == "leading":
        return 1.0
    first = levels(scheduler, alphas, steps, is_ancestral=is_ancestral)[1][0]
    return first / math.hypot(first, 1)


def ratios(scheduler: Mapping[str, Any], alphas: Tensor, steps: int) -> list[float]:
    """The sigmas of each call, where the config spaces them anew."""
    is_respaced = scheduler.get("use_karras_sigmas") or scheduler.get("use_exponential_sigmas")
    return levels(scheduler, alphas, steps)[1][:-1] if is_respaced else []


def flow_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    """Straight steps; with stochastic_sampling every call draws the noise of the image anew."""
    pairs = list(zip(sigmas, sigmas[1:]))
    if scheduler.get("stochastic_sampling"):
        return [Update(1 - target, ((target - 1) * sigma,), noise=target) for sigma, target in pairs]
    return [Update(1.0, (target - sigma,)) for sigma, target in pairs]


def heun_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    """Heun's method: a step of Euler, then a call at its end that replaces half of it, but for the last step."""
    updates = []
    for sigma, target in zip(sigmas[:-2], sigmas[1:]):
        half = (target - sigma) / 2
        updates += [Update(1.0, (2 * half,)), Update(1.0, (half, -half), is_kept=False)]
    return [*updates, Update(1.0, (sigmas[-1] - sigmas[-2],))]


SAMPLER = Sampler(euler, memory=0, noise_scale=noise_scale, ratios=ratios, flow=FlowSampler(euler_levels, flow_updates))
ANCESTRAL = Sampler(partial(euler, is_ancestral=True), memory=0, noise_scale=partial(noise_scale, is_ancestral=True))
HEUN = Sampler(None, memory=1, flow=FlowSampler(euler_levels, heun_updates, calls_per_step=2))
