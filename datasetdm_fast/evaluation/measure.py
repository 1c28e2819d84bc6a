"""Labels of trained decoders measured against ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from datasetdm_fast.errors import Refused
from datasetdm_fast.labels.class_tables import spoken


def evaluate(
    engine,
    source,
    tasks: Sequence[str],
    captions: str = "true",
    batch_size: int = 10,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
    *,
    unseen: Sequence[str] = (),
    bootstrap: int = 0,
    level: float = 0.95,
) -> dict:
    """{task: {metric: value}} of the engine's decoders over a data set, every image read through the capture path.

    With `bootstrap` draws each task also has `intervals`, with the same keys, of [low, high].
    """
    meters = measure(engine, source, tasks, captions, batch_size, seed, progress, unseen=unseen)
    return {task: figures(meter, bootstrap, level) for task, meter in meters.items()}


def figures(meter, bootstrap: int, level: float) -> dict[str, Any]:
    """A meter's result and, where asked for, its intervals."""
    if not meter.count:
        raise Refused("evaluate: no image has the truth to compare with", "Choose other data.")
    return meter.result() | (
        {"images": meter.count, "intervals": meter.intervals(bootstrap, level)} if bootstrap else {}
    )


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
) -> dict:
    """{task: meter} of the engine's decoders after every image of the data set."""
    from datasetdm_fast.evaluation.metrics import METRICS
    from datasetdm_fast.sampling.inversion import capture_timestep, invert
    from datasetdm_fast.tasks import TASKS
    from datasetdm_fast.tasks.captions import held_to

    configs = {task: engine.decoders[task].config for task in tasks}
    meters = {task: METRICS[task].judging(source, config, unseen) for task, config in configs.items()}
    timestep = capture_timestep(configs.values())
    words = engine.encode_classes(spoken(source.thing_classes)) if any(c.has_text for c in configs.values()) else None
    start = 0
    for items in _batches(source, batch_size):
        said = ["" if captions == "none" else item.caption for item in items]
        capture = invert(engine, _pixels(items), said, timestep, range(seed + start, seed + start + len(items)))
        for task, meter in meters.items():
            config = METRICS[task].reading(configs[task])
            raw = engine.annotate(task, capture, words[None].expand(len(items), -1, -1) if config.has_text else None)
            if captions == "true":
                raw = held_to(raw, config, said, source.thing_classes if config.has_text else ())
            asked = {"words": source.thing_classes} if config.has_text else {}
            found = TASKS[task].postprocess(raw, config, engine.model.size, **asked)
            for item, label in zip(items, found):
                meter.add(item, label)
        start += len(items)
        progress(start)
    return meters


def _pixels(items):
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([item.image for item in items]))


def _batches(source, size: int) -> Iterator[list]:
    items = iter(source)
    while batch := list(islice(items, size)):
        yield batch


def _passes(data: str, tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """The tasks that share their images: a pose decoder sees one person of COCO at a time, the others whole images."""
    if not data.startswith("coco:"):
        return [tuple(tasks)]
    from datasetdm_fast.tasks import TASKS

    alone = tuple(task for task in tasks if TASKS[task].is_of_one_person)
    return [some for some in (tuple(task for task in tasks if task not in alone), alone) if some]
