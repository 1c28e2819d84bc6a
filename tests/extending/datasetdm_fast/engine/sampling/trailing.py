"""DDIM whose timesteps end at the last training step, whatever the model's scheduler says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from datasetdm_fast.engine.sampling.ddim import ddim
from datasetdm_fast.engine.sampling.schedule import Sampler, Update


def trailing(
    scheduler: Mapping, alphas: Tensor, steps: int, prediction: str, profile: str
) -> tuple[list[int], list[Update]]:
    """DDIM's calls with trailing timesteps (arXiv 2305.08891, section 3.3)."""
    return ddim({**scheduler, "timestep_spacing": "trailing"}, alphas, steps, prediction, profile)


SAMPLER = Sampler(trailing, memory=0)
