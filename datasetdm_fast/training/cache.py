"""Captures of labelled images, kept in half precision so that every epoch reads them instead of running the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.inversion import invert


@dataclass(frozen=True)
class View:
    """One captured look at a labelled image: which image, mirrored or not."""

    image: int
    is_mirrored: bool


@dataclass(frozen=True)
class CaptureCache:
    capture: Capture  # every tensor [V, ...] fp16, V views
    views: tuple[View, ...]

    def batch(self, indices: Sequence[int]) -> Capture:
        """The captures of some views as one fp32 batch."""
        rows = torch.as_tensor(indices)

        def pick(levels: tuple[tuple[Tensor, ...], ...]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(tuple(tensor[rows].float() for tensor in level) for level in levels)

        return Capture(pick(self.capture.features), pick(self.capture.maps))


def capture_views(engine, images: Sequence[np.ndarray], captions: Sequence[str], timestep: int, draws: int, mirror: bool, batch_size: int = 16) -> CaptureCache:
    """Captures of every image in `draws` noise draws, and as many of its mirror image."""
    views = [View(k, side) for _ in range(draws) for side in ((False, True) if mirror else (False,)) for k in range(len(images))]
    parts = []
    for start in range(0, len(views), batch_size):
        some = views[start : start + batch_size]
        pixels = np.stack([images[view.image][:, ::-1] if view.is_mirrored else images[view.image] for view in some])
        capture = invert(engine, torch.from_numpy(pixels), [captions[view.image] for view in some], timestep, range(start, start + len(some)))
        parts.append(([[t.half() for t in level] for level in capture.features], [[t.half() for t in level] for level in capture.maps]))

    def joined(which: int) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(torch.cat(tensors) for tensors in zip(*levels)) for levels in zip(*(part[which] for part in parts)))

    return CaptureCache(Capture(joined(0), joined(1)), tuple(views))
