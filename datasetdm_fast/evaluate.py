"""python -m datasetdm_fast.evaluate: measure the labels of trained decoders against ground truth."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from datasetdm_fast.config import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.evaluation.measure import _passes, evaluate, measure
from datasetdm_fast.evaluation.settings import EvaluateConfig

PROG = "python -m datasetdm_fast.evaluate"


def main(arguments: Sequence[str] | None = None) -> int:
    from datasetdm_fast.command_line.ending import run_command

    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, EvaluateConfig, PROG, __doc__)
    config.check()
    if config.student or config.run:
        return _student(config)
    if config.curve:
        return _curve(config)
    selection = config.selection()
    from datasetdm_fast.readers import open_data

    engine = _opened(config, config.decoder)
    model, decoders = engine.model, engine.decoders
    absent = [task for task in config.task if task not in decoders]
    if absent:
        raise Refused(
            f"--task: {config.decoder} holds no decoder for {', '.join(absent)}", f"it has {', '.join(decoders)}"
        )
    # where nothing is asked for, whatever both sides have
    there = () if config.task else open_data(config.data, model.size).tasks
    tasks = config.task or tuple(task for task in TASKS if task in decoders and task in there)
    if not tasks:
        raise Refused(
            f"--data {config.data}: it has truth for {', '.join(there)}, the decoders say {', '.join(decoders)}",
            "Choose other data or decoders.",
        )
    result, skipped = {}, {}
    for some in _passes(config.data, tasks):
        source = open_data(
            config.data, model.size, tasks=some, selection=selection, skip_bad=config.skip_bad, framing=config.framing
        )
        with _bar(len(source), config.quiet) as bar:
            result |= evaluate(
                *(engine, source, some, config.captions, config.batch_size, config.seed, _moving(bar)),
                unseen=config.unseen,
                bootstrap=config.bootstrap,
                level=config.level,
            )
        skipped |= source.skipped
    result = {task: result[task] for task in tasks}
    if config.json:
        print(json.dumps(result | ({"skipped": skipped} if config.skip_bad else {})))
    else:
        print(table(result, config.level))
    _tell_skipped(skipped)
    return 0


def _curve(config: EvaluateConfig) -> int:
    """Decoders taught by ever more labels, judged on the same images."""
    from datasetdm_fast.evaluation import curve

    counts = curve.parse_counts(config.curve)
    address = curve.to_learn_from(config.data, config.learn_from, counts[-1])
    from datasetdm_fast.engines import build_engine
    from datasetdm_fast.readers import open_data
    from datasetdm_fast.training.session import train_on

    engine, result, skipped = _opened(config), {}, {}
    model = engine.model
    task_sets = [(task,) for task in config.task or open_data(config.data, model.size).tasks[:1]]
    for tasks in task_sets:
        options = {"tasks": tasks, "skip_bad": config.skip_bad, "framing": config.framing}
        labelled, judged = (
            open_data(address, model.size, selection=config.selection(), **options),
            open_data(config.data, model.size, **options),
        )
        if config.skip_bad:
            labelled = labelled.readable()
        if counts[-1] > len(labelled):
            raise Refused(
                f"--curve: {counts[-1]} labels, but {address} has {len(labelled)} of the selected images",
                "Ask for fewer.",
            )

        def judge(count: int, repeat: int, task=tasks[0], labelled=labelled, judged=judged):
            settings = {"steps": config.steps, "seed": config.seed + repeat, "data": address}
            decoder = train_on(engine, labelled, task, count, captions=config.captions, **settings)
            taught = build_engine(config.engine, model, {task: decoder}, dtype=config.dtype, device=config.device)
            with _bar(len(judged), config.quiet) as bar:
                bar.set_description(f"{task}, {count} labels")
                given = (config.captions, config.batch_size, config.seed, _moving(bar))
                return measure(taught, judged, (task,), *given)[task]

        found = curve.learning_curve(
            tasks[0], counts, config.repeats, judge, bootstrap=config.bootstrap, level=config.level, more=config.more
        )
        result |= {tasks[0]: found}
        skipped |= labelled.skipped | judged.skipped
        if not config.json:
            print(curve.told(tasks[0], found, config.level), flush=True)
    if config.json:
        print(json.dumps({"curve": result} | ({"skipped": skipped} if config.skip_bad else {})))
    _tell_skipped(skipped)
    return 0


def _student(config: EvaluateConfig) -> int:
    """The same student taught by real images alone and with those of a run."""
    if not (config.student and config.run):
        raise Refused(
            f"--student and --run belong together, {'--run' if config.student else '--student'} is missing",
            "Add --student --run RUN.",
        )
    from datasetdm_fast.evaluation import curve, worth

    address = curve.to_learn_from(config.data, config.learn_from, config.real)
    import torch

    from datasetdm_fast.evaluation.student_data import SIDE
    from datasetdm_fast.readers import open_data
    from datasetdm_fast.run_folder.reader import open_run

    torch.set_num_threads(config.threads or 1)  # more gain a net of this size nothing
    options = {"skip_bad": config.skip_bad, "framing": config.framing}
    with open_run(config.run) as run:
        learnt, judged = (
            open_data(address, SIDE, selection=config.selection(), **options),
            open_data(config.data, SIDE, **options),
        )
        learnt = learnt.readable() if config.skip_bad else learnt
        found = worth.worth(
            *(learnt, judged, run, worth.student_tasks(learnt, judged, run, config.task), config.real),
            seeds=config.repeats if config.repeats > 1 else worth.SEEDS,
            steps=config.steps,
            told=lambda line: None if config.quiet else print(line, file=sys.stderr, flush=True),
        )
    skipped = learnt.skipped | judged.skipped
    if config.json:
        print(json.dumps({"student": found} | ({"skipped": skipped} if config.skip_bad else {})))
    else:
        print(worth.table(found))
    _tell_skipped(skipped)
    return 0


def _opened(config: EvaluateConfig, decoder: str | None = None):
    """The engine, with every decoder of a folder."""
    from datasetdm_fast.engines.opening import open_engine

    options = {"allow_download": config.allow_download, **config.engine_choices()}
    return open_engine(config.model, decoder, **options)[0]


def _bar(total: int, is_quiet: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="img", disable=is_quiet or None, file=sys.stderr)


def _moving(bar) -> Callable[[int], None]:
    """Moves the bar to how many images are done."""
    return lambda done: bar.update(done - bar.n)


def _tell_skipped(skipped: dict[str, str]) -> None:
    from datasetdm_fast.foreign.documents import one_line

    if skipped:
        print(f"{len(skipped)} images were skipped:", file=sys.stderr)
        for reason in skipped.values():
            print(f"  {one_line(reason)}", file=sys.stderr)


def table(result: dict[str, dict], level: float) -> str:
    """Task, figure, value and interval, then the same for each class."""
    rows = []
    for task, found in result.items():
        bounds = found.get("intervals", {})
        for name, value in found.items():
            if isinstance(value, float):
                rows.append((task, name, value, bounds.get(name)))
        for each in ("per_class", "per_joint"):
            rows += [
                (task, f"  {name}", value, bounds.get(each, {}).get(name))
                for name, value in found.get(each, {}).items()
            ]
    tasks, names = (max(len(str(row[k])) for row in rows) for k in (0, 1))
    head = f"{'task':{tasks}}  {'figure':{names}}   value" + (
        f"   {level:.0%} interval" if any(row[3] for row in rows) else ""
    )
    lines = [
        f"{task:{tasks}}  {name:{names}}  {value:6.4f}" + (f"   {low[0]:.4f} to {low[1]:.4f}" if low else "")
        for task, name, value, low in rows
    ]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
