"""Samples of a run through its engine and through the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import REFERENCE
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.loading.provenance import digest
from datasetdm_fast.engine.loop.origin import FROM_NOISE
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.runs.agreement.verify import Verdict, verify
from datasetdm_fast.version import __version__

if TYPE_CHECKING:
    from datasetdm_fast.runs.jobs.job import Job


def compare_with_reference(
    job: Job,
    number: int,
    on_unet_call: Callable[[], None] = lambda: None,
) -> Verdict:
    """The first samples of the plan through the job's engine and the reference; labels that labellers of other packages
    read are left out.
    """
    if job.engine.name == REFERENCE:
        raise Refused(
            f"--verify {number}: the engine is {REFERENCE}, the reference itself, so nothing can be compared",
            "Drop --verify.",
        )
    requests = [job.plan.request(index) for index in range(number)]
    recipe, size = _builtin_recipe(job.recipe), min(job.plan.batch_size, number)
    with job.engine.model.built_for_now():  # networks that the reference alone needs are freed at the end
        reference = build_engine(REFERENCE, job.engine.model, job.engine.decoders, device=str(job.engine.device))
        return verify(job.engine, reference, requests, recipe, size, on_unet_call)


def count_calls(job: Job, number: int) -> int:
    """U-Net calls of the comparison, as on_unet_call counts them."""
    return -(-number // min(job.plan.batch_size, number)) * 3 * len(job.recipe.schedule)


def _builtin_recipe(recipe: Recipe) -> Recipe:
    """The recipe with every sample from its own noise, every call whole, and without the labels of other packages."""
    tasks = tuple(task for task in recipe.tasks if task not in recipe.labellers)
    captures = {task: call for task, call in recipe.captures.items() if task in tasks}
    return replace(recipe, tasks=tasks, captures=captures, origin=FROM_NOISE, cached=frozenset())


def describe_verdict(verdict: Verdict, engine: Engine) -> dict[str, Any]:
    """A verdict as run.json has it."""
    return verdict.document() | {"setting": setting_of(engine)}


def still_holds(stored: Any, engine: Engine, number: int) -> bool:
    """Whether a stored verdict is of this engine on this machine, over as many samples."""
    return (
        isinstance(stored, Mapping)
        and stored.get("agrees") is True
        and isinstance(stored.get("number"), int)
        and stored["number"] >= number
        and stored.get("setting") == setting_of(engine)
    )


def setting_of(engine: Engine) -> dict[str, str]:
    """What a verdict holds for: device, driver, versions and, of an engine that has them, its plan files."""
    facts = {name: value for name, value in engine.fingerprint().items() if name != "device"}
    facts |= {"python": platform.python_version(), "datasetdm_fast": __version__}
    if engine.device.type == "cuda":
        facts["driver"] = flavours.describe_driver()
    folder = getattr(engine, "folder", None)
    if isinstance(folder, Path) and folder.is_dir():
        files = (path for path in folder.rglob("*") if path.is_file())
        facts["plans"] = digest(sorted(files))
    return facts
