"""The files that --lora names, which are looked for before libraries and weights are loaded."""

from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused

LARGEST_SCALE = 100.0


def parse_adapter(text: str) -> tuple[Path, float]:
    """File and scale of FILE[:SCALE]."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        return Path(text), 1.0
    if not abs(scale) <= LARGEST_SCALE:
        raise Refused(
            f"--lora {text}: the scale is {number}, expected a number up to {LARGEST_SCALE:g}",
            "Write FILE:0.8 for a scale of 0.8.",
        )
    return Path(name), scale


def find_adapter(text: str) -> tuple[Path, float]:
    """As `parse_adapter`, of a file that is there."""
    path, scale = parse_adapter(text)
    if not path.is_file():
        raise Missing(
            f"--lora {path}: no such file{storage.named_alike(path)}",
            "Check the path; a scale follows the file: FILE:0.8",
        )
    return path, scale
