"""Who is measured: ways to make the same samples from the same requests, one file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bench.peers import compiled, diffusers, oracle, ort, ours, tensorrt, upstream, upstream_classes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bench.setting import Setting
    from datasetdm_fast.data import Capture, ProjectedCapture, Request, Sample


class Peer(Protocol):
    """Stages as engines.Engine has them, for the gates, and two ways to use them, which are timed."""

    dtype: str  # of UNet and autoencoder: fp32, tf32, fp16 or bf16
    rounds_text: bool  # whether the text encoder is stored in that type, too
    batch: int  # images made together

    def encode_text(self, prompts: Sequence[str]) -> Tensor: ...

    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor: ...

    def denoise_and_capture(
        self, latents: Tensor, timestep: float, context: Tensor
    ) -> tuple[Tensor, Capture | ProjectedCapture]: ...

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        """As many labelled samples as there are requests."""

    def draw(self, requests: Sequence[Request]) -> np.ndarray:
        """Their images alone."""


class Offer(NamedTuple):
    """One row: who it is and how it is built for a batch size."""

    title: str
    build: Callable[[Setting, int], Peer]
    batch: int = 0  # 0 = the one that proves best
    like: str = ""  # the peer whose best batch it takes: to try several would mean to compile for each
    must_run: bool = False  # an exception in it is a failed row; in others', a row that is not there


PEERS = {
    "upstream": Offer("DatasetDM as written, fp32", upstream.build, batch=1, must_run=True),
    "upstream-tf32": Offer("the same with TF32", upstream.build_tf32, batch=1),
    "upstream-fp16": Offer("the same in fp16", upstream.build_half, batch=1),
    "upstream-classes": Offer("DatasetDM's own classes, fp32", upstream_classes.build, batch=1),
    "torch": Offer("our reference engine, fp32", oracle.build, must_run=True),
    "diffusers-1": Offer("diffusers, one image at a time", diffusers.build, batch=1),
    "diffusers": Offer("diffusers at its best batch", diffusers.build),
    "diffusers-compiled": Offer("diffusers, torch.compile", compiled.build, like="diffusers"),
    "ort": Offer("ONNX Runtime", ort.build),
    "tensorrt": Offer("TensorRT", tensorrt.build, like="diffusers"),
    "ours-1": Offer("datasetdm_fast, one image at a time", ours.build, batch=1, must_run=True),
    "ours": Offer("datasetdm_fast", ours.build, must_run=True),
    "ours-bf16": Offer("datasetdm_fast, bf16", ours.build_bf16, must_run=True),
}
