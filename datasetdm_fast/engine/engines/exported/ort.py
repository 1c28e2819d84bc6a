"""The ort engine: every stage an ONNX Runtime session over its exported graph, tensors bound where they lie."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import Lanes, resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine, OpenedGraph, Tensors
from datasetdm_fast.engine.engines.exported.providers import NAMES, installed_providers, require_provider
from datasetdm_fast.engine.engines.fast import DTYPES, slice_of
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused, check_choice
from datasetdm_fast.export.manifest import Manifest, StageFile
from datasetdm_fast.export.staging import print_line

NUMPY = {"float32": np.float32, "int64": np.int64, "uint8": np.uint8, "bool": np.bool_}
FATAL = 3  # ONNX Runtime's log level that leaves only errors


class OrtEngine(GraphEngine):
    """See GraphEngine; for TensorRT the graphs have standard operators only, else ONNX Runtime's attention."""

    name, library = "ort", "ONNX Runtime"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        provider: str = "auto",
        on_message: Callable[[str], None] = print_line,
    ):
        require_provider(provider)
        self.provider, self.device = resolve_provider(provider, device)
        fits = "fp16" in model.backbone.halves or dtype != "auto"
        self.precision = self.graph_precision = resolve_precision(dtype if fits else "fp32", self.provider)
        self.runtime = "any" if self.provider == "tensorrt" else "onnxruntime"
        super().__init__(model, decoders, on_message)

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> OpenedGraph:
        path = manifest.graph(folder, stage)
        open_with = partial(open_session, path, self.provider, self.device)
        return OrtStage(open_with, manifest.stages[stage], self.device)

    def _unet_images(self, batch: int) -> int:
        return slice_of(batch) if self.device.type == "cpu" else batch

    def _versions(self) -> dict[str, str]:
        return {"provider": self.provider, "onnxruntime": onnxruntime.__version__}


class OrtStage:
    """A graph whose sessions read their inputs and write their outputs in the memory of torch tensors.

    On a CPU the parts of a batch run at once, each on its share of the threads.
    """

    def __init__(self, open_with: Callable[[int], onnxruntime.InferenceSession], file: StageFile, device: torch.device):
        self.open_with, self.file, self.device, self.lanes = open_with, file, device, Lanes()
        self.sessions: dict[int, onnxruntime.InferenceSession] = {}  # by their number of threads

    def __call__(self, parts: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        threads = torch.get_num_threads()
        share = threads // min(threads, len(parts)) if self.device.type == "cpu" else threads
        if share not in self.sessions:
            self.sessions[share] = self.open_with(share)
        work = [(self.sessions[share], inputs) for inputs in parts]
        if self.device.type == "cpu":
            return self.lanes.map(self._outputs, work)
        return [self._outputs(*arguments) for arguments in work]

    def _outputs(self, session: onnxruntime.InferenceSession, inputs: Tensors) -> dict[str, Tensor]:
        sizes: dict[str, int] = {}
        binding, held = session.io_binding(), []
        for info in self.file.inputs:
            # A single number may stay on the host.
            value = inputs[info.name].to(self.device if info.shape else "cpu", getattr(torch, info.dtype)).contiguous()
            held.append(value)
            sizes |= {letter: size for letter, size in zip(info.shape, value.shape) if isinstance(letter, str)}
            place = value.device.type, value.device.index or 0
            binding.bind_input(info.name, *place, NUMPY[info.dtype], list(value.shape), value.data_ptr())
        sizes["2B"] = 2 * sizes["B"]
        outputs = {}
        for info in self.file.outputs:
            shape = [sizes[size] if isinstance(size, str) else size for size in info.shape]
            value = outputs[info.name] = torch.empty(shape, dtype=getattr(torch, info.dtype), device=self.device)
            place = value.device.type, value.device.index or 0
            binding.bind_output(info.name, *place, NUMPY[info.dtype], shape, value.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime works on a stream of its own
        session.run_with_iobinding(binding)
        return outputs


def open_session(path: Path, provider: str, device: torch.device, threads: int) -> onnxruntime.InferenceSession:
    """A session on the provider asked for, and on no other."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Spinning threads take the cores of the processes beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    place = {"device_id": str(device.index or 0)}
    providers = {
        "cpu": ["CPUExecutionProvider"],
        "cuda": [("CUDAExecutionProvider", place), "CPUExecutionProvider"],
        # Its own cache of engines is left off: it would load native code that nobody has checked.
        "tensorrt": [("TensorrtExecutionProvider", place), ("CUDAExecutionProvider", place), "CPUExecutionProvider"],
    }[provider]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != NAMES[provider]:
        raise Missing(
            f"provider: {provider} could not be started, ONNX Runtime offers {', '.join(session.get_providers())} in "
            "its place",
            "Check its CUDA libraries, or use --provider cpu.",
        )
    return session


def resolve_provider(provider: str, device: str) -> tuple[str, torch.device]:
    """The provider and where its tensors lie; "auto" follows the device, and an open device what there is."""
    if provider == "cpu":
        place = resolve_device("cpu" if device == "auto" else device)
    elif provider == "auto":
        has_cuda = NAMES["cuda"] in installed_providers()
        place = resolve_device(device if device != "auto" or has_cuda else "cpu")
        provider = "cuda" if place.type == "cuda" else "cpu"
        require_provider(provider)
    else:
        place = resolve_device("cuda" if device == "auto" else device)
    if (place.type == "cpu") != (provider == "cpu"):
        raise Refused(
            f"provider: {provider} does not run on the device {place}",
            "Leave out --device, or choose another --provider.",
        )
    return provider, place


def resolve_precision(dtype: str, provider: str) -> str:
    """The storage of UNet and autoencoder: as requested, or fp32 on a CPU and fp16 elsewhere."""
    if dtype == "auto":
        return "fp32" if provider == "cpu" else "fp16"
    check_choice("dtype", dtype, ("auto", *DTYPES))
    if dtype in ("tf32", "bf16"):
        raise Refused(f"dtype: ONNX Runtime has no {dtype} convolutions", "Use --dtype fp16 or --dtype fp32.")
    return dtype
