"""The sampler of latent consistency models."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Sampler, Update
from datasetdm_fast.errors import Refused

SPREAD = 0.5  # sigma_data of the boundary condition


def lcm(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): every call but the last adds fresh noise."""
    values, count = alphas.double().tolist(), len(alphas)
    original = min(scheduler.get("original_inference_steps", 50), count)
    if steps > original:
        raise Refused(
            f"steps: {steps}, and this model was distilled for at most {original} with lcm", "Choose a smaller --steps."
        )
    distilled = np.arange(original, 0, -1) * (count // original) - 1
    times = distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].tolist()
    updates = []
    for time, target in zip(times, [*times[1:], None]):
        signal, noisy = math.sqrt(values[time]), math.sqrt(1 - values[time])
        scaled = time * scheduler.get("timestep_scaling", 10.0)
        skip, out = SPREAD**2 / (scaled**2 + SPREAD**2), scaled / math.sqrt(scaled**2 + SPREAD**2)
        image = (1 / signal, -noisy / signal) if prediction == "epsilon" else (signal, -noisy)
        signal_after, noise = (
            (1.0, 0.0) if target is None else (math.sqrt(values[target]), math.sqrt(1 - values[target]))
        )
        updates.append(Update(signal_after * (skip + out * image[0]), (signal_after * out * image[1],), noise=noise))
    return times, updates


SAMPLER = Sampler(lcm, memory=0)
