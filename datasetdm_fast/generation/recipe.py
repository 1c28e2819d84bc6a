"""How every image of a run is made, decided before the first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datasetdm_fast.engines.engine import Engine
from datasetdm_fast.errors import Refused
from datasetdm_fast.generation import prompts

if TYPE_CHECKING:
    from datasetdm_fast.sampling.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """How every image of a run is made, decided before the first batch."""

    schedule: Schedule
    guidance: float
    size: int  # pixels
    tasks: tuple[str, ...]
    capture_call: int  # the sampler call whose activations the decoders read
    words: tuple[str, ...] = ()  # open-vocabulary classes; a label map holds 1 + the position here
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a row says of how its sample was made


def make_recipe(
    engine: Engine,
    tasks: Sequence[str],
    *,
    sampler: str = "pndm",
    steps: int = 0,
    guidance: float = 0.0,
    profile: str = "0.3.0",
    classes: Sequence[str] = (),
) -> Recipe:
    """The recipe of a run; zeros stand for what the model was made for."""
    from datasetdm_fast.sampling import make_schedule

    model = engine.model
    schedule = make_schedule(model.scheduler, sampler, steps or model.defaults.steps, profile)
    asked = [task for task in tasks if engine.decoders[task].config.has_text]
    words = class_words_of(engine, asked[0], classes) if asked else ()
    call = capture_call(schedule, {task: engine.decoders[task].config.capture_timestep for task in tasks})
    facts = {
        "sampler": sampler,
        "profile": profile,
        "steps": steps or model.defaults.steps,
        "calls": len(schedule),
        "guidance": guidance or model.defaults.guidance,
        "size": model.size,
        "capture_timestep": schedule.timesteps[call],
    }
    return Recipe(schedule, facts["guidance"], model.size, tuple(tasks), call, words, facts)


def class_words_of(engine: Engine, task: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The words that the decoder of a task is asked for: those given, else those it was taught."""
    words = tuple(classes) or tuple(engine.decoders[task].config.classes)
    if not words:
        raise Refused(
            f"--task {task}: no class words were given, and its decoder names none", "Add --classes ball,cube."
        )
    if len(words) > 254:
        raise Refused(f"--classes: {len(words)} words, an 8-bit label map holds 254", "Make several runs.")
    prompts.check_class_lengths(words, engine.model.tokenizer)
    return words


def capture_call(schedule: Schedule, wanted: Mapping[str, int | None]) -> int:
    """The call every decoder of the run reads: the last, or the one nearest the timestep they were trained at."""
    last = len(schedule) - 1
    calls = {
        task: last
        if timestep is None
        else min(range(last + 1), key=lambda k: (abs(schedule.timesteps[k] - timestep), -k))
        for task, timestep in wanted.items()
    }
    if len(set(calls.values())) > 1:
        told = ", ".join(f"{task} at timestep {schedule.timesteps[call]}" for task, call in calls.items())
        raise Refused(
            f"--task: the decoders read different sampler calls ({told}), and one run has one capture",
            "Make one run for each.",
        )
    return next(iter(calls.values()), last)
