"""The reference engine with half the batch: both halves of the guidance run one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.engine.engines.torch import TorchEngine, capturing


class HalvesEngine(TorchEngine):
    """See engines.Engine; the call that is captured runs whole."""

    name = "halves"

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:  # [2B, 4, h, w]
        return torch.cat([self.model.unet(latents, timestep, half, return_dict=False)[0] for half in context.chunk(2)])

    @torch.inference_mode()
    def denoise_and_capture(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        with capturing(self.model.unet) as captures:
            noise = super().denoise(latents, timestep, context)
        return noise, captures[0]

    denoise_and_capture_raw = denoise_and_capture
