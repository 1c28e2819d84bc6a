"""The fastest block sizes of every kernel and the fastest form of every operation on one GPU; a size is timed only
after it agreed with the reference.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels.files import FILES
from bench.kernels.inputs import BATCH, sizes_of
from bench.machine import machine
from bench.machine.limits import device_rate
from bench.machine.measure import distance
from bench.options import say
from bench.peers.upstream import arithmetic
from bench.report import results
from bench.report.results import BUDGET, ResultFile, is_settled, rows_of
from bench.rows.ops import RandomInputs, limit_of, outputs, placed
from datasetdm_fast.engine.engines.fast import DTYPES
from datasetdm_fast.kernels import OPS, fused, plain
from datasetdm_fast.kernels.described_product import SUFFIX
from datasetdm_fast.kernels.launch import names_of

GAIN = 0.98  # of the time before; less is noise
LARGEST_OPTIONS = {"num_warps": 16, "num_stages": 5, "PROGRAMS": 4}
COUNTED = {"num_stages": 1, "PROGRAMS": 0}  # options that go by ones, from these on; PROGRAMS 0 is a program a tile
WINDOW = 0.03  # seconds a size is timed in each case


@dataclass(frozen=True)
class Judged:
    """A case with the answer in fp32, and how far from it another may lie."""

    reason: str
    inputs: tuple
    answer: list[Tensor]
    limit: float

    def seconds(self, form: Callable, device: torch.device) -> float:
        """Of one call; infinite where the form fails or says something else."""
        try:
            found = outputs(form, self.inputs)
            if not max(distance(a, b) for a, b in zip(found, self.answer, strict=True)) <= self.limit:
                return math.inf
            return 1 / device_rate(functools.partial(form, *self.inputs), device, WINDOW)
        except Exception:  # whatever compiler and driver throw at sizes that do not fit; such sizes are not chosen
            return math.inf


def running() -> dict[str, tuple[str, ...]]:
    """The operations whose kernels a run on a GPU launches, each with the precisions it is launched in."""
    kernels = json.loads(BUDGET.read_text(encoding="utf-8"))["kernels"]
    return {op: tuple(types) for op, types in kernels.items()}


def run(
    device: torch.device, ops: Mapping[str, Sequence[str]], minutes: float, out: str, command: str
) -> dict[str, Any]:
    """The result file after every operation that there was time for, each with its rows."""
    described = machine.describe(device)
    head = {"suite": "tune", "date": results.now(), "command": command}
    head |= {"machine": described, "setting": {"batch": BATCH}}
    path = Path(out) if out else results.default_path(described, "tuned-")
    file = ResultFile.open(path, head, goes_on=True)
    file.give_up_broken()
    end = time.monotonic() + 60 * minutes
    todo = [
        (op, dtype) for op, dtypes in ops.items() for dtype in dtypes if not is_settled(file.document, f"{op} {dtype}")
    ]
    for place, (op, dtype) in enumerate(todo):
        share = (end - time.monotonic()) / (len(todo) - place)
        if share <= 0:
            say(f"left: {', '.join(' '.join(one) for one in todo[place:])}; the same command resumes")
            break
        file.begin(f"{op} {dtype}")
        begin = time.perf_counter()
        with arithmetic(has_tf32=False):
            rows = list(op_rows(op, dtype, device, judged_cases(op, dtype, device), time.monotonic() + share))
        file.store(f"{op} {dtype}", rows, time.perf_counter() - begin)
        say(f"{op} {dtype}: {time.perf_counter() - begin:.0f} s")
    return file.document


def judged_cases(op: str, dtype: str, device: torch.device) -> list[Judged]:
    """The cases of an engine at its sizes; one whose reference does not fit into memory is left out."""
    found = []
    for reason, drawn in sizes_of(op)(RandomInputs(device)):
        inputs = placed(drawn, device, DTYPES[dtype])
        try:
            answer, limit = limit_of(OPS[op].reference, inputs, dtype)
        except torch.OutOfMemoryError:
            continue
        found.append(Judged(reason, inputs, answer, limit))
    return found


def op_rows(
    op: str, dtype: str, device: torch.device, cases: Sequence[Judged], until: float
) -> Iterator[dict[str, Any]]:
    """A row for each of its kernels with the sizes that proved fastest, then one for each form and case; a kernel by
    descriptors, where this GPU has a row of it, is timed after the one that it is launched instead of.
    """
    form, bits = getattr(fused, op), 8 * DTYPES[dtype].itemsize
    name = names_of(device)[0] if device.type == "cuda" else "untuned"
    tables = [file.BLOCKS for file in FILES if getattr(file, "BLOCKS", None)]
    kernels = [
        (table.setdefault(name, {}), kernel, dict(sizes))
        for table in tables
        for (kernel, width), sizes in (table["untuned"] | table.get(name, {})).items()
        if width == bits and kernel.split()[0] == op
    ]
    for table, kernel, _ in kernels:
        if kernel.endswith(SUFFIX):
            del table[kernel, bits]
    for place, (table, kernel, sizes) in enumerate(kernels):
        table[kernel, bits] = sizes
        before, now = total(form, cases, device), time.monotonic()
        end = now + (until - now) / (len(kernels) - place)
        best, after = descend(table, (kernel, bits), sizes, lambda: total(form, cases, device), before, end)
        yield {"kernel": kernel, "bits": bits, "sizes": best, "before_s": finite(before), "after_s": finite(after)}
    for name, one in {"fused": form, "plain": getattr(plain, op)}.items():
        for case in cases:
            facts = {"op": op, "form": name, "dtype": dtype, "case": case.reason}
            yield facts | {"form_s": finite(case.seconds(one, device))}


def total(form: Callable, cases: Sequence[Judged], device: torch.device) -> float:
    return sum(case.seconds(form, device) for case in cases)


def descend(
    table: dict[tuple[str, int], dict[str, int]],
    key: tuple[str, int],
    sizes: dict[str, int],
    cost: Callable[[], float],
    before: float,
    until: float,
) -> tuple[dict[str, int], float]:
    """From `sizes` to a better neighbour as long as there is one and time is left; `table` is left holding the best."""
    best, least, seen = sizes, before, {tuple(sizes.items())}
    while candidate := next((one for one in neighbours(best) if tuple(one.items()) not in seen), None):
        if time.monotonic() > until:
            break
        seen.add(tuple(candidate.items()))
        table[key] = candidate
        taken = cost()
        if taken < GAIN * least:
            best, least = candidate, taken
    table[key] = best
    return best, least


def neighbours(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The same sizes with one of them halved or doubled, stages one more or less."""
    for name, value in sizes.items():
        if name == "enable_fp_fusion":
            continue
        for other in (value - 1, value + 1) if name in COUNTED else (value // 2, 2 * value):
            if COUNTED.get(name, 1) <= other <= LARGEST_OPTIONS.get(name, 1024):
                yield {**sizes, name: other}


def finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def table_lines(document: dict[str, Any]) -> list[str]:
    """What goes into BLOCKS and DEVICES of each kernel's file, as Python."""
    rows = [row for part in document["parts"] for row in rows_of(document, part)]
    machine, forms = document["machine"], fastest(rows)
    device = f"sm_{machine['capability'].replace('.', '')}" if "capability" in machine else machine["device"]
    lines = []
    for op, form in forms.items():
        lines.append(f"kernels/{op}.py, DEVICES[{device!r}] = {form!r}, BLOCKS[{device!r}] =")
        for row in rows:
            if row.get("kernel", "").split()[:1] == [op] and row["after_s"] is not None:
                sizes = ", ".join(f"{name}={value}" for name, value in row["sizes"].items() if name.isupper())
                counts = f"{row['sizes']['num_warps']}, {row['sizes']['num_stages']}"
                lines.append(f'    | block_sizes("{row["kernel"]}", {counts}, bits=({row["bits"]},), {sizes})')
    return lines


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The form of each operation with the least time over all cases and types; one that fails in any of them is out."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if "form" in row:
            forms = times.setdefault(row["op"], {})
            forms[row["form"]] = forms.get(row["form"], 0.0) + (math.inf if row["form_s"] is None else row["form_s"])
    return {op: min(forms, key=forms.get) for op, forms in times.items()}
