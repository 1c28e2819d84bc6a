"""python -m bench sd14: labelled samples at the size of Stable Diffusion 1.4 on this CPU, one image at a time, every
engine in a process of its own; each part is stored, and the same command resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.options import FULL_SIZE_MODEL, SuiteConfig, check_numbers, chosen
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.settings import setting

PROG = "python -m bench sd14"
NAMES = ("diffusers-1", "ort-1", "openvino-1", "ours-bf16", "openvino-bf16")  # each in turn with ours
STEPS = 3  # a call takes two cores five to thirteen seconds


@dataclass(frozen=True)
class FullSizeConfig(SuiteConfig):
    model: str = setting(FULL_SIZE_MODEL, "random-sd14, or a smaller one to test the parts", metavar="MODEL")
    steps: int = setting(STEPS, "sampling steps", metavar="N")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, FullSizeConfig, PROG, __doc__)
    check_numbers(steps=config.steps, threads=config.threads)
    import torch

    from bench import suite
    from bench.rows import MEASUREMENTS
    from bench.rows.alone import TurnConfig, taking_turns
    from bench.rows.peers import one_by_one

    if config.threads:
        torch.set_num_threads(config.threads)
    steps = config.steps or STEPS
    turns = TurnConfig(config.model, steps, torch.get_num_threads())
    races = one_by_one(NAMES, lambda run, names: taking_turns(run, names, turns))
    parts = {part.name: part for part in (MEASUREMENTS["limits"], *races)}
    wanted = chosen("parts", config.parts, tuple(parts), tuple(parts))
    command = [*PROG.split(), *arguments]
    session = suite.open_run(command, config, "cpu", steps, goes_on=True, seconds=0.0, judged=1)
    return suite.measure_and_show(session, parts, wanted, is_json=config.json)
