"""python -m bench gpu: the suite at full size on a GPU, in parts: each is stored when it is done, and the same line
again goes on with what is left.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.options import check_numbers, chosen, prepare, say
from bench.run import JUDGED, SECONDS, open_measurement, show
from datasetdm_fast.config import setting
from datasetdm_fast.errors import Missing, Refused

PROG = "python -m bench gpu"
LAST = ("diffusers-compiled", "tensorrt", "ort")  # they build for minutes, so they come when all else is stored


@dataclass(frozen=True)
class GpuConfig:
    out: str = setting(
        "", "result file to begin or go on with (default: bench/results/DATE-DEVICE-COMMIT.json)", metavar="FILE"
    )
    minutes: float = setting(9.0, "begin no part that would end later", metavar="M")
    parts: tuple[str, ...] = setting((), "only these parts, comma-separated (default: all)", metavar="LIST")
    left: bool = setting(False, "print the names of the parts that are left, and measure nothing")
    model: str = setting("random-sd14", "random-sd14, a diffusers folder or a file", metavar="MODEL")
    steps: int = setting(0, "sampling steps, 0 = what the model was made for", metavar="N")
    seconds: float = setting(20.0, "seconds for the rounds of one race", metavar="S")
    device: str = setting("cuda", "cuda or cuda:N; cpu tries the parts out on a small model", metavar="DEVICE")
    quick: bool = setting(False, "fewer sizes and images, to try the parts out")
    json: bool = setting(False, "ratios, parity and every row as one JSON object on stdout")


def main(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, GpuConfig, PROG, __doc__)
    check_numbers(minutes=config.minutes, steps=config.steps, seconds=config.seconds)
    begin = time.monotonic()
    prepare(0)
    from bench import suite
    from bench.peers import PEERS
    from bench.report import results

    ordered = [*(name for name in PEERS if name not in LAST), *(name for name in PEERS if name in LAST)]
    parts = {
        part.name: part
        for part in (suite.LIMITS, *suite.one_by_one(ordered[:-3]), *suite.SHARED, *suite.one_by_one(ordered[-3:]))
    }
    wanted = chosen("parts", config.parts, tuple(parts), tuple(parts))
    if config.left:
        return print_left(config, [name for name in parts if name in wanted])
    check_device(config.device)
    m = open_measurement(
        config.model,
        config.device,
        arguments,
        steps=config.steps,
        quick=config.quick,
        out=config.out,
        seconds=config.seconds or SECONDS[config.quick],
        names=tuple(PEERS),
        prog=PROG,
        goes_on=True,
        keeps=True,
    )
    m.batches.update(results.batches_of(m.file.document))
    m.judged = JUDGED[True]  # a second image of the oracle costs as much as ten of ours
    left = suite.measure(
        m, [parts[name] for name in parts if name in wanted or name == "limits"], begin + 60 * config.minutes, say
    )
    print(m.file.path, file=sys.stderr if config.json else sys.stdout)
    show(m.file.document, config.json, time.monotonic() - begin)
    if left:
        say(f"left: {', '.join(left)}; the same line again goes on")
    suite.check(m.file.document)
    return 0


def check_device(name: str) -> None:
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Missing("python -m bench gpu: this machine shows no CUDA device", "`python -m bench` measures the CPU")


def print_left(config: GpuConfig, names: Sequence[str]) -> int:
    """The parts a file still lacks, one a line."""
    from pathlib import Path

    from bench.report import results

    if not config.out:
        raise Refused("--left: no file was named", "add --out FILE")
    path = Path(config.out)
    document = results.read(path) if path.exists() else {"parts": {}}
    left = [name for name in ("limits", *names) if not results.is_settled(document, name)]
    print(json.dumps(list(dict.fromkeys(left))) if config.json else "\n".join(dict.fromkeys(left)))
    return 0
