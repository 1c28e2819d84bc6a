"""From DatasetDM to datasetdm_fast, one technique at a time, each compared and timed with the others."""

from collections.abc import Iterator, Sequence

from bench.peers import PEERS, Offer, engine
from bench.peers.engine import EnginePeer
from bench.peers.upstream import Upstream, lean_decoders
from bench.report import charts
from bench.report.tables import Row, Table, figure, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.race import race, ratio
from bench.setting import Setting
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.kernels import plain


def lean_upstream(setting: Setting, batch: int) -> Upstream:
    return Upstream(setting, forms_maps=False, has_naive_decoders=False)


def in_batches(setting: Setting, batch: int) -> EnginePeer:
    """The modules of diffusers still, under our loop."""
    reference = build_engine("torch", setting.model, lean_decoders(setting), device=str(setting.device))
    return EnginePeer(reference, setting, batch)


def lean(setting: Setting, batch: int) -> EnginePeer:
    """Our networks with the operations of PyTorch."""
    device, decoders = str(setting.device), setting.reference.decoders
    return EnginePeer(FastEngine(setting.model, decoders, dtype="fp32", device=device, ops=plain), setting, batch)


# Each has every technique of those before it.
IN_FP32 = {
    "upstream": PEERS["upstream"]._replace(title="DatasetDM as written"),
    "maps once": Offer(
        "attention maps formed in one call alone", lambda setting, batch: Upstream(setting, forms_maps=False), batch=1
    ),
    "decoders": Offer("decoders project before they resize", lean_upstream, batch=1),
    "batches": Offer("16 images at a time", in_batches, batch=16),
    "lean": Offer("networks without repeated work", lean, batch=16),
}
ONE_PASS, HALF = "operations in one pass each", "16 bits"
TECHNIQUES = {
    **IN_FP32,
    "ours": PEERS["ours"]._replace(title=ONE_PASS),
    "ours-bf16": PEERS["ours-bf16"]._replace(title=HALF),
}
ON_GPU = {  # where ours has 16 bits unless told otherwise
    **IN_FP32,
    "ours-fp32": Offer(ONE_PASS, engine.named("fast", "fp32"), batch=16, must_run=True),
    "ours": PEERS["ours"]._replace(title=HALF),
}


def rows(run: BenchRun) -> Rows:
    offers = ON_GPU if run.setting.device.type == "cuda" else TECHNIQUES
    return run.ladder or race(run, tuple(offers), offers)


def with_gains(found: Sequence[Row]) -> Iterator[Row]:
    """The rows that were timed, each with its speed-up over the one before it and over the first."""
    timed = [row for row in found if row["status"] == "ok"]
    for before, row in zip([None, *timed], timed):
        is_compared = before and "ours_over" in row
        yield row | ({"over_last": ratio(row, before), "over_first": ratio(row, timed[0])} if is_compared else {})


COLUMNS = {"technique": text("title"), "precision": text("dtype"), "batch": text("batch")}
COLUMNS |= {"images/s": figure("images_per_second"), "speed-up over the row above": figure("over_last")}
COLUMNS |= {"speed-up over the first": figure("over_first")}
MEASUREMENT = Measurement(
    "ladder",
    "From DatasetDM to datasetdm_fast, one technique at a time",
    rows,
    (Table(COLUMNS, with_gains),),
    {"ladder": charts.ladder},
    least_seconds=120,
)
