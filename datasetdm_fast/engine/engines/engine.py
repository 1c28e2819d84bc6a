"""The protocol every engine follows, and those of its calls that follow from others."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from datasetdm_fast.config import ENGINES
from datasetdm_fast.errors import Missing
from datasetdm_fast.plugins import load_place
from datasetdm_fast.stages import FACTOR

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, Text
    from datasetdm_fast.engine.loading.model import Model


class Engine(Protocol):
    """What every engine offers, and what a subclass need not write; tensors live on `device`, and none of the calls
    keeps a graph for gradients.

    Latents are [B, C, h, w] of the model's own space. A call has R rows of text, [uncond_0 .. uncond_{B-1}, cond_0 ..
    cond_{B-1}] of a model with classifier-free guidance and B of any other.
    """

    name: str
    model: Model
    decoders: Mapping[str, nn.Module]
    device: torch.device
    precision: str
    is_compiled: bool = False
    speeds: tuple[str, ...] = ()  # approximate ones, see loop/calls.py, whose calls it has beside those below
    adjustments: Mapping[str, int] = {}  # settings that had to be changed, for the rows of the samples made since

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """A row of encoded text for each prompt."""

    def encode_classes(self, words: Sequence[str]) -> Tensor:
        """[K, D] class embeddings: the mean over all positions that are read."""
        text = self.encode_text(words)
        if text.mask is None:
            return text.context.mean(1)
        weights = text.mask[..., None].to(text.context.dtype)
        return (text.context * weights).sum(1) / weights.sum(1)

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """[R, C, h, w] output of the denoiser for latents [B, C, h, w] and R rows of text."""

    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, AnyCapture]:
        """The output of `denoise`, and what the decoders read."""

    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        """The output of `denoise`, and every feature and map as it is."""

    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The output of `denoise`, on a CPU bit by bit but for OpenVINO, and the sums with this call's attention added:
        of every self-attention with as many cells as `sums.cells`, and of the queries of every cross-attention with as
        many as `sums.tokens` over B rows of class prompts.
        """

    def decode_image(self, latents: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 images."""
        return self.decode_and_check(latents)[0]

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `decode_image`, and of each [B] whether its pixels were finite numbers."""

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[B, C, h, w] latents of uint8 images [B, H, W, 3]: posterior means, or samples by `generators`."""

    def annotate(self, task: str, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs of the task's decoder; `text` holds class embeddings for open-vocabulary decoders."""

    def prepare(self, batch: int) -> None:
        """Makes ready what calls of `batch` images would otherwise make at the first of them."""
        return

    def suggested_batch(self) -> int:
        """The default batch size."""
        from datasetdm_fast.engine.engines.device import BATCH, suggest_batch  # which import torch

        return BATCH if self.device.type == "cuda" else suggest_batch(self.model.size // FACTOR, self.device)

    def fp32_fallback(self) -> Engine | None:
        """An engine over the same weights in fp32, to retry quarantined samples; None where this one is in fp32."""
        return None if self.precision == "fp32" else self._wide

    @functools.cached_property
    def _wide(self) -> Engine:
        make = load_place(self.model.backbone.fast or ENGINES["fast"].engine)
        device, is_compiled = str(self.device), self.is_compiled
        wide: Engine = make(self.model, self.decoders, dtype="fp32", device=device, compile=is_compiled)
        return wide

    def fingerprint(self) -> dict[str, str]:
        """Names and versions that decide the engine's rounding."""
        import torch

        is_gpu = self.device.type == "cuda"
        return {
            "engine": self.name,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if is_gpu else platform.machine(),
            "dtype": self.precision,
            **self._versions(),
            **({"compiled": "yes"} if self.is_compiled else {}),
        }

    def _versions(self) -> dict[str, str]:
        """Versions and settings that decide rounding."""
        import torch

        return {"torch": torch.__version__}


def check_task(task: str, decoders: Mapping[str, object]) -> None:
    """Raises Missing where no decoder of the task is loaded."""
    if task not in decoders:
        raise Missing(
            f"task: no decoder for {task!r} was loaded, there are {', '.join(decoders) or 'none'}",
            "Name a folder with that decoder: --decoder DIR",
        )
