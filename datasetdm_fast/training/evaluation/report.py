"""Figures as lines to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasetdm_fast.messages import count_noun
from datasetdm_fast.training.evaluation.meter import figure_name


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
