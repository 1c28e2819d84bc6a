"""Ten thousand samples cost no more memory than two thousand, and a day of faults, compressed, ends with a whole data
set.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import FaultServer

from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import Ledger

HERE = Path(__file__).parent
IS_LONG = bool(os.environ.get("DATASETDM_LONG_TESTS"))
ITERATIONS, WARM, GROWTH = (10_000, 2_000, 8 * 2**20) if IS_LONG else (300, 100, 4 * 2**20)
SLOPE = 512  # bytes an iteration
IN_FLIGHT = 16  # files that writers and the ledger may hold open at one moment
SOAKED, BATCH, FAULTS = (100_000, 50, 40) if IS_LONG else (160, 4, 8)  # about so many faults in a whole run
SEED = int(os.environ.get("DATASETDM_SOAK_SEED", "0"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def slope(values: list[int]) -> float:
    """The median of the slopes between points half the series apart (Theil and Sen, thinned)."""
    half = len(values) // 2
    return statistics.median((values[k + half] - values[k]) / half for k in range(0, half, max(half // 500, 1)))


@pytest.mark.parametrize(
    "engine", ["arithmetic", pytest.param("torch", marks=pytest.mark.skipif(not IS_LONG, reason="the long form only"))]
)
def test_memory_descriptors_and_threads_stay_flat(tmp_path, engine):
    arguments = [str(ITERATIONS), str(tmp_path / "run"), *(["torch"] if engine == "torch" else [])]
    ended = subprocess.run([sys.executable, HERE / "long_run.py", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["code"] == 0 and len(told["memory"]) == ITERATIONS and told["leftovers"] == []
    warm = told["memory"][WARM:]
    print(f"{engine}: from {warm[0] / 2**20:.1f} to {max(warm) / 2**20:.1f} MiB, {slope(warm):.0f} bytes an iteration")
    assert max(warm) - warm[0] <= GROWTH
    assert not IS_LONG or slope(warm) <= SLOPE  # in a short run SQLite is still filling its cache of two megabytes
    for name in (
        "handles",
        "threads",
    ):  # a file being written at the moment of counting is no leak, one that stays open raises the least count
        counts = told[name]
        assert min(counts[-WARM:]) <= min(counts[WARM // 2 : WARM]) and max(counts) - min(counts) <= IN_FLIGHT, name


def test_a_day_of_faults_ends_with_a_whole_data_set(tmp_path):
    """Kills, full and broken disks, lost syncs and signals by a seeded schedule; the run is started again after each
    until it is done.
    """
    out, dice = tmp_path / "run", random.Random(SEED)
    server = FaultServer(tmp_path)
    line = ("--number", SOAKED, "--batch-size", BATCH, "--dtype", "fp32", "--quiet")  # else each start imports torch
    calls = SOAKED * 18  # about so many change the disk in an undisturbed run
    done, starts, tally = 0, 0, {}
    try:
        while True:
            starts += 1
            kind = dice.choice(("kill before", "kill after", "full", "broken", "short", "unsynced", "moment", "signal"))
            tally[kind] = tally.get(kind, 0) + 1
            if kind in ("moment", "signal"):
                ended = server.run(
                    *line,
                    out=out,
                    seconds=dice.uniform(0.01, 10.0 if IS_LONG else SOAKED / 5000),
                    signal=15 if kind == "signal" else 14,
                )
            else:
                ended = server.run(
                    *line, out=out, kind=kind, at=int(dice.expovariate(FAULTS) * calls), lasting=dice.random() < 0.5
                )
            assert ended["code"] in (0, 3, 143, None), ended
            before = done
            if (out / LEDGER).exists():
                with Ledger(out / LEDGER) as ledger:
                    done = ledger.count()
            assert done >= before, f"seed {SEED}, start {starts}: {before} samples became {done}"
            if ended["code"] == 0:
                break
            assert starts < 1000, f"seed {SEED}: no end in sight at {done} samples"
    finally:
        server.close()
    report = audit(out)
    print(f"seed {SEED}: {starts} starts, {report.done} samples, {tally}")
    assert report.findings == [] and report.done == SOAKED and report.is_complete
