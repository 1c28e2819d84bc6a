"""The UniPC sampler of second order, of flows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from datasetdm_fast.engine.sampling.flow import unipc_levels
from datasetdm_fast.engine.sampling.schedule import FlowSampler, Sampler, Update

MEMORY = 2


def flow_updates(scheduler: Mapping[str, Any], sigmas: list[float]) -> list[Update]:
    """UniPC-2 with B(h) = e^h - 1, predicting clean images (arXiv 2302.04867, algorithms 5 and 7).

    A call first corrects the step that led to it, whose latents it has and whose entries it knows, then predicts the
    next; both are linear in the latents and in three entries, so they are one update.
    """
    updates: list[Update] = []
    predicted, previous = np.zeros(MEMORY + 1), 1  # weights of entries in the latents of this call, newest first
    for k in range(len(sigmas) - 1):
        order = min(2, len(sigmas) - 1 - k, k + 1)
        correction = np.zeros(MEMORY + 1)
        if k > 0:
            correction = _corrector(sigmas, k, previous) - np.array([0.0, *predicted[:-1]])
        predicted = _predictor(sigmas, k, order)
        shrink = sigmas[k + 1] / sigmas[k]
        weights = (shrink * correction + predicted)[: min(k, MEMORY) + 1]
        updates.append(Update(shrink, tuple(weights.tolist()), (1.0, -sigmas[k])))
        previous = order
    return updates


def _log_ratio(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma else math.inf


def _predictor(sigmas: list[float], k: int, order: int) -> np.ndarray:
    """Weights of the entries of calls k, k - 1 and k - 2 in the latents of call k + 1."""
    step = _log_ratio(sigmas[k + 1]) - _log_ratio(sigmas[k])
    whole = -(1 - sigmas[k + 1]) * math.expm1(-step)
    if order == 1:
        return np.array([whole, 0.0, 0.0])
    ratio = (_log_ratio(sigmas[k - 1]) - _log_ratio(sigmas[k])) / step
    return np.array([whole * (1 - 0.5 / ratio), whole * 0.5 / ratio, 0.0])


def _corrector(sigmas: list[float], k: int, order: int) -> np.ndarray:
    """Weights of the entries of calls k, k - 1 and k - 2 in the corrected latents of call k."""
    step = _log_ratio(sigmas[k]) - _log_ratio(sigmas[k - 1])
    whole = -(1 - sigmas[k]) * math.expm1(-step)
    if order == 1:
        return np.array([whole * 0.5, whole * 0.5, 0.0])
    ratio = (_log_ratio(sigmas[k - 2]) - _log_ratio(sigmas[k - 1])) / step
    growth = math.expm1(-step)
    first = growth / -step - 1
    second = first / -step - 0.5
    older, newest = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array([first, 2 * second]) / growth)
    return whole * np.array([newest, 1 - newest - older / ratio, older / ratio])


SAMPLER = Sampler(None, memory=MEMORY, flow=FlowSampler(unipc_levels, flow_updates))
