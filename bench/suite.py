"""The measurements in their order, each stored as soon as it is done, and what a run of them shows at its end."""

import json
import math
import shlex
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.options import SuiteConfig, say
from bench.report import report, results
from bench.rows.measurement import BenchRun, Measurement
from bench.rows.peers import ratios
from bench.setting import open_setting
from datasetdm_fast.errors import GateFailed


def open_run(
    command: Sequence[str],
    config: SuiteConfig,
    device: str,
    steps: int,
    *,
    goes_on: bool = False,
    is_stored: bool = True,
    **options: Any,
) -> BenchRun:
    """The setting and its result file, before anything is measured; the options are fields of `BenchRun`."""
    opened, out = open_setting(config.model, device, steps=steps, quick=config.quick), config.out
    described = machine.describe(opened.device)
    suite = "gpu" if opened.device.type == "cuda" else results.cpu_suite(config.model)
    head = {"suite": suite, "date": results.now(), "command": shlex.join(command)}
    head |= {"machine": described, "setting": opened.document()}
    kind = "" if suite in results.SUITES else f"{suite.removeprefix('cpu-')}-"
    path = Path(out) if out else results.default_path(described, kind) if is_stored else None
    if path and not out and not goes_on:
        path = results.unused(path)
    return BenchRun(opened, results.ResultFile.open(path, head, goes_on=goes_on), **options)


def measure_and_show(
    run: BenchRun, parts: Mapping[str, Measurement], wanted: Collection[str], *, is_json: bool, end: float = math.inf
) -> int:
    """Measures the wanted parts and the limits, then writes the tables for a reader, or everything for a program."""
    begin = time.monotonic()
    left = measure(run, [part for name, part in parts.items() if name in wanted or name == "limits"], end)
    document, tables = run.file.document, sys.stderr if is_json else sys.stdout
    if run.file.path:
        print(run.file.path, file=tables)
    print(report.terminal(document, tables.isatty()), file=tables, flush=True)
    if is_json:
        found = {"ratios": ratios(document), "parity": report.parity(document)}
        found["rows"] = {name: part.get("rows", []) for name, part in document["parts"].items()}
        facts = {name: document[name] for name in ("machine", "setting", "command")}
        print(json.dumps({**found, **facts, "seconds": round(time.monotonic() - begin, 1)}))
    if left:
        say(f"left: {', '.join(left)}; the same command measures them")
    check(document)
    return GateFailed.exit_code if left else 0


def measure(run: BenchRun, parts: Iterable[Measurement], end: float) -> list[str]:
    """Measures what is not there yet while the clock allows; the names of the parts that are left."""
    run.file.give_up_broken()
    left = []
    for part in parts:
        if results.is_settled(run.file.document, part.name):
            continue
        if time.monotonic() + part.least_seconds > end:
            left.append(part.name)
            continue
        run.file.begin(part.name)
        begin = time.perf_counter()
        try:
            rows = part.rows(run)
        except (KeyboardInterrupt, SystemExit):
            run.file.forgive(part.name)
            raise
        seconds = time.perf_counter() - begin
        if any(row.get("is_left") for row in rows):
            run.file.leave(part.name, rows)
            left.append(part.name)
            continue
        run.file.store(part.name, rows, seconds)
        say(f"{part.name}: {part.title}, {seconds:.0f} s")
    return left


def failed(document: dict[str, Any]) -> list[str]:
    """A line for every failed row, and for every part that never ended."""
    parts = document["parts"].items()
    lines = [f"part {name} did not end" for name, part in parts if part["status"] == "broken"]
    for name, row in ((name, row) for name, part in parts for row in part.get("rows", [])):
        if row.get("status") == "failed":
            which = next(str(row[key]) for key in ("peer", "stage", "op", "ranks") if key in row)
            lines.append(f"{name}, {which}: {row['why']}")
    return lines


def check(document: dict[str, Any]) -> None:
    """Raises GateFailed where a row failed."""
    if lines := failed(document):
        say("\n".join(lines))
        raise GateFailed(
            f"bench: {len(lines)} rows failed, first {lines[0]}",
            "what failed was not timed; `python -m datasetdm_fast.verify` shows where it differs",
        )
