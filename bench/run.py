"""python -m bench: labelled samples per second of datasetdm_fast and other systems on this CPU, as a share of its peak,
timed after their outputs have matched the reference engine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.options import SuiteConfig, check_numbers, chosen
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.settings import setting

PROG = "python -m bench"
SECONDS = {True: 8.0, False: 35.0}  # quick or not: for the rounds of one race, of which there are five at least
STEPS = {True: 6, False: 10}  # what a CPU has time for at batches of 32
QUICK_PARTS = ("limits", "peers", "ops")
COMPILED = "diffusers-compiled"
QUICK_PEERS = ("upstream", "torch", "diffusers", "ours", "ours-bf16")


def usual(values: dict[bool, float]) -> str:
    return f"0 = {values[False]:g}, with --quick {values[True]:g}"


@dataclass(frozen=True)
class BenchConfig(SuiteConfig):
    quick: bool = setting(False, "fewer steps, peers and parts; the file is kept only with --out")
    compile: bool = setting(False, "also diffusers under torch.compile, which takes a CPU minutes to compile")
    peers: tuple[str, ...] = setting((), "only these peers, comma-separated (default: all)", metavar="LIST")
    steps: int = setting(0, f"sampling steps, {usual(STEPS)}", metavar="N")
    seconds: float = setting(0.0, f"seconds for the rounds of one comparison, {usual(SECONDS)}", metavar="S")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, BenchConfig, PROG, __doc__)
    check_numbers(steps=config.steps, seconds=config.seconds, threads=config.threads)
    import torch

    from bench import suite
    from bench.peers import PEERS
    from bench.rows import MEASUREMENTS

    if config.threads:
        torch.set_num_threads(config.threads)
    quick = config.quick
    names = QUICK_PEERS if quick else tuple(name for name in PEERS if name != COMPILED)
    names = chosen("peers", config.peers, tuple(PEERS), (*names, COMPILED) if config.compile else names)
    parts = chosen("parts", config.parts, tuple(MEASUREMENTS), QUICK_PARTS if quick else tuple(MEASUREMENTS))
    options = {"seconds": config.seconds or SECONDS[quick], "judged": 2 if quick else 4, "peers": names}
    command, steps, is_stored = [*PROG.split(), *arguments], config.steps or STEPS[quick], bool(config.out) or not quick
    options |= {"is_stored": is_stored, "races_ladder": "ladder" in parts}
    session = suite.open_run(command, config, "cpu", steps, **options)
    return suite.measure_and_show(session, MEASUREMENTS, parts, is_json=config.json)
