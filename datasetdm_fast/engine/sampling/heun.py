"""Heun's method, of flows."""

from collections.abc import Mapping
from typing import Any

from datasetdm_fast.engine.sampling.flow import euler_levels
from datasetdm_fast.engine.sampling.schedule import FlowSampler, Sampler, Update


def flow_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    """A step of Euler, then one call at its end that replaces half of the step; the last step is Euler's alone."""
    updates = []
    for sigma, target in zip(sigmas[:-2], sigmas[1:]):
        half = (target - sigma) / 2
        updates += [Update(1.0, (2 * half,)), Update(1.0, (half, -half), is_kept=False)]
    return [*updates, Update(1.0, (sigmas[-1] - sigmas[-2],))]


SAMPLER = Sampler(None, memory=1, flow=FlowSampler(euler_levels, flow_updates, calls_per_step=2))
