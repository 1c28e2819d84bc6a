"""Throughput of eager PyTorch with threads that spin while they wait: OpenMP decides this once for a process, and small
operations that wait often gain by it what our engine would lose.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.machine.machine import ROOT
from bench.machine.measure import spread
from bench.peers import OURS
from bench.report.tables import Table, figure, span, spread_of, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.peers import method

EAGER = ("upstream", "torch", "diffusers-1", "diffusers")
POLICY = "OMP_WAIT_POLICY"


def rows(run: BenchRun) -> Rows:
    """The race of these peers and ours in a process of its own; `ours_over` is that of ours in the race of all peers,
    whose threads sleep.
    """
    names = [name for name in EAGER if name in run.peers]
    own = [row for row in run.file.rows("peers") if row["peer"] == OURS and "seconds_per_image" in row]
    if not (names and own) or os.environ.get(POLICY) == "ACTIVE":
        return []
    setting = run.setting
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spinning.json"
        line = [sys.executable, "-m", "bench", "--parts", "peers", "--peers", ",".join((*names, OURS))]
        line += ["--model", setting.model.name, "--steps", str(run.steps), "--seconds", str(run.seconds)]
        line += ["--threads", str(torch.get_num_threads()), "--out", str(file), *(["--quick"] if setting.quick else [])]
        environment = os.environ | {POLICY: "ACTIVE"}
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(done.stderr.strip() or f"the race ended with code {done.returncode}")
        found = json.loads(file.read_text())["parts"]["peers"]["rows"]
    ours = statistics.median(own[0]["seconds_per_image"]["rounds"])
    for row in found:
        if "seconds_per_image" in row:
            row["ours_over"] = spread([seconds / ours for seconds in row["seconds_per_image"]["rounds"]])
    return found


COLUMNS = {
    "method": method,
    "precision": text("dtype"),
    "batch": text("batch"),
    "images/s": figure("images_per_second"),
}
COLUMNS |= {"s/image": spread_of("seconds_per_image")}
COLUMNS |= {"speed-up of datasetdm_fast, whose threads sleep": lambda row: span(row.get("ours_over"), unit="×")}
MEASUREMENT = Measurement(
    "spinning", "Throughput with threads that spin, in a process of its own", rows, (Table(COLUMNS, reason_at=3),)
)
