"""python -m datasetdm_fast.train: train a decoder per task on about a hundred labelled images; the same command
resumes.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import NOTHING_WRITTEN, print_lines
from datasetdm_fast.command_line.progress import StepProgress
from datasetdm_fast.messages import count_noun
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
        results = {task: task_run.finished(folders[task], plan) for task, plan in plans.items()}
        crossed, count = {task: folds.read(folders[task]) for task in config.task}, folds.count_of(session)
        session.announce(plans, results, count)
        if config.dry_run:
            if ranks.is_first:
                print_lines(config, NOTHING_WRITTEN)
            return 0
        for task in results if ranks.is_first else ():
            if results[task] is not None:
                task_run.clear(folders[task])
        with Interruption(is_quiet) as interruption, ExitStack() as held:
            line = f"{PROG} {shlex.join(arguments)}".rstrip()
            for task in [task for task in config.task if results[task] is None or count]:
                if ranks.is_first:
                    held.enter_context(task_run.alone(folders[task]))
                # Until here another training may have written to this folder.
                results[task] = ranks.said(task_run.finished(folders[task], plans[task]) if ranks.is_first else None)
                if results[task] is not None and not count:
                    continue
                if count:
                    own = 0 if results[task] else plans[task].schedule.steps
                    given = (session, task, folders[task], ranks, _fold_progress(task, count, own, is_quiet))
                    crossed[task] = folds.run(*given, interruption.is_stopping)
                    if crossed[task] is None:
                        results[task] = None
                        break
                is_done = results[task] is not None
                if is_done and ranks.said(ranks.is_first and task_run.shows_folds(folders[task], crossed[task])):
                    continue
                told = {"command": line, "folds": crossed[task], "is_finished": is_done}
                training = session.training(folders[task], plans[task], interruption.is_stopping, **told)
                if training is not None and training.held is None:
                    training = replace(training, of_fold=folds.shown(session, task, folders[task]))
                if training is not None and is_done:
                    task_run.show_folds(training, results[task], ranks)
                elif training is not None:
                    with _progress(task, task, plans[task].schedule.steps, is_quiet) as progress:
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


def _fold_progress(task: str, count: int, own: int, is_quiet: bool) -> Callable[[int, int], StepProgress]:
    """Progress of one fold after the other, and then of the decoder itself, which takes `own` steps."""

    def progress(number: int, steps: int) -> StepProgress:
        later = (count - number) * steps + own
        return _progress(task, f"{task}, fold {number} of {count},", steps, is_quiet, later)

    return progress


def _progress(task: str, title: str, steps: int, is_quiet: bool, later: int = 0) -> StepProgress:
    from datasetdm_fast.training.evaluation.meter import figure_name
    from datasetdm_fast.training.evaluation.metrics import METRICS

    return StepProgress(title, figure_name(METRICS[task].held_out_figure), steps, is_quiet, later)


def _figures(images: str, held_out: dict[str, Any], bounds: dict[str, list[float]]) -> str:
    """Each figure on so many images, with its interval."""
    from datasetdm_fast.training.evaluation.meter import figure_name

    told = "  ".join(
        f"{figure_name(name)} {value:.4f}"
        + (f" ({bounds[name][0]:.4f} to {bounds[name][1]:.4f})" if name in bounds else "")
        for name, value in held_out.items()
        if isinstance(value, float)
    )
    return f"on {images}{' (95 % intervals)' if bounds else ''}: {told}"


def _end(config: TrainConfig, results: dict[str, Any], crossed: dict[str, Any]) -> None:
    told = {
        task: result if result is None or crossed[task] is None else {**result, "folds": crossed[task]}
        for task, result in results.items()
    }
    print(json.dumps({"path": config.out, "tasks": told}) if config.json else config.out, flush=True)
    for task, result in () if config.quiet else results.items():
        for line in () if result is None else _lines(config, task, result, crossed[task]):
            print(line, file=sys.stderr)


def _lines(config: TrainConfig, task: str, result: dict[str, Any], folds: dict[str, Any] | None) -> Iterator[str]:
    """What a training came to, the figures to rely on first."""
    from datasetdm_fast.training.held_out import cautions

    if folds:
        images = count_noun(folds["images"], "image")
        yield f"{task}: {folds['folds']}-fold {_figures(images, folds['held_out'], folds['held_out_intervals'])}"
    steps, count = count_noun(result["steps"], "step"), result["held_out_images"]
    if result.get("stopped_early"):
        steps += f", stopped early, weights of step {result.get('weights_of_step')}"
    if not result["held_out"]:
        yield f"{task}: {steps}"
    else:
        bounds = result.get("held_out_intervals", {})
        yield f"{task}: {steps}; {_figures(count_noun(count, 'held-out image'), result['held_out'], bounds)}"
    yield from (f"  {note}" for note in cautions(result, bool(folds)))
    yield f"  look at {config.out}/{task}/training/page.html"


if __name__ == "__main__":
    sys.exit(main())
