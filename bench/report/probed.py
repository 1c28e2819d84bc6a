"""What `python -m bench probe` measured on a GPU: whole calls by batch size, and the kernels that take longest."""

from __future__ import annotations

import re
from typing import Any

from bench.report.results import rows_of
from bench.report.tables import Cells, markdown, number

CALLS = 50  # of an image besides the captured one
NONE = "No GPU has been probed yet: `python -m bench probe`."
BATCH_OF = re.compile(r"batch of (\d+), (\w+)")
STAGES = ["images in a batch", "UNet call", "captured call", "label decoders", "image decoder"]
IN_ALL = [f"an image of {CALLS + 1} calls"]
LISTS = {8: "longest", 32: "longest_32"}  # images of a call -> the part that lists its kernels
SHOWN = 12  # kernels
LIBRARY = re.compile(r"_implicit_gemm_\w+?_tilesize")  # of cuDNN's names, what all of its convolutions have


def stages(document: dict[str, Any]) -> Cells:
    """Milliseconds an image of every stage, by batch size; an image is the sum of its stages."""
    rows = []
    for row in rows_of(document, "batches"):
        taken, size = row["ms"], BATCH_OF.search(row["what"])[1]
        labels = sum(value for name, value in taken.items() if name.startswith("decoder "))
        whole = CALLS * taken["call"] + taken["captured call"] + labels + taken["autoencoder"]
        parts = (taken["call"], taken["captured call"], labels, taken["autoencoder"], whole)
        rows.append([size, *map(number, parts)])
    return [*STAGES, *IN_ALL], rows


def longest(document: dict[str, Any], part: str) -> Cells:
    """The kernels of one call that take most of its time."""
    rows = sorted(rows_of(document, part), key=lambda row: -row["ms"]["call"])[:SHOWN]
    return ["kernel", "launches", "ms"], [
        [f"`{LIBRARY.sub(' ', row['what']).strip('_')[:60]}`", str(row["count"]), number(row["ms"]["call"])]
        for row in rows
    ]


def source(document: dict[str, Any]) -> str:
    machine, precision = document["machine"], BATCH_OF.search(rows_of(document, "batches")[0]["what"])[2]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "cuda"))
    return (
        f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, {versions}, commit "
        f"{machine['commit']}; SD 1.4's size, 512 pixels, {precision}; ms an image; an image is the sum of its stages"
    )


def section(document: dict[str, Any]) -> str:
    parts = [f"{source(document)}.", markdown(stages(document))]
    for batch, part in LISTS.items():
        if rows_of(document, part):
            parts += [f"### Kernels of a UNet call of {batch} images", markdown(longest(document, part))]
    return "\n\n".join(parts)
