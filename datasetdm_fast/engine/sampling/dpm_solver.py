"""The DPM-Solver++ sampler of second order."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.engine.sampling.flow import dpm_solver_levels
from datasetdm_fast.engine.sampling.schedule import (
    FlowSampler,
    Sampler,
    Update,
    noise_ratios,
    place_ratios,
    respace,
    space_times,
    whole_times,
)


def dpm_solver(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2), to sigma zero; entries are clean samples."""
    values, count = alphas.double().tolist(), len(alphas)
    if sigmas := ratios(scheduler, alphas, steps):
        times = [round(time) for time in place_ratios(np.array(sigmas), noise_ratios(alphas)).tolist()]
        pairs = [(1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)) for sigma in sigmas]
        log_ratio = [-math.log(sigma) for sigma in sigmas]  # lambda of the paper
    else:
        times = whole_times(space_times(scheduler, count, steps, beyond=1), count)
        pairs = [(math.sqrt(values[time]), math.sqrt(1 - values[time])) for time in times]
        log_ratio = [0.5 * math.log(values[t] / (1 - values[t])) for t in times]
    entries = [
        (1 / signal, -noisy / signal) if prediction == "epsilon" else (signal, -noisy) for signal, noisy in pairs
    ]
    return times, _updates(pairs, log_ratio, entries)


def ratios(scheduler: Mapping[str, Any], alphas: Tensor, steps: int) -> list[float]:
    """The sigmas of each call, where the config spaces them as Karras et al. do: between the ends of training."""
    if not scheduler.get("use_karras_sigmas"):
        return []
    table = noise_ratios(alphas)
    return [*map(float, respace(scheduler, np.linspace(table[-1], table[0], steps)))]


def _updates(
    pairs: list[tuple[float, float]], log_ratio: list[float], entries: list[tuple[float, float]]
) -> list[Update]:
    """Updates between latents of these shares of image and noise, the last to the image alone."""
    updates = []
    for k, (_, noisy) in enumerate(pairs[:-1]):
        signal, following = pairs[k + 1]
        h = log_ratio[k + 1] - log_ratio[k]
        sample, weight = following / noisy, -signal * math.expm1(-h)
        weights: tuple[float, ...] = (weight,)
        if k > 0:
            share = 0.5 * h / (log_ratio[k] - log_ratio[k - 1])
            weights = (weight * (1 + share), -weight * share)
        updates.append(Update(sample, weights, entries[k]))
    return [*updates, Update(0.0, (1.0,), entries[-1])]


def flow_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    pairs = [(1 - sigma, sigma) for sigma in sigmas[:-1]]
    log_ratio = [math.log(signal / noisy) for signal, noisy in pairs]
    return _updates(pairs, log_ratio, [(1.0, -sigma) for sigma in sigmas[:-1]])


SAMPLER = Sampler(
    dpm_solver, memory=1, orders=((1.0,),), ratios=ratios, flow=FlowSampler(dpm_solver_levels, flow_updates)
)
