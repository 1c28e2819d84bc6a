"""Who makes labelled samples how fast, and the ratios between them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from bench.peers import OURS, PEERS
from bench.report import charts
from bench.report.results import rows_of
from bench.report.tables import Row, Table, figure, memory, number, share, span, spread_of, text, unsteady
from bench.rows.ladder import TECHNIQUES
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.race import race, ratio

BUILT = ("diffusers-compiled", "tensorrt")  # for minutes, before anything of them is timed
RATIOS = {  # name -> (who is faster, than whom)
    "fast_vs_torch": ("ours", "torch"),
    "fast_vs_upstream": ("ours", "upstream"),
    "fast_vs_diffusers_best": ("ours", "diffusers"),
    "fast_vs_diffusers_tuned": ("ours", "diffusers-tuned"),
    "fast_vs_diffusers_1": ("ours", "diffusers-1"),
    "fast_vs_diffusers_compiled": ("ours", "diffusers-compiled"),
    "fast_vs_ort": ("ours", "ort"),
    "fast_vs_openvino": ("ours", "openvino"),
    "fast_1_vs_openvino_1": ("ours-1", "openvino-1"),
    "bf16_vs_openvino_bf16": ("ours-bf16", "openvino-bf16"),
    "bf16_vs_torch": ("ours-bf16", "torch"),
}


def rows(run: BenchRun) -> Rows:
    """The rows of all peers, which race together with the techniques of the ladder where those are asked for."""
    techniques = tuple(TECHNIQUES) if run.races_ladder else ()
    names = tuple(dict.fromkeys((*run.peers, *techniques)))
    found = race(run, names, {**TECHNIQUES, **PEERS}, without_labels=not run.setting.quick)
    run.ladder = [row | {"title": TECHNIQUES[one].title} for one in techniques for row in found if row["peer"] == one]
    return [row for row in found if row["peer"] in run.peers]


def ratios(document: dict[str, Any]) -> dict[str, float]:
    """The speed-ups that programs read, of the peers that were timed: pair by pair where all took turns in one race;
    where each raced against ours alone, by what ours was faster than both.
    """
    timed = (row for row in rows_of(document, "peers") if row.get("status") == "ok" and "seconds_per_image" in row)
    found = {row["peer"]: row for row in timed}
    is_one_race = "peers" in document["parts"]
    compared = ratio if is_one_race else ratio_over_ours
    return {
        name: compared(found[first], found[second])
        for name, (first, second) in RATIOS.items()
        if first in found and second in found
        if is_one_race or all("ours_over" in found[peer] for peer in (first, second))
    }


def ratio_over_ours(first: Row, second: Row) -> float:
    """How many times as many images the first makes as the second, each by its own pairs with ours."""
    return round(second["ours_over"]["median"] / first["ours_over"]["median"], 3)


def method(row: Row) -> str:
    return row["title"] + (f" (unsteady: {why})" if (why := unsteady(row)) else "")


def speedup(row: Row, times: str) -> str:
    """How many times as fast ours is as a peer, by the times of that name; of ours in another precision, itself over
    the usual one.
    """
    usual = row.get("ours_dtype", "fp32")
    if row["peer"] == OURS or times not in row:
        return "" if row["peer"] == OURS else span(None)
    if row["peer"].startswith(f"{OURS}-") and row["dtype"] != usual:
        return f"{number(1 / row[times]['median'])}× as fast as in {usual}"
    return span(row[times], unit="×") + (f" in {row['dtype']}" if "beside" in row else "")


def our_speedup(row: Row) -> str:
    return speedup(row, "ours_over")


def our_call_speedup(row: Row) -> str:
    return speedup(row, "call_over")


COLUMNS = {"method": method, "precision": text("dtype"), "batch": text("batch")}
COLUMNS |= {"images/s": figure("images_per_second"), "s/image": spread_of("seconds_per_image")}
COLUMNS |= {"s/image without labels": spread_of("images_alone_s"), "s/UNet call": spread_of("call_s")}
COLUMNS |= {"TFLOP/s": figure("tflops")}
COLUMNS |= {"share of peak": share("share_of_products"), "memory": memory(), "J/image": figure("joules_per_image")}
COLUMNS |= {"load": figure("load_s", unit=" s", digits=2), "first batch": figure("first_s", unit=" s", digits=2)}
COLUMNS |= {"our speed-up": our_speedup, "in a UNet call": our_call_speedup}
MEASUREMENT = Measurement(
    "peers", "Throughput of labelled samples", rows, (Table(COLUMNS, reason_at=3),), {"peers": charts.peers}
)


def race_of_images(run: BenchRun, names: Sequence[str]) -> Rows:
    """The race of the first one, with the times of images without labels where that is timed so."""
    return race(run, names, without_labels=PEERS[names[0]].draws, is_of_first=True)


def one_by_one(
    names: Iterable[str], raced: Callable[[BenchRun, Sequence[str]], Rows] = race_of_images
) -> tuple[Measurement, ...]:
    """Each peer against ours in a part of its own, so that an interrupted run has what was done."""

    def against_ours(name: str) -> Measurement:
        return replace(
            MEASUREMENT,
            name=f"peers {name}",
            title=f"{PEERS[name].title}, in turn with ours",
            rows=lambda run: raced(run, tuple(dict.fromkeys((name, PEERS[name].beside)))),
            least_seconds=400 if name in BUILT else 120,
        )

    return tuple(against_ours(name) for name in names)
