"""python -m bench epochs: an epoch of training with captures read from the disk, and with recomputed captures, in turn
in one process.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine.measure import distance, interleaved, meter
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.config import TASKS
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.settings import setting
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.recipes import recipe
from datasetdm_fast.training.settings import Inversion, ViewSettings
from datasetdm_fast.training.trainer import Trainer

LIMIT = 2e-3  # relative L2 between a stored capture and one computed anew: half precision
DRAWS = 4


@dataclass(frozen=True)
class EpochConfig:
    model: str = setting("demo", "demo, tiny, random-sd14, a diffusers folder or a file", metavar="MODEL")
    engine: str = setting("auto", "engine that computes the captures", choices=("auto", "fast", "torch"))
    task: str = setting("semantic", "task that is trained", choices=TASKS)
    images: int = setting(6, "demo scenes to train on", metavar="N")
    rounds: int = setting(3, "epochs of each kind that are timed", metavar="N")


def measure(config: EpochConfig) -> dict[str, Any]:
    """Median seconds of both epochs and of reading captures alone, and how many times faster each is with stored
    captures.

    `cpu_` figures count only what cores were at work: on a busy machine they are the steadier ones.
    """
    engine = build_engine(config.engine, load_model(config.model), {})
    source = open_data(f"demo:{config.images}@1000", engine.model.size)
    views = TrainingViews(source, range(config.images), config.task, ViewSettings(draws=DRAWS))
    inversion = Inversion((engine.model.defaults.capture,))
    is_open = config.task == "open-vocabulary"
    words = engine.encode_classes(spoken(source.thing_classes)).float().clone() if is_open else None
    width, levels = engine.model.text_width, engine.model.levels
    found = recipe(config.task, source, levels, width, inversion.timesteps, config.images)
    size, calls = found.schedule.batch_size, {}
    batches = [range(first, min(first + size, len(views))) for first in range(0, len(views), size)]
    with tempfile.TemporaryDirectory() as folder:
        stored = cache.cache_captures(engine, views, inversion, Path(folder))
        sources = {"anew": cache.RecomputedCaptures(engine, views, inversion), "kept": stored}
        check(sources)
        for name, one in sources.items():
            trainer = Trainer(found.config, found.schedule, views.with_captures(one), words, reads_ahead=False)
            trainer.step()
            calls[f"epoch_{name}"] = lambda trainer=trainer: [trainer.step() for _ in batches]
            calls[f"captures_{name}"] = lambda one=one: [one.batch(batch) for batch in batches]
        rounds = interleaved(calls, 0.0, meter(engine.device), least=config.rounds)
    clock = {name: statistics.median(taken.seconds) for name, taken in rounds.items()}
    cpu = {name: statistics.median(taken.cpu_seconds) for name, taken in rounds.items()}
    ratios = {
        f"{prefix}{part}_ratio": round(values[f"{part}_anew"] / values[f"{part}_kept"], 2)
        for prefix, values in (("", clock), ("cpu_", cpu))
        for part in ("epoch", "captures")
    }
    facts = {"model": config.model, "engine": engine.fingerprint()["engine"], "task": config.task, "views": len(views)}
    seconds = {name: round(value, 4) for name, value in clock.items()}
    return {**facts, "rounds": config.rounds, **ratios, "seconds": seconds}


def check(sources: dict[str, Any]) -> None:
    pairs = zip(sources["kept"].batch([0, 1]), sources["anew"].batch([0, 1]), strict=True)
    error = max(distance(a, b) for a, b in pairs)
    if not error <= LIMIT:
        raise GateFailed(
            f"captures: those stored and those computed anew differ by {error:.1e}, expected at most {LIMIT:.0e}",
            "nothing was timed",
        )


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, EpochConfig, "python -m bench epochs", __doc__)
    print(json.dumps(measure(config), indent=2))
    return 0
