"""python -m bench gpu: the suite at full size on a GPU, part by part; each is stored, and the same command resumes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.options import SuiteConfig, check_numbers, chosen
from bench.run import SECONDS
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.settings import setting

PROG = "python -m bench gpu"
LAST = ("diffusers-compiled", "tensorrt", "ort")  # they build for minutes, so they come when all else is stored
JUDGED = 2  # images every peer is judged by: another image of the reference costs as much as ten of ours


@dataclass(frozen=True)
class GpuConfig(SuiteConfig):
    out: str = setting(
        "",
        "result file to create or to continue (default: bench/results/DATE-DEVICE-COMMIT.json)",
        metavar="FILE",
        output="file",
    )
    minutes: float = setting(9.0, "start no part that would end later", metavar="M")
    left: bool = setting(False, "print the names of the parts that are left, and measure nothing")
    model: str = setting("random-sd14", "random-sd14, a diffusers folder or a file", metavar="MODEL")
    steps: int = setting(0, "sampling steps, 0 = what the model was made for", metavar="N")
    seconds: float = setting(20.0, "seconds for the rounds of one comparison", metavar="S")
    lock: str = setting(
        "", "file that other processes lock while they use the GPU; nothing is timed meanwhile", metavar="FILE"
    )
    raced: tuple[str, ...] = setting((), "peers of the one race, all of them by default", metavar="LIST")
    device: str = setting("cuda", "cuda or cuda:N; cpu tests the parts on a small model", metavar="DEVICE")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, GpuConfig, PROG, __doc__)
    check_numbers(minutes=config.minutes, steps=config.steps, seconds=config.seconds)
    end = time.monotonic() + 60 * config.minutes
    from bench import suite
    from bench.peers import PEERS
    from bench.report import results
    from bench.rows import MEASUREMENTS, one_race, whole_run
    from bench.rows.peers import one_by_one

    first, last = one_by_one(name for name in PEERS if name not in LAST), one_by_one(LAST)
    others = [part for part in MEASUREMENTS.values() if part.name not in ("limits", "peers")]
    usual = {part.name: part for part in (MEASUREMENTS["limits"], *first, *others, *last)}
    race, whole = one_race.MEASUREMENT, whole_run.MEASUREMENT
    parts = {race.name: race, whole.name: whole, **usual}  # the race measures the limits when no other process runs
    wanted = chosen("parts", config.parts, tuple(parts), tuple(usual))
    raced = chosen("raced", config.raced, one_race.RACED, one_race.RACED)
    if config.left:
        return print_left(config, ["limits", *(name for name in parts if name in wanted and name != "limits")])
    import torch

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise Missing("python -m bench gpu: this machine shows no CUDA device", "`python -m bench` measures the CPU")
    folders = {path: Path(path).name for path in (config.out, config.lock) if path}
    command = [*PROG.split(), *(folders.get(word, word) for word in arguments)]  # a page shows it
    options = {"seconds": config.seconds or SECONDS[config.quick], "judged": JUDGED}
    session = suite.open_run(command, config, config.device, config.steps, goes_on=True, **options)
    session.batches.update(results.batches_of(session.file.document))
    session.lock, session.raced = config.lock, raced
    reserved = whole.least_seconds if whole.name in wanted else 0.0
    has_time = end - time.monotonic() > 2 * reserved  # or the race has it all, and the whole run is left
    session.end, session.race_end = end, end - reserved if has_time else end
    return suite.measure_and_show(session, parts, wanted, is_json=config.json, end=end)


def print_left(config: GpuConfig, names: Sequence[str]) -> int:
    """The parts a file still lacks, one a line."""
    from bench.report import results

    if not config.out:
        raise Refused("--left: no file was named", "add --out FILE")
    path = Path(config.out)
    document = results.read(path) if path.exists() else {"parts": {}}
    left = [name for name in names if not results.is_settled(document, name)]
    print(json.dumps(left) if config.json else "\n".join(left))
    return 0
