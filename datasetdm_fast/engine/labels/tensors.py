"""Images and labels as torch tensors, and batches of them, as data sets give them to trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.kind import Table

if TYPE_CHECKING:
    from torch import Tensor

OF_THINGS = "scores"  # what labels of things have, and labels of pixels have not


def image_tensor(image: np.ndarray) -> Tensor:  # [3, H, W] float32, 0..1
    import torch

    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def label_tensors(task: str, label: Any, table: Table) -> Tensor | dict[str, Tensor]:
    """A label whose classes have the numbers of a run's files, which its table holds."""
    import torch

    parts = kind_of(task).arrays(label, table)
    if isinstance(parts, np.ndarray):
        return torch.from_numpy(parts)
    return {name: torch.from_numpy(value) for name, value in parts.items()}


def stack(values: Sequence[Any]) -> Any:
    """A batch: what has one shape in all pairs is stacked, what has not, such as the masks of instances, is a list."""
    import torch

    first = values[0]
    if isinstance(first, dict) and OF_THINGS in first:
        return list(values)  # images have different numbers of them
    if isinstance(first, dict):
        return {name: stack([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(stack(column) for column in zip(*values, strict=True))
    if isinstance(first, torch.Tensor) and len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    return list(values)
