"""What an op is tried on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    reason: str
    inputs: tuple[Any, ...]
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]  # of the output, or of each of several


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    """Seeded normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(size * 31**place for place, size in enumerate(shape)) % 2**31)
    return torch.randn(shape, generator=generator) * scale
