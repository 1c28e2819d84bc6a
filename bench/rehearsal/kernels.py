"""Triton's kernels in a rehearsal: each launch is noted, with all that compiling it needs."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.kernels.audit import Launch as Compilable
from bench.kernels.audit import Recorder, name_of
from bench.rehearsal.operations import size, tensors
from bench.rehearsal.timeline import Timeline
from datasetdm_fast.kernels import OPS

LARGEST_GRID = 65535  # along y and z
ALIGNED = 16  # bytes that one thread loads at most, and elements that Triton asks sizes to be multiples of
ACTIVATIONS = ("x_ptr", "q_ptr")  # what a network hands to a kernel, by the names in kernels/

# Multiplications and additions of the kernels that multiply matrices, from the arguments of a launch.
FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "attention_capture": lambda given: (
        2 * given["q_ptr"].shape[0] * given["heads"] * given["queries"] * given["tokens"]
        * (2 * given["width"] + given["features"])
    ),
    "attention": lambda given: 4 * given["q_ptr"].shape.numel() * given["keys"],
    "attention_average": lambda given: 2 * given["q_ptr"].shape.numel() * given["keys"],
    "attention_rows": lambda given: (
        2 * given["rows_ptr"].shape.numel() * given["keys"] * (given["depth"] + given["width"])
    ),
    "depth_head": lambda given: 2 * given["planes_ptr"].shape.numel() * given["hidden"],
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


# What stays in fp32 whatever the networks are stored in.
WIDE = {
    "attention_average": ("total_ptr", "sum_ptr"),
    "guided_step": ("latents_ptr", "history_ptr", "numbers_ptr", "out_ptr"),
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
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    noted = NotedKernel(kernel, timeline, launches, storage)
                    stack.enter_context(mock.patch.object(module, name, noted))
        yield launches


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
        pointers = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        card = timeline.thread.device
        for name, value in pointers.items():
            if value.device.type != "cuda":
                timeline.find("device", f"{self.name}: {name} lies on {value.device}, made at {timeline.made(value)}")
            elif value.device.index != card:
                timeline.find("wrong GPU", f"{self.name} is launched on GPU {card}, {name} lies on {value.device}")
        if any(count > LARGEST_GRID for count in grid[1:]):
            timeline.find("grid", f"{self.name}: {grid}, at most {LARGEST_GRID} along y and z")
        for name in WIDE.get(self.name, ()):
            if (value := pointers[name]).dtype != torch.float32:
                timeline.find("dtype", f"{self.name}: {name} is {value.dtype}, made at {timeline.made(value)}")
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
            stand_ins = [pointer(value) if isinstance(value, Tensor) else value for value in positional]
            self.launches[kept[0]] = NotedLaunch(self.kernel, grid, tuple(stand_ins), named)


def pointer(value: Tensor) -> Pointer:
    return Pointer(value.dtype, value.storage_offset() * value.element_size() % ALIGNED)


def storages(launches: Iterable[Compilable]) -> dict[str, list[str]]:
    """The operations that were launched, each with the storage types of the activations it was handed."""
    found: dict[str, set[str]] = {}
    for one in launches:
        op, types = one.kernel.fn.__module__.rpartition(".")[2], dict(one.signature)
        found.setdefault(op, set()).update(types[name].removeprefix("*") for name in ACTIVATIONS if name in types)
    return {op: sorted(types) for op, types in sorted(found.items()) if types}


@cache
def source_of(function: Callable) -> str:
    return textwrap.dedent(inspect.getsource(function))


@cache
def written(function: Callable) -> frozenset[str]:
    """The pointers a kernel stores to, from its source."""
    tree = ast.parse(source_of(function))
    return _pointers(tree, [call.args[0] for call in ast.walk(tree) if _is_call(call, "store")])


@cache
def loaded(function: Callable) -> frozenset[str]:
    """The pointers a kernel loads from whatever its switches are, from its source."""
    tree, calls = ast.parse(source_of(function)), []

    def visit(node: ast.AST) -> None:
        if _is_call(node, "load"):
            calls.append(node.args[0])
        if not isinstance(node, (ast.If, ast.IfExp)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return _pointers(tree, calls)


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def _pointers(tree: ast.AST, addresses: Iterable[ast.AST]) -> frozenset[str]:
    """The pointers that addresses in a kernel are made of."""
    made: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in names(target):
                    made.setdefault(name, set()).update(names(node.value))
    reached = set().union(*map(names, addresses))
    while more := set().union(*(made.get(name, set()) for name in reached)) - reached:
        reached |= more
    return frozenset(name for name in reached if name.endswith("_ptr"))


def names(node: ast.AST) -> set[str]:
    """Variables of an expression, without what it loads from memory."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
        return set()
    own = {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*(names(child) for child in ast.iter_child_nodes(node)))
