"""Samplers: each a schedule of linear updates, one file each."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasetdm_fast.config import PROFILES, SAMPLERS, FlowRule
from datasetdm_fast.engine.sampling.schedule import Sampler, Schedule, checked_calls, last_calls
from datasetdm_fast.engine.sampling.times import ANOTHER, FLOW_PREDICTION, alphas_cumprod, choose_sampler, is_flow
from datasetdm_fast.errors import Refused
from datasetdm_fast.plugins import load_place


def make_schedule(
    scheduler: Mapping[str, Any],
    sampler: str,
    steps: int,
    profile: str = "0.3.0",
    strength: float = 1.0,
    flow: FlowRule | None = None,
    tokens: int = 0,
) -> Schedule:
    """The calls of `sampler` for a diffusers scheduler config; `profile` is the diffusers version of PNDM's timesteps.

    "auto" is the sampler that the config is of. `flow` is the rule of a family of flows, None of one with betas; an
    image of `tokens` tokens tells how far the noise levels of some flows are shifted. With a `strength` below 1 only
    that share of the steps is left, the last ones, but at least one.

    PNDM repeats its second timestep, so 50 steps are 51 calls; with profile 0.3.0 the last update changes nothing. That
    profile knows neither steps_offset nor set_alpha_to_one, and where the steps do not divide the training steps it
    makes one call more.
    """
    sampler = choose_sampler(scheduler, sampler)
    if sampler not in SAMPLERS:
        raise Refused(
            f"sampler: {sampler!r} is none of {', '.join(SAMPLERS.names)}", "Choose one of these with --sampler."
        )
    if profile not in PROFILES:
        raise Refused(f"profile: {profile!r} is none of {', '.join(PROFILES)}", "Choose one of these with --profile.")
    if is_flow(scheduler) != (flow is not None):
        raise Refused(
            f"scheduler: the model is {'a flow' if flow else 'a model with betas'}, and its scheduler config, "
            f"{scheduler.get('_class_name', 'without a class')}, is of the other kind",
            "Put the scheduler_config.json there that the model was published with.",
        )
    chosen = open_sampler(sampler)
    if (chosen.calls if flow is None else chosen.flow) is None:
        raise Refused(
            f"sampler: {sampler} samples {'flows' if flow is None else 'models with betas'} alone, and this model "
            "is of the other kind",
            "Choose another with --sampler.",
        )
    most = scheduler.get("num_train_timesteps", 1000) if flow else len(alphas_cumprod(scheduler))
    if not chosen.least_steps <= steps <= most:
        raise Refused(
            f"steps: {steps} is not within {chosen.least_steps} .. {most}, the range of {sampler} for this model",
            "Choose another --steps.",
        )
    count = max(round(strength * steps), 1)
    if flow is not None:
        return _flow_schedule(scheduler, chosen, steps, flow, tokens, count)
    whole = _beta_schedule(scheduler, sampler, chosen, steps, profile)
    return whole if strength == 1 else last_calls(whole, count, chosen.orders)


def _beta_schedule(scheduler: Mapping[str, Any], name: str, sampler: Sampler, steps: int, profile: str) -> Schedule:
    """All calls of a sampler for a model with betas."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Refused(
            f"prediction_type: the scheduler config says {prediction!r}, supported are epsilon and v_prediction",
            ANOTHER,
        )
    alphas = alphas_cumprod(scheduler)
    make = partial(checked_calls, sampler, scheduler, alphas, steps, prediction, profile)
    times, updates = SAMPLERS.guard(name, make, "fails")
    scale = sampler.noise_scale(scheduler, alphas, steps) if sampler.noise_scale else 1.0
    return Schedule(
        sampler.memory, prediction, tuple(times), tuple(updates), sampler.shifts.get(profile, 0), noise_scale=scale
    )


def _flow_schedule(
    scheduler: Mapping[str, Any], sampler: Sampler, steps: int, rule: FlowRule, tokens: int, count: int
) -> Schedule:
    """The calls of the last `count` steps of a flow."""
    prediction = scheduler.get("prediction_type", FLOW_PREDICTION)
    if prediction != FLOW_PREDICTION:
        raise Refused(
            f"prediction_type: the scheduler config says {prediction!r}, and a flow's is {FLOW_PREDICTION}", ANOTHER
        )
    if scheduler.get("use_dynamic_shifting") and not tokens:
        raise ValueError("tokens: the noise levels of this model depend on them")
    assert sampler.flow is not None
    times, sigmas = sampler.flow.levels(scheduler, steps, rule, tokens)
    times, sigmas = times[-count:], sigmas[-count - 1 :]
    steps_of_calls = [0, *(step for step in range(1, count) for _ in range(sampler.flow.calls_per_step))]
    levels = [sigma * scheduler.get("num_train_timesteps", 1000) for sigma in sigmas]
    return Schedule(
        sampler.memory,
        "flow",
        tuple(times[step] for step in steps_of_calls),
        tuple(sampler.flow.updates(scheduler, sigmas)),
        noise_steps=tuple(levels[step] for step in steps_of_calls),
    )


def open_sampler(name: str) -> Sampler:
    """The record of a sampler, which is one of SAMPLERS."""
    entry = SAMPLERS[name]
    sampler: Sampler = load_place(entry) if isinstance(entry, str) else SAMPLERS.check_type(name, entry, Sampler)
    return sampler
