"""The protocol every engine follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from datasetdm_fast.errors import Missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasetdm_fast.data import AttentionSums, Capture, ProjectedCapture, Text
    from datasetdm_fast.engine.loading.model import Model


class Engine(Protocol):
    """What every engine offers; tensors live on `device`, and none of the calls keeps a graph for gradients.

    Latents are [B, C, h, w] of the model's own space. A call has R rows of text, [uncond_0 .. uncond_{B-1}, cond_0 ..
    cond_{B-1}] of a model with classifier-free guidance and B of any other.
    """

    name: str
    model: Model
    decoders: Mapping[str, nn.Module]
    device: torch.device
    adjustments: Mapping[str, int]  # settings that had to be changed, for the rows of the samples made since

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """A row of encoded text for each prompt."""

    def encode_classes(self, words: Sequence[str]) -> Tensor:
        """[K, D] class embeddings: the mean over all positions that are read."""

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """[R, C, h, w] output of the denoiser for latents [B, C, h, w] and R rows of text."""

    def denoise_and_capture(
        self, latents: Tensor, timestep: float, text: Text
    ) -> tuple[Tensor, Capture | ProjectedCapture]:
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

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `decode_image`, and of each [B] whether its pixels were finite numbers."""

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[B, C, h, w] latents of uint8 images [B, H, W, 3]: posterior means, or samples by `generators`."""

    def annotate(self, task: str, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs of the task's decoder; `text` holds class embeddings for open-vocabulary decoders."""

    def suggested_batch(self) -> int:
        """The default batch size."""

    def fp32_fallback(self) -> Engine | None:
        """An engine over the same weights in fp32, to retry quarantined samples; None where this one is in fp32."""

    def fingerprint(self) -> dict[str, str]:
        """Names and versions that decide the engine's rounding."""


def check_task(task: str, decoders: Mapping[str, object]) -> None:
    """Raises Missing where no decoder of the task is loaded."""
    if task not in decoders:
        raise Missing(
            f"task: no decoder for {task!r} was loaded, there are {', '.join(decoders) or 'none'}",
            "Name a folder with that decoder: --decoder DIR",
        )
