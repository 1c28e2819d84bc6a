"""Comparisons before a run begins: whether its engine, in the precision that was chosen, may make its samples."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasetdm_fast.config import EXACT, FP8, HALF, REFERENCE
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.jobs.job import Job, recipe_of
from datasetdm_fast.runs.jobs.run import prepare_job, tries_half
from datasetdm_fast.runs.run_folder.document import figures_in_words
from datasetdm_fast.runs.run_folder.folder import note
from datasetdm_fast.runs.run_settings import RunSpec

MEASURED = 4  # samples that --dtype auto compares


@dataclass(frozen=True)
class Screen:
    """Where comparisons are reported."""

    on_message: Callable[[str], None]
    # a title and a number of U-Net calls -> a bar, which is to be called after each
    show_calls: Callable[[str, int], AbstractContextManager[Callable[[], Any]]]


def admit_job(spec: RunSpec, stored: Mapping[str, Any] | None, screen: Screen, *, verify: int) -> Job:
    """The job in the precision that `--dtype auto` takes, once its engine, and its speed, passed what they have to."""
    if tries_half(spec, stored):
        job = _choose_precision(spec, screen)
    else:
        job = prepare_job(spec, stored, mixes=True)
        if job.differing:
            job = _check_engine(job, screen)
    job = _verify(job, stored, min(verify, job.plan.number), screen) if verify else job
    return job if spec.sampling.speed == EXACT or "speed" in job.document else _judge_speed(job, spec, screen)


def _judge_speed(job: Job, spec: RunSpec, screen: Screen) -> Job:
    """The job with the verdict on its approximate speed; refused where that makes labels worse."""
    from datasetdm_fast.runs.agreement.speed_gate import count_calls, judge_speed

    source, speed = spec.source, spec.sampling.speed
    sampling = replace(spec.sampling, speed=EXACT)
    if speed == FP8 and job.engine.device.type == "cpu":
        screen.on_message(f"speed      {speed} rounds on a CPU as on a GPU, and saves no time here")
    exact = recipe_of(sampling, spec.labels, job.engine, source.classes or source.listed, table=source.table)
    with screen.show_calls(f"judging {speed}", count_calls(job, exact)) as on_unet_call:
        verdict = judge_speed(job, exact, on_unet_call)
    images = count_noun(verdict["number"], "image")
    if not verdict["passed"]:
        failed = figures_in_words(row for row in verdict["measures"] if not row["passed"])
        raise GateFailed(
            f"--speed {speed}: labels of {images} fit worse than those of exact images: {failed}; nothing was written",
            "Drop --speed, or try another.",
        )
    screen.on_message(
        f"speed      {speed}, as labels of {images} fit as exact ones do: {figures_in_words(verdict['measures'])}"
    )
    return replace(job, document=job.document | {"speed": verdict})


def _choose_precision(spec: RunSpec, screen: Screen) -> Job:
    """The job in half precision if its first samples pass the gates of that, else in fp32; run.json has the figures."""
    from datasetdm_fast.runs.agreement.comparing import compare_with_reference, count_calls, describe_verdict

    job = prepare_job(spec, None, dtype=HALF)
    if not job.half:
        return job
    number = min(MEASURED, job.plan.number)
    with screen.show_calls(f"comparing {job.half} with {REFERENCE}", count_calls(job, number)) as on_unet_call:
        verdict = compare_with_reference(job, number, on_unet_call)
    failed, half = verdict.failed, job.half
    facts: dict[str, Any] = {"precision": {"tried": half, "number": number, "failed": failed}}
    if failed:
        summary = f"fp32, as {half} does not agree with {REFERENCE} in {', '.join(failed)} on {number} samples"
        job = prepare_job(spec, None, dtype="fp32")
    else:
        summary = f"{half}, as it agrees in all {len(verdict.rows)} measures with {REFERENCE} on {number} samples"
        facts["verified"] = describe_verdict(verdict, job.engine)
    screen.on_message(f"precision  {summary}")
    return replace(job, half="", document=job.document | facts)


def _check_engine(job: Job, screen: Screen) -> Job:
    """The job of an engine that is new to its run folder, if it reproduces some of its samples."""
    from datasetdm_fast.runs.agreement.comparing import choose_samples, compare_with_stored

    indices, differences = choose_samples(job.folder), "; ".join(job.differing)
    screen.on_message(f"mixed      another engine than before ({differences})")
    calls = -(-len(indices) // job.plan.batch_size) * len(job.recipe.schedule)
    with screen.show_calls("compare", calls) as on_unet_call:
        rows = compare_with_stored(job, indices, on_unet_call) if indices else []
    samples = count_noun(len(indices), "sample")
    if failed := [row.measure for row in rows if not row.is_passed]:
        raise GateFailed(
            f"{job.folder}: {job.engine.name} does not reproduce its samples, {', '.join(failed)} beyond the limit in "
            f"{samples} ({differences}); nothing was written",
            "Continue with the engine that started it, or choose another --out.",
        )
    screen.on_message(f"mixed      {job.engine.name} reproduces {samples} of the run")
    measures = [asdict(row) | {"passed": row.is_passed} for row in rows]
    entry = {"engine": dict(job.engine.fingerprint()), "number": len(indices), "measures": measures}
    engines = [*job.document.get("mixed", []), entry]
    note(job.folder, "mixed", engines)
    return replace(job, document=job.document | {"mixed": engines}, differing=())


def _verify(job: Job, stored: Mapping[str, Any] | None, number: int, screen: Screen) -> Job:
    """The job with the verdict on its engine, a stored one where that still holds."""
    from datasetdm_fast.runs.agreement.comparing import (
        compare_with_reference,
        count_calls,
        describe_verdict,
        still_holds,
    )

    before = (stored or job.document).get("verified")
    if still_holds(before, job.engine, number):
        samples = count_noun(before["number"], "sample")
        screen.on_message(f"verified   {samples} agreed before, with this engine and device")
        return job
    with screen.show_calls("verify", count_calls(job, number)) as on_unet_call:
        verdict = compare_with_reference(job, number, on_unet_call)
    failed = verdict.failed
    if failed:
        raise GateFailed(
            f"--verify {number}: outputs of {job.engine.name} do not match those of {REFERENCE} in "
            f"{', '.join(failed)}; nothing was written",
            verdict.remedy,
        )
    measures, samples = len(verdict.rows), count_noun(number, "sample")
    screen.on_message(f"verified   {job.engine.name} agrees in all {measures} measures with {REFERENCE} on {samples}")
    facts = describe_verdict(verdict, job.engine)
    if stored is not None:
        note(job.folder, "verified", facts)
    return replace(job, document=job.document | {"verified": facts})
