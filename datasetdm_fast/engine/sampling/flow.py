"""Noise levels of flows: the sigmas that a family's pipeline and its scheduler config make of a number of steps."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from datasetdm_fast.config import FlowRule
from datasetdm_fast.engine.sampling.schedule import ANOTHER, ANOTHER_SAMPLER, respace
from datasetdm_fast.errors import Refused

LARGEST_MU = 100  # of what models say by far; it is an exponent
NEAR_ONE = 1e-6  # UniPC begins so much below sigma 1, where its logarithm of the signal is not finite


def euler_levels(
    scheduler: Mapping[str, Any], steps: int, rule: FlowRule, tokens: int
) -> tuple[list[float], list[float]]:
    """Timesteps and sigmas of FlowMatchEulerDiscreteScheduler, each rounded to fp32 where it rounds them."""
    _check(scheduler, ("invert_sigmas", "use_beta_sigmas"))
    count = scheduler.get("num_train_timesteps", 1000)
    sigmas = _shift_sigmas(scheduler, _space_sigmas(scheduler, steps, rule, count), steps, rule, tokens)
    sigmas = _to_terminal(scheduler, sigmas)
    sigmas = torch.from_numpy(respace(scheduler, sigmas)).to(torch.float32)
    return (sigmas * count).tolist(), [*sigmas.tolist(), 0.0]


def dpm_solver_levels(
    scheduler: Mapping[str, Any], steps: int, rule: FlowRule, tokens: int
) -> tuple[list[float], list[float]]:
    """Timesteps and sigmas of DPMSolverMultistepScheduler with use_flow_sigmas, which rounds timesteps down."""
    _check(scheduler, ("shift_terminal",))
    count, shift = scheduler.get("num_train_timesteps", 1000), _shift(scheduler, steps, rule, tokens)
    rising = 1.0 - np.linspace(1, 1 / count, steps + 1)
    sigmas = np.flip(shift * rising / (1 + (shift - 1) * rising))[:-1]
    return _whole(sigmas, count)


def unipc_levels(
    scheduler: Mapping[str, Any], steps: int, rule: FlowRule, tokens: int
) -> tuple[list[float], list[float]]:
    """Timesteps and sigmas of UniPCMultistepScheduler with use_flow_sigmas, which rounds timesteps down."""
    count = scheduler.get("num_train_timesteps", 1000)
    sigmas = np.linspace(1, 1 / count, steps + 1)[:-1] if not rule.is_imposed else np.linspace(1.0, 1 / steps, steps)
    sigmas = _to_terminal(scheduler, _shift_sigmas(scheduler, sigmas, steps, rule, tokens))
    if abs(sigmas[0] - 1) < NEAR_ONE:
        sigmas[0] -= NEAR_ONE
    return _whole(sigmas, count)


def _check(scheduler: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if scheduler.get(name):
            raise Refused(
                f"{name}: the scheduler config says {scheduler[name]!r}, which this sampler does not follow",
                ANOTHER_SAMPLER,
            )


def _space_sigmas(scheduler: Mapping[str, Any], steps: int, rule: FlowRule, count: int) -> np.ndarray:
    """Sigmas before they are shifted: those that the pipeline hands to its scheduler, or the scheduler's own."""
    if rule.spacing == "uniform":
        return np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if rule.spacing == "uniform-fp32":
        return torch.linspace(1.0, 1 / steps, steps).numpy()
    ends = torch.tensor([float(count), 1.0]) / count
    if not scheduler.get("use_dynamic_shifting"):  # whose ends the scheduler shifts once more
        shift = _static_shift(scheduler)
        ends = shift * ends / (1 + (shift - 1) * ends)
    most, least = (ends.double() * count).tolist()
    return np.linspace(most, least, steps) / count


def _static_shift(scheduler: Mapping[str, Any]) -> float:
    return float(scheduler.get("shift", scheduler.get("flow_shift", 1.0)))


def _shift(scheduler: Mapping[str, Any], steps: int, rule: FlowRule, tokens: int) -> float:
    """The factor of odds of noise by which sigmas are shifted, by steps and tokens where the config says so."""
    if not scheduler.get("use_dynamic_shifting"):
        return _static_shift(scheduler)
    if rule.mu == "empirical":  # a line in tokens at 10 and 200 steps, and one between
        mu = 0.00016927 * tokens + 0.45666666
        if tokens <= 4300:
            few = 8.73809524e-05 * tokens + 1.89833333
            slope = (mu - few) / 190.0
            mu = slope * steps + (mu - 200.0 * slope)
    else:
        least, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (high - low) / (most - least) if most != least else math.inf
        mu = float(tokens * slope + (low - slope * least))
    kind = scheduler.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise Refused(
            f"time_shift_type: the scheduler config says {kind!r}, supported are exponential and linear", ANOTHER
        )
    if not abs(mu) < LARGEST_MU or kind == "linear" and mu <= 0:
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        values = ", ".join(f"{name} {scheduler[name]}" for name in names if name in scheduler)
        raise Refused(f"scheduler: its {values} give no shift of the noise of {tokens} tokens", ANOTHER)
    return math.exp(mu) if kind == "exponential" else mu


def _shift_sigmas(
    scheduler: Mapping[str, Any], sigmas: np.ndarray, steps: int, rule: FlowRule, tokens: int
) -> np.ndarray:
    """Sigmas by the shift, in the form of each kind, as they round differently."""
    shift = _shift(scheduler, steps, rule, tokens)
    if scheduler.get("use_dynamic_shifting"):
        return shift / (shift + (1 / sigmas - 1))
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _to_terminal(scheduler: Mapping[str, Any], sigmas: np.ndarray) -> np.ndarray:
    """Sigmas stretched so that the last is the config's shift_terminal."""
    terminal = scheduler.get("shift_terminal")
    if not terminal:
        return sigmas
    if len(sigmas) < 2:
        raise Refused(
            f"steps: {len(sigmas)}, and the model's last noise level is {terminal}, which needs 2 or more",
            "Choose another --steps.",
        )
    signal = 1 - sigmas
    return 1 - signal / (signal[-1] / (1 - terminal))


def _whole(sigmas: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Timesteps rounded down, and sigmas in fp32 with the last, zero."""
    return (sigmas * count).astype(np.int64).tolist(), [*sigmas.astype(np.float32).tolist(), 0.0]
