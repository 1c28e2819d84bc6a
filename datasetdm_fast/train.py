"""python -m datasetdm_fast.train: a decoder per task from about a hundred labelled images; the same command resumes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.progress import StepProgress
from datasetdm_fast.training.settings import TrainConfig

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
    from datasetdm_fast.training.session import _announce, _planned, _session, _training

    if config.threads:
        torch.set_num_threads(config.threads)
    ranks, device = joined(config.device)
    config = replace(config, device=device)
    try:
        session = _session(config, ranks)
        folders = {task: Path(config.out) / task for task in config.task}
        plans = {task: _planned(session, task) for task in config.task}
        results = {task: task_run.finished(folders[task], settings) for task, (_, settings, _) in plans.items()}
        _announce(session, plans, results)
        if config.dry_run:
            return 0
        with Interruption(config.quiet or not ranks.is_first) as interruption, ExitStack() as held:
            for task in config.task:
                if results[task] is not None:
                    continue
                if ranks.is_first:
                    held.enter_context(task_run.alone(folders[task]))
                training = _training(session, folders[task], task, plans[task], lambda: interruption.signal is not None)
                if training is not None:
                    with StepProgress(task, training.schedule.steps, config.quiet or not ranks.is_first) as progress:
                        results[task] = task_run.run(
                            training, ranks, progress.on_step, lambda: interruption.signal is not None
                        )
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
        figures = "  ".join(
            f"{name} {value:.4f}" for name, value in result["held_out"].items() if isinstance(value, float)
        )
        judged = (
            f" on {result['held_out_images']} held-out images: {figures}; look at "
            f"{config.out}/{task}/training/page.html"
            if figures
            else ""
        )
        print(f"{task}: {result['steps']} steps{judged}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
