"""What generate and label print about a run: its plan, and what was made."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from datasetdm_fast.command_line.output import NOTHING_WRITTEN, OutputFlags, print_lines, print_result, print_unfinished
from datasetdm_fast.command_line.progress import CountProgress
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.result import Result, describe_job
from datasetdm_fast.runs.run_settings import RunConfig

MOST_REQUESTS = 40  # that a plan for the eye lists


def print_run_plan(config: RunConfig, job: Job) -> int:
    """The exit code of a dry run, which prints what a run would make."""
    print_lines(config, *describe_job(job))
    if config.json:
        facts = {"path": job.place, **job.recipe.facts, "batch_size": job.plan.batch_size}
        names = ("id", "seed", "prompt", "classes")
        requests = [{name: getattr(request, name) for name in names} for request in job.plan]
        print(json.dumps({**facts, "bytes": job.bytes_needed, "requests": requests}))
    else:
        for request in islice(job.plan, MOST_REQUESTS):
            print(f"{request.id}  seed {request.seed}  {request.prompt!r}")
        if (rest := job.plan.number - MOST_REQUESTS) > 0:
            print(f"and {rest:,} more, which --json lists")
    print_lines(config, NOTHING_WRITTEN)
    return 0


def print_finished_run(settings: OutputFlags, result: Result) -> int:
    """The exit code of a run with nothing left to do."""
    print_lines(settings, f"{result.path}: complete with {count_noun(result.done, 'sample')}, nothing to do")
    print_run(settings, result, "")
    return 0


def print_run(settings: OutputFlags, result: Result, resume_with: str, by: str = "", noun: str = "image") -> None:
    """Prints the result of a run, and the line to resume it with; fails where samples were quarantined."""
    print_result(settings, {"path": str(result.path), **result.facts()}, str(result.path))
    if result.made:
        speed = f"{count_noun(result.made, noun)}{by} in {format_duration(result.seconds)}"
        page = ""
        if result.closing_seconds:  # a run in shards has none
            speed += f" ({format_duration(result.closing_seconds)} of it for index files and gallery)"
            page = f"; look at {result.path}/gallery/index.html"
        print_lines(settings, f"{speed}, {result.rate:.3g} {noun}s per second{page}")
    if result.trust_message:
        print_lines(settings, result.trust_message)
    result.check()
    if not result.is_complete:
        print_unfinished(result.done, result.number, resume_with, "samples" if noun == "image" else f"{noun}s")


@contextmanager
def show_calls(is_quiet: bool, title: str, calls: int) -> Iterator[Callable[[], Any]]:
    """The progress of so many U-Net calls, which is to be called after each."""
    with CountProgress(calls, "call", title, is_quiet) as progress:
        yield progress.on_call
