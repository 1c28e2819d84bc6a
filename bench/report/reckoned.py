"""What bench/gpu_budget.json reckons for a call and a whole image, from rates that kernels reached on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bench.machine.machine import ROOT
from bench.report.tables import markdown, number

BUDGET = ROOT / "bench" / "gpu_budget.json"
CALLS, BATCH = 50, 8  # of an image besides the captured one, and the images of a batch
WHOLE = ("UNet call", "captured call", "label decoders", "autoencoder")
COPIED = ("UNet call", "label decoders and autoencoder")
AROUND = "around the"  # begins the names of what is launched beside the graphs of calls: copies, steps, post-processing
HEAD = ["call", "launches", "GB", "TFLOP", "ms, estimated"]


def section() -> str:
    document = json.loads(BUDGET.read_text(encoding="utf-8"))
    calls = document["calls"]
    rows = [
        [name, f"{one['launches']:,}", number(one["gigabytes"]), number(one["tflop"]), number(one["milliseconds"])]
        for name, one in calls.items()
        if not name.startswith(AROUND)
    ]
    return (
        "**Estimated** (`python -m bench rehearse --budget`) for the present code: from launches, bytes and operations "
        f"of the same size, and what kernels reached on that GPU: {document['roofline']}. In batches of {BATCH}, an "
        f"image with four kinds of labels takes {milliseconds_per_image(calls):.0f} ms, {images_per_second():g} per "
        "second, with sampler steps, post-processing and copies.\n\n"
    ) + markdown((HEAD, rows))


def images_per_second() -> float:
    """Of one H200, with four kinds of labels, to a tenth."""
    return round(1e3 / milliseconds_per_image(json.loads(BUDGET.read_text(encoding="utf-8"))["calls"]), 1)


def milliseconds_per_image(calls: Mapping[str, Any]) -> float:
    call, *others = (calls[f"{name}, {BATCH} images"]["milliseconds"] for name in WHOLE)
    beside, ends = (calls[f"{AROUND} {name}, {BATCH} images"]["milliseconds"] for name in COPIED)
    return (CALLS * call + sum(others) + (CALLS + 1) * beside + ends) / BATCH
