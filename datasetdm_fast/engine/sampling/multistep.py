"""The linear multistep samplers PLMS and PNDM."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Sampler, Update, space_times, whole_times

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """PLMS after a warm-up of one repeated call, with the timesteps of the profile's diffusers version.

    Those of diffusers 0.3.0 have no offset, its alphas have one, and its last update stays where it is.
    """
    values, last, stride = alphas.double().tolist(), len(alphas) - 1, len(alphas) // steps
    is_first = profile == "0.3.0"
    final = 1.0 if scheduler.get("set_alpha_to_one", False) else values[0]
    if is_first:
        times = list(range(0, len(alphas), stride))[::-1]
    else:
        times = whole_times(space_times(scheduler, len(alphas), steps, "leading"), len(alphas))
    times = [*times[:2], times[1], *times[2:]]

    def value(time: int) -> float:
        if is_first:
            return float(values[min(max(time, 0) + 1, last)])  # a stride that divides 999 would step past the table
        return float(values[min(time, last)]) if time >= 0 else final

    pairs = [(value(t), value(t - stride)) for t in times]
    pairs[1] = (value(times[1] + stride), value(times[1]))
    updates = []
    for k, (alpha, target) in enumerate(pairs):  # PNDM's transfer (equation 9 of arXiv 2202.09778)
        sample = math.sqrt(target / alpha)
        noise = -(target - alpha) / (alpha * math.sqrt(1 - target) + math.sqrt(alpha * (1 - alpha) * target))
        if prediction == "v_prediction":
            sample, noise = sample + noise * math.sqrt(1 - alpha), noise * math.sqrt(alpha)
        # call 1 redoes call 0 with the mean of both outputs
        weights = (0.5, 0.5) if k == 1 else ADAMS_BASHFORTH[max(min(k, 4) - 1, 0)]
        updates.append(Update(sample, tuple(noise * part for part in weights), restarts=k == 1, is_kept=k != 1))
    return times, updates


SAMPLER = Sampler(pndm, memory=3, least_steps=2, orders=ADAMS_BASHFORTH, shifts={"0.3.0": 1})
