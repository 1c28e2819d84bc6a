"""DatasetDM's `model.unet`: a U-Net whose features are collected at its last call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datasetdm_fast.compat.showlab_modules import attention
from datasetdm_fast.data import Capture
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.stages import LEVELS

if TYPE_CHECKING:
    from datasetdm_fast.compat.showlab_modules.attention import AttentionStore

CAPTURED = (0, 1)  # timesteps whose call collects features
# DatasetDM keeps both as globals of its modules.
FEATURES: dict[str, list[Tensor]] = {}  # of the last captured call
MODELS: list[Model] = []  # of every U-Net that was opened; decoders take their sizes from the last


def clear_feature_dic() -> None:
    """Clears the features of the last image."""
    FEATURES.update({level: [] for level in LEVELS})


def get_feature_dic() -> dict[str, list[Tensor]]:
    """Level -> features [B, 2C, h, w] of the last captured call, the halves of guidance joined image by image."""
    return FEATURES


class UNet2D:
    """The U-Net of a model, run by an engine of this package; it is not a module, and its weights are not trained."""

    def __init__(self, model: Model, engine: str, dtype: str, device: str):
        self.model = model
        self.engine = build_engine(engine, model, dtype=dtype, device=device)
        self.config = model.networks["unet"].config
        self.controller: AttentionStore | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        subfolder: str = "",
        *,
        engine: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        **_: Any,
    ) -> UNet2D:
        """The U-Net of a diffusers folder, or of one of this package's models; `subfolder` has no effect."""
        MODELS.append(load_model(folder))
        return cls(MODELS[-1], engine, dtype, device)

    @property
    def size(self) -> int:
        """Pixels of a side of its images."""
        return self.model.size

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def parameters(self) -> Iterator[torch.nn.Parameter]:
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
        return {"sample": self.predict_noise(latents, timestep, encoder_hidden_states, int(timestep) in CAPTURED)}

    def predict_noise(self, latents: Tensor, timestep: Tensor | float, context: Tensor, is_captured: bool) -> Tensor:
        """[2B, C, h, w] output for both halves; a captured call stores its features and attention."""
        if not is_captured:
            return self.engine.denoise(latents, float(timestep), context)
        noise, capture = self.engine.denoise_and_capture_raw(latents, float(timestep), context)
        store_features(capture)
        if self.controller is not None:
            attention.add_capture(self.controller, capture)
        return noise


def store_features(capture: Capture) -> None:
    """Replaces the stored features by those of a call."""
    for level, tensors in zip(LEVELS, capture.features, strict=True):
        FEATURES[level] = [tensor.float() for tensor in tensors]
