"""Samples of a run go through the chosen engine and the reference before the run begins."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import REFERENCE
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.loading.provenance import digest
from datasetdm_fast.engine.loop.origin import FROM_NOISE
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.runs.agreement.verify import Verdict, verify
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.version import __version__

MEASURED = 4  # samples that --dtype auto compares


def setting_of(engine: Engine) -> dict[str, str]:
    """What a verdict holds for: device, driver, versions and, of an engine that has them, its plan files."""
    told = {name: value for name, value in engine.fingerprint().items() if name != "device"}
    told |= {"python": platform.python_version(), "datasetdm_fast": __version__}
    if engine.device.type == "cuda":
        told["driver"] = flavours.describe_driver()
    folder = getattr(engine, "folder", None)
    if isinstance(folder, Path) and folder.is_dir():
        files = (path for path in folder.rglob("*") if path.is_file())
        told["plans"] = digest(sorted(files))
    return told


def holds(verdict: Any, engine: Engine, number: int) -> bool:
    """Whether a stored verdict is one of this engine here, over as many samples."""
    return (
        isinstance(verdict, Mapping)
        and verdict.get("agrees") is True
        and isinstance(verdict.get("number"), int)
        and verdict["number"] >= number
        and verdict.get("setting") == setting_of(engine)
    )


def calls_of(job: Job, number: int) -> int:
    """U-Net calls of the comparison, as on_unet_call hears of them."""
    size = min(job.plan.batch_size, number)
    return -(-number // size) * 3 * len(_recipe(job).schedule)


@contextmanager
def reference_of(job: Job) -> Iterator[Engine]:
    """The reference engine over the job's weights; networks that it alone needs, as large as the engine, are let go at
    the end.
    """
    engine = job.engine
    with engine.model.built_for_now():
        yield build_engine(REFERENCE, engine.model, engine.decoders, device=str(engine.device))


def compared(
    job: Job,
    number: int,
    on_unet_call: Callable[[], None] = lambda: None,
    *,
    first: int = 0,
    reference: Engine | None = None,
) -> Verdict:
    """Samples of the plan, from `first` on, through the job's engine and the reference, which is built where none is
    given; labels that labellers of other packages read are left out.
    """
    if job.engine.name == REFERENCE:
        raise Refused(
            f"--verify {number}: the engine is {REFERENCE}, the reference itself, so nothing can be compared",
            "Drop --verify.",
        )
    requests = [job.plan.request(index) for index in range(first, first + number)]
    with nullcontext(reference) if reference else reference_of(job) as other:
        return verify(job.engine, other, requests, _recipe(job), min(job.plan.batch_size, number), on_unet_call)


def _recipe(job: Job) -> Any:
    """The recipe of the run, every sample from its own noise and without the labels of other packages."""
    own = [task for task in job.recipe.tasks if task not in job.recipe.labellers]
    read = {task: call for task, call in job.recipe.captures.items() if task in own}
    return replace(job.recipe, tasks=tuple(own), captures=read, origin=FROM_NOISE)


def measured(job: Job, in_fp32: Callable[[], Job], on_unet_call: Callable[[], None] = lambda: None) -> Job:
    """The job in the half precision that it tries, if its first samples pass the gates of that precision, else the same
    in fp32; run.json keeps what was found.
    """
    number = min(MEASURED, job.plan.number)
    verdict = compared(job, number, on_unet_call)
    failed = [row.measure for row in verdict.rows if not row.is_passed]
    found = {"precision": {"tried": job.half, "number": number, "failed": failed}}
    if failed:
        told = f"fp32, as {job.half} does not agree with {REFERENCE} in {', '.join(failed)} on {number} samples"
        job = in_fp32()
    else:
        told = f"{job.half}, as it agrees in all {len(verdict.rows)} measures with {REFERENCE} on {number} samples"
        found["verified"] = kept(verdict, job.engine)
    return replace(job, half="", precision=told, document=job.document | found)


def kept(verdict: Verdict, engine: Engine) -> dict[str, Any]:
    """What run.json keeps of a verdict."""
    return verdict.document() | {"setting": setting_of(engine)}
