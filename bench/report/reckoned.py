"""The section about GPUs that nobody had: what bench/gpu_budget.json says of a call and of a whole image."""

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
        "**Estimated, not measured** (`python -m bench rehearse --budget`): Stable Diffusion 1.4 in fp16 at 512 "
        f"pixels, on an H100 with {document['roofline']}. In batches of {BATCH}, an image with four kinds of "
        f"labels takes {milliseconds_per_image(calls):.0f} ms ({CALLS + 1} calls), {images_per_second():g} per second, "
        "with sampler steps, post-processing and copies.\n\n"
    ) + markdown((HEAD, rows))


def images_per_second() -> float:
    """Of one H100, with four kinds of labels, to a tenth."""
    return round(1e3 / milliseconds_per_image(json.loads(BUDGET.read_text(encoding="utf-8"))["calls"]), 1)


def milliseconds_per_image(calls: Mapping[str, Any]) -> float:
    call, *others = (calls[f"{name}, {BATCH} images"]["milliseconds"] for name in WHOLE)
    beside, ends = (calls[f"{AROUND} {name}, {BATCH} images"]["milliseconds"] for name in COPIED)
    return (CALLS * call + sum(others) + (CALLS + 1) * beside + ends) / BATCH
