"""Triton's kernels in a rehearsal: each launch is noted, with all that compiling it needs."""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FrameType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.kernels.audit import TYPE_NAMES, Recorder, name_of, type_name
from bench.kernels.audit import CompiledLaunch as Compilable
from bench.kernels.files import FILES
from bench.rehearsal.operations import size, tensors
from bench.rehearsal.timeline import Timeline
from datasetdm_fast.kernels import OPS, launch

LARGEST_GRID = (2**31 - 1, 65535, 65535)
ALIGNED = 16  # bytes that one thread loads at most, and elements that Triton asks sizes to be multiples of
ACTIVATIONS = ("x_ptr", "q_ptr", "x_desc")  # what a network hands to a kernel, by the names in kernels/
STATED = re.compile(r"(\w+_ptr),  # \[[^]]*\] (\w+)")  # a parameter with its comment: shape and dtype

# Multiplications and additions of the kernels that multiply matrices, from the arguments of a launch.
FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "attention_capture": lambda given: (
        2 * given["q_ptr"].shape[0] * given["heads"] * given["queries"] * given["tokens"]
        * (2 * given["width"] + given["features"])
    ),
    "attention": lambda given: 4 * given["q_ptr"].shape.numel() * given["keys"],
    "attention_shares": lambda given: (
        2 * given["q_ptr"].shape.numel() * given["tokens"]
        + (0 if given["weight_ptr"] is None else 2 * given["out_ptr"].shape.numel() * given["heads"] * given["tokens"])
    ),
    "depth_head": lambda given: 2 * given["planes_ptr"].shape.numel() * given["hidden"],
    "described_product": lambda given: (
        2 * given["x_desc"].shape[0] * math.prod(given["weight_desc"].shape)
    ),
    "linear_add": lambda given: (
        2 * given["residual_ptr"].shape.numel() * (given["width"] + given["second_width"])
    ),
    "linear_geglu": lambda given: 4 * given["rows"] * given["channels"] * given["width"],
    "linear_norm": lambda given: 2 * given["rows"] * given["channels"] * given["width"],
    "mask_embedding": lambda given: (
        2 * given["rows"] * given["channels"] * (2 * given["channels"] + given["features"])
    ),
    "query_attention": lambda given: 4 * given["q_ptr"].shape.numel() * given["cells"],
}  # fmt: skip


# What a run hands over in fp32 whatever the networks are stored in, although the kernel takes it in any dtype.
WIDE = {
    "group_norm_parts": ("mean_ptr", "spread_ptr", "second_mean_ptr", "second_spread_ptr"),
    "group_norm_parts_merge": ("mean_ptr", "spread_ptr"),
    "guided_step": ("latents_ptr", "history_ptr", "out_ptr"),
}
# Operations without a kernel on a GPU, and why.
WITHOUT_KERNEL = {
    "attention_sums": "the attention of libraries returns the sums",
    "pyramid": "it is one product for each captured tensor, by a library, and a resize",
    "masked_attention": "decoders of a run take query_attention",
    "mask_head": "it is a product, by a library, and a resize",
}


@dataclass(frozen=True)
class Pointer:
    """What Triton specialises a kernel for of a tensor."""

    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


class NotedLaunch(NamedTuple):
    """A launch as Triton is to compile it, pointers in the places of tensors."""

    kernel: Any
    grid: tuple[int, ...]
    positional: tuple
    named: dict[str, Any]
    op: str  # whose `fused` launched it

    @property
    def given(self) -> dict[str, Any]:
        """Every argument by its name."""
        return dict(zip((parameter.name for parameter in self.kernel.params), self.positional)) | self.named


@contextmanager
def noted_kernels(
    timeline: Timeline, storage: Callable[[], set[torch.dtype]]
) -> Iterator[dict[Compilable, NotedLaunch]]:
    """Every kernel of OPS replaced by a note of its launches: what to compile -> the first such launch."""
    launches: dict[Compilable, NotedLaunch] = {}
    with ExitStack() as stack:
        for op, module in OPS.items():
            stack.enter_context(mock.patch.object(module, "reference", watched_reference(op, module, timeline)))
        for module in FILES:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    noted = NotedKernel(kernel, timeline, launches, storage)
                    stack.enter_context(mock.patch.object(module, name, noted))
        yield launches


def watched_forms(form_on: Callable[..., str], timeline: Timeline) -> Callable[..., str]:
    """choice.form_on, which has to choose a kernel on a GPU."""

    def called(op: str, *names: str) -> str:
        form = form_on(op, *names)
        if names[0].startswith("sm_") and form != "fused" and op not in WITHOUT_KERNEL:
            timeline.find("fallback", f"{op} runs as its {form} form on a GPU, by the DEVICES of its file")
        return form

    return called


def watched_reference(op: str, module: ModuleType, timeline: Timeline) -> Callable:
    """An operation's reference, which its `fused` may only call for tensors that lie on no GPU."""
    reference = module.reference

    def called(*arguments: Any, **named: Any) -> Any:
        caller = sys._getframe(1).f_code
        is_fallback = (caller.co_name, caller.co_filename) == ("fused", module.__file__)
        if is_fallback and any(value.device.type == "cuda" for value in tensors((arguments, named))):
            timeline.find("fallback", f"{op} runs as its reference on a GPU")
        return reference(*arguments, **named)

    return called


class NotedKernel:
    """Stands where a kernel stood."""

    def __init__(self, kernel, timeline: Timeline, launches: dict[Compilable, NotedLaunch], storage):
        self.kernel, self.timeline, self.launches, self.storage = kernel, timeline, launches, storage
        self.name = name_of(kernel)

    def __getitem__(self, grid):
        return lambda *positional, **named: self.note(tuple(grid), positional, named)

    def note(self, grid: tuple[int, ...], positional: tuple, named: dict[str, Any]) -> None:
        timeline = self.timeline
        given = dict(zip((parameter.name for parameter in self.kernel.params), positional)) | named
        bases = {name: getattr(value, "base", value) for name, value in given.items()}
        pointers = {name: value for name, value in bases.items() if isinstance(value, Tensor)}
        card = timeline.thread.device
        if any(not 0 < count <= most for count, most in zip(grid, LARGEST_GRID)):
            timeline.find("grid", f"{self.name}: {grid}, expected 1 to {', '.join(map(str, LARGEST_GRID))}")
        self.check_places(pointers, card)
        self.check_contract(pointers)
        stored = written(self.kernel.fn)
        reads = [value for name, value in pointers.items() if name not in stored]
        writes = [value for name, value in pointers.items() if name in stored]
        activations = next((pointers[name] for name in ACTIVATIONS if name in pointers), None)
        if timeline.capture is not None and activations is not None and activations.dtype not in self.storage():
            timeline.find("dtype", f"{self.name} of {activations.dtype}, the recorded network is {self.storage()}")
        read = loaded(self.kernel.fn)
        timeline.check_written(f"triton {self.name}", (value for name, value in pointers.items() if name in read))
        timeline.launch(
            f"triton {self.name}",
            card,
            reads,
            writes,
            flops=FLOPS.get(self.name, lambda given: 0)(given),
            moved=size(reads) + size(writes),
        )
        kept: list[Compilable] = []
        Recorder(self.kernel, kept).note(*positional, **named)
        if kept[0] not in self.launches:
            self.launches[kept[0]] = NotedLaunch(
                self.kernel, grid, tuple(map(stand_in, positional)), named, calling_op()
            )

    def check_places(self, pointers: dict[str, Tensor], card: int) -> None:
        for name, value in pointers.items():
            if value.device.type != "cuda":
                self.find("device", f"{name} lies on {value.device}", value)
            elif value.device.index != card:
                told = f"{self.name} is launched on GPU {card}, {name} lies on {value.device}"
                self.timeline.find("wrong GPU", told)

    def check_contract(self, pointers: dict[str, Tensor]) -> None:
        """What the kernel expects of its tensors: the dtype of a pointer, one for all others, no gaps where it takes no
        strides, sums in a fixed order.
        """
        own = stated(self.kernel.fn) | dict.fromkeys(WIDE.get(self.name, ()), torch.float32)
        for name, dtype in own.items():
            if name in pointers and pointers[name].dtype != dtype:
                self.find("dtype", f"{name} is {pointers[name].dtype}, expected {dtype}", pointers[name])
        others = {str(value.dtype) for name, value in pointers.items() if name not in own}
        if len(others) > 1:
            self.timeline.find("dtype", f"{self.name} of {' and '.join(sorted(others))}")
        for name, value in pointers.items():
            if name.endswith("_ptr") and name not in strided(self.kernel.fn) and not value.is_contiguous():
                told = f"{name} {list(value.shape)} has strides {list(value.stride())}, the kernel takes none"
                self.find("strides", told, value)
        added = pointers.keys() & pointers_of(self.kernel.fn, "atomic")
        if any(pointers[name].is_floating_point() for name in added):
            self.timeline.find("order", f"{self.name} adds in any order, so the last bits change from run to run")

    def find(self, rule: str, what: str, value: Tensor) -> None:
        self.timeline.find(rule, f"{self.name}: {what}, made at {self.timeline.made(value)}")


def stand_in(value: Any) -> Any:
    """An argument of a launch, without the memory that a tensor would hold."""
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.storage_offset() * value.element_size() % ALIGNED)
    return replace(value, base=stand_in(value.base)) if isinstance(value, launch.TensorDescriptor) else value


def calling_op() -> str:
    """The operation within whose `fused` a kernel is launched, also one of a file that several operations share."""
    ops = {module.fused.__code__: op for op, module in OPS.items() if hasattr(module, "fused")}
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code not in ops:
        frame = frame.f_back
    return ops[frame.f_code] if frame else ""


def storages(launches: Iterable[NotedLaunch]) -> dict[str, list[str]]:
    """The operations that were launched, each with the storage types of the activations it was handed."""
    found: dict[str, set[str]] = {}
    for one in launches:
        given = [one.given[name] for name in ACTIVATIONS if one.given.get(name) is not None]
        found.setdefault(one.op, set()).update(type_name(getattr(value, "base", value)) for value in given)
    return {op: sorted(types) for op, types in sorted(found.items()) if op and types}


@cache
def source_of(function: Callable) -> str:
    return textwrap.dedent(inspect.getsource(function))


class Access(NamedTuple):
    """One use of memory by a kernel, or by a function that it calls."""

    kind: str  # load, store or atomic
    pointers: frozenset[str]  # of the kernel, of which the address is made
    is_strided: bool  # by an argument, so that rows or cells of the tensor may lie apart
    is_always: bool  # whatever the kernel's switches are


@cache
def accesses(function: Callable) -> tuple[Access, ...]:
    """Every use of memory by a kernel, from its source."""
    tree, found = ast.parse(source_of(function)), []
    made = assigned(tree)

    def note(kind: str, address: ast.AST, is_strided: bool, is_always: bool) -> None:
        used = reached(names(address), made)
        pointers = frozenset(name for name in used if name.endswith(("_ptr", "_desc")))
        found.append(Access(kind, pointers, is_strided or any("stride" in name for name in used), is_always))

    def visit(node: ast.AST, is_always: bool) -> None:
        if kind := kind_of(node):
            is_described = ast.unparse(node.func.value) != "tl"
            note(kind, node.func.value if is_described else node.args[0], False, is_always)
        elif helper := helper_of(node, function):
            given = dict(zip(inspect.signature(helper).parameters, node.args))
            for one in accesses(helper):
                for name in one.pointers & given.keys():
                    note(one.kind, given[name], one.is_strided, is_always and one.is_always)
        is_always = is_always and not isinstance(node, (ast.If, ast.IfExp))
        for child in ast.iter_child_nodes(node):
            visit(child, is_always)

    visit(tree, True)
    return tuple(found)


def kind_of(node: ast.AST) -> str:
    """What tl.load, tl.store and tl.atomic_add, among others, do; empty where it is no such call."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    return next((kind for kind in ("load", "store", "atomic") if node.func.attr.split("_")[0] == kind), "")


def helper_of(node: ast.AST, function: Callable) -> Callable | None:
    """The function for GPUs that a kernel calls there."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    called = function.__globals__.get(node.func.id)
    return getattr(called, "fn", None)


def pointers_of(function: Callable, kind: str) -> frozenset[str]:
    """The pointers through which a kernel loads, stores or adds."""
    return frozenset().union(*(one.pointers for one in accesses(function) if one.kind == kind))


def written(function: Callable) -> frozenset[str]:
    """The pointers that a kernel stores to."""
    return pointers_of(function, "store") | pointers_of(function, "atomic")


def loaded(function: Callable) -> frozenset[str]:
    """The pointers that a kernel loads from whatever its switches are."""
    return frozenset().union(*(one.pointers for one in accesses(function) if one.kind != "store" and one.is_always))


def strided(function: Callable) -> frozenset[str]:
    """The pointers whose tensors a kernel takes strides of."""
    return frozenset().union(*(one.pointers for one in accesses(function) if one.is_strided))


@cache
def stated(function: Callable) -> dict[str, torch.dtype]:
    """The pointers of a kernel whose comment says a dtype, as in `mean_ptr,  # [B, C] fp32`."""
    dtypes = {short: getattr(torch, name) for name, short in TYPE_NAMES.items()}
    return {name: dtypes[word] for name, word in STATED.findall(source_of(function)) if word in dtypes}


def assigned(tree: ast.AST) -> dict[str, set[str]]:
    """Of every variable of a kernel the names that it is made of."""
    made: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for one, value in paired(target, node.value):
                    for name in names(one):
                        made.setdefault(name, set()).update(names(value))
    return made


def paired(target: ast.AST, value: ast.AST) -> Iterable[tuple[ast.AST, ast.AST]]:
    """Each of several variables with its own value."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return zip(target.elts, value.elts, strict=True)
    return [(target, value)]


def reached(own: set[str], made: dict[str, set[str]]) -> set[str]:
    """Names, and all that these are made of."""
    found = set(own)
    while more := set().union(*(made.get(name, set()) for name in found)) - found:
        found |= more
    return found


def names(node: ast.AST) -> set[str]:
    """Variables of an expression, without what it loads from memory."""
    if kind_of(node) == "load":
        return set()
    own = {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*(names(child) for child in ast.iter_child_nodes(node)))
