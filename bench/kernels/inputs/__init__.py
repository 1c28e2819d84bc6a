"""Inputs of every operation, a file each: `cases` are those it is tested on, `sizes` those of Stable Diffusion 1.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

# Stable Diffusion 1.x at 512 pixels: cells of a side and channels of the three levels with attention, of a batch whose
# levels are projected to so many features.
LEVELS = ((64, 320), (32, 640), (16, 1280))
HEADS = 8
TOKENS = 77
BATCH = 8
FEATURES = 256
QUERIES = 100  # of upstream's decoders


class Case(NamedTuple):
    reason: str
    inputs: tuple[Any, ...]
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]  # of the output, or of each of several


def cases_of(op: str) -> list[Case]:
    """The inputs that an operation is tested on, the smallest first."""
    return import_module(f"{__name__}.{op}").cases()


def sizes_of(op: str) -> Callable[..., Iterator[tuple[str, tuple]]] | None:
    """A function of `empty`, which makes a tensor of a shape, that yields the inputs at a model's sizes, if any."""
    return getattr(import_module(f"{__name__}.{op}"), "sizes", None)
