"""python -m datasetdm_fast.train: a decoder per task from about a hundred labelled images; the same command resumes."""

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.progress import StepProgress, counted
from datasetdm_fast.training.settings import TrainConfig

PROG = "python -m datasetdm_fast.train"
EXAMPLES = (
    "--data folder:photos --task semantic --out decoder",
    "--data run:runs/demo --task semantic,depth",
    "--data coco:COCO2017 --task instance --images list.txt --dry-run",
)


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, TrainConfig, PROG, __doc__, EXAMPLES)
    config.check()
    import torch

    from datasetdm_fast.training import task_run
    from datasetdm_fast.training.processes import joined, leave
    from datasetdm_fast.training.session import open_session

    if config.threads:
        torch.set_num_threads(config.threads)
    ranks, device = joined(config.device)
    config = replace(config, device=device)
    is_quiet = config.quiet or not ranks.is_first
    try:
        session = open_session(config, ranks)
        folders = {task: Path(config.out) / task for task in config.task}
        plans = {task: session.plan(task) for task in config.task}
        results = {task: task_run.finished(folders[task], plan.settings) for task, plan in plans.items()}
        session.announce(plans, results)
        if config.dry_run:
            return 0
        with Interruption(is_quiet) as interruption, ExitStack() as held:
            for task in [task for task in config.task if results[task] is None]:
                if ranks.is_first:
                    held.enter_context(task_run.alone(folders[task]))
                training = session.training(folders[task], plans[task], interruption.is_stopping)
                if training is not None:
                    with StepProgress(task, plans[task].schedule.steps, is_quiet) as progress:
                        results[task] = task_run.run(training, ranks, progress.on_step, interruption.is_stopping)
                if results[task] is None:
                    break
        if ranks.is_first:
            _end(config, results)
            if None in results.values():
                print(f"stopped; go on with: {PROG} {shlex.join(arguments)}".rstrip(), file=sys.stderr)
        return interruption.exit_code(0)
    finally:
        leave(ranks)


def _end(config: TrainConfig, results: dict[str, Any]) -> None:
    from datasetdm_fast.training.held_out import cautions

    print(json.dumps({"path": config.out, "tasks": results}) if config.json else config.out, flush=True)
    for task, result in () if config.quiet else results.items():
        if result is None:
            continue
        judged = ""
        bounds = result.get("held_out_intervals", {})
        figures = [
            f"{name} {value:.4f}" + (f" ({bounds[name][0]:.4f} to {bounds[name][1]:.4f})" if name in bounds else "")
            for name, value in result["held_out"].items()
            if isinstance(value, float)
        ]
        if figures:
            count, place = result["held_out_images"], f"{config.out}/{task}/training/page.html"
            notes = "".join(f"; {one}" for one in cautions(count, result.get("step_chosen_on_held_out", False)))
            images = counted(count, "held-out image")
            judged = f" on {images}: {'  '.join(figures)}{notes}; look at {place}"
        print(f"{task}: {result['steps']} steps{judged}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
