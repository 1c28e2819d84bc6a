"""The DPM-Solver++ sampler of second order."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Sampler, Update
from datasetdm_fast.engine.sampling.times import SPACING, check_times, trailing
from datasetdm_fast.errors import Refused


def dpm_solver(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2), to sigma zero; entries are clean samples."""
    values, count = alphas.double().tolist(), len(alphas)
    spacing, offset = scheduler.get("timestep_spacing", "linspace"), scheduler.get("steps_offset", 0)
    if spacing == "linspace":
        falling = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        falling = (np.arange(steps + 1) * (count // (steps + 1)))[::-1][:-1] + offset
    elif spacing == "trailing":
        falling = trailing(count, steps)
    else:
        raise Refused(
            f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing",
            SPACING,
        )
    times, updates = check_times(falling, count), []
    log_ratio = [0.5 * math.log(values[t] / (1 - values[t])) for t in times]  # lambda of the paper
    for k, time in enumerate(times):
        signal, noisy = math.sqrt(values[time]), math.sqrt(1 - values[time])
        entry = (1 / signal, -noisy / signal) if prediction == "epsilon" else (signal, -noisy)
        if k == len(times) - 1:
            updates.append(Update(0.0, (1.0,), entry))
            continue
        h, target = log_ratio[k + 1] - log_ratio[k], values[times[k + 1]]
        sample, weight = math.sqrt(1 - target) / noisy, -math.sqrt(target) * math.expm1(-h)
        share = 0.0 if k == 0 else 0.5 * h / (log_ratio[k] - log_ratio[k - 1])
        updates.append(Update(sample, (weight,) if k == 0 else (weight * (1 + share), -weight * share), entry))
    return times, updates


SAMPLER = Sampler(dpm_solver, memory=1, orders=((1.0,),))
