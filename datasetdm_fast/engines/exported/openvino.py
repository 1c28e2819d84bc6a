"""The openvino engine: every exported stage a model that OpenVINO compiled for this CPU and one size of batch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino
import torch
from torch import Tensor

from datasetdm_fast.decoders.trunk import Decoder
from datasetdm_fast.engines.device import resolve_device
from datasetdm_fast.engines.exported.cached import CachedEngine
from datasetdm_fast.engines.exported.providers import require_openvino
from datasetdm_fast.engines.fast import slice_of
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.manifest import StageFile, TensorInfo
from datasetdm_fast.export.staging import say
from datasetdm_fast.loading.model import Model

HINTS = {"fp32": "f32", "bf16": "bf16"}
ANY_BATCH = ("encode_text",)  # called once for any number of words: compiling for each would take longer


class OpenVinoEngine(CachedEngine):
    """See CachedEngine; a batch is cut into the slices of the fast engine, which run in `streams` at once."""

    name, library, stored, runtime = "openvino", "OpenVINO", "fp32", "any"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        streams: int = 0,
        tell: Callable[[str], None] = say,
    ):
        require_openvino(streams)
        self.device = resolve_device("cpu" if device == "auto" else device)
        if self.device.type != "cpu":
            raise Refused(f"device: OpenVINO is used on a CPU, not on {device}", "Leave out --device.")
        self.core, self.streams = openvino.Core(), streams
        self.precision = resolve_precision(dtype, self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        super().__init__(model, decoders, tell)

    def _open(self, path: Path, name: str, file: StageFile) -> OpenVinoStage:
        is_wide = name == "encode_text" or name.startswith("annotate")
        hint = HINTS["fp32" if is_wide else self.precision]
        return OpenVinoStage(self.core, path, file, hint, self.streams, name in ANY_BATCH)

    def _images_at_once(self, batch: int) -> int:
        return slice_of(batch)

    def fingerprint(self) -> dict[str, str]:
        told = {"engine": self.name, "device": str(self.device), "device_name": platform.machine()}
        return {**told, "dtype": self.precision, "openvino": openvino.__version__}


class OpenVinoStage:
    """A graph, compiled at the first call of every shape: shapes known beforehand make it faster by half."""

    def __init__(
        self, core: openvino.Core, path: Path, file: StageFile, hint: str, streams: int, takes_any_batch: bool
    ):
        self.core, self.path, self.file, self.takes_any_batch = core, path, file, takes_any_batch
        self.streams, self.options = streams, {"INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False}
        self._requests: dict[tuple, list[openvino.InferRequest]] = {}

    def __call__(self, parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        threads = torch.get_num_threads()
        streams = min(self.streams or threads, threads, len(parts))
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(parts), streams):
            found += self._at_once(parts[start : start + streams], streams, threads)
        return found

    def _at_once(self, parts: Sequence[Mapping[str, Tensor]], streams: int, threads: int) -> list[dict[str, Tensor]]:
        started, found = [], []
        for place, inputs in enumerate(parts):
            given = [inputs[info.name].to(getattr(torch, info.dtype)).contiguous() for info in self.file.inputs]
            request = self._compiled([tuple(value.shape) for value in given], streams, threads)[place]
            for info, value in zip(self.file.inputs, given):
                request.set_tensor(info.name, openvino.Tensor(value.numpy(), shared_memory=True))
            request.start_async()
            started.append((request, given))
        for request, _ in started:
            request.wait()
            # Copied, as the request writes its next answer into the same memory.
            found.append({info.name: _copied(request.get_tensor(info.name), info) for info in self.file.outputs})
        return found

    def _compiled(self, shapes: list[tuple[int, ...]], streams: int, threads: int) -> list[openvino.InferRequest]:
        key = (streams, threads) if self.takes_any_batch else (*shapes, streams, threads)
        if key not in self._requests:
            graph = self.core.read_model(str(self.path))
            if not self.takes_any_batch:
                graph.reshape({info.name: shape for info, shape in zip(self.file.inputs, shapes)})
            options = {**self.options, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
            compiled = self.core.compile_model(graph, "CPU", options)
            self._requests[key] = [compiled.create_infer_request() for _ in range(streams)]
        return self._requests[key]


def _copied(value: openvino.Tensor, info: TensorInfo) -> Tensor:
    return torch.from_numpy(np.array(value.data)).to(getattr(torch, info.dtype))


def resolve_precision(dtype: str, capabilities: Sequence[str]) -> str:
    """The arithmetic of UNet and autoencoder: as asked, or fp32."""
    if dtype == "auto":
        return "fp32"
    if dtype not in HINTS:
        raise Refused(f"dtype: OpenVINO computes in {' or '.join(HINTS)} here, not in {dtype}", "Use --dtype fp32.")
    if dtype == "bf16" and "BF16" not in capabilities:
        raise Refused(
            "dtype: this CPU has no instructions for bf16, OpenVINO would compute in fp32", "Use --dtype fp32."
        )
    return dtype
