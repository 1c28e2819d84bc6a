"""Samplers: each a schedule of linear updates, one file each."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from datasetdm_fast.config import PROFILES, SAMPLERS
from datasetdm_fast.engine.sampling.schedule import Sampler, Schedule, checked_calls, last_calls
from datasetdm_fast.engine.sampling.times import ANOTHER, alphas_cumprod
from datasetdm_fast.errors import Refused


def make_schedule(
    scheduler: Mapping[str, Any], sampler: str, steps: int, profile: str = "0.3.0", strength: float = 1.0
) -> Schedule:
    """The calls of `sampler` for a diffusers scheduler config; `profile` is the diffusers version of PNDM's timesteps.

    With a `strength` below 1 only that share of the steps is left, the last ones, but at least one.

    PNDM repeats its second timestep, so 50 steps are 51 calls; with profile 0.3.0 the last update changes nothing. That
    profile knows neither steps_offset nor set_alpha_to_one, and where the steps do not divide the training steps it
    makes one call more.
    """
    if sampler not in SAMPLERS:
        raise Refused(
            f"sampler: {sampler!r} is none of {', '.join(SAMPLERS.names)}", "Choose one of these with --sampler."
        )
    if profile not in PROFILES:
        raise Refused(f"profile: {profile!r} is none of {', '.join(PROFILES)}", "Choose one of these with --profile.")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Refused(
            f"prediction_type: the scheduler config says {prediction!r}, supported are epsilon and v_prediction",
            ANOTHER,
        )
    alphas = alphas_cumprod(scheduler)
    chosen = open_sampler(sampler)
    if not chosen.least_steps <= steps <= len(alphas):
        raise Refused(
            f"steps: {steps} is not within {chosen.least_steps} .. {len(alphas)}, the range of {sampler} for this "
            "model",
            "Choose another --steps.",
        )
    if sampler in SAMPLERS.others:
        make = partial(checked_calls, chosen, scheduler, alphas, steps, prediction, profile)
        times, updates = SAMPLERS.guard(sampler, make, "fails")
    else:
        times, updates = chosen.calls(scheduler, alphas, steps, prediction, profile)
    shift = chosen.shifts.get(profile, 0)
    whole = Schedule(chosen.memory, prediction, tuple(times), tuple(updates), shift)
    return whole if strength == 1 else last_calls(whole, max(round(strength * steps), 1), chosen.orders)


def open_sampler(name: str) -> Sampler:
    """The record of a sampler, which is one of SAMPLERS."""
    entry = SAMPLERS[name]
    sampler: Sampler = (
        import_module(entry).SAMPLER if isinstance(entry, str) else SAMPLERS.check_type(name, entry, Sampler)
    )
    return sampler
