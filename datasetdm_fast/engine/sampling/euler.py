"""Euler's method: of models with betas, plain or with fresh noise at every call, and of flows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.engine.sampling.flow import euler_levels
from datasetdm_fast.engine.sampling.schedule import FlowSampler, Sampler, Update
from datasetdm_fast.engine.sampling.times import ANOTHER, SPACING, noise_ratios, respace, trailing
from datasetdm_fast.errors import Refused


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
        noise = _ancestral_noise(sigmas[k], sigmas[k + 1]) if is_ancestral else 0.0
        updates.append(_update(sigmas[k], sigmas[k + 1], noise, prediction, is_last=k == steps - 1))
    return times, updates


def _ancestral_noise(sigma: float, target: float) -> float:
    """The share of `target` that is fresh noise, so that the marginals stay those of the forward process."""
    return math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)


def _update(sigma: float, target: float, noise: float, prediction: str, *, is_last: bool) -> Update:
    """One step between latents of unit variance, which are those of diffusers over sqrt(sigma^2 + 1); the last ones are
    as diffusers has them.
    """
    before, after = math.hypot(sigma, 1), 1.0 if is_last else math.hypot(target, 1)
    change = math.sqrt(target**2 - noise**2) - sigma
    sample, weight = before, change
    if prediction == "v_prediction":  # whose noise is (sigma * x + v) / sqrt(sigma^2 + 1), x of unit variance
        sample, weight = sample + change * sigma / before, change / before
    return Update(sample / after, (weight / after,), noise=noise / after)


def levels(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, *, is_ancestral: bool = False
) -> tuple[list[float], list[float]]:
    """Timesteps, and sigmas with the last one, rounded as EulerDiscreteScheduler rounds them."""
    times, table = _space_times(scheduler, len(alphas), steps), noise_ratios(alphas)
    sigmas, last = np.interp(times, np.arange(len(table)), table), 0.0
    if not is_ancestral:
        _check(scheduler)
        respaced = respace(scheduler, sigmas)
        if respaced is not sigmas:
            sigmas, times = respaced, _times_of(respaced, np.log(table)).astype(np.float32)
        last = float(table[0]) if scheduler.get("final_sigmas_type") == "sigma_min" else 0.0
    whole = [int(time) if time.is_integer() else time for time in times.tolist()]
    return whole, [*sigmas.astype(np.float32).tolist(), last]


def _space_times(scheduler: Mapping[str, Any], count: int, steps: int) -> np.ndarray:
    """[steps] fp32 falling timesteps by the config's timestep_spacing."""
    spacing = scheduler.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps, dtype=np.float32)[::-1]
    if spacing == "leading":
        rising = np.arange(steps) * (count // steps) + scheduler.get("steps_offset", 0)
        return rising[::-1].astype(np.float32)
    if spacing == "trailing":
        return trailing(count, steps).astype(np.float32)
    raise Refused(
        f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing",
        SPACING,
    )


def _check(scheduler: Mapping[str, Any]) -> None:
    followed = {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "use_beta_sigmas": (False,),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    for name, values in followed.items():
        if (value := scheduler.get(name)) is not None and value not in values:
            raise Refused(
                f"{name}: the scheduler config says {value!r}, supported is {' or '.join(map(str, values))}", ANOTHER
            )


def _times_of(sigmas: np.ndarray, logarithms: np.ndarray) -> np.ndarray:
    """Timesteps of sigmas, between whole ones by the logarithm of sigma."""
    required: np.ndarray = np.log(np.maximum(sigmas, 1e-10))
    low = (logarithms[:, None] <= required).sum(0).clip(1, len(logarithms) - 1) - 1
    below, above = logarithms[low], logarithms[low + 1]
    share = np.clip((below - required) / (below - above), 0, 1)
    return (1 - share) * low + share * (low + 1)


def noise_scale(scheduler: Mapping[str, Any], alphas: Tensor, steps: int, *, is_ancestral: bool = False) -> float:
    """What diffusers' first latents are at unit variance: sigma times the noise, but not with spacing `leading`."""
    if scheduler.get("timestep_spacing", "linspace") == "leading":
        return 1.0
    first = levels(scheduler, alphas, steps, is_ancestral=is_ancestral)[1][0]
    return first / math.hypot(first, 1)


def flow_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    """Straight steps; with stochastic_sampling every call draws the noise of the image anew."""
    pairs = list(zip(sigmas, sigmas[1:]))
    if scheduler.get("stochastic_sampling"):
        return [Update(1 - target, ((target - 1) * sigma,), noise=target) for sigma, target in pairs]
    return [Update(1.0, (target - sigma,)) for sigma, target in pairs]


SAMPLER = Sampler(euler, memory=0, noise_scale=noise_scale, flow=FlowSampler(euler_levels, flow_updates))
