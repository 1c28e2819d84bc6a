"""Every operation in the forms that this machine's engine uses, each against its reference."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers import OURS, PEERS
from bench.report.tables import Row, Table, figure, share, text
from bench.rows import ops
from bench.rows.measurement import BenchRun, Measurement, Rows


def rows(run: BenchRun) -> Rows:
    engine = PEERS[OURS].build(run.setting, 1).engine
    seconds, dtype = 0.02 if run.setting.quick else 0.1, engine.fingerprint()["dtype"]
    return ops.rows(run.setting.device, dtype, run.limits, seconds)


def shown(found: Sequence[Row]) -> list[Row]:
    """The rows that were timed, and the failed ones."""
    return [row for row in found if row["status"] == "failed" or "form_s" in row]


COLUMNS = {"operation": text("op"), "form": text("form"), "case": text("case")}
COLUMNS |= {"reference, ms": figure("plain_s", 1e3), "this form, ms": figure("form_s", 1e3)}
COLUMNS |= {"speed-up": figure("ratio", unit="×"), "GB/s": figure("gbps"), "TFLOP/s": figure("tflops")}
COLUMNS |= {"bound by": text("bound"), "share of limit": share("share"), "error": lambda row: f"{row['error']:.0e}"}
MEASUREMENT = Measurement(
    "ops", "Operations against their reference", rows, (Table(COLUMNS, shown, reason_at=3),), least_seconds=60
)
