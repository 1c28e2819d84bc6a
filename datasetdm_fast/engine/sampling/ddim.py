"""The DDIM sampler."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datasetdm_fast.engine.sampling.schedule import Sampler, Update, space_times, whole_times


def ddim(
    scheduler: Mapping[str, Any], alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """DDIM with eta 0 (equation 12 of arXiv 2010.02502), of a predicted noise or v (appendix D of arXiv 2202.00512)."""
    values, stride = alphas.double().tolist(), len(alphas) // steps
    final = 1.0 if scheduler.get("set_alpha_to_one", True) else values[0]
    times, updates = whole_times(space_times(scheduler, len(alphas), steps, "leading"), len(alphas)), []
    for time in times:
        alpha, target = values[time], values[time - stride] if time >= stride else final
        if prediction == "epsilon":
            sample, weight = math.sqrt(target / alpha), math.sqrt(1 - target) - math.sqrt(target * (1 - alpha) / alpha)
        else:
            sample = math.sqrt(target * alpha) + math.sqrt((1 - target) * (1 - alpha))
            weight = math.sqrt((1 - target) * alpha) - math.sqrt(target * (1 - alpha))
        updates.append(Update(sample, (weight,)))
    return times, updates


SAMPLER = Sampler(ddim, memory=0)
