"""`generate` as a user starts it, with four kinds of labels and all files: images a second over the later half of its
batches, memory, power and clock meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.machine.measure import mib
from bench.rows import peers
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.one_race import own_the_device
from datasetdm_fast.engine.engines.device import half_of

PEER = "ours-run"
TITLE = "datasetdm_fast, a whole run of `generate`"
NUMBER, BATCH = {True: 6, False: 256}, {True: 2, False: 32}  # quick or not
EVERY = 0.5  # seconds between samples of the GPU's state
LEAST_SECONDS = 95.0
ERROR = 400  # last characters of what a failed run said

State = dict[str, float]


def rows(run: BenchRun) -> Rows:
    """One row, also of a run that the clock cut after its second batch."""
    own_the_device(run)
    quick, recipe = run.setting.quick, run.setting.recipe
    batch = BATCH[quick]
    row: dict[str, Any] = {"peer": PEER, "title": TITLE, "batch": batch}
    before = state(run)
    with tempfile.TemporaryDirectory() as folder:
        out, said, prompts = (Path(folder, name) for name in ("run", "said", "prompts.txt"))
        prompts.write_text("".join(f"{request.prompt}\n" for request in run.setting.requests))
        command = [sys.executable, "-m", "datasetdm_fast.generate", "--model", run.setting.model.name]
        command += ["--number", str(NUMBER[quick]), "--batch-size", str(batch), "--device", str(run.setting.device)]
        command += ["--prompts", str(prompts), "--allow-unnamed"]
        command += ["--steps", str(recipe.facts["steps"]), "--task", ",".join(recipe.tasks), "--quiet", "--json"]
        if run.setting.device.type == "cuda":  # `auto` would first make samples with the fp32 reference
            command += ["--dtype", half_of(run.setting.device)]
        begin = time.monotonic()
        with said.open("w") as log:
            process = subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=subprocess.STDOUT)
            try:
                samples = watch(run, process)
                is_cut = process.poll() is None
            finally:
                process.kill()
                process.wait()
        row |= {"seconds": round(time.monotonic() - begin, 1)}
        made = sorted(path.stat().st_mtime for path in (out / "images").glob("*"))
        row["images"] = len(made)
        if len(made) < 2 * batch or not (is_cut or process.returncode == 0):
            why = f"ended with {process.returncode} after {len(made)} images: {said.read_text()[-ERROR:]}"
            return [row | {"status": "failed", "why": why}]
        row["dtype"] = json.loads((out / "run.json").read_text())["engine"]["dtype"]
    row |= {"is_left": True} if is_cut else {}
    ends = later_ends(made, batch)
    row |= {"status": "ok", "images_per_second": round(rate(ends, batch), 4), "counted": batch * (len(ends) - 1)}
    row["tflops"] = float(f"{row['images_per_second'] * run.setting.flops / 1e12:.4g}")
    return [row | figures(samples, before, ends, batch)] if samples else [row]


def later_ends(made: Sequence[float], batch: int) -> Sequence[float]:
    """When the last image of each batch was written, from the middle batch on: those before wait for the first, whose
    labels are late, as what is recorded once is recorded then. A batch that was cut has no end.
    """
    ends = made[batch - 1 :: batch]
    return ends[(len(ends) - 1) // 2 :]


def rate(ends: Sequence[float], batch: int) -> float:
    """Images a second from the first of these ends to the last."""
    return batch * (len(ends) - 1) / max(ends[-1] - ends[0], 1e-9)


def state(run: BenchRun) -> State:
    """Watts, MHz and bytes in use of a GPU; empty on a CPU and where the driver does not tell."""
    if run.setting.device.type != "cuda":
        return {}
    found = machine.nvml(run.setting.device)
    values = {"watts": found.watts, "mhz": found.state()["graphics_mhz"], "used": found.memory_used}
    return {name: value for name, value in values.items() if value is not None}


def watch(run: BenchRun, process: subprocess.Popen[bytes]) -> list[tuple[float, State]]:
    """The state of the GPU at every moment until the process ends or the time is up."""
    found = []
    while process.poll() is None and time.monotonic() < run.end:
        if now := state(run):
            found.append((time.time(), now))
        time.sleep(EVERY)
    return found


def figures(samples: Sequence[tuple[float, State]], before: State, ends: Sequence[float], batch: int) -> dict[str, Any]:
    """Memory at most, and power and clock on average between these ends of batches."""
    busy = [one for moment, one in samples if ends[0] <= moment <= ends[-1]]
    found: dict[str, Any] = {}
    if used := [one["used"] for _, one in samples if "used" in one]:
        found["peak_mib"] = mib(int(max(used) - before.get("used", 0)))
    for name in ("watts", "mhz"):
        if values := [one[name] for one in busy if name in one]:
            found[name] = round(statistics.fmean(values))
    if "watts" in found:
        found["joules_per_image"] = round(found["watts"] / rate(ends, batch), 2)
    return found


MEASUREMENT = Measurement(
    "peers run", "A whole run of `generate`", rows, peers.MEASUREMENT.tables, least_seconds=LEAST_SECONDS
)
