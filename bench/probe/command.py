"""python -m bench probe: which form of each heavy operation is fastest on this GPU at the sizes of Stable Diffusion
1.4, and where the time of whole calls goes; every part is stored, and the same command resumes.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.options import check_numbers, chosen, say
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import GateFailed, Missing
from datasetdm_fast.settings import setting

PROG = "python -m bench probe"
OPERATIONS = ("attention", "convolutions", "upsampling", "products", "norms")
CALLS = ("batches", "speeds", "choices", "overlap", "longest", "longest_32", "once")
USUAL = ("batches", "longest", "attention", "convolutions", "overlap", "products", "norms", "upsampling", "choices")


@dataclass(frozen=True)
class ProbeConfig:
    model: str = setting("random-sd14", "demo, tiny, random-..., a diffusers folder or a file", metavar="MODEL")
    device: str = setting("cuda", "cuda or cuda:N; cpu tests the parts at small sizes", metavar="DEVICE")
    parts: tuple[str, ...] = setting(
        (),
        f"only these of {', '.join(OPERATIONS + CALLS)}, comma-separated (default: without speeds, once, longest_32)",
        metavar="LIST",
    )
    minutes: float = setting(8.0, "start no part later than this", metavar="M")
    out: str = setting("", "result file (default: none is written)", metavar="FILE", output="file")
    json: bool = setting(False, "the result file's text on stdout instead of lines")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ProbeConfig, PROG, __doc__)
    check_numbers(minutes=config.minutes)
    end = time.monotonic() + 60 * config.minutes
    wanted = chosen("parts", config.parts, OPERATIONS + CALLS, USUAL)
    import torch

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise Missing(f"{PROG}: this machine shows no CUDA device", "--device cpu --model tiny tries the parts out")
    file = opened(config, arguments)
    left = measured(config, wanted, file, end)
    document = file.document
    if config.json:
        print(json.dumps(document, indent=1))
    rows = [row for part in document["parts"].values() for row in part.get("rows", [])]
    if failed := [row for row in rows if row.get("status") == "failed"]:
        raise GateFailed(
            f"bench probe: {failed[0]['what']}: {failed[0]['why']}", "python -m bench rehearse finds races"
        )
    return GateFailed.exit_code if left else 0


def opened(config: ProbeConfig, arguments: Sequence[str]) -> Any:
    import torch

    from bench.machine import machine
    from bench.report import results

    command = [*PROG.split(), *(Path(word).name if word == config.out else word for word in arguments)]
    head = {"suite": "probe", "date": results.now(), "command": shlex.join(command)}
    head |= {"machine": machine.describe(torch.device(config.device)), "setting": {"model": config.model}}
    head["machine"] |= {"cudnn": torch.backends.cudnn.version()}
    file = results.ResultFile.open(Path(config.out) if config.out else None, head, goes_on=True)
    file.give_up_broken()
    return file


def measured(config: ProbeConfig, wanted: Sequence[str], file: Any, end: float) -> list[str]:
    """Every part that is not there yet, while the clock allows, and the names of those that are left; the model is
    loaded for the first that needs it.
    """
    import torch

    from bench.probe import calls, forms
    from bench.probe.timing import Inputs
    from bench.report.results import is_settled
    from datasetdm_fast.engine.engines.device import release
    from datasetdm_fast.engine.loading import load_model

    device, engine, left = torch.device(config.device), None, []
    for name in wanted:
        if is_settled(file.document, name):
            continue
        if time.monotonic() > end:
            say(f"left: {name}; the same command measures it")
            left.append(name)
            continue
        file.begin(name)
        begin = time.perf_counter()
        if name in CALLS:
            engine = engine or calls.engine_of(load_model(config.model), device)
            found = getattr(calls, name)(engine)
        else:
            found = getattr(forms, name)(Inputs(device))
        rows = []
        for row in found:
            rows.append(row)
            file.keep(name, rows)
            if not config.json:
                shown = ", ".join(f"{form} {value}" for form, value in row["ms"].items())
                print(f"{row['what']}: {shown or row.get('largest_difference', '')}", flush=True)
        file.store(name, rows, time.perf_counter() - begin)
        release()
    return left
