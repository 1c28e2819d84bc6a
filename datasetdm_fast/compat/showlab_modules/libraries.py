"""Stand-ins for libraries as far as DatasetDM's generators call them."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def retry_if_cuda_oom(function: Callable) -> Callable:
    """The function itself: what does not fit is refused by the engine."""
    return function


def sem_seg_postprocess(result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int) -> Tensor:
    """Class planes [C, h, w] without their padding, at another size."""
    planes = result[None, :, : img_size[0], : img_size[1]]
    return F.interpolate(planes, size=(output_height, output_width), mode="bilinear", align_corners=False)[0]


def seed_everything(seed: int | None = None, workers: bool = False) -> int:
    """Seeds the generators of Python, NumPy and PyTorch."""
    seed = 0 if seed is None else int(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def display(*_: Any, **__: Any) -> None:
    """Shows nothing."""


def imwrite(path: str, image: np.ndarray, params: Any = None) -> bool:
    """Writes a grey plane or channels blue, green, red: rounded half to even and clipped to 8 bits, 16 as they are."""
    plane = image if image.dtype == np.uint16 else np.rint(image).clip(0, 255).astype(np.uint8)
    if plane.ndim == 3:
        plane = plane[:, :, 0] if plane.shape[2] == 1 else plane[:, :, ::-1]
    Image.fromarray(np.ascontiguousarray(plane)).save(path)
    return True


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
