"""Calls of the protocol that follow from others, alike in every engine."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datasetdm_fast.data import Text
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.device import engine_call
from datasetdm_fast.engine.engines.memory import BATCH, suggest_batch
from datasetdm_fast.stages import FACTOR

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.loading.model import Model


class BaseEngine:
    """See engines.Engine."""

    name: str
    model: Model
    decoders: Mapping[str, Any]
    device: torch.device
    precision: str
    adjustments: Mapping[str, int] = {}
    is_compiled = False

    def encode_text(self, prompts: Sequence[str]) -> Text:
        raise NotImplementedError

    @engine_call
    def encode_classes(self, words: Sequence[str]) -> Tensor:  # [K, D]
        text = self.encode_text(words)
        if text.mask is None:
            return text.context.mean(1)
        weights = text.mask[..., None].to(text.context.dtype)
        return (text.context * weights).sum(1) / weights.sum(1)

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        raise NotImplementedError

    def decode_image(self, latents: Tensor) -> Tensor:  # [B, H, W, 3] uint8
        return self.decode_and_check(latents)[0]

    def prepare(self, batch: int) -> None:
        """Makes ready what calls of `batch` images would otherwise make at the first of them."""

    def suggested_batch(self) -> int:
        return BATCH if self.device.type == "cuda" else suggest_batch(self.model.size // FACTOR, self.device)

    def fp32_fallback(self) -> Engine | None:
        return None if self.precision == "fp32" else self._wide

    @functools.cached_property
    def _wide(self) -> Engine:
        device, is_compiled = str(self.device), self.is_compiled
        return build_engine("fast", self.model, self.decoders, dtype="fp32", device=device, compile=is_compiled)

    def fingerprint(self) -> dict[str, str]:
        is_gpu = self.device.type == "cuda"
        return {
            "engine": self.name,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if is_gpu else platform.machine(),
            "dtype": self.precision,
            **self._versions(),
        }

    def _versions(self) -> dict[str, str]:
        """Versions and settings that decide rounding."""
        return {"torch": torch.__version__}
