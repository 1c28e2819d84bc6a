"""Seeded inputs of operations."""

from typing import Any

import torch
from torch import Tensor

Probe = tuple[Any, ...]  # arguments of an operation


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    """Seeded normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(size * 31**place for place, size in enumerate(shape)) % 2**31)
    return torch.randn(shape, generator=generator) * scale
