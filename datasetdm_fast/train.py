"""python -m datasetdm_fast.train: train a decoder per task on about a hundred labelled images; the same command
resumes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import NOTHING_WRITTEN, StepProgress, print_lines, print_result
from datasetdm_fast.engine.backbones import check_source
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.log import check_trackers
from datasetdm_fast.training.settings import BEST, TrainConfig

if TYPE_CHECKING:
    from datasetdm_fast.training.workflow import Workflow

EXAMPLES = (
    "--data folder:photos --task semantic --out decoder",
    "--data run:runs/demo --task semantic,depth",
    "--data coco:COCO2017 --task instance --images list.txt --dry-run",
)


@command_with(TrainConfig, EXAMPLES)
def main(config: TrainConfig, command: CommandLine) -> int:
    if not command.arguments:  # else 7,500 steps on pictures of the demo begin
        raise Refused(
            f"{command.prog}: --data is missing",
            f"Train on your own pictures: {command.prog} {EXAMPLES[0]}, or on those of the demo: --data demo:100",
        )
    config.check()
    check_trackers(config.log)
    from datasetdm_fast.training.readers import check_address

    check_address(config.data)
    check_source(config.model, config.allow_download)
    from datasetdm_fast.engine.engines.device import set_threads
    from datasetdm_fast.training.evaluation.meter import figure_name
    from datasetdm_fast.training.evaluation.metrics import METRICS
    from datasetdm_fast.training.report import describe_result

    set_threads(config.threads)
    line, workflow = command.text, open_workflow(config)
    plans = workflow.prepare()
    if config.dry_run:
        print_lines(config, NOTHING_WRITTEN)
        return 0

    def progress(task: str, title: str, steps: int, later: int) -> StepProgress:
        return StepProgress(title, figure_name(METRICS[task].held_out_figure), steps, config.quiet, later)

    with Interruption(config.quiet) as interruption:
        outcomes = workflow.run(plans, line, progress, interruption.is_stopping)
    documents = {task: outcome.document for task, outcome in outcomes.items()}
    print_result(config, {"path": config.out, "tasks": documents}, config.out)
    for task, outcome in outcomes.items():
        if outcome.result:
            print_lines(config, *describe_result(workflow.out, task, outcome.result, outcome.folds, outcome.check))
    if None in documents.values():
        print(f"stopped; resume with: {line}", file=sys.stderr)
    return interruption.exit_code


def open_workflow(config: TrainConfig) -> Workflow:
    """The trainings of these settings, with their model and data opened."""
    from datasetdm_fast.training.call_ranking import with_best
    from datasetdm_fast.training.session import check_apart, open_session
    from datasetdm_fast.training.task_training import check_unlocked
    from datasetdm_fast.training.workflow import Workflow

    out = Path(config.out)
    check_apart(out, config.task, config.data)
    if not config.dry_run:  # before minutes go into loading
        check_unlocked(out, config.task)
    data, choice, inversion = config.training_data(), config.model_choice(), config.capture_settings()
    settings = config.session_settings()
    session = open_session(data, choice, config.task, inversion, partial(print_lines, config), **settings)
    ranked = {"calls": config.timestep == (BEST,), "blocks": config.blocks == (BEST,)}
    if any(ranked.values()):
        session = with_best(session, config.task, **ranked)
    return Workflow(session, out, config.task, config.task_settings(), config.folds)


if __name__ == "__main__":
    sys.exit(main())
