"""Figures of trained decoders: their labels are compared with the ground truth of a data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels import by_task, tasks_of
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.loop.calls import timesteps_of
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.pictures.reading import BACKGROUNDS
from datasetdm_fast.engine.tasks import TASKS, read_labels
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.training import data_record
from datasetdm_fast.training.evaluation import naming
from datasetdm_fast.training.evaluation.meter import (
    Meter,
    check_count,
    check_names,
    figure_name,
    intervals,
    nothing_shown,
)
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.evaluation.settings import ScoreSettings


def evaluate_decoders(
    engine: Any,
    folder: str,
    address: str,
    tasks: Sequence[str],
    requested: Sequence[str],
    open_source: Callable[[str, Sequence[str]], Any],
    settings: ScoreSettings,
    *,
    names: Mapping[str, str] | None = None,
    is_auto: bool = False,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    on_message: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """The figures by label of the engine's decoders, which lie in `folder`, on one data set with truth for `tasks`, and
    the images that were skipped. `open_source` opens it for some tasks. `names` are other names for its classes,
    `is_auto` adds those that the decoders use.
    """
    configs = {label: decoder.config for label, decoder in engine.decoders.items()}
    if missing := [label for label in requested if label not in configs]:
        raise Refused(f"--task: {folder} holds no decoder for {', '.join(missing)}", f"It has {', '.join(configs)}.")
    labels = tuple(requested) or tuple(label for label in by_task(configs) if configs[label].task in tasks)
    if not labels:
        raise Refused(
            f"--data {address}: ground truth for {', '.join(tasks)}, but only decoders for {', '.join(configs)}",
            "Choose other data or decoders.",
        )
    result, skipped, reads_captions = {}, {}, settings.captions == "true"
    for group in passes(address, {label: configs[label] for label in labels}):
        source = open_source(address, tasks_of(group))
        seen = data_record.count_seen_in_training(folder, source, group)
        known = tuple(dict.fromkeys(name for label in group for name in configs[label].classes))
        # captions made of the labels use the words that they had in training
        source.class_table = next((table for label in group if (table := configs[label].table)), None)
        source = naming.rename(source, names or {}, known, is_auto=is_auto)
        meters = measure(engine, source, group, settings, on_images)
        for label, meter in meters.items():
            if not requested and not meter.result():
                on_message(f"{label} is left out: no image of {address} shows anything to compare with")
                continue
            result[label] = figures(meter, settings.bootstrap, settings.level) | {
                "captions": settings.captions,
                "captions_name_all": reads_captions and source.captions_name_all,
                "named_by_captions": reads_captions and bool(configs[label].named),
                **({"seen_in_training": seen[label]} if seen.get(label) else {}),
            }
            for line in _compare_names(meter, configs[label], result[label]):
                on_message(f"{label}: {line}")
            if names is not None:
                result[label] |= naming.in_common(result[label], known)
        skipped |= source.skipped
    if not result:
        raise nothing_shown()
    return {label: result[label] for label in labels if label in result}, skipped


def _compare_names(meter: Meter, config: DecoderConfig, result: Mapping[str, Any]) -> list[str]:
    """Classes of the data that a decoder does not know, and classes of the decoder that no image shows."""
    if not (config.classes and meter.columns) or config.has_text or meter.each != "per_class":
        return []
    shown = [name for name in result.get("per_class", {}) if name not in BACKGROUNDS]
    check_names(config.task, config.classes, shown)  # a class in common that no image shows is one by chance
    lines = (
        naming.describe_unknown(meter.columns, config.classes),
        naming.describe_absent(config.classes, result.get("per_class", {})),
    )
    return [line for line in lines if line]


def figures(meter: Meter, bootstrap: int, level: float) -> dict[str, Any]:
    """A meter's result {metric: value}, some of it `by_things` {number of things: {metric: value}}, and, with
    `bootstrap` resamples, `intervals` of [low, high] under the same keys, where there is one.
    """
    result = check_count(meter)
    resampled = {"images": meter.count, "intervals": intervals(meter, bootstrap, level)} if bootstrap else {}
    things = {"by_things": counts} if len(counts := meter.by_things()) > 1 else {}
    return result | things | resampled


def measure(
    engine: Any,
    source: Any,
    labels: Sequence[str],
    settings: ScoreSettings,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Meter]:
    """{label: meter} of the engine's decoders after every image of the data set, read through the capture path."""
    configs = {label: engine.decoders[label].config for label in labels}
    meters = {label: METRICS[config.task].judging(source, config, settings.unseen) for label, config in configs.items()}
    start = 0
    words = {
        label: engine.encode_classes(spoken(source.thing_classes, config.table))
        for label, config in configs.items()
        if config.has_text
    }
    for items in in_blocks(source, settings.batch_size):
        captions = ["" if settings.captions == "none" else item.caption for item in items]
        pixels = torch.from_numpy(np.stack([item.image for item in items]))
        seeds = range(settings.seed + start, settings.seed + start + len(items))
        captures = invert_for(engine, labels, pixels, captions, seeds)
        for label, meter in meters.items():
            config = METRICS[configs[label].task].reading(configs[label])
            queries = source.thing_classes if config.has_text else ()
            text = words[label][None].expand(len(items), -1, -1) if label in words else None
            raw = engine.annotate(label, captures[label], text)
            if settings.captions == "true":
                raw = held_to(raw, config, captions, queries, tokenizer=engine.model.tokenizer)
            options = {"words": queries} if queries else {}
            predicted = read_labels(raw, (item.image for item in items), config, engine.model.size, **options)
            for item, label_of_item in zip(items, predicted):
                before = meter.count
                meter.add(item, label_of_item)
                meter.things += [0 if item.masks is None else len(item.masks)] * (meter.count - before)
        start += len(items)
        on_images(start, len(source))
    return meters


def passes(address: str, configs: Mapping[str, DecoderConfig]) -> list[tuple[str, ...]]:
    """The labels that share their images and their captures: a pose decoder sees one person of COCO at a time, the
    others whole images, and each is read at the timesteps it was trained at.
    """
    groups: dict[tuple[bool, tuple[int, ...]], tuple[str, ...]] = {}
    for label, config in configs.items():
        place = TASKS[config.task].sees_one_person(address), tuple(time or 0 for time in timesteps_of(config))
        groups[place] = (*groups.get(place, ()), label)
    return [groups[place] for place in sorted(groups)]


def figures_table(result: Mapping[str, Mapping[str, Any]], level: float) -> str:
    """Task, figure, value and interval, then those of each class, the figures by the number of things, and how captions
    were used.
    """
    rows: list[tuple[str, str, float, Sequence[float] | None]] = []
    for task, figures in result.items():
        bounds = figures.get("intervals", {})
        single = [(name, value) for name, value in figures.items() if isinstance(value, float)]
        rows += [(task, figure_name(name), value, bounds.get(name)) for name, value in single]
        for each in ("per_class", "per_joint"):
            limits = bounds.get(each, {})
            rows += [(task, f"  {name}", value, limits.get(name)) for name, value in figures.get(each, {}).items()]
        for count, by_count in figures.get("by_things", {}).items():
            images = f"of {count_noun(int(count), 'thing')}, {count_noun(by_count['images'], 'image')}"
            values = [(figure_name(name), value) for name, value in by_count.items() if name != "images"]
            rows += [(task, f"  {name} {images}", value, None) for name, value in values]
    tasks, names = (max(len(str(row[k])) for row in rows) for k in (0, 1))
    title = f"   {level:.0%} interval" if any(row[3] for row in rows) else ""
    lines = [
        f"{task:{tasks}}  {name:{names}}  {value:6.4f}" + (f"   {low[0]:.4f} to {low[1]:.4f}" if low else "")
        for task, name, value, low in rows
    ]
    head = f"{'task':{tasks}}  {'figure':{names}}   value{title}"
    return "\n".join([head, *lines, *notes(result)])


def notes(result: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How captions were used, and how many images the decoders saw in training."""
    captions = next(iter(result.values()))["captions"]
    if captions != "true":
        line = f"captions: {'none' if captions == 'none' else 'text condition only'}"
    else:
        line = "captions: read"
        if any(figures.get("captions_name_all") for figures in result.values()):
            line += ", and they name all that an image shows"
        if named := [task for task, figures in result.items() if figures.get("named_by_captions")]:
            line += f"; {', '.join(named)} looked only for what they name"
    seen = {task: figures["seen_in_training"] for task, figures in result.items() if "seen_in_training" in figures}
    return [line] + [
        f"{task}: the training data held {count} of these images; expect lower figures on others"
        for task, count in seen.items()
    ]
