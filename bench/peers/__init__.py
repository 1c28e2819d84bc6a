"""Who is measured: ways to make the same samples from the same requests."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bench.peers import compiled, diffusers, engine, upstream, upstream_classes

if TYPE_CHECKING:
    from torch import Tensor

    from bench.setting import Setting
    from datasetdm_fast.data import Capture, ProjectedCapture, Request, Sample, Text


class Peer(Protocol):
    """Stages as engines.Engine has them, for the gates, and all of them together, which is timed."""

    dtype: str  # of UNet and autoencoder: fp32, tf32, fp16 or bf16
    rounds_text: bool  # whether the text encoder is stored in that type, too
    batch: int  # images made together

    def encode_text(self, prompts: Sequence[str]) -> Text: ...

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor: ...

    def denoise_and_capture(
        self, latents: Tensor, timestep: float, text: Text
    ) -> tuple[Tensor, Capture | ProjectedCapture]: ...

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        """As many labelled samples as there are requests; what `draws` also has `draw`, its images."""


class Offer(NamedTuple):
    """One row: who it is and how it is built for a batch size."""

    title: str
    build: Callable[[Setting, int], Peer]
    batch: int = 0  # 0 = the one that proves best
    like: str = ""  # the peer whose best batch it takes: to try several would mean to compile for each
    draws: bool = False  # whether its images without labels are timed as well
    beside: str = "ours"  # the one of ours that it is compared with
    dtype: str = "fp32"  # in which it computes, as far as the judge must know before it is built
    must_run: bool = False  # an exception in it is a failed row; in others', a row that is not there
    not_on_cpu: str = ""  # why a CPU does not run it
    not_on_gpu: str = ""  # why a GPU does not


TF32 = "upstream in TF32: a CPU has no such arithmetic"
FP16 = "upstream in fp16: its convolutions take a CPU hundreds of times longer than in fp32"
TUNED = "diffusers with its settings for GPUs: they change nothing on a CPU"
TENSORRT = "TensorRT: it runs on NVIDIA GPUs only"
CPU_ONLY = "OpenVINO: it is a peer on CPUs"
OURS = "ours"
PEERS = {
    "upstream": Offer("DatasetDM as written, fp32", upstream.with_dtype("fp32"), batch=1, must_run=True),
    "upstream-tf32": Offer("the same with TF32", upstream.with_dtype("tf32"), batch=1, not_on_cpu=TF32),
    "upstream-fp16": Offer("the same in fp16", upstream.with_dtype("fp16"), batch=1, not_on_cpu=FP16),
    "upstream-classes": Offer("DatasetDM's own classes, fp32", upstream_classes.build, batch=1),
    "torch": Offer("our reference engine, fp32", engine.reference, must_run=True),
    "diffusers-1": Offer("diffusers, one image at a time", diffusers.Diffusers, batch=1, draws=True),
    "diffusers": Offer("diffusers at its best batch", diffusers.Diffusers, draws=True),
    "diffusers-tuned": Offer(
        "diffusers, channels-last, timed convolutions", diffusers.TunedDiffusers, like="diffusers", not_on_cpu=TUNED
    ),
    "diffusers-compiled": Offer("diffusers, torch.compile", compiled.build, like="diffusers", draws=True),
    "ort-1": Offer("ONNX Runtime, one image at a time", engine.named("ort"), batch=1),
    "ort": Offer("ONNX Runtime", engine.named("ort")),
    "openvino-1": Offer("OpenVINO, one image at a time", engine.named("openvino"), batch=1, not_on_gpu=CPU_ONLY),
    "openvino": Offer("OpenVINO", engine.named("openvino"), draws=True, not_on_gpu=CPU_ONLY),
    "openvino-bf16": Offer(
        "OpenVINO, bf16", engine.named("openvino", "bf16"), beside="ours-bf16", dtype="bf16", not_on_gpu=CPU_ONLY
    ),
    "tensorrt": Offer("TensorRT", engine.named("trt"), like="diffusers", draws=True, not_on_cpu=TENSORRT),
    "ours-1": Offer("datasetdm_fast, one image at a time", engine.named("fast"), batch=1, must_run=True),
    OURS: Offer("datasetdm_fast", engine.named("fast"), draws=True, must_run=True),
    "ours-bf16": Offer("datasetdm_fast, bf16", engine.named("fast", "bf16"), dtype="bf16", must_run=True),
}


def beside(name: str, names: Container[str]) -> str:
    """Which of ours a peer, or a technique, is compared with where these are there."""
    wanted = PEERS[name].beside if name in PEERS else OURS
    return wanted if wanted in names else OURS
