"""The reference engine with half the batch: both halves of the guidance run one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast.data import Capture, Text
from datasetdm_fast.engine.engines.torch import TorchEngine


class HalvesEngine(TorchEngine):
    """See engines.Engine; the call that is captured runs whole."""

    name = "halves"

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        unet, halves = self.model.modules["unet"], text.context.chunk(2)
        return torch.cat([unet(latents, timestep, half, return_dict=False)[0] for half in halves])

    @torch.inference_mode()
    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        with self.reference.capturing() as captures:
            noise = super().denoise(latents, timestep, text)
        return noise, captures[0]

    denoise_and_capture_raw = denoise_and_capture
