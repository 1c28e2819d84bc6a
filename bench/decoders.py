"""Decoders of a folder, for comparisons that need no opened engine."""

from pathlib import Path

from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.engine.decoders.config import find_decoders
from datasetdm_fast.engine.decoders.trunk import Decoder


def load_decoders(folder: str | Path) -> dict[str, Decoder]:
    """The decoders of a folder, by the labels they make; `demo` is that of the demo model."""
    found = find_decoders(folder)
    return {label: load_decoder(found[label]) for label in found.labels}
