"""python -m bench attention: images with labels from attention on this CPU, compared with a plain version of Dataset
Diffusion based on diffusers; both take turns in one process, with that project's settings.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.machine.measure import distance, interleaved
from bench.peers.dataset_diffusion import DatasetDiffusion, Numbers
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.config import ATTENTION, ENGINES
from datasetdm_fast.data import Batch, Request
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.driver import BatchGenerator
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.settings import setting

CLASSES = ("ball", "cube", "cone")
REQUESTS = (("a red ball and a blue cube", ("ball", "cube")), ("a yellow cone", ("cone",)), ("a cube", ("cube",)))
LIMIT = 1e-3  # relative L2 between the averages of both
MIB = 1 << 20


@dataclass(frozen=True)
class AttentionBench:
    model: str = setting("demo", "demo, tiny, random-sd14, a diffusers folder or a file", metavar="MODEL")
    engine: str = setting("fast", "engine to compare", choices=tuple(ENGINES))
    images: int = setting(8, "images of a batch", metavar="N")
    steps: int = setting(25, "sampling steps", metavar="N")
    rounds: int = setting(5, "how often each is timed", metavar="N")


def measure(config: AttentionBench) -> dict[str, Any]:
    """Median seconds an image of both, how many times faster ours is, and what its labels hold in memory."""
    if min(config.images, config.steps, config.rounds) < 1:
        raise Refused("--images, --steps and --rounds: expected 1 or more", "Name larger numbers.")
    model = load_model(config.model)
    engine, side = build_engine(config.engine, model, {}, device="cpu"), model.size // 8  # where the other runs, too
    theirs = DatasetDiffusion(model, Numbers(self_cells=side // 2, cross_cells=side // 4), config.steps)
    numbers = vars(theirs.numbers) | {"steps": config.steps, "classes": CLASSES, "profile": "0.14.0"}
    generator = BatchGenerator(
        engine, make_recipe(engine, (ATTENTION,), parity="dataset-diffusion", **numbers), lambda: None
    )
    given = (REQUESTS[k % len(REQUESTS)] for k in range(config.images))
    requests = tuple(Request(k, prompt, 7 + k, classes) for k, (prompt, classes) in enumerate(given))
    ours = Batch(0, requests)
    sampled = generator.sample(ours)
    check(sampled.averages, theirs.draw(requests[:2]))
    sums = sum(one.nbytes for one in vars(sampled.averages).values()) / config.images
    generator.label(ours, sampled)
    rounds = interleaved(
        {"theirs": lambda: theirs.make(requests, CLASSES), "ours": lambda: generator.make(ours)},
        0.0,
        least=config.rounds,
    )
    seconds = {name: statistics.median(taken.seconds) / config.images for name, taken in rounds.items()}
    cpu = {name: statistics.median(taken.cpu_seconds) / config.images for name, taken in rounds.items()}
    return {
        **vars(config),
        "engine": engine.fingerprint(),
        "seconds_an_image": {name: round(value, 4) for name, value in seconds.items()},
        "cpu_seconds_an_image": {name: round(value, 4) for name, value in cpu.items()},
        "ratio": round(seconds["theirs"] / seconds["ours"], 2),
        "cpu_ratio": round(cpu["theirs"] / cpu["ours"], 2),
        "mib_an_image": round(sums / MIB, 2),
    }


def check(averages, drawn: Sequence) -> None:
    """Nothing is timed that says something else."""
    for b, each in enumerate(drawn):
        error = max(distance(averages.cells[b], each.cells), distance(averages.tokens[b], each.tokens))
        if not error <= LIMIT:
            raise GateFailed(
                f"attention of image {b}: {error:.1e} apart, expected at most {LIMIT:.0e}", "Nothing was timed."
            )


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, AttentionBench, "python -m bench attention", __doc__)
    print(json.dumps(measure(config), indent=2))
    return 0
