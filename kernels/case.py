"""What an op is tried on: its cases, and the sizes of Stable Diffusion 1.x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Stable Diffusion 1.x at 512 pixels, as every op's `sizes` has it: cells of a side and channels of the three levels
# with attention, of a batch whose levels are projected to so many features.
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


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    """Seeded normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(size * 31**place for place, size in enumerate(shape)) % 2**31)
    return torch.randn(shape, generator=generator) * scale
