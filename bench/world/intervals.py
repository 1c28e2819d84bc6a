"""python -m bench.world.intervals --out FILE.json: how often intervals of few images hold the figure of many.

Demo scenes are labelled without captions. The figures of all are held against the 95 % intervals of some of them, drawn
many times.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import machine
from bench.report import results
from datasetdm_fast.engine.engines import open_engine
from datasetdm_fast.training.evaluation.measure import measure
from datasetdm_fast.training.evaluation.meter import Meter, intervals
from datasetdm_fast.training.evaluation.settings import ScoreSettings
from datasetdm_fast.training.readers import open_data

COUNTS = (4, 8, 15, 30, 40)  # images
FIGURES = {
    "semantic": ("miou", "per_class"),
    "pose": ("pck", "per_joint", "oks_ap"),
    "depth": ("delta_1.25", "absrel", "rmse"),
}


class SomeImages(Meter):
    """A meter of some images of another one."""

    def __init__(self, whole: Meter, images: Sequence[int]):
        self.whole, self.images, self.each = whole, images, whole.each
        self.counts_hits = whole.counts_hits

    @property
    def columns(self) -> Sequence[str]:
        return self.whole.columns

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def telling(self) -> int:
        alone = self.whole.figures(np.eye(self.whole.count)[self.images])
        return int(np.isfinite(next(iter(alone.values()))).sum())

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        spread = np.zeros((len(weights), self.whole.count))
        spread[:, self.images] = weights
        return self.whole.figures(spread)


def coverage(whole: Meter, names: Sequence[str], count: int, sets: int, draws: int) -> dict[str, Any]:
    """Of each figure the share of intervals of `count` images that hold it, and their mean width."""
    truth, random = whole.result(), np.random.default_rng(count)
    held: dict[str, list[bool]] = defaultdict(list)
    widths: dict[str, list[float]] = defaultdict(list)
    for _ in range(sets):
        some = SomeImages(whole, random.choice(whole.count, count, replace=False))
        found = intervals(some, draws, classes=len(whole.columns))
        for name in names:
            single = name != whole.each
            values = {"": truth[name]} if single else truth[name]
            bounds = ({"": found[name]} if single else found[name]) if name in found else {}
            for column, (low, high) in bounds.items():
                held[name].append(low <= values[column] <= high)
                widths[name].append(high - low)
    return {
        name: {"intervals": len(held[name]), "held": float(np.mean(held[name])), "width": float(np.mean(widths[name]))}
        for name in held
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.intervals", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--data", default="demo:400@900000", help="scenes")
    parser.add_argument("--sets", type=int, default=200, help="sets of images of each number")
    parser.add_argument("--draws", type=int, default=500, help="bootstrap resamples of each set")
    options = parser.parse_args(arguments)
    engine, _ = open_engine("demo", "demo", tuple(FIGURES))
    source = open_data(options.data, engine.model.size)
    meters = measure(engine, source, tuple(FIGURES), ScoreSettings(captions="none"))
    rows = {}
    for count in COUNTS:
        rows[count] = {
            name: row
            for task, names in FIGURES.items()
            for name, row in coverage(meters[task], names, count, options.sets, options.draws).items()
        }
        print(count, {name: (round(row["held"], 3), round(row["width"], 2)) for name, row in rows[count].items()})
    command = shlex.join(["python", "-m", "bench.world.intervals", *(arguments or sys.argv[1:])])
    facts = {"suite": "demo-intervals", "date": results.now()[:10], "command": command}
    document = {**facts, "machine": machine.describe(engine.device), "images": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
