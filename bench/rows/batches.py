"""How speed and memory of one UNet call change with the batch size."""

from bench.machine.measure import held
from bench.machine.work import HALVES
from bench.peers import OURS, PEERS
from bench.report import charts
from bench.report.tables import WHO, Table, figure, memory
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.race import best_batch
from datasetdm_fast.engine.engines.device import release

SWEPT = ("diffusers", OURS)


def rows(run: BenchRun) -> Rows:
    """One UNet call by batch size: what the peers that raced were tried at, else diffusers and ours alone."""
    raced = [(row, row["tried"]) for row in run.file.rows("peers") if row["status"] == "ok" and "tried" in row]
    work = HALVES * run.setting.stages["call"]
    for name in SWEPT if not raced else ():
        others, peer = held(run.setting.device), PEERS[name].build(run.setting, 1)
        raced.append(({"peer": name, "dtype": peer.dtype}, best_batch(peer, run, others)[1]))
        release()
    return [
        {"peer": row["peer"], "dtype": row["dtype"], **one, "tflops": round(work / one["call_s"] / 1e12, 4)}
        for row, tried in raced
        for one in tried
    ]


COLUMNS = {**WHO, "ms per image and call": figure("call_s", 1e3), "TFLOP/s": figure("tflops"), "memory": memory()}
MEASUREMENT = Measurement(
    "batches", "One UNet call by batch size", rows, (Table(COLUMNS),), {"batches": charts.batches}, least_seconds=60
)
