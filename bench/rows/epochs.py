"""python -m bench epochs: an epoch of training with captures read from the disk, and with captures made anew, in turn
in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine.measure import distance, in_turn
from datasetdm_fast.config import TASKS
from datasetdm_fast.engines import build_engine
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.lessons import cache
from datasetdm_fast.lessons.views import Looks, Views
from datasetdm_fast.loading import load_model
from datasetdm_fast.readers import open_data
from datasetdm_fast.training.loop import Trainer, TrainingViews
from datasetdm_fast.training.recipes import recipe

LIMIT = 2e-3  # relative L2 between a kept capture and one made anew: half precision
DRAWS = 4


def row(
    model: str = "demo", engine_name: str = "auto", task: str = "semantic", images: int = 6, rounds: int = 3
) -> dict[str, Any]:
    """Median seconds of both epochs and of reading captures alone, and how many times faster each is with kept
    captures.

    `cpu_` figures count only what cores were at work: on a busy machine they are the steadier ones.
    """
    engine = build_engine(engine_name, load_model(model), {})
    source = open_data(f"demo:{images}@1000", engine.model.size)
    views, inversion = (
        Views(source, range(images), task, Looks(draws=DRAWS)),
        cache.Inversion(engine.model.defaults.capture),
    )
    words = engine.encode_classes(list(source.thing_classes)).float().clone() if task == "open-vocabulary" else None
    found = recipe(
        task, source, engine.model.levels, engine.model.text_encoder.config.hidden_size, inversion.timestep, images
    )
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "anew": cache.RecomputedCaptures(engine, views, inversion),
            "kept": cache.stored(engine, views, inversion, Path(folder)),
        }
        _check(sources)
        trainers = {
            name: Trainer(found.config, found.schedule, TrainingViews(one, views), words, is_ahead=False)
            for name, one in sources.items()
        }
        steps = -(-len(views) // found.schedule.batch_size)
        for trainer in trainers.values():
            trainer.step()
        epochs = {
            f"epoch_{name}": lambda trainer=trainer: [trainer.step() for _ in range(steps)]
            for name, trainer in trainers.items()
        }
        batches = [
            range(k, min(k + found.schedule.batch_size, len(views)))
            for k in range(0, len(views), found.schedule.batch_size)
        ]
        reads = {
            f"captures_{name}": lambda one=one: [one.batch(batch) for batch in batches] for name, one in sources.items()
        }
        seconds, busy = in_turn({**epochs, **reads}, rounds)
    clock, worked = ({name: statistics.median(values) for name, values in side.items()} for side in (seconds, busy))
    ratios = {
        f"{what}_ratio": round(clock[f"{what}_anew"] / clock[f"{what}_kept"], 2) for what in ("epoch", "captures")
    }
    ratios |= {
        f"cpu_{what}_ratio": round(worked[f"{what}_anew"] / worked[f"{what}_kept"], 2) for what in ("epoch", "captures")
    }
    facts = {
        "model": model,
        "engine": engine.fingerprint()["engine"],
        "task": task,
        "views": len(views),
        "rounds": rounds,
    }
    return {**facts, **ratios, "seconds": {name: round(value, 4) for name, value in clock.items()}}


def _check(sources: dict[str, Any]) -> None:
    error = max(
        distance(a, b) for a, b in zip(sources["kept"].batch([0, 1]), sources["anew"].batch([0, 1]), strict=True)
    )
    if not error <= LIMIT:
        raise GateFailed(
            f"captures: those kept and those made anew differ by {error:.1e}, expected at most {LIMIT:.0e}",
            "nothing was timed",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench epochs", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", default="auto", choices=("auto", "fast", "torch"))
    parser.add_argument("--task", default="semantic", choices=TASKS)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(json.dumps(row(options.model, options.engine, options.task, options.images, options.rounds), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
