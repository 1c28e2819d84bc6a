"""The section about GPUs that nobody had: what bench/gpu_budget.json says of a call and of a whole image."""

from __future__ import annotations

import json

from bench.machine.machine import ROOT
from bench.report.tables import markdown, number

BUDGET = ROOT / "bench" / "gpu_budget.json"
CALLS, BATCH = 50, 8  # of an image besides the captured one, and the images of a batch
WHOLE = ("UNet call", "captured call", "label decoders", "autoencoder")
HEAD = ["call", "launches", "GB", "TFLOP", "ms, reckoned"]


def section() -> str:
    document = json.loads(BUDGET.read_text(encoding="utf-8"))
    calls = document["calls"]
    rows = [
        [name, f"{one['launches']:,}", number(one["gigabytes"]), number(one["tflop"]), number(one["milliseconds"])]
        for name, one in calls.items()
    ]
    call, *others = (calls[f"{name}, batch {BATCH}"]["milliseconds"] for name in WHOLE)
    image = (CALLS * call + sum(others)) / BATCH
    return (
        "**Reckoned, not measured**: no GPU has run this yet. `python -m bench rehearse --budget` notes every launch "
        "of a call of Stable Diffusion 1.4 in fp16 at 512 pixels on tensors without memory and divides its work by the "
        f"rates of an H100 that good libraries reach: {document['roofline']}. The tests fail when a figure rises. "
        f"A whole image of {CALLS + 1} calls with four kinds of labels would take {image:.0f} ms in batches of "
        f"{BATCH}, that is {1e3 / image:.1f} images a second.\n\n" + markdown((HEAD, rows))
    )
