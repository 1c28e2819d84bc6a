"""python -m datasetdm_fast.evaluate: measure the labels of trained decoders against ground truth."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_plan
from datasetdm_fast.command_line.progress import shows_bar
from datasetdm_fast.engine.labels.names import by_task, tasks_of
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.training.evaluation import naming
from datasetdm_fast.training.evaluation.settings import EvaluateConfig
from datasetdm_fast.untrusted.documents import one_line

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.training.evaluation.meter import Meter

OF_TRAINING = ("learn_from", "repeats", "steps", "more")  # settings of decoders that are trained here
ANY_SIZE = 64  # pixels of a side, where no image is read yet
PROG = "python -m datasetdm_fast.evaluate"
EXAMPLES = (
    '--decoder decoder --data "folder:photos[val]"',
    '--data "folder:photos[val]" --learn-from folder:photos --task semantic --curve 10,30,100',
)


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, EvaluateConfig, PROG, __doc__, EXAMPLES)
    config.check()
    if not config.curve and (idle := [name for name in OF_TRAINING if name in given]):
        raise Refused(f"--{idle[0].replace('_', '-')}: for --curve, which is not given", "Add --curve, or drop it.")
    if config.curve and (len(naming.addresses(config.data)) > 1 or config.class_names):
        raise Refused(
            "--data: several data sets, or --class-names, can only be used to evaluate trained decoders",
            "Leave out --curve, or give one data set without --class-names.",
        )
    return _curve(config) if config.curve else _decoders(config)


def _decoders(config: EvaluateConfig) -> int:
    """Each of the data sets in turn, their figures by address where there are several."""
    addresses = naming.addresses(config.data)
    # a bad data set is refused before a model loads
    sources = {address: _opened(config, address, ANY_SIZE, tasks_of(config.task)) for address in addresses}
    pairs = naming.pairs(config.class_names, sources.values())
    if config.dry_run:
        images = {address: len(source) for address, source in sources.items()}
        told = [f"{address}: {count_noun(count, 'image')} would be judged" for address, count in images.items()]
        return print_plan(config, {"images": images}, "\n".join(told))
    engine, found, skipped = _engine(config, config.decoder), {}, {}
    for address, source in sources.items():
        found[address], own = _judged(replace(config, data=address), engine, source.tasks, pairs)
        skipped |= own
        if len(addresses) > 1 and not config.json:
            print(f"{address}\n{table(found[address], config.level)}", flush=True)
    if len(addresses) > 1:
        return _end(config, {"data": found}, skipped)
    (result,) = found.values()
    return _end(config, result, skipped, "" if config.json else table(result, config.level))


def _judged(
    config: EvaluateConfig, engine: Engine, there: Sequence[str], pairs: Mapping[str, str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """The figures of the decoders on one data set, and the images that were skipped."""
    decoders, selection = engine.decoders, config.selection()
    if absent := [task for task in config.task if task not in decoders]:
        raise Refused(
            f"--task: {config.decoder} holds no decoder for {', '.join(absent)}", f"It has {', '.join(decoders)}."
        )
    # where nothing is asked for, whatever both sides have
    tasks = config.task or tuple(label for label in by_task(decoders) if decoders[label].config.task in there)
    if not tasks:
        raise Refused(
            f"--data {config.data}: ground truth for {', '.join(there)}, but only decoders for {', '.join(decoders)}",
            "Choose other data or decoders.",
        )
    from datasetdm_fast.training import data_record
    from datasetdm_fast.training.evaluation.measure import figures, measure, passes
    from datasetdm_fast.training.evaluation.meter import nothing_shown

    result, skipped = {}, {}
    for some in passes(config.data, {label: decoders[label].config for label in tasks}):
        source = _opened(config, config.data, engine.model.size, tasks_of(some), selection)
        seen = data_record.count_seen_in_training(config.decoder, source, some)
        known = dict.fromkeys(name for label in some for name in decoders[label].config.classes)
        # captions made of the labels say what they said in training
        source.class_table = next((table for label in some if (table := decoders[label].config.table)), None)
        source = naming.renamed(source, pairs, tuple(known), finds=naming.AUTO in config.class_names)
        with _bar(len(source), config.quiet) as bar:
            given = (config.captions, config.batch_size, config.seed, _moving(bar))
            meters = measure(engine, source, some, *given, unseen=config.unseen)
        shown = meters if config.task else _telling(meters, config)
        for label, meter in shown.items():
            result[label] = figures(meter, config.bootstrap, config.level) | {
                "captions": config.captions,
                "captions_name_all": config.captions == "true" and source.captions_name_all,
                "named_by_captions": config.captions == "true" and bool(decoders[label].config.named),
                **({"seen_in_training": seen[label]} if seen.get(label) else {}),
            }
        if config.class_names:
            result |= {task: naming.in_common(result[task], tuple(known)) for task in shown}
        skipped |= source.skipped
    if not result:
        raise nothing_shown()
    return {task: result[task] for task in tasks if task in result}, skipped


def _telling(meters: Mapping[str, Meter], config: EvaluateConfig) -> dict[str, Meter]:
    """The meters of the labels of which the images show something; the others are named."""
    found = {label: meter for label, meter in meters.items() if meter.result()}
    for label in meters if not config.quiet else ():
        if label not in found:
            print(f"{label} is left out: no image of {config.data} shows anything to compare with", file=sys.stderr)
    return found


def _curve(config: EvaluateConfig) -> int:
    """Decoders taught by ever more labels, judged on the same images."""
    from datasetdm_fast.training.evaluation import curve

    counts = curve.parse_counts(config.curve)
    address = curve.to_learn_from(config.data, config.learn_from, counts[-1])
    learnt, judged = (_opened(config, data, ANY_SIZE, config.task) for data in (address, config.data))
    tasks = config.task or judged.tasks[:1]
    for task in tasks:  # before a model loads; a selection can leave fewer still
        there = learnt if config.task == (task,) else _opened(config, address, ANY_SIZE, (task,))
        _check_enough(counts[-1], there, address)
    if config.dry_run:
        trained = config.repeats * len(counts)
        told = (
            f"{count_noun(trained, 'decoder')} for each task would be taught by {address} and judged on {config.data}"
        )
        return print_plan(config, {"labels": list(counts), "repeats": config.repeats, "learn_from": address}, told)
    from datasetdm_fast.engine.decoders.trunk import fold
    from datasetdm_fast.engine.engines import build_engine
    from datasetdm_fast.training.captures.views import ViewSettings
    from datasetdm_fast.training.evaluation.measure import check_shown, measure
    from datasetdm_fast.training.recipes import RecipeSettings
    from datasetdm_fast.training.session import train_decoder

    engine, result, skipped = _engine(config), {}, {}
    size = engine.model.size
    for task in tasks:
        labelled = _opened(config, address, size, (task,), config.selection())
        judged = _opened(config, config.data, size, (task,))
        check_shown(judged, task)  # which else would be noticed once a decoder is trained
        if config.skip_bad:
            labelled = labelled.readable()
        _check_enough(counts[-1], labelled, address)

        def judge(count: int, repeat: int, task=task, labelled=labelled, judged=judged):
            seed = config.seed + repeat
            settings = {
                "view_settings": ViewSettings(captions=config.captions, seed=seed),
                "recipe_settings": RecipeSettings(steps=config.steps, seed=seed),
            }
            decoder = fold(train_decoder(engine, labelled, task, count, address, **settings)).requires_grad_(False)
            taught = build_engine(
                config.engine, engine.model, {task: decoder}, dtype=config.dtype, device=config.device
            )
            with _bar(len(judged), config.quiet) as bar:
                bar.set_description(f"{task}, {count} labels")
                given = (config.captions, config.batch_size, config.seed, _moving(bar))
                return measure(taught, judged, (task,), *given)[task]

        bounds = {"bootstrap": config.bootstrap, "level": config.level, "more": config.more}
        result[task] = curve.learning_curve(task, counts, config.repeats, judge, **bounds)
        result[task] |= {"captions": config.captions} | _shared(judged, labelled, counts[-1])
        skipped |= labelled.skipped | judged.skipped
        if not config.json:
            print(
                curve.told(task, result[task], config.level),
                _of_captions({task: result[task]}),
                *_of_training({task: result[task]}),
                sep="\n",
                flush=True,
            )
    return _end(config, {"curve": result}, skipped)


def _check_enough(most: int, labelled, address: str) -> None:
    if most > len(labelled):
        raise Refused(
            f"--curve: {most} labels, but {address} has {len(labelled)} of the selected images", "Ask for fewer."
        )


def _opened(config: EvaluateConfig, data: str, size: int, tasks: Sequence[str] = (), selection=None):
    from datasetdm_fast.training.readers import EVERYTHING, open_data

    options = {"skip_bad": config.skip_bad, "framing": config.framing, "selection": selection or EVERYTHING}
    return open_data(data, size, tasks=tasks, **options)


def _shared(judged, learnt, count: int) -> dict[str, int]:
    """How many images for scoring are among the first `count` to learn from, 0 = all, where there are any."""
    from datasetdm_fast.training import data_record

    seen = data_record.count_shared(judged, learnt, count or len(learnt))
    return {"seen_in_training": seen} if seen else {}


def _engine(config: EvaluateConfig, decoder: str | None = None):
    from datasetdm_fast.engine.engines.opening import open_engine

    options = {"allow_download": config.allow_download, "outlines": config.outlines, **config.engine_choices()}
    return open_engine(config.model, decoder, **options)[0]


def _bar(total: int, is_quiet: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="img", disable=not shows_bar(is_quiet), file=sys.stderr)


def _moving(bar) -> Callable[[int], None]:
    """Moves the bar to how many images are done."""
    return lambda done: bar.update(done - bar.n)


def _end(config: EvaluateConfig, result: dict, skipped: dict[str, str], text: str = "") -> int:
    if config.json:
        print(json.dumps(result | ({"skipped": skipped} if config.skip_bad else {})))
    elif text:
        print(text)
    if skipped and not config.quiet:
        reasons = (f"  {one_line(reason)}" for reason in skipped.values())
        verb = "was" if len(skipped) == 1 else "were"
        print(f"{count_noun(len(skipped), 'image')} {verb} skipped:", *reasons, sep="\n", file=sys.stderr)
    return 0


def table(result: dict[str, dict], level: float) -> str:
    """Task, figure, value and interval, then the same for each class, the figures by the number of things, and what was
    read of captions.
    """
    from datasetdm_fast.training.evaluation.meter import figure_name

    rows: list[tuple[str, str, float, Sequence[float] | None]] = []
    for task, found in result.items():
        bounds = found.get("intervals", {})
        single = [(name, value) for name, value in found.items() if isinstance(value, float)]
        rows += [(task, figure_name(name), value, bounds.get(name)) for name, value in single]
        for each in ("per_class", "per_joint"):
            own = bounds.get(each, {})
            rows += [(task, f"  {name}", value, own.get(name)) for name, value in found.get(each, {}).items()]
        for count, own in found.get("by_things", {}).items():
            shown = f"of {count_noun(int(count), 'thing')}, {count_noun(own['images'], 'image')}"
            values = [(figure_name(name), value) for name, value in own.items() if name != "images"]
            rows += [(task, f"  {name} {shown}", value, None) for name, value in values]
    tasks, names = (max(len(str(row[k])) for row in rows) for k in (0, 1))
    title = f"   {level:.0%} interval" if any(row[3] for row in rows) else ""
    lines = [
        f"{task:{tasks}}  {name:{names}}  {value:6.4f}" + (f"   {low[0]:.4f} to {low[1]:.4f}" if low else "")
        for task, name, value, low in rows
    ]
    head = f"{'task':{tasks}}  {'figure':{names}}   value{title}"
    return "\n".join([head, *lines, _of_captions(result), *_of_training(result)])


def _of_training(result: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many images the decoders saw in training, a line each, as figures of others are lower."""
    seen = {task: found["seen_in_training"] for task, found in result.items() if "seen_in_training" in found}
    return [
        f"{task}: the training data held {count} of these images; expect lower figures on others"
        for task, count in seen.items()
    ]


def _of_captions(result: Mapping[str, Mapping[str, Any]]) -> str:
    """What was read of captions, in words, as figures differ by it."""
    asked = next(iter(result.values()))["captions"]
    if asked != "true":
        return f"captions: {'none' if asked == 'none' else 'text condition only'}"
    told = "captions: read"
    if any(found.get("captions_name_all") for found in result.values()):
        told += ", and they name all that an image shows"
    if named := [task for task, found in result.items() if found.get("named_by_captions")]:
        told += f"; of {', '.join(named)} only what they name was looked for"
    return told


if __name__ == "__main__":
    sys.exit(main())
