"""python -m datasetdm_fast.train: a decoder for each task from about a hundred labelled images; the same line again goes on where it stopped."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.training.session import EVERY, _announce, _course, _planned, _school
from datasetdm_fast.training.settings import TrainConfig

if TYPE_CHECKING:
    from datasetdm_fast.training.task_run import Course

PROG = "python -m datasetdm_fast.train"


def main(arguments: Sequence[str] | None = None) -> int:
    from datasetdm_fast.command_line.ending import run_command

    return run_command(_train, arguments)


def _train(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, TrainConfig, PROG, __doc__)
    config.check()
    import torch

    from datasetdm_fast.command_line.interruption import Interruption
    from datasetdm_fast.training import task_run
    from datasetdm_fast.training.processes import joined, leave

    if config.threads:
        torch.set_num_threads(config.threads)
    ranks, device = joined(config.device)
    config = replace(config, device=device)
    try:
        school = _school(config, ranks)
        folders = {task: Path(config.out) / task for task in config.task}
        plans = {task: _planned(school, task) for task in config.task}
        results = {task: task_run.finished(folders[task], settings) for task, (_, settings, _) in plans.items()}
        _announce(school, plans, results)
        if config.dry_run:
            return 0
        with Interruption(config.quiet or not ranks.is_first) as interruption, ExitStack() as held:
            for task in config.task:
                if results[task] is not None:
                    continue
                if ranks.is_first:
                    held.enter_context(task_run.alone(folders[task]))
                course = _course(school, folders[task], task, plans[task], lambda: interruption.signal is not None)
                if course is not None:
                    with Progress(course, config.quiet or not ranks.is_first) as progress:
                        results[task] = task_run.run(course, ranks, progress.stepped, lambda: interruption.signal is not None)
                if results[task] is None:
                    break
        if ranks.is_first:
            _end(config, results)
            if None in results.values():
                print(f"stopped; go on with: {PROG} {shlex.join(arguments)}".rstrip(), file=sys.stderr)
        return 0 if interruption.signal is None else 128 + interruption.signal
    finally:
        leave(ranks)


def _end(config: TrainConfig, results: dict[str, Any]) -> None:
    print(json.dumps({"path": config.out, "tasks": results}) if config.json else config.out, flush=True)
    if config.quiet:
        return
    for task, result in results.items():
        if result is None:
            continue
        figures = "  ".join(f"{name} {value:.4f}" for name, value in result["held_out"].items() if isinstance(value, float))
        judged = f" on {result['held_out_images']} held-out images: {figures}; look at {config.out}/{task}/training/page.html" if figures else ""
        print(f"{task}: {result['steps']} steps{judged}", file=sys.stderr)


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, course: Course, is_quiet: bool):
        self._task, self._steps, self._is_quiet = course.task, course.schedule.steps, is_quiet
        self._begin = self._told = time.monotonic()
        self._first: int | None = None
        self._figure, self._bar = "", None
        if not is_quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._steps, unit="step", desc=course.task, file=sys.stderr)

    def stepped(self, step: int, loss: float, figure: float | None) -> None:
        if self._first is None:
            self._first = step - 1
        if figure is not None:
            self._figure = f", held out {figure:.4f}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.4f}{self._figure}")
        elif not self._is_quiet and (now - self._told >= EVERY or step == self._steps):
            self._told = now
            left = (now - self._begin) / (step - self._first) * (self._steps - step)
            print(f"{self._task} {step}/{self._steps}, loss {loss:.4f}{self._figure}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
