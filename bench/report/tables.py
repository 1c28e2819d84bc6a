"""Result files in words: tables for a terminal and for Markdown, and the ratios that matter."""

from __future__ import annotations

import statistics
from typing import Any

from bench.report.results import rows_of

RATIOS = {  # name -> (who is faster, than whom)
    "fast_vs_torch": ("ours", "torch"),
    "fast_vs_upstream": ("ours", "upstream"),
    "fast_vs_diffusers_best": ("ours", "diffusers"),
    "fast_vs_diffusers_1": ("ours", "diffusers-1"),
    "fast_vs_diffusers_compiled": ("ours", "diffusers-compiled"),
    "bf16_vs_torch": ("ours-bf16", "torch"),
}


def peers(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["peer"]: row for row in rows_of(document, "peers")}


def ratios(document: dict[str, Any]) -> dict[str, float]:
    """How many times as many images the first makes as the second: the median over pairs of neighbours in time."""
    found = {}
    for name, (first, second) in RATIOS.items():
        rows = peers(document)
        if all(rows.get(one, {}).get("status") == "ok" and "ours_over" in rows[one] for one in (first, second)):
            found[name] = ratio(rows[first], rows[second])["median"]
    return found


def ratio(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Least, median and most of the second's seconds an image over the first's, pair by pair."""
    ours_over = [row["ours_over"]["rounds"] for row in (first, second)]
    pairs = [theirs / own for own, theirs in zip(*ours_over)]
    return {"least": round(min(pairs), 3), "median": round(statistics.median(pairs), 3), "most": round(max(pairs), 3)}


def parity(document: dict[str, Any]) -> str:
    statuses = [row.get("status") for part in document["parts"].values() for row in part.get("rows", [])]
    return "fail" if "failed" in statuses else "pass"


MOST_LAYERS = 12
Table = tuple[list[str], list[list[str]]]  # head, rows


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A figure with so many significant digits, a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}{unit}"
    text = f"{value:.{digits}g}"
    return (f"{float(text):,.0f}" if "e" in text else text) + unit


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def span(values: dict[str, Any] | None, scale: float = 1.0, unit: str = "") -> str:
    """Median, and least and most in brackets."""
    if not values:
        return "–"
    return (
        f"{number(values['median'] * scale)}{unit} ({number(values['least'] * scale)}–{number(values['most'] * scale)})"
    )


PEER_HEAD = [
    "who",
    "type",
    "batch",
    "images/s",
    "seconds an image",
    "images alone",
    "TFLOP/s",
    "of the products' limit",
]
PEER_HEAD += ["memory", "J/image", "load", "first", "ours is"]


def peer_table(document: dict[str, Any]) -> Table:
    return PEER_HEAD, [peer_row(row) for row in rows_of(document, "peers")]


def peer_row(row: dict[str, Any]) -> list[str]:
    who = [row["title"], row.get("dtype", ""), str(row.get("batch", ""))]
    if row["status"] != "ok":
        said = "FAILED" if row["status"] == "failed" else "not here"
        return [*who, f"{said}: {row['why']}", *[""] * (len(PEER_HEAD) - 4)]
    times = [
        number(row["images_per_second"]),
        span(row["seconds_per_image"]),
        span(row.get("images_alone_s"), unit=" s"),
    ]
    rates = [number(row["tflops"]), percent(row["share_of_products"])]
    memory = f"{row['peak_mib']:,.0f} MiB" if "peak_mib" in row else "–"
    costs = [memory, number(row["joules_per_image"]), number(row["load_s"], 2, " s"), number(row["first_s"], 2, " s")]
    return [*who, *times, *rates, *costs, "" if row["peer"] == "ours" else span(row.get("ours_over"), unit=" x")]


def stage_table(document: dict[str, Any]) -> Table:
    head = ["stage", "as written, ms an image", "ours, ms an image", "ratio", "TFLOP/s", "of the products' limit"]
    rows = []
    for row in rows_of(document, "stages"):
        if row["status"] != "ok":
            rows.append([row["stage"], f"FAILED: {row['why']}", "", "", "", ""])
            continue
        times = [span(row.get("naive_s"), 1e3), span(row["ours_s"], 1e3), span(row.get("ratio"))]
        rows.append([row["stage"], *times, number(row.get("tflops")), percent(row.get("share_of_products"))])
    return head, rows


def op_table(document: dict[str, Any]) -> Table:
    """The rows that were timed, and the failed ones."""
    head = [
        "operation",
        "form",
        "case",
        "plain, ms",
        "this form, ms",
        "ratio",
        "GB/s",
        "TFLOP/s",
        "bound by",
        "of that limit",
        "error",
    ]
    rows = []
    for row in rows_of(document, "ops"):
        who = [row["op"], row["form"], row["case"]]
        if row["status"] == "failed":
            rows.append([*who, f"FAILED: {row['why']}", *[""] * 7])
        elif "form_s" in row:
            times = [number(1e3 * row["plain_s"]), number(1e3 * row["form_s"]), number(row["ratio"])]
            rates = [
                number(row["gbps"]),
                number(row["tflops"]),
                row["bound"],
                percent(row["share"]),
                f"{row['error']:.0e}",
            ]
            rows.append([*who, *times, *rates])
    return head, rows


def layer_table(document: dict[str, Any]) -> Table:
    """The shapes that most of the work is in."""
    head = [
        "layer",
        "times",
        "of the work",
        "type",
        "batch",
        "ms an image",
        "TFLOP/s",
        "GB/s",
        "bound by",
        "of that limit",
    ]
    rows = []
    for row in rows_of(document, "layers")[:MOST_LAYERS]:
        rates = [
            number(1e3 * row["layer_s"]),
            number(row["tflops"]),
            number(row["gbps"]),
            row["bound"],
            percent(row["share"]),
        ]
        rows.append([row["layer"], str(row["count"]), percent(row["of_work"]), row["dtype"], str(row["batch"]), *rates])
    return head, rows


def batch_table(document: dict[str, Any]) -> Table:
    head = ["who", "type", "batch", "ms an image and call", "TFLOP/s", "memory"]
    return head, [
        [
            row["peer"],
            row["dtype"],
            str(row["batch"]),
            number(1e3 * row["call_s"]),
            number(row["tflops"]),
            f"{row['peak_mib']:,.0f} MiB",
        ]
        for row in rows_of(document, "batches")
    ]


def chunk_table(document: dict[str, Any]) -> Table:
    rows = rows_of(document, "chunks")
    head = ["images decoded at once", "ms an image", "TFLOP/s", "memory"]
    return head, [
        [str(row["images"]), number(1e3 * row["image_s"]), number(row["tflops"]), f"{row['peak_mib']:,.0f} MiB"]
        for row in rows
    ]


def profile_table(document: dict[str, Any]) -> Table:
    rows = rows_of(document, "profile")
    groups = list(rows[0]["shares"]) if rows else []
    head = ["one UNet call of", "type", "batch", "ms an image", *groups]
    return head, [
        [
            row["peer"],
            row["dtype"],
            str(row["batch"]),
            number(1e3 * row["call_s"]),
            *(percent(row["shares"][group]) for group in groups),
        ]
        for row in rows
    ]


def ladder_table(document: dict[str, Any]) -> Table:
    head = ["rung", "type", "batch", "images/s", "over the rung before", "over the first"]
    rows, good = [], [row for row in rows_of(document, "ladder") if row["status"] == "ok"]
    for before, row in zip([None, *good], good):
        steps = (
            ["", ""]
            if before is None
            else [number(ratio(row, before)["median"]), number(ratio(row, good[0])["median"])]
        )
        rows.append([row["title"], row["dtype"], str(row["batch"]), number(row["images_per_second"]), *steps])
    return head, rows


def quality_table(document: dict[str, Any]) -> Table:
    head = [
        "option",
        "calls",
        "images/s",
        "over exact",
        "PSNR",
        "mask IoU",
        "instance IoU",
        "depth AbsRel",
        "keypoints",
        "persons lost",
    ]
    rows = []
    for row in rows_of(document, "quality"):
        labels = [
            number(row["mask_iou"]),
            number(row["instance_iou"]),
            number(row["depth_absrel"]),
            number(row["keypoint_px"], unit=" px"),
        ]
        lost = f"{row['persons_lost']} of {row['images']}"
        rows.append(
            [
                row["option"],
                str(row["calls"]),
                number(row["images_per_second"]),
                span(row["over_exact"]),
                number(row["psnr_db"], unit=" dB"),
                *labels,
                lost,
            ]
        )
    return head, rows


def scale_table(document: dict[str, Any]) -> Table:
    rows = [row for row in rows_of(document, "scale") if "ms" in row]
    parts = list(rows[0]["ms"]) if rows else []
    head = ["images made", "pixels", *(f"{part}, ms" for part in parts), "index and gallery, ms", "resident"]
    return head, [
        [
            f"{row['images']:,}",
            str(row["pixels"]),
            *(number(row["ms"][part]) for part in parts),
            number(row.get("closing_ms")),
            f"{row['resident_mib']:,.0f} MiB",
        ]
        for row in rows
    ]


def scene_table(document: dict[str, Any]) -> Table:
    rows = [row for row in rows_of(document, "scale") if "written" in row]
    head = ["pixels", "images/s encoded and written", "core ms an image"]
    return head, [[str(row["pixels"]), number(row["images_per_second"]), number(row["core_ms"])] for row in rows]


def disk_table(document: dict[str, Any]) -> Table:
    rows = [row for row in rows_of(document, "scale") if "commit_ms" in row]
    head = ["commit of a batch, ms", "rows", "one sample's files made durable, ms", "files"]
    return head, [
        [number(row["commit_ms"]), str(row["rows"]), number(row["publish_ms"]), str(row["files"])] for row in rows
    ]


def rank_table(document: dict[str, Any]) -> Table:
    rows = [row for row in rows_of(document, "scale") if "ranks" in row]
    return ["ranks", "images/s", "over one"], [
        [
            str(row["ranks"]),
            number(row["images_per_second"]),
            number(row["images_per_second"] / rows[0]["images_per_second"]),
        ]
        for row in rows
    ]


TABLES = {
    "peers": ("Who makes labelled samples how fast", peer_table),
    "stages": ("Stage by stage", stage_table),
    "ops": ("Operations against their plain form", op_table),
    "layers": ("The largest layers of the UNet by themselves", layer_table),
    "batches": ("One UNet call by batch size", batch_table),
    "chunks": ("Image decoding by how many at once", chunk_table),
    "profile": ("Where the time of one UNet call goes", profile_table),
    "ladder": ("From DatasetDM to us", ladder_table),
    "quality": ("Ways that change the result", quality_table),
    "scale": (
        "The driver's own cost: core milliseconds an image with an engine that computes next to nothing, files in "
        "memory",
        scale_table,
    ),
    "scenes": ("Encoding and writing rendered scenes with four kinds of labels, files in memory", scene_table),
    "disk": ("Waiting for the disk", disk_table),
    "ranks": ("Ranks of one thread each", rank_table),
}


RED, PLAIN = "\x1b[31m", "\x1b[0m"


def aligned(table: Table, is_coloured: bool = False) -> str:
    """Columns for a terminal; a failed row says why instead of its figures, in red where there are colours."""
    head, rows = table
    whole = [row for row in rows if not any(cell.startswith(("FAILED", "not here")) for cell in row)]
    widths = [max(map(len, column)) for column in zip(head, *whole)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(f"{RED}{line}{PLAIN}" if is_coloured and "FAILED: " in line else line for line in lines)


def markdown(table: Table) -> str:
    head, rows = table
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def limit_line(document: dict[str, Any]) -> str:
    """The machine and its measured limits in one sentence."""
    found, machine = rows_of(document, "limits")[0], document["machine"]
    products = ", ".join(f"{rate:g} TFLOP/s in {name}" for name, rate in found["tflops"].items())
    exps = f", {found['gexps']:g} G exponentials/s" if found["gexps"] else ""
    where = f"{machine['device']}, torch {machine['versions']['torch']}, commit {machine['commit']}"
    return f"{where}: matrix products {products}; copies {found['gbps']:g} GB/s{exps}"


def setting_line(document: dict[str, Any]) -> str:
    setting = document["setting"]
    weights = "" if setting["trained"] else ", seeded weights"
    labels = ", ".join(setting["tasks"])
    return f"{setting['model']}{weights}, {setting['size']} pixels, {setting['calls']} UNet calls, {setting['tflop_per_image']:g} TFLOP an image; labels: {labels}"


def terminal(document: dict[str, Any], is_coloured: bool = False) -> str:
    parts = [limit_line(document), setting_line(document)]
    for title, build in TABLES.values():
        table = build(document)
        if table[1]:
            parts.append(f"{title}\n{aligned(table, is_coloured)}")
    names = ", ".join(f"{name} {value:g}" for name, value in ratios(document).items())
    return "\n\n".join([*parts, f"parity {parity(document)}{'; ' + names if names else ''}"])
