"""Labelled images in, one reader a file; `open_data("demo:500@900000")` picks by the word before the colon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np

from datasetdm_fast.errors import Refused
from datasetdm_fast.readers import demo


@dataclass(frozen=True)
class Labelled:
    """A real image with whatever truth its data set holds."""

    id: str
    image: np.ndarray  # [H, W, 3] uint8
    caption: str
    semantic: np.ndarray | None = None  # [H, W] uint8, 255 = ignore
    masks: np.ndarray | None = None  # [N, H, W] bool
    mask_classes: np.ndarray | None = None  # [N] index into the source's thing_classes
    depth: np.ndarray | None = None  # [H, W] float32 metres, 0 = unknown
    keypoints: np.ndarray | None = None  # [P, J, 3]: x, y, visibility 0..2
    keypoint_boxes: np.ndarray | None = None  # [P, 4]: x, y, width, height
    keypoint_areas: np.ndarray | None = None  # [P] pixels


class Source(Protocol):
    """A data set: its vocabulary, its length and its items in a fixed order."""

    classes: tuple[str, ...]
    thing_classes: tuple[str, ...]
    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    max_depth: float

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Labelled: ...
    def __iter__(self) -> Iterator[Labelled]: ...


READERS = {"demo": demo.read}


def open_data(spec: str, size: int) -> Source:
    """The data set a `NAME:REST` specification names, its images at size x size pixels."""
    name, _, rest = spec.partition(":")
    if name not in READERS:
        near = get_close_matches(name, READERS, 1)
        raise Refused(f"--data {spec}: no reader is called {name!r}", f"Known: {', '.join(READERS)}." + (f" Did you mean {near[0]}?" if near else ""))
    return READERS[name](rest, size)
