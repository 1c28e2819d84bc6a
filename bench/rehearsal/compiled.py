"""The kernels of a rehearsal through Triton's own compiler, for GPUs that are not there: what they take, and a cache of
machine code that a GPU machine can take along (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch

from bench.kernels.audit import SHARED_LIMIT, name_of, taken
from bench.kernels.files import FILES
from bench.rehearsal.cuda import CARDS
from bench.rehearsal.kernels import ACTIVATIONS, ALIGNED, NotedLaunch, source_of
from datasetdm_fast.kernels.launch import UNTUNED

WARP = 32  # threads

# Of a kernel: the arguments that say how many values lie side by side, and tiles of which one is to be loaded in whole
# vectors. `channels` and cells by channels where nothing else is said.
IMAGE = ("channels",), (("BLOCK_S", "BLOCK_C"),)
PRODUCT = ("width",), (("BLOCK_S", "BLOCK_K"), ("BLOCK_C", "BLOCK_K"))
TILES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "ada_norm": (("channels",), (("BLOCK_C",),)),
    "attention": (("WIDTH",), (("BLOCK_N", "BLOCK_D"), ("BLOCK_S", "BLOCK_D"))),
    "attention_capture": (("q_stride_head",), (("BLOCK_S", "BLOCK_D"),)),
    "attention_shares": (("width",), (("BLOCK_S", "WIDTH"), ("BLOCK_T", "WIDTH"))),
    "depth_head": (("cells",), (("BLOCK_O", "BLOCK_S"),)),
    "geglu": (("channels", "row_stride"), (("BLOCK_C",),)),
    "group_norm_parts": (("first_channels", "TAKEN"), IMAGE[1]),
    "group_norm_parts_plane": (("channels", "TAKEN"), IMAGE[1]),
    "joint_qkv": (("width", "token_stride"), (("BLOCK_S", "BLOCK_D"),)),
    "linear_add": PRODUCT,
    "linear_geglu": PRODUCT,
    "linear_norm": PRODUCT,
    "mask_embedding": (("channels",), (*IMAGE[1], ("BLOCK_C", "BLOCK_J"))),
    "query_attention": (("width", "k_row_stride"), (("BLOCK_N", "BLOCK_D"), ("BLOCK_S", "BLOCK_D"))),
}
WIDE_LOAD = re.compile(
    r"ld\.global(\.\w+)*\.v4\.b32|ld\.global(\.\w+)*\.v2\.b64|cp\.async[\w.]* [^;]*, 0x10|cp\.async\.bulk"
)
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma|tcgen05\.mma)")


class CompiledRow(NamedTuple):
    kernel: str
    target: str
    registers: int
    spills: int  # bytes of stack of a thread
    shared: int  # bytes of a block
    spoilt: int  # addresses that ptxas got wrong
    has_wide_loads: bool  # 16 bytes a thread and instruction
    has_tensor_cores: bool

    def wrong(self, loads_wide: bool, multiplies: bool) -> str:
        """What is wrong with it, empty where nothing is."""
        reasons = [f"{self.spills} bytes of stack"] if self.spills else []
        if self.spoilt:
            reasons.append(f"{self.spoilt} addresses of shared memory that ptxas spoilt (bench/kernels/sass.py)")
        if self.shared > SHARED_LIMIT[self.target]:
            reasons.append(f"{self.shared} of {SHARED_LIMIT[self.target]} bytes of shared memory")
        if loads_wide and not self.has_wide_loads:
            reasons.append("no load of 16 bytes")
        if multiplies and not self.has_tensor_cores:
            reasons.append("no tensor cores")
        return ", ".join(reasons)


class AbsentGpu:
    """Triton's driver for a GPU that is not there; each target has a number of its own, by which kernels are kept."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.number, self.target, self.utils, self.launcher_cls = (
            int(target),
            GPUTarget("cuda", int(target), 32),
            None,
            None,
        )

    def get_current_device(self) -> int:
        return self.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def on(target: str) -> Iterator[None]:
    from triton.runtime import driver

    driver.set_active(AbsentGpu(target))
    try:
        yield
    finally:
        driver.set_active(None)


def gpus(targets: Iterable[str]) -> dict[tuple[int, int], list[str]]:
    """The compute capabilities to simulate -> the targets whose GPUs launch the same: one alone where rows for it
    stand in a kernel's file, all others together.
    """
    tables = [getattr(op, table, ()) for op in FILES for table in ("BLOCKS", "DEVICES", "LIBRARY")]
    measured, found = set(chain(*tables)), {}
    for target in targets:
        name = f"sm_{target}"
        is_measured = not measured.isdisjoint((name, CARDS[divmod(int(target), 10)]))
        found.setdefault(name if is_measured else UNTUNED, []).append(target)
    return {divmod(int(alike[0]), 10): alike for alike in found.values()}


def rows(launches: Iterable[NotedLaunch], targets: Iterable[str]) -> Iterator[tuple[CompiledRow, str]]:
    """Every launch for every target, and what is wrong with it."""
    launches = list(launches)
    for target in targets:
        with on(target):
            for launch in launches:
                made = warmed(launch)
                text, name = made.asm["ptx"], name_of(launch.kernel)
                is_wide, is_matrix = bool(WIDE_LOAD.search(text)), bool(TENSOR_CORES.search(text))
                row = CompiledRow(name, target, *taken(made), is_wide, is_matrix)
                yield row, row.wrong(loads_wide(launch), "tl.dot" in source_of(launch.kernel.fn))


def warmed(launch: NotedLaunch) -> Any:
    """The launch through Triton's own entry point, which compiles it or takes it from its cache."""
    return launch.kernel.warmup(*launch.positional, grid=launch.grid, **launch.named)


def loads_wide(launch: NotedLaunch) -> bool:
    """Whether each thread has 16 bytes of neighbouring values to load: rows of whole vectors, and a tile with as many
    bytes for every thread.
    """
    given = launch.given
    activations = next((given[name] for name in ACTIVATIONS if name in given), None)
    if activations is None or hasattr(activations, "block_shape"):
        return activations is not None  # blocks by descriptors always are
    counts, tiles = TILES.get(name_of(launch.kernel), IMAGE)
    known = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    size = activations.dtype.itemsize
    # Triton knows that a size is a multiple of 16, or the size itself where it is a constant.
    if any(given[name] * (size if name in known else 1) % ALIGNED for name in counts):
        return False
    values = max(math.prod(given[name] for name in tile) for tile in tiles)
    return values * size >= ALIGNED * WARP * given["num_warps"]
