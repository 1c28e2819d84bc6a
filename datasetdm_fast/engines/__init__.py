"""Engines: ways to run the networks behind one narrow protocol; loop, guidance, tasks and writers sit above it and exist once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from datasetdm_fast.config import ENGINES as KNOWN
from datasetdm_fast.errors import Missing, Refused

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasetdm_fast.data import Capture, ProjectedCapture
    from datasetdm_fast.loading.model import Model


class Engine(Protocol):
    """What every engine offers; tensors live on `device`, and none of the calls keeps a graph for gradients.

    A CFG batch of 2B is [uncond_0 .. uncond_{B-1}, cond_0 .. cond_{B-1}].
    """

    name: str
    model: Model
    decoders: Mapping[str, nn.Module]
    device: torch.device
    adjustments: Mapping[str, int]  # what had to be done differently from what was asked, for the rows of the samples made since

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[B, T, D] last hidden states of the padded prompts."""

    def encode_classes(self, words: Sequence[str]) -> Tensor:
        """[K, D] class embeddings: the mean over all T positions."""

    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:
        """[2B, 4, h, w] UNet output for latents [B, 4, h, w] and context [2B, T, D]."""

    def denoise_and_capture(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture | ProjectedCapture]:
        """The same output, and what the decoders read."""

    def denoise_and_keep(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        """The same output, and every feature and map as it is."""

    def decode_image(self, latents: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 images."""

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and of each image [B] whether its pixels were finite numbers."""

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[B, 4, h, w] scaled latents of uint8 images [B, H, W, 3]: the posterior's mean, or a sample of it per image's generator."""

    def annotate(self, task: str, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs of the task's decoder; `text` holds class embeddings for open-vocabulary decoders."""

    def suggested_batch(self) -> int:
        """Images to make together where nobody says."""

    def widened(self) -> Engine | None:
        """An engine over the same weights in fp32, for what this one could not hold; None where this one is."""

    def fingerprint(self) -> dict[str, str]:
        """Names and versions that decide the engine's rounding."""


def _torch(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str) -> Engine:
    from datasetdm_fast.engines.torch import TorchEngine

    return TorchEngine(model, decoders, dtype=dtype, device=device)


def _fast(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, compile: bool) -> Engine:
    from datasetdm_fast.engines.fast import FastEngine

    return FastEngine(model, decoders, dtype=dtype, device=device, is_compiled=compile)


def _ort(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, **where: str) -> Engine:
    from datasetdm_fast.engines.ort import OrtEngine

    return OrtEngine(model, decoders, dtype=dtype, device=device, **where)


def _trt(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, **where: str) -> Engine:
    from datasetdm_fast.engines.trt import TrtEngine

    return TrtEngine(model, decoders, dtype=dtype, device=device, **where)


ENGINES = {"torch": _torch, "fast": _fast, "ort": _ort, "trt": _trt}


def check_engine(name: str, flavour: str = "auto", provider: str = "auto") -> None:
    """Raises Missing where an engine lacks what it runs on; asked before torch is imported or a model is read, so that the answer comes at once."""
    if provider != "auto" and name != "ort":
        raise Refused(f"provider: {provider} is one of ONNX Runtime's, and the engine is {name}", "add --engine ort")
    if name == "ort":
        from datasetdm_fast.engines.providers import require_provider

        require_provider(provider)
    if name == "trt":
        from datasetdm_fast.export.flavours import require_gpu

        require_gpu(flavour)


def build_engine(
    name: str,
    model: Model,
    decoders: Mapping[str, nn.Module] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    engines: str = "",
    trt_flavour: str = "auto",
    provider: str = "auto",
    compile: bool = False,
) -> Engine:
    """The engine `name` for a loaded model; "auto" is the fast one. `engines` is the folder of exported stages and plans, empty for a cache;
    `provider` is what ONNX Runtime runs on; `compile` lets torch.compile make the fast engine's UNet."""
    if name not in KNOWN:
        raise Refused(f"engine: {name!r} is none of {', '.join(KNOWN)}")
    chosen = "fast" if name == "auto" else name
    if chosen not in ENGINES:
        raise Missing(f"engine: {chosen} is not part of this installation, which has {', '.join(ENGINES)}", "use one of those, or --engine auto")
    if compile and chosen != "fast":
        raise Refused(f"--compile: the engine is {chosen}, and only the fast one can be compiled", "Use it with --engine fast.")
    where = {"trt": {"folder": engines, "flavour": trt_flavour}, "ort": {"provider": provider}, "fast": {"compile": compile}}
    return ENGINES[chosen](model, decoders or {}, dtype, device, **where.get(chosen, {}))
