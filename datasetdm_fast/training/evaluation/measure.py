"""Labels of trained decoders measured against ground truth."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.sampling.inversion import capture_timestep, invert
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.engine.tasks.outlines import read_labels
from datasetdm_fast.training.evaluation.intervals import intervals
from datasetdm_fast.training.evaluation.meter import Meter, check_count, nothing_shown
from datasetdm_fast.training.evaluation.metrics import METRICS


def figures(meter: Meter, bootstrap: int, level: float) -> dict[str, Any]:
    """A meter's result {metric: value}, some of it `by_things` {number of things: {metric: value}}, and, with
    `bootstrap` draws, `intervals` of [low, high] under the same keys, where there is one.
    """
    found = check_count(meter)
    drawn = {"images": meter.count, "intervals": intervals(meter, bootstrap, level)} if bootstrap else {}
    things = {"by_things": counted} if len(counted := meter.by_things()) > 1 else {}
    return found | things | drawn


def measure(
    engine,
    source,
    tasks: Sequence[str],
    captions: str = "true",
    batch_size: int = 10,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    *,
    unseen: Sequence[str] = (),
) -> dict[str, Meter]:
    """{label: meter} of the engine's decoders of `tasks` after every image of the data set, read through the capture
    path; the decoders were trained at one timestep, and each task may be given as TASK:NAME.
    """
    configs = {task: engine.decoders[task].config for task in tasks}
    meters = {task: METRICS[config.task].judging(source, config, unseen) for task, config in configs.items()}
    timestep = capture_timestep(configs)
    words = {
        task: engine.encode_classes(spoken(source.thing_classes, config.table))
        for task, config in configs.items()
        if config.has_text
    }
    start, left = 0, iter(source)
    while items := list(islice(left, batch_size)):
        said = ["" if captions == "none" else item.caption for item in items]
        pixels = torch.from_numpy(np.stack([item.image for item in items]))
        capture = invert(engine, pixels, said, timestep, range(seed + start, seed + start + len(items)))
        for task, meter in meters.items():
            config = METRICS[configs[task].task].reading(configs[task])
            text = words[task][None].expand(len(items), -1, -1) if task in words else None
            raw = engine.annotate(task, capture, text)
            if captions == "true":
                asked = source.thing_classes if config.has_text else ()
                raw = held_to(raw, config, said, asked, tokenizer=engine.model.tokenizer)
            asked = {"words": source.thing_classes} if config.has_text else {}
            found = read_labels(raw, (item.image for item in items), config, engine.model.size, **asked)
            for item, label in zip(items, found):
                before = meter.count
                meter.add(item, label)
                meter.things += [0 if item.masks is None else len(item.masks)] * (meter.count - before)
        start += len(items)
        progress(start)
    return meters


def check_shown(source, task: str) -> None:
    """Refuses images none of which shows anything of a task; reads up to the first that does."""
    targets = (TASKS[task].target(source, item) for item in source)
    if not any(found and TASKS[task].is_shown(source, found) for found in targets):
        raise nothing_shown()


def passes(data: str, configs: Mapping[str, DecoderConfig]) -> list[tuple[str, ...]]:
    """The labels that share their images and their captures: a pose decoder sees one person of COCO at a time, the
    others whole images, and each is read at the timestep it was trained at.
    """
    found: dict[tuple[bool, int], tuple[str, ...]] = {}
    for label, config in configs.items():
        place = TASKS[config.task].sees_one_person(data), config.capture_timestep or 0
        found[place] = (*found.get(place, ()), label)
    return [found[place] for place in sorted(found)]
