"""python -m datasetdm_fast.train: a decoder per task from about a hundred labelled images; the same command resumes."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.progress import StepProgress, counted
from datasetdm_fast.command_line.telling import NOTHING_WRITTEN, say
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

    from datasetdm_fast.training import folds, task_run
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
        crossed, count = {task: folds.read(folders[task]) for task in config.task}, folds.count_of(session)
        session.announce(plans, results, count)
        if config.dry_run:
            if ranks.is_first:
                say(config, NOTHING_WRITTEN)
            return 0
        with Interruption(is_quiet) as interruption, ExitStack() as held:
            line = f"{PROG} {shlex.join(arguments)}".rstrip()
            for task in [task for task in config.task if results[task] is None or count]:
                if ranks.is_first:
                    held.enter_context(task_run.alone(folders[task]))
                if count:
                    given = (session, task, folders[task], ranks, _fold_progress(task, count, is_quiet))
                    crossed[task] = folds.run(*given, interruption.is_stopping)
                    if crossed[task] is None:
                        results[task] = None
                        break
                if results[task] is not None:
                    continue
                training = session.training(folders[task], plans[task], interruption.is_stopping, line, crossed[task])
                if training is not None:
                    with StepProgress(task, plans[task].schedule.steps, is_quiet) as progress:
                        results[task] = task_run.run(training, ranks, progress.on_step, interruption.is_stopping)
                if results[task] is None:
                    break
        if ranks.is_first:
            _end(config, results, crossed)
            if None in results.values():
                print(f"stopped; go on with: {line}", file=sys.stderr)
        return interruption.exit_code(0)
    finally:
        leave(ranks)


def _fold_progress(task: str, count: int, is_quiet: bool) -> Callable[[int, int], StepProgress]:
    """Progress of one fold after the other."""
    return lambda number, steps: StepProgress(f"{task}, fold {number} of {count},", steps, is_quiet)


def _figures(held_out: dict[str, Any], bounds: dict[str, list[float]]) -> str:
    """Each figure with its interval."""
    return "  ".join(
        f"{name} {value:.4f}" + (f" ({bounds[name][0]:.4f} to {bounds[name][1]:.4f})" if name in bounds else "")
        for name, value in held_out.items()
        if isinstance(value, float)
    )


def _end(config: TrainConfig, results: dict[str, Any], crossed: dict[str, Any]) -> None:
    from datasetdm_fast.training.held_out import cautions

    told = {
        task: result if result is None or crossed[task] is None else {**result, "folds": crossed[task]}
        for task, result in results.items()
    }
    print(json.dumps({"path": config.out, "tasks": told}) if config.json else config.out, flush=True)
    for task, result in () if config.quiet else results.items():
        if result is None:
            continue
        judged, folds = "", crossed[task]
        figures = _figures(result["held_out"], result.get("held_out_intervals", {}))
        if figures:
            count, place = result["held_out_images"], f"{config.out}/{task}/training/page.html"
            notes = cautions(count, result.get("step_chosen_on_held_out", False), bool(folds))
            images = counted(count, "held-out image")
            judged = f" on {images}: {figures}{''.join(f'; {one}' for one in notes)}; look at {place}"
        ended = ", stopped early" if result.get("stopped_early") else ""
        print(f"{task}: {counted(result['steps'], 'step')}{ended}{judged}", file=sys.stderr)
        if folds:
            figures = _figures(folds["held_out"], folds["held_out_intervals"])
            print(f"{task}: {folds['folds']}-fold on {counted(folds['images'], 'image')}: {figures}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
