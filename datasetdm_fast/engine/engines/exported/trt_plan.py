"""A loaded TensorRT plan: contexts over static buffers, each call of fixed shape recorded as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.engine.engines.cuda_graph import InOrder
from datasetdm_fast.errors import GateFailed, Missing
from datasetdm_fast.export import golden
from datasetdm_fast.export.tensorrt import sealed
from datasetdm_fast.export.tensorrt.flavours import Flavour
from datasetdm_fast.export.tensorrt.plans import PlanFile, compiled_path
from datasetdm_fast.export.tensorrt.to_tensorrt import resolved

if TYPE_CHECKING:
    from datasetdm_fast.export.manifest import StageFile, TensorInfo

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class Queue(InOrder):
    """A stream of its own on one GPU: TensorRT synchronises the whole device when it is given the default stream.

    The threads that sample and that make labels take turns: what one queues while the other records would be recorded.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self._turn = device, torch.cuda.Stream(device), threading.RLock()
        self.gpu = torch.cuda.get_device_name(device)
        self.capability = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        self.handle = self.stream.cuda_stream

    def run(self, work: Callable[[], None]) -> None:
        """`work` on this stream: after what its caller has queued, before what the caller queues next."""
        current = torch.cuda.current_stream(self.device)
        with self._turn:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                work()
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats `work` as one CUDA graph; call it within `run`."""
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def wait(self) -> None:
        self.stream.synchronize()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What this thread queues within this block comes after what others have queued in theirs."""
        with self._turn:
            self.follow(torch.cuda.current_stream(self.device))
            yield

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within this block the GPU is the current one, as TensorRT expects when it loads a plan, and the stream this
        thread's alone.
        """
        with self._turn, torch.cuda.device(self.device):
            yield


class LoadedPlan:
    """One stage on the GPU: its weights once, and a `Call` for each batch size its plan was built for."""

    def __init__(self, plan: PlanFile, tensors: StageFile, flavour: Flavour, queue: Queue, key: bytes):
        self.plan, self.tensors, self.flavour, self.queue, self.key = plan, tensors, flavour, queue, key
        self.log, self.compiled = _logger(flavour.module), None
        self.batches = tuple(self._batch_of(shapes) for shapes in plan.facts["profiles"])
        self._calls: dict[int, Call] = {}
        with queue.here():
            self.runtime = flavour.module.Runtime(self.log)
            self.engine = self._deserialised()
            self._check_tensors()
            if "weight-streaming" in plan.facts["flags"] and self.engine.streamable_weights_size:
                self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
            self._settings = self._runtime_settings()

    def __call__(self, batch: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the stage, as tensors of the caller's own; `batch` is one of `batches`."""
        if batch not in self._calls:
            with self.queue.here():
                self._calls[batch] = Call(self, self.batches.index(batch), batch)
            self._keep_compiled()
        return self._calls[batch](inputs)

    def _deserialised(self):
        if hasattr(self.runtime, "get_engine_validity"):
            validity, why = self.runtime.get_engine_validity(self.plan.content)
            if validity == self.flavour.module.EngineValidity.INVALID:
                reasons = [
                    name
                    for name, one in self.flavour.module.EngineInvalidityDiagnostics.__members__.items()
                    if why & one.value
                ]
                raise self._unfit(", ".join(reasons) or self.log.last)
        engine = self.runtime.deserialize_cuda_engine(self.plan.content)
        if engine is None:
            raise self._unfit(self.log.last)
        return engine

    def _unfit(self, reason: str) -> Missing:
        return Missing(
            f"{self.plan.path}: {self.flavour.title} cannot run this plan on {self.queue.gpu} "
            f"({self.queue.capability}): {reason}",
            "Update the NVIDIA driver, or delete the plan so that it is built on this machine.",
        )

    def _check_tensors(self) -> None:
        found = {}
        for place in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(place)
            found[name] = DTYPES.get(self.engine.get_tensor_dtype(name).name)
        expected = {one.name: one.dtype for one in (*self.tensors.inputs, *self.tensors.outputs)}
        if found != expected:
            raise self._unfit(f"its tensors are {found}, expected {expected}")

    def _batch_of(self, shapes: Mapping[str, Sequence[Sequence[int]]]) -> int:
        """The B of an optimisation profile."""
        one = next(one for one in self.tensors.inputs if one.shape[:1] == ("B",))
        return shapes[one.name][0][0]

    # The context's settings: what TensorRT-RTX has and TensorRT has not is looked for, not assumed

    def _runtime_settings(self):
        if not hasattr(self.engine, "create_runtime_config"):
            return None
        settings, trt = self.engine.create_runtime_config(), self.flavour.module
        if hasattr(settings, "dynamic_shapes_kernel_specialization_strategy"):
            settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if hasattr(settings, "cuda_graph_strategy"):
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if hasattr(settings, "create_runtime_cache"):
            self.compiled = settings.create_runtime_cache()
            with suppress(FileNotFoundError, sealed.Unusable):
                _, content = sealed.read(self._compiled_path, self.key, self._compiled_facts)
                self.compiled.deserialize(content)  # says no to kernels of another driver, and compiles anew
            settings.set_runtime_cache(self.compiled)
        return settings

    @property
    def records_itself(self) -> bool:
        """Whether TensorRT wraps its calls into CUDA graphs without our doing."""
        return hasattr(self._settings, "cuda_graph_strategy")

    def new_context(self):
        context = (
            self.engine.create_execution_context()
            if self._settings is None
            else self.engine.create_execution_context(self._settings)
        )
        if context is None:
            raise self._unfit(self.log.last)
        return context

    @property
    def _compiled_path(self):
        return compiled_path(self.plan.path)

    @property
    def _compiled_facts(self) -> dict[str, str]:
        return {
            "kind": "compiled kernels",
            "plan": self.plan.path.stem,
            "version": self.flavour.version,
            "gpu": self.queue.gpu,
        }

    def _keep_compiled(self) -> None:
        """Writes the kernels compiled on this GPU beside the plan, so that the next start need not compile."""
        if self.compiled is None:
            return
        content = self.compiled.serialize()
        with suppress(Missing):  # a folder of others may be read-only
            sealed.write(self._compiled_path, self._compiled_facts, bytes(content), self.key)

    # Golden outputs

    def check(self, precision: str) -> None:
        """Raises GateFailed where the plan, on this GPU, does not say of its golden inputs what it was built to say."""
        batch = self.batches[0]
        inputs = {one.name: self._spread(one, self.plan.golden[f"in.{one.name}"], batch) for one in self.tensors.inputs}
        outputs = self(batch, {name: torch.from_numpy(value).to(self.queue.device) for name, value in inputs.items()})
        for one in self.tensors.outputs:
            truth = self.plan.golden[f"out.{one.name}"]
            for place in {0, batch - 1}:
                found = golden.sampled(_of_image(one, outputs[one.name].cpu(), place, batch).float().numpy())
                far = golden.distance(found, truth)
                if not far <= golden.FAR[precision]:
                    limit = f"at most {golden.FAR[precision]:g} is allowed"
                    raise GateFailed(
                        f"{self.plan.path}: on {self.queue.gpu} the output {one.name} is {far:.2g} away from the "
                        f"golden one, {limit}",
                        "Update the NVIDIA driver or build the plan on this machine; --precision fp32 asks less of it.",
                    )

    def _spread(self, one: TensorInfo, value: np.ndarray, batch: int) -> np.ndarray:
        """A golden input of one image for every image of a batch."""
        for axis, (size, had) in enumerate(zip(resolved(one.shape, batch), value.shape)):
            value = np.repeat(value, size // had, axis)
        return value.copy(order="C")


def _of_image(one: TensorInfo, value: Tensor, place: int, batch: int) -> Tensor:
    """What an output says of one image of the batch, and of its first word."""
    if one.shape[0] == "2B":
        return value[[place, batch + place]]
    value = value[place : place + 1]
    return value[:, :1] if "K" in one.shape else value


class Call:
    """One context, at one optimisation profile, over input and output buffers that stay where they are."""

    def __init__(self, loaded: LoadedPlan, profile: int, batch: int):
        self.queue, self.log, self.path = loaded.queue, loaded.log, loaded.plan.path
        self.context = loaded.new_context()
        self._must(self.context.set_optimization_profile_async(profile, self.queue.handle), "selecting its shapes")
        self.queue.wait()
        tensors = loaded.tensors
        self.inputs, self.outputs = self._buffers(tensors.inputs, batch), self._buffers(tensors.outputs, batch)
        for one in tensors.inputs:
            if any(isinstance(axis, str) for axis in one.shape):
                self._must(
                    self.context.set_input_shape(one.name, tuple(self.inputs[one.name].shape)),
                    f"the shape of {one.name}",
                )
        self._must(not self.context.infer_shapes(), "inferring shapes")
        for name, buffer in self.outputs.items():
            self._must(tuple(self.context.get_tensor_shape(name)) == tuple(buffer.shape), f"the shape of {name}")
        for name, buffer in (self.inputs | self.outputs).items():
            self._must(self.context.set_tensor_address(name, buffer.data_ptr()), f"the address of {name}")
        self.queue.run(self._execute)  # compiles, tunes and allocates what a recording must not
        self._repeat = self._execute
        if not loaded.records_itself:
            self.queue.run(self._record)

    def _buffers(self, tensors: Sequence[TensorInfo], batch: int) -> dict[str, Tensor]:
        return {
            one.name: torch.zeros(resolved(one.shape, batch), dtype=getattr(torch, one.dtype), device=self.queue.device)
            for one in tensors
        }

    def _must(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise Missing(
                f"{self.path}: TensorRT failed at {what}: {self.log.last}",
                "Delete the plan so that it is rebuilt, or use --engine fast.",
            )

    def _execute(self) -> None:
        self._must(self.context.execute_async_v3(self.queue.handle), "running it")

    def _record(self) -> None:
        self._repeat = self.queue.record(self._execute)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.queue.turn():
            for name, buffer in self.inputs.items():
                assert inputs[name].shape == buffer.shape, (
                    f"{name} is {list(inputs[name].shape)}, expected {list(buffer.shape)}"
                )
                buffer.copy_(inputs[name])
            self.queue.run(self._repeat)
            return {name: buffer.clone() for name, buffer in self.outputs.items()}


def _logger(trt):
    class RuntimeLog(trt.ILogger):
        """Keeps the last error for our own sentence about it."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.last = "no reason was given"

        def log(self, severity, message):
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())

    return RuntimeLog()
