"""Labels of trained decoders measured against ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from datasetdm_fast.errors import Refused


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
    from datasetdm_fast.sampling.inversion import capture_timestep, invert
    from datasetdm_fast.tasks import TASKS as LABELLERS
    from datasetdm_fast.tasks.captions import held_to

    meters = {task: _meter(task, source, engine.decoders[task].config, unseen) for task in tasks}
    timestep = capture_timestep(engine.decoders[task].config for task in tasks)
    words = engine.encode_classes(list(source.thing_classes)) if "open-vocabulary" in tasks else None
    start = 0
    for items in _batches(source, batch_size):
        said = ["" if captions == "none" else item.caption for item in items]
        capture = invert(engine, _pixels(items), said, timestep, range(seed + start, seed + start + len(items)))
        for task, meter in meters.items():
            is_open = task == "open-vocabulary"
            raw = engine.annotate(task, capture, words[None].expand(len(items), -1, -1) if is_open else None)
            config = _asked(engine.decoders[task].config)
            if captions == "true":
                raw = held_to(raw, config, said, source.thing_classes if is_open else ())
            found = LABELLERS[task].postprocess(
                raw, config, engine.model.size, **({"words": source.thing_classes} if is_open else {})
            )
            for item, label in zip(items, found):
                meter.add(item, label)
        start += len(items)
        progress(start)
    return meters


def _asked(config):
    """How a decoder's answers are read: AP ranks every candidate itself."""
    return replace(config, score_threshold=0.0) if config.task == "instance" else config


def _pixels(items):
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([item.image for item in items]))


def _batches(source, size: int) -> Iterator[list]:
    items = iter(source)
    while batch := list(islice(items, size)):
        yield batch


def _meter(task: str, source, config, unseen: Sequence[str]):
    """The task's meter; classes a decoder of words was not taught are told apart without being named."""
    from datasetdm_fast.evaluation.meter import check_names
    from datasetdm_fast.evaluation.metrics import METRICS

    if task == "pose" and config.joints != source.joints:
        shown = ", ".join(config.joints), ", ".join(source.joints)
        raise Refused(
            f"pose: the decoder has the joints {shown[0]}, the data set {shown[1]}", "Evaluate on data with its joints."
        )
    if task in ("semantic", "instance"):
        check_names(task, config.classes, source.classes if task == "semantic" else source.thing_classes)
    if task not in ("semantic", "open-vocabulary"):
        return METRICS[task](source)
    known = source.classes if task == "semantic" else source.thing_classes
    if unknown := [name for name in unseen if name not in known]:
        raise Refused(f"--unseen: the data set has no class {unknown[0]!r}", f"It has {', '.join(known[:20])}.")
    if not unseen and task == "open-vocabulary" and config.classes:
        unseen = [name for name in known if name not in config.classes]
    return METRICS[task](source, unseen=unseen if len(unseen) < len(known) else ())


def _passes(data: str, tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """The tasks that share their images: a pose decoder sees one person of COCO at a time, the others whole images."""
    if not data.startswith("coco:"):
        return [tuple(tasks)]
    return [
        some for some in (tuple(task for task in tasks if task != "pose"), ("pose",) if "pose" in tasks else ()) if some
    ]
