"""Stand-ins for libraries as far as DatasetDM's scripts call them; detectron2 and OpenCV have files of their own."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from datasetdm_fast.compat.showlab import drawing
from datasetdm_fast.untrusted import documents


def seed_everything(seed: int | None = None, workers: bool = False) -> int:
    """Seeds the generators of Python, NumPy and PyTorch."""
    seed = 0 if seed is None else int(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def display(*_: Any, **__: Any) -> None:
    """Shows nothing."""


def get_cmap(name: str) -> Callable[..., np.ndarray]:
    """The colours of values 0 to 1, in this package's maps: `magma_r` for streets, `jet` for rooms."""
    colours = {"jet": drawing.jet, "magma_r": drawing.near_to_far}[name]

    def mapped(values: np.ndarray, bytes: bool = False) -> np.ndarray:  # noqa: A002, as the library calls it
        solid = np.full((*values.shape, 1), 255, np.uint8)
        found = np.concatenate([colours(values), solid], -1)
        return found if bytes else found / 255

    return mapped


class Timer:
    """How long something takes."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begun


class LvisFile:
    """Images and annotations of a file in LVIS's form, by their ids."""

    def __init__(self, path: str):
        found = documents.read_object(Path(path))
        self.imgs = {each["id"]: each for each in found["images"]}
        self.cats = {each["id"]: each for each in found["categories"]}
        self.img_ann_map: dict[int, list[dict]] = defaultdict(list)
        for each in found["annotations"]:
            self.img_ann_map[each["image_id"]].append(each)

    def load_imgs(self, ids: Sequence[int]) -> list[dict]:
        return [self.imgs[id] for id in ids]


class ProcessInTurn:
    """A process of a script: it runs within this one when it is started, after those started before it."""

    def __init__(self, target: Callable, args: tuple = (), kwargs: dict | None = None, **_: Any):
        self.call = target, args, kwargs or {}

    def start(self) -> None:
        target, arguments, named = self.call
        target(*arguments, **named)

    def join(self, timeout: float | None = None) -> None:
        """Nothing is left to wait for."""


def get_context(method: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(Process=ProcessInTurn, Manager=Manager)


class Manager:
    """Holds what processes share, which here is one process's own."""

    def dict(self) -> dict:
        return {}

    def list(self) -> list:
        return []


def set_device(device: Any) -> None:
    """Changes nothing: processes run in turn, all on the device of the engine."""
