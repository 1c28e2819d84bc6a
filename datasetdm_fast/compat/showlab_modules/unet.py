"""DatasetDM's `model.unet`: a U-Net whose features are collected at its last call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datasetdm_fast.compat.showlab_modules import attention, session
from datasetdm_fast.data import Capture
from datasetdm_fast.stages import LEVELS

if TYPE_CHECKING:
    from datasetdm_fast.compat.showlab_modules.attention import AttentionStore

CAPTURED = (0, 1)  # timesteps whose call collects features


def clear_feature_dic() -> None:
    """Forgets the features of the last image, and ends a script that has made enough: some trainers catch the end
    within an image.
    """
    session.current().check()
    session.current().features = {level: [] for level in LEVELS}


def get_feature_dic() -> dict[str, list[Tensor]]:
    """Level -> features [B, 2C, h, w] of the last captured call, the halves of guidance joined image by image."""
    return session.current().features


class UNet2D:
    """The U-Net of a model, run by an engine of this package; it is not a module, and its weights are not trained."""

    def __init__(self, owner: session.ScriptSession):
        self.owner = owner
        self.controller: AttentionStore | None = None

    @classmethod
    def from_pretrained(cls, folder: str, subfolder: str = "", **_: Any) -> UNet2D:
        return cls(session.current().open(folder, subfolder))

    @property
    def engine(self):
        return self.owner.engine

    @property
    def size(self) -> int:
        """Pixels of a side of its images."""
        return self.owner.model.size

    @property
    def config(self):
        return self.owner.model.networks["unet"].config

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def parameters(self):
        return iter(())

    def to(self, *_: Any, **__: Any) -> UNet2D:
        """Itself: the engine has its own device."""
        return self

    def eval(self) -> UNet2D:
        return self

    def __call__(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, **_: Any
    ) -> dict[str, Tensor]:
        """The output for a batch of both halves of guidance, whose latents are equal."""
        latents = sample.chunk(2)[0]
        return {"sample": self.noise(latents, timestep, encoder_hidden_states, int(timestep) in CAPTURED)}

    def noise(self, latents: Tensor, timestep: Tensor | float, context: Tensor, is_captured: bool) -> Tensor:
        """[2B, C, h, w] output for both halves; at a captured call features and attention are kept."""
        if not is_captured:
            return self.engine.denoise(latents, float(timestep), context)
        noise, capture = self.engine.denoise_and_capture_raw(latents, float(timestep), context)
        keep(capture)
        if self.controller is not None:
            attention.keep(self.controller, capture)
        return noise


def keep(capture: Capture) -> None:
    """Takes the features of a call in place of those before."""
    for level, tensors in zip(LEVELS, capture.features, strict=True):
        get_feature_dic()[level] = [one.float() for one in tensors]
