"""python -m datasetdm_fast.evaluate: how true the labels of trained decoders are, on images whose truth is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from datasetdm_fast.config import ENGINES, TASKS, setting
from datasetdm_fast.errors import Refused
from datasetdm_fast.evaluation.measure import _passes, evaluate, measure
from datasetdm_fast.truth.selection import DataSettings

PROG = "datasetdm-fast evaluate"


@dataclass(frozen=True)
class EvaluateConfig(DataSettings):
    model: str = setting(
        "demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL"
    )
    decoder: str = setting("demo", "folder of trained decoders, one sub-folder per task", metavar="DIR")
    data: str = setting(
        "demo:500@900000", "labelled images: KIND:PATH, KIND:PATH[SPLIT] or demo:COUNT@FIRST_SEED", metavar="ADDRESS"
    )
    task: tuple[str, ...] = setting(
        (),
        "labels to judge, comma-separated; default: every decoder the data has truth for",
        choices=TASKS,
        metavar="LIST",
    )
    unseen: tuple[str, ...] = setting(
        (), "classes the decoder was not taught, comma-separated; default: those it does not name", metavar="LIST"
    )
    captions: str = setting(
        "true",
        "true: each image's own caption is what the text half sees, and where a decoder was taught so only classes "
        "it names are looked for; "
        "unread: the text half alone; none: neither",
        choices=("true", "unread", "none"),
    )
    bootstrap: int = setting(500, "draws of the images behind each interval, 0 = no intervals", metavar="N")
    level: float = setting(0.95, "share of the draws within an interval", metavar="SHARE")
    curve: tuple[str, ...] = setting(
        (), "teach decoders with these numbers of labels, such as 10,30,100,300, and judge each", metavar="LIST"
    )
    learn_from: str = setting(
        "",
        "labelled images for --curve and --student; default: the train split of --data, or demo scenes",
        metavar="ADDRESS",
    )
    repeats: int = setting(
        1,
        "decoders taught for each number of --curve, or students of each kind (then 3, at least 2), with seeds of "
        "their own",
        metavar="N",
    )
    steps: int = setting(0, "steps of each training of --curve or --student, 0 = as usual", metavar="N")
    more: int = setting(50, "labels beyond the last number of --curve whose worth is told", metavar="N")
    student: bool = setting(
        False,
        "whether a run's images help: teach a small net by real images alone and with those of --run, and judge it "
        "on --data",
    )
    real: int = setting(100, "real images that teach the student, the first of --learn-from", metavar="N")
    run: str = setting("", "run folder whose images --student adds", metavar="RUN")
    engine: str = setting("auto", "how the networks run", choices=ENGINES)
    dtype: str = setting("auto", "arithmetic of the fast engines", choices=("auto", "fp32", "fp16", "bf16"))
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    batch_size: int = setting(10, "images read together", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")
    quiet: bool = setting(False, "no progress")

    def check(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("bootstrap", 0),
            ("threads", 0),
            ("seed", 0),
            ("repeats", 1),
            ("real", 1),
            ("steps", 0),
            ("more", 1),
        ):
            if getattr(self, name) < least:
                raise Refused(f"--{name.replace('_', '-')}: {getattr(self, name)} is not at least {least}")
        if not 0 < self.level < 1:
            raise Refused(f"--level: {self.level:g} is not between 0 and 1")


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
    import torch

    from datasetdm_fast.decoders.checkpoint import check_levels, load_decoders
    from datasetdm_fast.engines import build_engine
    from datasetdm_fast.loading import load_model
    from datasetdm_fast.readers import open_data

    if config.threads:
        torch.set_num_threads(config.threads)
    decoders = load_decoders(config.decoder)
    absent = [task for task in config.task if task not in decoders]
    if absent:
        raise Refused(
            f"--task: {config.decoder} holds no decoder for {', '.join(absent)}", f"it has {', '.join(decoders)}"
        )
    model = load_model(config.model)
    # where nothing is asked for, whatever both sides have
    there = () if config.task else open_data(config.data, model.size).tasks
    tasks = config.task or tuple(task for task in TASKS if task in decoders and task in there)
    if not tasks:
        raise Refused(
            f"--data {config.data}: it has truth for {', '.join(there)}, the decoders say {', '.join(decoders)}",
            "Choose other data or decoders.",
        )
    for decoder in decoders.values():
        check_levels(decoder, model.levels)
    engine = build_engine(config.engine, model, decoders, dtype=config.dtype, device=config.device)
    result, skipped = {}, {}
    for some in _passes(config.data, tasks):
        source = open_data(
            config.data, model.size, tasks=some, selection=selection, skip_bad=config.skip_bad, framing=config.framing
        )
        with _bar(len(source), config.quiet) as bar:
            result |= evaluate(
                *(
                    engine,
                    source,
                    some,
                    config.captions,
                    config.batch_size,
                    config.seed,
                    lambda done, bar=bar: bar.update(done - bar.n),
                ),
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
    import torch

    from datasetdm_fast.engines import build_engine
    from datasetdm_fast.loading import load_model
    from datasetdm_fast.readers import open_data
    from datasetdm_fast.training.session import train_on

    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(config.model)
    task_sets = [(task,) for task in config.task or open_data(config.data, model.size).tasks[:1]]
    engine, result, skipped = build_engine(config.engine, model, {}, dtype=config.dtype, device=config.device), {}, {}
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
            decoder = train_on(
                engine,
                labelled,
                task,
                count,
                steps=config.steps,
                seed=config.seed + repeat,
                data=address,
                captions=config.captions,
            )
            taught = build_engine(config.engine, model, {task: decoder}, dtype=config.dtype, device=config.device)
            with _bar(len(judged), config.quiet) as bar:
                bar.set_description(f"{task}, {count} labels")
                said = measure(
                    taught,
                    judged,
                    (task,),
                    config.captions,
                    config.batch_size,
                    config.seed,
                    lambda done: bar.update(done - bar.n),
                )
            return said[task]

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


def _bar(total: int, is_quiet: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="img", disable=is_quiet or None, file=sys.stderr)


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
