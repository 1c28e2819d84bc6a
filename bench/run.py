"""python -m bench: who makes labelled samples how fast on this CPU, and by what share of its limits, after proving that
all say the same.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.options import check_numbers, chosen, prepare, say
from datasetdm_fast.config import setting

PROG = "python -m bench"
SECONDS = {True: 8.0, False: 35.0}  # quick or not: for the rounds of one race, of which there are two at least
JUDGED = {True: 2, False: 4}  # images every peer is judged by
STEPS = {True: 6, False: 10}  # what a CPU has time for at batches of 32
QUICK_PARTS = ("limits", "peers", "ops")
COMPILED = "diffusers-compiled"
QUICK_PEERS = ("upstream", "torch", "diffusers", "ours", "ours-bf16")


@dataclass(frozen=True)
class BenchConfig:
    quick: bool = setting(
        False, "a minute instead of five: fewer steps, peers and parts; the file is kept only with --out"
    )
    compile: bool = setting(False, "also diffusers under torch.compile, which takes a CPU minutes to compile")
    parts: tuple[str, ...] = setting((), "only these parts, comma-separated (default: all)", metavar="LIST")
    peers: tuple[str, ...] = setting((), "only these peers, comma-separated (default: all)", metavar="LIST")
    model: str = setting("demo", "demo, tiny, random-sd14, a diffusers folder or a file", metavar="MODEL")
    steps: int = setting(0, "sampling steps, 0 = 20, with --quick 8", metavar="N")
    seconds: float = setting(0.0, "seconds for the rounds of one race, 0 = 35, with --quick 8", metavar="S")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")
    out: str = setting("", "result file (default: bench/results/DATE-DEVICE-COMMIT.json)", metavar="FILE")
    json: bool = setting(False, "ratios, parity and every row as one JSON object on stdout")


def main(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, BenchConfig, PROG, __doc__)
    check_numbers(steps=config.steps, seconds=config.seconds, threads=config.threads)
    begin = time.monotonic()
    prepare(config.threads)
    from bench import suite
    from bench.peers import PEERS

    usual = QUICK_PEERS if config.quick else tuple(name for name in PEERS if name != COMPILED)
    names = chosen("peers", config.peers, tuple(PEERS), (*usual, COMPILED) if config.compile else usual)
    parts = {part.name: part for part in (suite.LIMITS, suite.PEERS_PART, *suite.SHARED)}
    wanted = chosen("parts", config.parts, tuple(parts), QUICK_PARTS if config.quick else tuple(parts))
    steps = config.steps or STEPS[config.quick]
    m = open_measurement(
        config.model,
        "cpu",
        arguments,
        steps=steps,
        quick=config.quick,
        out=config.out,
        seconds=config.seconds,
        names=names,
    )
    m.has_ladder = "ladder" in wanted
    suite.measure(m, [parts[name] for name in parts if name in wanted or name == "limits"], math.inf, say)
    if m.file.path:
        print(m.file.path, file=sys.stderr if config.json else sys.stdout)
    show(m.file.document, config.json, time.monotonic() - begin)
    suite.check(m.file.document)
    return 0


def open_measurement(
    model: str,
    device: str,
    arguments: Sequence[str],
    *,
    steps: int,
    quick: bool,
    out: str,
    seconds: float,
    names: Sequence[str],
    prog: str = PROG,
    goes_on: bool = False,
    keeps: bool = False,
) -> Any:
    """The setting and its result file, before anything is measured."""
    from bench import suite
    from bench.machine import machine
    from bench.report import results
    from bench.setting import open_setting

    opened = open_setting(model, device, steps=steps, quick=quick)
    described = machine.describe(opened.device)
    head = {
        "suite": "gpu" if opened.device.type == "cuda" else "cpu",
        "date": results.now(),
        "command": shlex.join([*prog.split(), *arguments]),
        "machine": described,
        "setting": opened.document(),
    }
    path = Path(out) if out else None if quick and not keeps else results.default_path(described)
    if path and not out and not goes_on:
        path = results.unused(path)
    file = results.ResultFile.open(path, head, goes_on=goes_on)
    return suite.Measurement(opened, file, seconds or SECONDS[quick], JUDGED[quick], tuple(names))


def show(document: dict[str, Any], is_json: bool, seconds: float) -> None:
    """The tables for a reader, or everything for a program."""
    from bench.report import tables

    stream = sys.stderr if is_json else sys.stdout
    print(tables.terminal(document, stream.isatty()), file=stream, flush=True)
    if is_json:
        rows = {name: part.get("rows", []) for name, part in document["parts"].items()}
        facts = {name: document[name] for name in ("machine", "setting", "command")}
        print(
            json.dumps(
                {
                    "ratios": tables.ratios(document),
                    "parity": tables.parity(document),
                    "rows": rows,
                    **facts,
                    "seconds": round(seconds, 1),
                }
            )
        )
