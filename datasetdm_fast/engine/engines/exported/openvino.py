"""The openvino engine: every exported stage a model that OpenVINO compiled for this CPU and one size of batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import openvino
import torch
from openvino import opset13
from torch import Tensor

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine, OpenedGraph, Tensors
from datasetdm_fast.engine.engines.exported.providers import require_openvino
from datasetdm_fast.engine.engines.fast import slice_of
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.manifest import Manifest, StageFile, TensorInfo
from datasetdm_fast.export.staging import print_line

HINTS = {"fp32": "f32", "bf16": "bf16"}
ANY_BATCH = ("encode_text",)  # called once for any number of words: compiling for each would take longer
NUMBERS = ("timestep", "guidance")  # what depends on these inputs alone is computed in fp32 beside a graph in bf16


@cache
def open_core() -> openvino.Core:
    """One for the process: its plug-in moves the stack of signal handlers. Two leave it in memory that is no longer
    there, and the next Ctrl-C is a segmentation fault.
    """
    return openvino.Core()


class OpenVinoEngine(GraphEngine):
    """See GraphEngine; a batch is cut into the slices of the fast engine, which run in `streams` at once."""

    name, library, graph_precision, runtime = "openvino", "OpenVINO", "fp32", "any"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        streams: int = 0,
        on_message: Callable[[str], None] = print_line,
    ):
        require_openvino(streams)
        self.device = resolve_device("cpu" if device == "auto" else device)
        if self.device.type != "cpu":
            raise Refused(f"device: OpenVINO is used on a CPU, not on {device}", "Leave out --device.")
        self.core, self.streams = open_core(), streams
        self.precision = resolve_precision(dtype, self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        super().__init__(model, decoders, on_message)

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> OpenedGraph:
        is_wide = stage == "encode_text" or stage.startswith("annotate")
        hint = HINTS["fp32" if is_wide else self.precision]
        path, file = manifest.graph(folder, stage), manifest.stages[stage]
        return OpenVinoStage(self.core, path, file, hint, self.streams, stage in ANY_BATCH)

    def _unet_images(self, batch: int) -> int:
        return slice_of(batch)

    def _versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__}


class OpenVinoStage:
    """A graph, compiled at the first call of every shape: shapes known beforehand make it faster by half."""

    def __init__(
        self, core: openvino.Core, path: Path, file: StageFile, hint: str, streams: int, takes_any_batch: bool
    ):
        self.core, self.path, self.file, self.takes_any_batch = core, path, file, takes_any_batch
        self.streams, self.options = streams, {"INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False}
        self._requests: dict[tuple[object, ...], list[openvino.InferRequest]] = {}
        self._time_model: openvino.CompiledModel | None = None  # what depends on NUMBERS alone, in fp32
        self._time_outputs: tuple[dict[str, float], dict[str, np.ndarray]] = {}, {}  # of these numbers

    def __call__(self, parts: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        threads = torch.get_num_threads()
        streams = min(self.streams or threads, threads, len(parts))
        blocks = (self._run_streams(block, streams, threads) for block in in_blocks(parts, streams))
        return [outputs for block in blocks for outputs in block]

    def _run_streams(self, parts: Sequence[Tensors], streams: int, threads: int) -> list[dict[str, Tensor]]:
        """The outputs of as many parts as there are streams, computed at once."""
        started = []
        for place, inputs in enumerate(parts):
            values = [inputs[info.name].to(getattr(torch, info.dtype)).contiguous() for info in self.file.inputs]
            request = self._open_requests([tuple(value.shape) for value in values], streams, threads)[place]
            arrays = {info.name: value.numpy() for info, value in zip(self.file.inputs, values)}
            if self._time_model:
                numbers = {name: float(arrays.pop(name)) for name in NUMBERS if name in arrays}
                if self._time_outputs[0] != numbers:
                    values = self._time_model({name: np.array(value, np.float32) for name, value in numbers.items()})
                    # by their order, as a compiled graph may give an output another name
                    named = {f"{NUMBERS[0]}.{k}": values[k] for k in range(len(self._time_model.outputs))}
                    self._time_outputs = numbers, named
                arrays |= self._time_outputs[1]
            for name, value in arrays.items():
                request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
            request.start_async()
            started.append((request, arrays))
        outputs = []
        for request, _ in started:
            request.wait()
            # Copied, as the request writes its next outputs into the same memory.
            outputs.append({info.name: _copy_output(request.get_tensor(info.name), info) for info in self.file.outputs})
        return outputs

    def _open_requests(self, shapes: list[tuple[int, ...]], streams: int, threads: int) -> list[openvino.InferRequest]:
        key = (streams, threads) if self.takes_any_batch else (*shapes, streams, threads)
        if key not in self._requests:
            graph = self.core.read_model(str(self.path))
            if not self.takes_any_batch:
                graph.reshape({info.name: shape for info, shape in zip(self.file.inputs, shapes)})
            if self.options["INFERENCE_PRECISION_HINT"] != HINTS["fp32"] and NUMBERS[0] in input_names(graph):
                time_graph = split_graph(graph, NUMBERS)  # equal for every batch size
                options = {**self.options, "INFERENCE_PRECISION_HINT": HINTS["fp32"], "NUM_STREAMS": 1}
                self._time_model = self._time_model or self.core.compile_model(time_graph, "CPU", options)
            options = {**self.options, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
            compiled = self.core.compile_model(graph, "CPU", options)
            self._requests[key] = [compiled.create_infer_request() for _ in range(streams)]
        return self._requests[key]


def input_names(graph: openvino.Model) -> list[str]:
    return [value.any_name for value in graph.inputs]


def split_graph(graph: openvino.Model, names: Sequence[str]) -> openvino.Model:
    """Takes what depends on the inputs `names` alone out of the graph, as a second graph; its outputs are inputs of the
    first by the same names.

    In bf16 the phases of a timestep's sines, up to 1,000, would be rounded to whole numbers and more. At full size the
    noise of timestep 999 then lies 16 % from that of fp32; computed in fp32 here, 1.7 %. Those of an embedded guidance
    are as large.
    """
    parameters = [value.get_node() for value in graph.inputs if value.any_name in names]
    decided = {parameter.get_friendly_name() for parameter in parameters}  # by these inputs alone
    fixed: set[str] = set()
    for node in graph.get_ordered_ops():
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if not sources - fixed and node.get_type_name() not in ("Parameter", "Result"):
            fixed.add(node.get_friendly_name())
        elif sources and not sources - fixed - decided and node.get_type_name() != "Result":
            decided.add(node.get_friendly_name())
    ends: list[openvino.op.Result] = []
    inputs: list[openvino.op.Parameter] = []
    for node in graph.get_ordered_ops():
        for value in node.outputs() if node.get_friendly_name() in decided else ():
            uses = [use for use in value.get_target_inputs() if use.get_node().get_friendly_name() not in decided]
            if not uses:
                continue
            replacement = opset13.parameter(value.get_partial_shape(), value.get_element_type())
            replacement.output(0).set_names({f"{names[0]}.{len(ends)}"})
            for use in uses:
                use.replace_source_output(replacement.output(0))
            end = opset13.result(value)
            end.output(0).set_names({f"{names[0]}.{len(ends)}"})
            ends.append(end)
            inputs.append(replacement)
    graph.add_parameters(inputs)
    for parameter in parameters:
        graph.remove_parameter(parameter)
    return openvino.Model(ends, parameters, names[0])


def _copy_output(value: openvino.Tensor, info: TensorInfo) -> Tensor:
    return torch.from_numpy(np.array(value.data)).to(getattr(torch, info.dtype))


def resolve_precision(dtype: str, capabilities: Sequence[str]) -> str:
    """The arithmetic of UNet and autoencoder: as requested, or fp32."""
    if dtype == "auto":
        return "fp32"
    if dtype not in HINTS:
        raise Refused(f"dtype: OpenVINO computes in {' or '.join(HINTS)} here, not in {dtype}", "Use --dtype fp32.")
    if dtype == "bf16" and "BF16" not in capabilities:
        raise Refused(
            "dtype: this CPU has no instructions for bf16, OpenVINO would compute in fp32", "Use --dtype fp32."
        )
    return dtype
