"""The linear multistep samplers PLMS and PNDM."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Sampler, Update
from datasetdm_fast.engine.sampling.times import space_steps

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _transfer(alpha: float, target: float, order: int, prediction: str, *, restarts: bool = False) -> Update:
    """PNDM's transfer from one alpha to another (equation 9 of arXiv 2202.09778) with a multistep output."""
    sample = math.sqrt(target / alpha)
    noise = -(target - alpha) / (alpha * math.sqrt(1 - target) + math.sqrt(alpha * (1 - alpha) * target))
    if prediction == "v_prediction":
        sample, noise = sample + noise * math.sqrt(1 - alpha), noise * math.sqrt(alpha)
    weights = (0.5, 0.5) if restarts else ADAMS_BASHFORTH[order - 1]
    return Update(sample, tuple(noise * weight for weight in weights), restarts=restarts, is_kept=not restarts)


def _plms(pairs: list[tuple[float, float]], prediction: str) -> list[Update]:
    """Updates of the PLMS calls between the given alphas; call 1 redoes call 0 with the mean of both outputs."""
    updates = []
    for k, (alpha, target) in enumerate(pairs):
        if k == 1:
            updates.append(_transfer(alpha, target, 2, prediction, restarts=True))
        else:
            updates.append(_transfer(alpha, target, min(k, 4) if k else 1, prediction))
    return updates


def pndm(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """PLMS after a warm-up of one repeated call, with the timesteps of the profile's diffusers version."""
    if profile == "0.3.0":
        return _first_profile(alphas, steps, prediction)
    values, last, stride = alphas.double().tolist(), len(alphas) - 1, len(alphas) // steps
    final = 1.0 if scheduler.get("set_alpha_to_one", False) else values[0]
    rising = space_steps(scheduler, len(alphas), steps)
    times = [*rising[:-1], rising[-2], rising[-1]][::-1]
    pairs = [(values[t], values[t - stride] if t >= stride else final) for t in times]
    pairs[1] = (values[min(times[1] + stride, last)], values[times[1]])
    return times, _plms(pairs, prediction)


def _first_profile(alphas: Tensor, steps: int, prediction: str) -> tuple[list[int], list[Update]]:
    """diffusers 0.3.0: no offset in the timesteps, one in the alphas, and the last update stays where it is."""
    values, last, stride = alphas.double().tolist(), len(alphas) - 1, len(alphas) // steps
    rising = list(range(0, len(alphas), stride))
    times = [*rising[:-1], rising[-2], rising[-1]][::-1]

    def value(time: int) -> float:
        return float(values[min(max(time, 0) + 1, last)])  # a stride that divides 999 would step one past the table

    pairs = [(value(t), value(t - stride)) for t in times]
    pairs[1] = (value(times[1] + stride), value(times[1]))
    return times, _plms(pairs, prediction)


SAMPLER = Sampler(pndm, memory=3, least_steps=2, orders=ADAMS_BASHFORTH, shifts={"0.3.0": 1})
