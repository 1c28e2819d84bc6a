"""Metres per pixel."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from datasetdm_fast.data import DepthMap
from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.tasks.to_host import to_host


def upstream_bytes(metres: np.ndarray, max_depth: float) -> np.ndarray:
    """DatasetDM's 8-bit depth: metres / max_depth * 256, rounded half to even, saturated at 255."""
    return np.clip(np.rint(metres / max_depth * 256), 0, 255).astype(np.uint8)


def postprocess(raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[DepthMap]:
    """Depth maps in metres at image size."""
    (metres,) = to_host(resize(raw["depth"].float(), size)[:, 0])
    return [DepthMap(plane, config.max_depth) for plane in metres]
