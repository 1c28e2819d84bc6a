"""Every PyTorch operation of a rehearsal: its launch, what it makes the host wait for, and the answers that depend on
data, which are chosen.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.rehearsal.page_locked import PageLocked, filled
from bench.rehearsal.timeline import Timeline, frames_of_ours

ATTENTION = "scaled_dot_product_attention"
PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm", ATTENTION}
RESIZES = {"upsample_bilinear2d", "upsample_linear1d"}  # a kernel each; without a GPU PyTorch would take them apart
WITHOUT_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"}
OVERWRITING = {"fill_", "zero_", "index_put_", "masked_fill_", "slice_scatter", "select_scatter"}  # read no old values
# Types that a recorded network computes with, by the precision that was asked for; in bf16 decoders are in fp16.
STORED = {
    "auto": {torch.float16},
    "fp16": {torch.float16},
    "bf16": {torch.bfloat16, torch.float16},
    "tf32": {torch.float32},
    "fp32": {torch.float32},
}
CHECKED = "_linalg_check_errors"  # after an inverse, among others: whether there is one
READ_BY_HOST = {"_local_scalar_dense": 1, "is_nonzero": 1, "equal": 1, "nonzero": 2, "masked_select": 2, "_unique2": 3}
READ_BY_HOST |= {CHECKED: 1}
LISTED = (torch.tensor, torch.as_tensor, torch.asarray)  # tensors of what is no tensor yet
OPTIMISERS = "_fused_adam"  # whose kernels take every tensor's address as one of the GPU
INDEXED = ("index", "index_put_", "index_put")
# What draws numbers, which a run does on the host from the seed of each image; dropout draws nothing in these networks.
RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "normal_",
          "uniform_", "bernoulli", "bernoulli_", "multinomial", "exponential_", "random_"}  # fmt: skip
ENGINE = "datasetdm_fast/engine/engines/fast/engine.py"
AUTOENCODER = {(ENGINE, "_pixels"), (ENGINE, "encode_image")}
TAUGHT = {
    ("datasetdm_fast/training/trainer.py", "_step"),
    ("bench/proof/students/course.py", "step"),
}  # steps
# Where a recorded network of narrow storage computes in fp32, by file and function.
IN_FP32 = {
    ("datasetdm_fast/engine/engines/fast/engine.py", "_run"),  # the answer of the U-Net,
    ("datasetdm_fast/engine/engines/fast/on_gpu.py", "run"),  # and of a decoder
    ("datasetdm_fast/engine/engines/fast/engine.py", "as_images"),
    ("datasetdm_fast/engine/models/capture.py", "__init__"),  # sums over all layers of a level
    ("datasetdm_fast/engine/models/capture.py", "feature"),
    ("datasetdm_fast/engine/models/capture.py", "attend"),
    ("datasetdm_fast/engine/models/fused.py", "both_doubled"),  # statistics of a norm
    ("kernels/attention_average.py", "fused"),  # running sums of attention
}
# What adds floating-point numbers on a GPU in the order in which its threads come, by PyTorch's list of what is not
# deterministic there; the sums of `index_put_` are sorted.
UNORDERED = {"index_add", "scatter_add", "cumsum", "bincount", "histc", "nll_loss2d_forward"}
REDUCING, EXACT = {"scatter", "scatter_reduce", "index_reduce"}, (None, "amax", "amin")
TIES = {"topk", "kthvalue", "median", "nanmedian", "mode"}  # which of equal numbers they name is a GPU's choice
PLACING = {"scatter": "src", "index_put": "values", "index_copy": "source", "put": "source"}  # any of several stays
TRAINING = "datasetdm_fast/training/", "bench/proof/students/"  # whose steps are promised up to rounding
META = torch.device("meta")  # what PyTorch's backward pass is told, as without CUDA it has no streams to ask for
FOUND = 7  # rows that an operation finds whose result depends on data


class Operations(TorchDispatchMode):
    """Lies above a FakeTensorMode. `stored` holds the dtypes of the networks whose calls are recorded as graphs,
    `autoencoder` that of one which leaves the range of fp16, `is_exact` whether convolutions in fp32 have to be,
    `has_dropout` whether a network in training draws numbers.
    """

    def __init__(self, timeline: Timeline):
        super().__init__()
        self.timeline, self.stored, self.is_exact = timeline, set(), False
        self.autoencoder: torch.dtype | None = None
        self.pinned: list[StorageWeakRef] = []
        self.truths: deque[bool] = deque()  # what the host reads of single flags; all others are true
        self.flags: deque[bool] = deque()  # and of arrays of flags
        self.gradients_on: torch.device | None = None  # while they are computed
        self.has_dropout = False
        self.taught: torch.dtype | None = None  # what the convolutions of a training compute in

    @contextmanager
    def backward(self, device: torch.device) -> Iterator[None]:
        """Within the block PyTorch computes gradients, in this thread."""
        with torch.autograd.set_multithreading_enabled(False):
            self.gradients_on = device
            try:
                yield
            finally:
                self.gradients_on = None

    def judge(self, precision: str) -> None:
        """Judges what comes next by the precision that an engine was asked for."""
        self.stored, self.is_exact = STORED[precision], precision == "fp32"

    @property
    def storage(self) -> set[torch.dtype]:
        """The dtypes of the network that is called now."""
        if self.autoencoder is None:
            return self.stored
        calls = {(file, function) for file, _, function in frames_of_ours(sys._getframe(1))}
        return {self.autoencoder} if calls & AUTOENCODER else self.stored

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, (room, name) = kwargs or {}, func._schema.name.split("::")
        if room == "prim":  # a question about a tensor
            return META if name == "device" and self.gradients_on else func(*args, **kwargs)
        if self.gradients_on and kwargs.get("device") == META:
            kwargs["device"] = self.gradients_on
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if (
            name != ATTENTION
            and name not in RESIZES
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)
        ):
            with self:
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        inputs = tensors((args, kwargs))
        if name == "_pin_memory":
            return self.pin(torch.empty_like(inputs[0]))
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        if name == "is_pinned":
            return self.is_pinned(inputs[0])
        if name in RANDOM and not self.has_dropout:
            self.random(name, inputs, kwargs)
        given = given_of(func, args, kwargs)
        self.used_by_host(name, func, given)
        cuda = [value for value in inputs if value.device.type == "cuda"]
        if cuda and name.startswith(OPTIMISERS) and (held := [one for one in inputs if one.device.type == "cpu"]):
            self.timeline.find("device", f"{name} reads {len(held)} tensors of the host, such as {list(held[0].shape)}")
        if cuda and (reason := by_chance(name, given)) and not self.is_learning(inputs):
            self.timeline.find("order", f"{name} {reason}")
        if inputs and (answer := self.read_by_host(name, inputs, cuda)) is not None:
            return answer
        if name in INDEXED and inputs[0].device.type == "cuda":
            self.indices_copied(inputs[0], args[1])
        for value in inputs:
            if isinstance(value, FakeTensor) and value.constant is not None:
                value.constant = None  # the mode would compute with small known numbers instead of launching
        if name == ATTENTION and cuda:
            result = self.attention(*args)
        elif name in RESIZES and cuda:
            result = self.resized(*args)
        else:
            result = func(*args, **kwargs)
        if name == "convolution" and cuda:
            result = like_cudnn(result, args)
        results = tensors(result)
        is_copy = name in ("_to_copy", "copy_")
        if name == "_to_copy" and cuda and kwargs.get("non_blocking") and results[0].device.type == "cpu":
            self.pin(results[0])  # PyTorch makes it so
        written = [value for value in results if value.device.type == "cuda" or (is_copy and cuda)]
        if (cuda or written) and name not in WITHOUT_LAUNCH and not is_view(func, inputs, results):
            sources = inputs[-1:] if is_copy and is_asynchronous(name, args, kwargs) else []
            queued = [value for value in sources if value.device.type == "cpu" and self.is_pinned(value)]
            self.launched(name, func, args, kwargs, result, cuda, written, queued)
        for value in results:
            if value.device.type == "cpu":
                self.timeline.made_on_host(value)
        for value in written if name in WITHOUT_LAUNCH else ():
            self.timeline.allocated(value, value.device.index)
        if is_copy:
            self.copied(name, args, kwargs, inputs, results)
        return result

    # Launches ---------------------------------------------------------------------------------------------------------
    def launched(
        self, name: str, func, args, kwargs, result, cuda: list[Tensor], written: list[Tensor], queued: list[Tensor]
    ) -> None:
        """`queued` is page-locked memory of the host that a copy will read."""
        card = (cuda or written)[0].device.index
        moved, kernels = size(cuda) + size(written), 1
        if name == "convolution" and args[2] is not None:  # cuDNN's bias is an addition of its own in PyTorch
            moved, kernels = moved + 2 * size(written), 2
        read = () if name in OVERWRITING else read_of(func, given_of(func, args, kwargs))
        self.timeline.check_written(name, read)
        plain = name.removesuffix("_")  # in place it is the same work
        self.check_dtypes(plain, func, cuda, written)
        # what a copy narrows, and what a norm says beside its answer, may be wide
        self.check_width(plain, (*(cuda if name != "_to_copy" else ()), *written[:1]))
        self.timeline.launch(
            name,
            card,
            [*cuda, *queued],
            written,
            flops=flops_of(name, func, args, kwargs, result),
            moved=moved,
            kernels=kernels,
        )

    def check_dtypes(self, name: str, func, cuda: list[Tensor], written: list[Tensor]) -> None:
        dtypes = {value.dtype for value in cuda if value.is_floating_point() and value.dim()}
        if name in PRODUCTS and len(dtypes) > 1:
            self.timeline.find("dtype", f"{name} of {' and '.join(sorted(map(str, dtypes)))}")
        is_wide = torch.float32 in dtypes and name == "convolution"
        if is_wide and self.is_exact and torch.backends.cudnn.allow_tf32:
            self.timeline.find("precision", "a convolution of fp32 rounds its factors to TF32")
        if is_wide and (told := self.narrow_network()):
            self.timeline.find("dtype", f"a convolution in fp32, {told}")
        if self.timeline.capture is None or not self.storage:
            return
        library = torch.backends.cudnn
        if name == "convolution" and (library.benchmark or not library.deterministic):
            self.timeline.find(
                "choice", "cuDNN may choose a convolution's algorithm by timing, or one that adds in any order"
            )
        if name in PRODUCTS and dtypes - self.storage:
            self.timeline.find("dtype", f"{name} in {dtypes.pop()}, the recorded network is {self.storage}")
        elif len(dtypes) > 1 and not func._schema.is_mutable:
            self.timeline.find("dtype", f"{name} joins {' and '.join(sorted(map(str, dtypes)))}")

    def narrow_network(self) -> str:
        """Whose convolution is being computed, where that has to be in half precision."""
        calls = {(file, function) for file, _, function in frames_of_ours(sys._getframe(1))}
        if self.taught not in (None, torch.float32) and calls & TAUGHT:
            return f"the training is in {self.taught}"
        if (ENGINE, "_decode_part") in calls and (ENGINE, "_pixels") not in calls:
            return ""  # an autoencoder that leaves fp16 runs again
        is_narrow = self.timeline.capture is None and self.storage and torch.float32 not in self.storage
        is_engine = is_narrow and any(file == ENGINE for file, _ in calls)
        return f"the networks of the engine are {self.storage}" if is_engine else ""

    def check_width(self, name: str, values: Iterable[Tensor]) -> None:
        """fp32 between the products of a recorded network that is stored in less."""
        if self.timeline.capture is None or not self.storage or torch.float32 in self.storage or name in PRODUCTS:
            return
        if any(value.dtype == torch.float32 and value.dim() > 1 for value in values):
            frames = ((file, function) for file, _, function in frames_of_ours(sys._getframe(1)))
            if next((frame for frame in frames if frame[1][0] != "<"), ("", "")) not in IN_FP32:
                self.timeline.find("dtype", f"{name} in fp32, the recorded network is {self.storage}")

    def is_learning(self, inputs: list[Tensor]) -> bool:
        """Whether an operation belongs to a step of a training, which is promised up to rounding on a GPU."""
        if self.gradients_on is not None or any(value.requires_grad for value in inputs):
            return True
        return any(file.startswith(TRAINING) for file, _, _ in frames_of_ours(sys._getframe(1)))

    def random(self, name: str, inputs: list[Tensor], kwargs: Mapping[str, Any]) -> None:
        """Numbers that a GPU draws, or that a generator of another device is asked for."""
        device = torch.device(kwargs.get("device") or (inputs[0].device if inputs else "cpu"))
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            self.timeline.find("device", f"{name} on {device} by a generator of {generator.device}")
        elif device.type == "cuda":
            self.timeline.find("random", f"{name} on {device}: a GPU's numbers are others than those of the host")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        """As CUDA's kernels give it: heads side by side."""
        shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        return q.new_empty(shape).transpose(1, 2)

    def resized(self, x: Tensor, sides: list[int] | None, *others: Any) -> Tensor:
        sides = sides or [int(side * scale) for side, scale in zip(x.shape[2:], others[1], strict=True)]
        is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        kept = torch.channels_last if is_last else torch.contiguous_format
        return torch.empty_like(x.new_empty((*x.shape[:2], *sides)), memory_format=kept)

    # The host ---------------------------------------------------------------------------------------------------------
    def read_by_host(self, name: str, inputs: list[Tensor], cuda: list[Tensor]) -> Any:
        """What an operation says whose result the host has to know; None for any other."""
        masks = [value for value in inputs[1:] if value.dtype in (torch.bool, torch.uint8)]
        is_masked, first = name in ("index", "index_put_") and bool(masks), inputs[0]
        if name not in READ_BY_HOST and not is_masked:
            return None
        if cuda:
            device, kernels = cuda[0].device.index, READ_BY_HOST.get(name, 3)
            self.timeline.launch(name, device, cuda, [], moved=size(cuda), kernels=kernels)
            stream = self.timeline.thread.stream(device)
            self.timeline.host_waits_for(f"aten.{name} of {list(first.shape)} {first.dtype}", stream)
        if name == CHECKED:
            return None
        if name == "index_put_":
            return first
        if is_masked:
            return first.new_empty((FOUND, *first.shape[masks[0].dim() :]))
        if name == "nonzero":
            return torch.empty((FOUND, first.dim()), dtype=torch.int64, device=first.device)
        if name in ("masked_select", "_unique2"):
            return first.new_empty(FOUND)
        if name in ("_local_scalar_dense", "is_nonzero") and first.dtype == torch.bool and self.truths:
            return self.truths.popleft()
        return True if first.dtype == torch.bool or name == "equal" else 1.0 if first.is_floating_point() else 1

    def used_by_host(self, name: str, func, given: Mapping[str, Any]) -> None:
        """What an operation reads and writes of the host's own memory; copies to and from a GPU are the GPU's."""
        held = tensors(given)
        is_copy = name in ("_to_copy", "copy_") and any(value.device.type == "cuda" for value in held)
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.arguments)
        if is_copy or is_view or all(value.device.type != "cpu" for value in held):
            return
        for argument in func._schema.arguments:
            for value in tensors(given.get(argument.name)):
                if value.device.type != "cpu":
                    continue
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.timeline.written_by_host(value)
                else:
                    self.timeline.read_by_host(value)

    def copied(self, name: str, args, kwargs, inputs: list[Tensor], results: list[Tensor]) -> None:
        """A copy between host and GPU makes the host wait unless it is asked not to and its memory is page-locked."""
        source, target = (inputs[1], inputs[0]) if name == "copy_" else (inputs[0], results[0])
        places = source.device.type, target.device.type
        if sorted(places) != ["cpu", "cuda"]:
            return
        host, card = (source, target) if places[0] == "cpu" else (target, source)
        if is_asynchronous(name, args, kwargs) and self.is_pinned(host):
            return
        way = "to the GPU" if places[0] == "cpu" else "to the host"
        stream = self.timeline.thread.stream(card.device.index)
        kind = "pageable" if not self.is_pinned(host) else "waiting"
        self.timeline.host_waits_for(f"{kind} copy {way} of {list(card.shape)} {card.dtype}", stream)

    def indices_copied(self, of: Tensor, indices: Iterable[Tensor | None]) -> None:
        """PyTorch brings the indices of a tensor on a GPU there, and waits."""
        stream = self.timeline.thread.stream(of.device.index)
        for index in indices:
            if index is not None and index.device.type == "cpu":
                what = f"pageable copy to the GPU of indices {list(index.shape)}"
                self.timeline.host_waits_for(what, stream)

    def pin(self, value: Tensor) -> Tensor:
        self.pinned.append(StorageWeakRef(value.untyped_storage()))
        self.timeline.pinned.add(self.pinned[-1].cdata)
        return value

    def is_pinned(self, value: Tensor) -> bool:
        return any(kept.cdata == value.untyped_storage()._cdata for kept in self.pinned)


class Calls(TorchFunctionMode):
    """Calls that no dispatched operation shows: devices without a number, and arrays of the host."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.timeline, self.flags, self.is_pinned = operations.timeline, operations.flags, operations.is_pinned

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device or func.__name__ == "__get__":  # of an attribute, such as a shape
            return func(*args, **kwargs)
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            return self.array(args[0])
        if func in (Tensor.__repr__, Tensor.__format__) and args[0].device.type == "cuda":
            return self.printed(args[0], *args[1:])
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            copied = args[0].detach().clone().requires_grad_(args[0].requires_grad)
            return args[1].setdefault(id(args[0]), copied)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self.indices(args[1]), *args[2:])
        if func is Tensor.new_tensor:
            of, *args = args
            func, kwargs = torch.tensor, {"dtype": of.dtype, "device": of.device, **kwargs}
        if func in LISTED and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            device = self.numbered(kwargs.pop("device"))  # made on the host and copied, as PyTorch does
            return func(*args, **kwargs).to(device)
        named = {name: self.numbered(value) for name, value in kwargs.items()}
        return func(*map(self.numbered, args), **named)

    def numbered(self, value: Any) -> Any:
        """A GPU by its number: PyTorch without CUDA cannot ask which one is the current."""
        if isinstance(value, torch.device) and value.type == "cuda" and value.index is None:
            return torch.device("cuda", self.timeline.thread.device)
        is_cuda = isinstance(value, str) and value == "cuda"
        return torch.device("cuda", self.timeline.thread.device) if is_cuda else value

    def indices(self, given: Any) -> Any:
        """Lists of places as tensors of the host, which is what PyTorch makes of them."""
        if isinstance(given, tuple):
            return tuple(map(self.indices, given))
        return torch.tensor(given, dtype=torch.int64) if isinstance(given, list) else given

    def printed(self, value: Tensor, form: str = "") -> str:
        """A tensor of a GPU as text, for which the host waits; a number alone can be formatted."""
        stream = self.timeline.thread.stream(value.device.index)
        self.timeline.host_waits_for(f"{list(value.shape)} printed", stream)
        if form and not value.dim():
            return format(1.0 if value.is_floating_point() else 1, form)
        return f"tensor(..., device={str(value.device)!r})"

    def array(self, value: Tensor) -> np.ndarray:
        """Flags as they are chosen, what is unlikely where nobody has written to page-locked memory, and zeros else;
        what a GPU writes must have been waited for, and what it reads, too, before the array is written to.
        """
        if value.device.type != "cpu":
            raise TypeError(f"can't convert {value.device} tensor to numpy, copy it to host memory first")
        self.timeline.read_by_host(value)
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        chosen = value.dtype == torch.bool and (self.flags.popleft() if self.flags else True)
        if not self.is_pinned(value) or not value.numel():
            array = np.full(shape, chosen, dtype=dtype)
        else:
            is_known = value.dtype == torch.bool or self.timeline.is_written(value)
            own, content = filled(shape, dtype, chosen if is_known else None)
            self.timeline.watch(value, own, content)
            array = own.reshape(shape).view(PageLocked)
            array.on_write = lambda: self.timeline.written_by_host(value)
        self.timeline.viewed(value, array)
        return array


def tensors(values: Any) -> list[Tensor]:
    """Those among the arguments or results of an operation."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [one for value in values for one in tensors(value)]
    return [one for value in values.values() for one in tensors(value)] if isinstance(values, dict) else []


def given_of(func, args, kwargs) -> dict[str, Any]:
    """The arguments of an operation by their names."""
    return {**dict(zip((one.name for one in func._schema.arguments), args)), **kwargs}


def read_of(func, given: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a GPU whose values an operation reads: not what it writes its answer, or a copy, to."""
    is_copy = func._schema.name == "aten::copy_"
    written = {one.name for one in func._schema.arguments if one.is_out or (is_copy and one.alias_info)}
    if given.get("beta") == 0:  # a product that is added to nothing
        written.add("self")
    read = tensors([value for name, value in given.items() if name not in written])
    return [one for one in read if one.device.type == "cuda"]


def adds_in_any_order(name: str, given: Mapping[str, Any]) -> bool:
    """Whether an operation on a GPU rounds its sums by chance; those of whole numbers are exact."""
    name = name.removesuffix("_")
    is_one = name in UNORDERED or (name in REDUCING and given.get("reduce") not in EXACT)
    if not (is_one or (name == "put" and given.get("accumulate"))):
        return False
    return any(value.is_floating_point() for value in tensors(given))


def by_chance(name: str, given: Mapping[str, Any]) -> str:
    """What an operation on a GPU leaves to chance; nothing where it says the same in every run."""
    if adds_in_any_order(name, given):
        return "adds in any order on a GPU, so the last bits change from run to run"
    if name in TIES or (name == "sort" and not given.get("stable")):
        return "may take any of equal numbers first: a stable sort says which"
    values = given.get(PLACING.get(name.removesuffix("_"), ""))
    is_plain = given.get("reduce") is None and not given.get("accumulate")
    is_masked = any(one.dtype in (torch.bool, torch.uint8) for one in tensors(given.get("indices")))
    if isinstance(values, Tensor) and values.numel() > 1 and is_plain and not is_masked:
        return "writes several values, of which any stays where their places are the same"
    return ""


def is_asynchronous(name: str, args, kwargs) -> bool:
    """Whether a copy is asked not to make the host wait."""
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def size(values: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in values)


def is_view(func, inputs: list[Tensor], results: list[Tensor]) -> bool:
    """Whether nothing is computed: every result lies in the memory of an input that stays as it is."""
    if func._schema.is_mutable or not inputs:
        return False
    held = {value.untyped_storage()._cdata for value in inputs}
    return all(value.untyped_storage()._cdata in held for value in results)


def like_cudnn(result: Tensor, args) -> Tensor:
    """The result of a convolution channels-last where an operand is, which PyTorch without CUDA does not do."""
    is_last = any(
        value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
        for value in args[:2]
    )
    return torch.empty_like(result, memory_format=torch.channels_last) if is_last else result


def flops_of(name: str, func, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    if name == ATTENTION:
        (batch, heads, queries, width), keys = args[0].shape, args[1].shape[2]
        return 4 * batch * heads * queries * keys * width
    count = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_")))  # in place it is the same work
    return count(*args, **kwargs, out_val=result) if count else 0


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)
