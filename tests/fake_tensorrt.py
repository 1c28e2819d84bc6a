"""A stand-in for the module tensorrt_rtx that runs plans on the CPU: the graph a plan names, by ONNX Runtime, over the
addresses it is given.

It is as strict as the real one: shapes must lie in the chosen profile, every tensor needs its address before it runs.
"""

import ctypes
import enum
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from datasetdm_fast.export.tensorrt import flavours, plan_builder

NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}
HANDLE = 4711
SESSIONS: dict[bytes, onnxruntime.InferenceSession] = {}


class ILogger:
    ERROR, WARNING, VERBOSE = 1, 2, 4


class DataType(enum.Enum):
    FLOAT = "tensor(float)"
    INT64 = "tensor(int64)"
    UINT8 = "tensor(uint8)"
    BOOL = "tensor(bool)"


class EngineValidity(enum.Enum):
    VALID, INVALID = 0, 2


class EngineInvalidityDiagnostics(enum.Enum):
    UNSUPPORTED_CC, OLD_CUDA_DRIVER = 2, 4


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER = 0, 1


class ComputeCapability(enum.Enum):
    NONE, CURRENT, SM75, SM86, SM89 = 0, 1, 75, 86, 89


def plan_of(graph, shapes, capability) -> bytes:
    """What this module takes for a plan."""
    return json.dumps({"graph": str(graph), "shapes": shapes, "capability": capability}).encode()


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session of the graph, the same one for equal bytes of graph and weights."""
    graph = path.read_bytes()
    digest = hashlib.sha256(graph)
    for file in sorted(path.parent.glob("*.data")):
        if file.name.encode() in graph:  # which names the file of its weights
            digest.update(file.read_bytes())
    if digest.digest() not in SESSIONS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        SESSIONS[digest.digest()] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return SESSIONS[digest.digest()]


class Runtime:
    made = 0  # plans deserialised by this class

    def __init__(self, log):
        self.log = log

    def get_engine_validity(self, content):
        is_served = json.loads(content)["capability"] in ("sm86", "")
        return (EngineValidity.VALID, 0) if is_served else (EngineValidity.INVALID, 2)

    def deserialize_cuda_engine(self, content):
        Runtime.made += 1
        return Engine(json.loads(content), self.log)


class RuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY


class PlainRuntimeConfig:
    """Of the full TensorRT: no graphs of its own."""


class Engine:
    offers_graphs = True

    def __init__(self, plan, log):
        self.plan, self.log = plan, log
        self.session = open_session(Path(plan["graph"]))
        self.inputs, self.outputs = self.session.get_inputs(), self.session.get_outputs()
        self.tensors = {one.name: one for one in (*self.inputs, *self.outputs)}
        self.contexts = []

    device_memory_size_v2 = 1_000_000
    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, place):
        return list(self.tensors)[place]

    def get_tensor_dtype(self, name):
        return DataType(self.tensors[name].type)

    def create_runtime_config(self):
        return RuntimeConfig() if self.offers_graphs else PlainRuntimeConfig()

    def create_execution_context(self, config=None):
        self.contexts.append(Context(self, config))
        return self.contexts[-1]


class Context:
    def __init__(self, engine, config):
        self.engine, self.config = engine, config
        self.shapes, self.addresses, self.runs = {}, {}, 0

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return tuple(shape) == tuple(self.engine.plan["shapes"][name])

    def infer_shapes(self):
        return [
            one.name
            for one in self.engine.inputs
            if not all(isinstance(size, int) for size in one.shape) and one.name not in self.shapes
        ]

    def get_tensor_shape(self, name):
        sizes = {}
        for one in self.engine.inputs:
            sizes |= {
                axis: size
                for axis, size in zip(one.shape, self.shapes.get(one.name, one.shape))
                if isinstance(axis, str)
            }
        sizes["2B"] = 2 * sizes["B"]
        return tuple(sizes.get(axis, axis) for axis in self.engine.tensors[name].shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, handle):
        assert handle == HANDLE
        self.runs += 1
        given = {one.name: self._view(one) for one in self.engine.inputs}
        for one, value in zip(self.engine.outputs, self.engine.session.run(None, given)):
            self._view(one)[...] = value
        return True

    def _view(self, one):
        shape, dtype = self.get_tensor_shape(one.name), np.dtype(NUMPY[one.type])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[one.name]), dtype).reshape(shape)


class FakeFlavour:
    """A TensorRT-RTX whose plans run here, or a full TensorRT where it serves every GPU."""

    def __init__(self, module, title="TensorRT-RTX 1.7.1.116", capabilities=("sm75", "sm86", "sm89")):
        self.module, self.title, self.capabilities = module, title, capabilities

    def serves(self, capability):
        return flavours.Flavour.serves(self, capability)


class HostQueue:
    """A queue that runs everything at once, and counts what was recorded."""

    handle, gpu, capability = HANDLE, "NVIDIA GeForce RTX 3090", "sm86"

    def __init__(self):
        self.device, self.recorded = torch.device("cpu"), 0

    def run(self, work):
        work()

    def record(self, work):
        self.recorded += 1
        return work

    def take_turn(self):
        return nullcontext()

    def free_memory(self):
        return 8_000_000_000

    def use_device(self):
        return torch.inference_mode()


def fake_builder(monkeypatch) -> list:
    """Builds become fakes; the stage, shapes and capability of each are in the list."""
    built = []

    def build_plan(graph, plan, shapes, flavour, capability):
        built.append((graph.stem, shapes, capability))
        plan.write_bytes(plan_of(graph, shapes, capability if flavour.capabilities else ""))

    monkeypatch.setattr(plan_builder, "build_plan", build_plan)
    return built
