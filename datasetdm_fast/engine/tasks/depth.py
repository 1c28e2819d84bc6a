"""Metres per pixel."""

from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.data import DepthMap
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, present
from datasetdm_fast.engine.tasks import Task
from datasetdm_fast.kernels.transfer import to_host
from datasetdm_fast.kernels.upsample_concat import resize


class DepthTask(Task):
    needs = ("depth",)
    shown_by = "depth"
    requirement = "a depth above 0 and up to {farthest:g} m"
    small = {"batch_size": 12, "steps": 2500, "rate": 2e-3, "dropout": 0.15, "is_relative": True}

    def postprocess(self, raw: dict[str, Tensor], config: DecoderConfig, size: int) -> list[DepthMap]:
        (metres,) = to_host(resize(raw["depth"].float(), size)[:, 0])
        return [DepthMap(plane, config.max_depth) for plane in metres]

    def decoder(self, source: LabelledSource, is_small: bool, _: str) -> dict[str, Any]:
        sizes = {"width": 16, "depth_width": 24, "upscale": 2} if is_small else {}
        return {"kind": "depth", "max_depth": source.max_depth, **sizes}

    def truth(self, source: LabelledSource, item: Labelled) -> DepthMap:
        return DepthMap(present(item.depth), source.max_depth)

    def target(self, source: LabelledSource, item: Labelled) -> dict[str, np.ndarray]:
        return {"depth": present(item.depth)}
