"""The TensorRT engine: every stage a plan built from its graph, run by whichever TensorRT is installed.

A loaded plan has contexts over static buffers, and each call of fixed shape is recorded as a CUDA graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.cuda_graph import TURN, InOrder
from datasetdm_fast.engine.engines.device import new_stream, resolve_device
from datasetdm_fast.engine.engines.exported.graphs import GraphEngine, Tensors
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Missing, Refused, check_choice, is_out_of_gpu
from datasetdm_fast.export.manifest import PRECISIONS, Manifest, StageFile, TensorInfo
from datasetdm_fast.export.staging import fill_alone, print_line
from datasetdm_fast.export.tensorrt import plan_builder
from datasetdm_fast.export.tensorrt.flavours import Flavour, describe_driver, require_gpu
from datasetdm_fast.export.tensorrt.plan_builder import make_logger
from datasetdm_fast.untrusted import documents

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}
WORDS = 4  # class words per call of the open-vocabulary decoder


def resolve_shape(info: TensorInfo, batch: int) -> tuple[int, ...]:
    """The shape of a tensor in numbers."""
    letters = {"B": batch, "2B": 2 * batch, "K": WORDS}
    return tuple(letters[axis] if isinstance(axis, str) else axis for axis in info.shape)


def dynamic_shapes(tensors: StageFile, batch: int) -> dict[str, tuple[int, ...]]:
    """The inputs whose shape a call decides; kernels are chosen for these."""
    return {
        info.name: resolve_shape(info, batch)
        for info in tensors.inputs
        if any(isinstance(axis, str) for axis in info.shape)
    }


class Queue(InOrder):
    """A stream of its own on one GPU: TensorRT synchronises the whole device when it is given the default stream.

    The threads that sample and that make labels take turns: what one queues while the other records would be recorded.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, new_stream(device)
        self.gpu = torch.cuda.get_device_name(device)
        self.capability = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        self.handle = self.stream.cuda_stream

    def run(self, work: Callable[[], None]) -> None:
        """`work` on this stream: after what its caller has queued, before what the caller queues next."""
        current = torch.cuda.current_stream(self.device)
        with TURN:
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

    def free_memory(self) -> int:
        """Bytes that neither PyTorch nor another process holds."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def take_turn(self) -> Iterator[None]:
        """What this thread queues within this block comes after what others have queued in theirs."""
        with TURN:
            self.follow(torch.cuda.current_stream(self.device))
            yield

    @contextmanager
    def use_device(self) -> Iterator[None]:
        """Within this block the GPU is the current one, as TensorRT expects when it loads a plan, and the stream this
        thread's alone.
        """
        with TURN, torch.cuda.device(self.device):
            yield


class LoadedPlan:
    """One stage on the GPU for one batch size: its weights and a context over buffers that stay where they are."""

    def __init__(self, path: Path, tensors: StageFile, batch: int, flavour: Flavour, queue: Queue):
        self.path, self.tensors, self.batch, self.flavour, self.queue = path, tensors, batch, flavour, queue
        self.log = make_logger(flavour.module)
        with queue.use_device():
            try:
                self._load()
            # Of TensorRT, of an older one that lacks something, and of a recording that it ended.
            except (RuntimeError, TypeError, AttributeError) as error:
                if isinstance(error, Missing) or is_out_of_gpu(error):
                    raise
                raise self._failure(f"loading it: {documents.one_line(str(error))}") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the stage, as tensors that later calls leave alone."""
        with self.queue.take_turn():
            for name, buffer in self.inputs.items():
                shape, expected = list(inputs[name].shape), list(buffer.shape)
                assert shape == expected, f"{name} is {shape}, expected {expected}"
                buffer.copy_(inputs[name])
            self.queue.run(self._replay)
            return {name: buffer.clone() for name, buffer in self.outputs.items()}

    def _load(self) -> None:
        self.runtime = self.flavour.module.Runtime(self.log)
        self.engine = self._deserialise()
        names = [self.engine.get_tensor_name(place) for place in range(self.engine.num_io_tensors)]
        dtypes = {name: DTYPES.get(self.engine.get_tensor_dtype(name).name) for name in names}
        expected = {info.name: info.dtype for info in (*self.tensors.inputs, *self.tensors.outputs)}
        if dtypes != expected:
            raise self._unfit(f"its tensors are {dtypes}, expected {expected}")
        self.inputs, self.outputs = map(self._make_buffers, (self.tensors.inputs, self.tensors.outputs))
        self.context = self._make_context()
        self.queue.run(self._execute)  # compiles, tunes and allocates what a recording must not
        self._replay = self._execute
        if not self.records_itself:
            self.queue.run(self._record)

    def _deserialise(self) -> Any:
        trt, content = self.flavour.module, self.path.read_bytes()
        if hasattr(self.runtime, "get_engine_validity"):
            validity, flags = self.runtime.get_engine_validity(content)
            if validity == trt.EngineValidity.INVALID:
                members = trt.EngineInvalidityDiagnostics.__members__.items()
                raise self._unfit(", ".join(name for name, member in members if flags & member.value) or self.log.last)
        engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._unfit(self.log.last)
        return engine

    def _unfit(self, reason: str) -> Missing:
        return Missing(
            f"{self.path}: {self.flavour.title} cannot run this plan on {self.queue.gpu} "
            f"({self.queue.capability}): {reason}",
            "Update the NVIDIA driver, or delete the plan so that it is built on this machine.",
        )

    def _make_buffers(self, infos: Sequence[TensorInfo]) -> dict[str, Tensor]:
        return {
            info.name: torch.zeros(
                resolve_shape(info, self.batch), dtype=getattr(torch, info.dtype), device=self.queue.device
            )
            for info in infos
        }

    def _make_context(self) -> Any:
        self.settings = None
        if hasattr(self.engine, "create_runtime_config"):  # TensorRT has only some of what TensorRT-RTX has
            self.settings, trt = self.engine.create_runtime_config(), self.flavour.module
            if hasattr(self.settings, "dynamic_shapes_kernel_specialization_strategy"):
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                self.settings.dynamic_shapes_kernel_specialization_strategy = eager
            if self.records_itself:
                self.settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._check_memory()
        context = self.engine.create_execution_context(*([] if self.settings is None else [self.settings]))
        if context is None:
            raise self._unfit(self.log.last)
        for name, shape in dynamic_shapes(self.tensors, self.batch).items():
            self._must(context.set_input_shape(name, shape), f"the shape of {name}")
        missing = context.infer_shapes()
        self._must(not missing, f"inferring shapes, without {', '.join(missing)}")
        for name, buffer in self.outputs.items():
            self._must(tuple(context.get_tensor_shape(name)) == tuple(buffer.shape), f"the shape of {name}")
        for name, buffer in (self.inputs | self.outputs).items():
            self._must(context.set_tensor_address(name, buffer.data_ptr()), f"the address of {name}")
        return context

    def _check_memory(self) -> None:
        """Refuses what would not fit: TensorRT's own message about it names bytes and nothing to change."""
        needed, free = self.engine.device_memory_size_v2, self.queue.free_memory()
        if needed > free:
            raise Missing(
                f"memory: the GPU does not have enough memory for {Path(self.tensors.file).stem} in batches of "
                f"{self.batch}: it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                "Choose a smaller --batch-size or --size, or free its memory.",
            )

    @property
    def records_itself(self) -> bool:
        """Whether TensorRT wraps its calls into CUDA graphs without our doing."""
        return hasattr(self.settings, "cuda_graph_strategy")

    def _must(self, is_done: bool, step: str) -> None:
        if not is_done:
            raise self._failure(step)

    def _failure(self, step: str) -> Missing:
        return Missing(
            f"{self.path}: TensorRT failed at {step}: {self.log.last}",
            "Delete the plan so that it is rebuilt, or use --engine fast.",
        )

    def _execute(self) -> None:
        self._must(self.context.execute_async_v3(self.queue.handle), "running it")

    def _record(self) -> None:
        self._replay = self.queue.record(self._execute)


TEXTS = 8  # prompts or words per call of the text encoder
PIXELS = 8 * 512 * 512  # of the images per call of the autoencoder; its full-size activations dwarf the UNet's


class TrtEngine(GraphEngine):
    """See GraphEngine; plans lie beside their graphs in the cache, and are built for this GPU and one batch size; one
    stream.
    """

    name, library, runtime = "trt", "TensorRT", "any"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        queue: Queue | None = None,
        flavour: Flavour | None = None,
        on_message: Callable[[str], None] = print_line,
    ):
        self.flavour, self.queue = flavour or require_gpu(), queue or Queue(_resolve_gpu(device))
        self.device, self.precision = self.queue.device, "fp16" if dtype == "auto" else dtype
        check_choice("dtype", dtype, ("auto", *PRECISIONS))
        self.graph_precision = self.precision
        super().__init__(model, decoders, on_message)
        self._timesteps: dict[float, Tensor] = {}

    def _open(self, folder: Path, manifest: Manifest, stage: str) -> TrtStage:
        return TrtStage(self, folder, manifest, stage)

    def _run(self, stage: str, size: int, rows: int = 0, **inputs: Tensor) -> dict[str, Tensor]:
        return super()._run(stage, call_size(stage, self.model.size, size), rows, **inputs)

    def _timestep(self, timestep: float) -> Tensor:
        if timestep not in self._timesteps:  # on the device already: a copy from the host would make the loop wait
            self._timesteps[timestep] = torch.tensor(timestep, device=self.device)
        return self._timesteps[timestep]

    def _call_decoder(self, task: str, batch: int, sums: Tensors, words: Tensor | None) -> dict[str, Tensor]:
        call = super()._call_decoder
        if words is None:
            return call(task, batch, sums, None)
        parts = [call(task, batch, sums, pad_to(part, WORDS, 1)) for part in words.split(WORDS, 1)]
        return {name: torch.cat([part[name] for part in parts], 1)[:, : words.shape[1]] for name in parts[0]}

    @torch.inference_mode()
    def prepare(self, batch: int) -> None:
        """Builds and loads the plans that images from prompts need: a build takes minutes, and chooses kernels by their
        time, which calls of other threads would disturb.
        """
        stages = {name: cast(TrtStage, self._open_once(name)) for name in self.manifest.stages}
        needed = {name: stage for name, stage in stages.items() if name != "encode_image"}
        missing = [name for name, stage in needed.items() if not stage.path(batch).exists()]
        for name, stage in needed.items():
            if name in missing:
                self.on_message(f"plan {missing.index(name) + 1} of {len(missing)}:")
            stage.plan(batch)

    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {"device_name": self.queue.gpu}

    def _versions(self) -> dict[str, str]:
        return {"tensorrt": self.flavour.title, "torch": torch.__version__}


class TrtStage:
    """One stage: its plans by batch size, each read or built at the first call."""

    def __init__(self, engine: TrtEngine, folder: Path, manifest: Manifest, stage: str):
        self.engine, self.folder, self.manifest, self.stage = engine, folder, manifest, stage
        self.tensors = manifest.stages[stage]
        self.plans: dict[int, LoadedPlan] = {}

    def __call__(self, parts: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        """The outputs of every part; a part that is smaller than the plan's batch is filled with its last entry."""
        outputs = []
        for inputs in parts:
            count = len(next(iter(inputs.values())))
            size = self._size(len(next(iter(parts[0].values()))))
            padded = {name: pad_to(value, size) for name, value in inputs.items()} if count < size else inputs
            result = self.plan(size)(padded)
            outputs.append({name: value[:count] for name, value in result.items()} if count < size else result)
        return outputs

    def _size(self, batch: int) -> int:
        return call_size(self.stage, self.manifest.size, batch)

    def path(self, batch: int) -> Path:
        """The file of the plan for a batch, named by all that decides its bytes and whether it runs here."""
        queue, batch = self.engine.queue, self._size(batch)
        facts = [self.manifest.files[name].sha256 for name in self.tensors.files]
        facts += [self.engine.flavour.title, queue.gpu, queue.capability]
        key = hashlib.sha256(json.dumps([*facts, batch]).encode()).hexdigest()[:16]
        return self.folder / f"{self.stage}-{key}.plan"

    def plan(self, batch: int) -> LoadedPlan:
        """The plan of calls for a batch of that many images."""
        if (batch := self._size(batch)) not in self.plans:
            path = self.path(batch)
            with fill_alone(self.folder):  # one process builds for all that wait
                if not path.exists():
                    engine = self.engine
                    target = engine.flavour, engine.queue.capability, engine.on_message
                    build_stage(path, self.manifest, self.stage, batch, *target)
            self.plans[batch] = LoadedPlan(path, self.tensors, batch, self.engine.flavour, self.engine.queue)
        return self.plans[batch]


def build_stage(
    path: Path,
    manifest: Manifest,
    stage: str,
    batch: int,
    flavour: Flavour,
    capability: str,
    on_message: Callable[[str], None],
) -> None:
    """Builds the plan of a stage from its graph, which lies beside it, for calls of a batch of that many images."""
    size = call_size(stage, manifest.size, batch)
    on_message(f"building {stage} for batch {size}, which takes minutes")
    graph, part = manifest.graph(path.parent, stage), storage.part_of(path)
    shapes = dynamic_shapes(manifest.stages[stage], size)
    try:
        plan_builder.build_plan(graph, part, shapes, flavour, capability)
        storage.move(part, path)
    finally:
        storage.forget(part)


def call_size(stage: str, size: int, batch: int) -> int:
    """How many of a batch a stage takes in one call."""
    if stage == "encode_text":
        return TEXTS
    return min(batch, max(PIXELS // size**2, 1)) if stage in ("decode_image", "encode_image") else batch


def _resolve_gpu(device: str) -> torch.device:
    place = resolve_device(device)
    if place.type != "cuda":
        if device != "auto":
            raise Refused(
                f"device: the trt engine runs on a GPU, not on {device}", "Use --device cuda, or --engine fast."
            )
        raise Missing(
            f"engine trt: this PyTorch ({torch.__version__}) sees no GPU; {describe_driver()}",
            "Install a PyTorch built for CUDA.",
        )
    return torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())


def pad_to(part: Tensor, size: int, axis: int = 0) -> Tensor:
    """`part` with its last entry along `axis` repeated up to `size`."""
    short = size - part.shape[axis]
    return torch.cat([part, part.narrow(axis, -1, 1).repeat_interleave(short, axis)], axis) if short else part
