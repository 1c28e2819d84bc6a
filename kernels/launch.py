"""Where the kernels meet Triton: its one import, the tensors it serves, and block sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.errors import Missing

try:
    import triton
    import triton.language
    import triton.tools.tensor_descriptor

    tl, TensorDescriptor = triton.language, triton.tools.tensor_descriptor.TensorDescriptor
except ImportError:  # the plain forms need none
    triton = tl = TensorDescriptor = None

UNTUNED = "untuned"  # the rows for a GPU that was not measured
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides at decoration, that is when the kernel files are imported.
IS_INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Three passes of the tensor cores keep fp32 products exact to about 2^-21; a single one would round the factors to 10
# bits.
PRECISION = "tf32x3"


# Decorates kernels; where Triton is missing they stay functions that are not called.
jit: Any = triton.jit if triton else lambda kernel: kernel


def is_served(op: str, *inputs: Tensor | None, fits: bool = True) -> bool:
    """Whether a kernel runs where the inputs lie: on a GPU always, on a CPU in Triton's interpreter only.

    Inputs that do not fit each other (`fits`), on several devices, of a dtype without a kernel, with vectors that have
    gaps, or on a GPU without Triton are refused.
    """
    tensors = [x for x in inputs if x is not None]
    if not fits:
        received = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
        raise ValueError(f"{op}: inputs of {received} do not fit each other")
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: the tensors lie on {' and '.join(sorted(map(str, devices)))}, move them to one device")
    if tensors[0].device.type == "cpu" and not IS_INTERPRETED:
        return False
    if triton is None:
        raise Missing(
            f"{op}: Triton is not installed, the kernels for {tensors[0].device} need it",
            "Install it with: pip install 'datasetdm-fast[triton]'",
        )
    for x in tensors:
        if x.dtype not in DTYPES:
            raise ValueError(f"{op}: {x.dtype} has no kernel, use one of {', '.join(map(str, DTYPES))}")
        if x.ndim == 1 and not x.is_contiguous():
            raise ValueError(f"{op}: a vector of {len(x)} has a stride of {x.stride(0)}, call contiguous() on it")
    return True


def ceil_divide(size: int, block: int) -> int:
    return -(-size // block)


def round_up(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`, at least what a matrix product of tiles needs."""
    return max(least, 1 << (size - 1).bit_length())


@cache
def names_of(device: torch.device) -> tuple[str, ...]:
    """Under which names rows for a device may stand, of which the first that is there counts: what was measured on one
    GPU serves every other of its compute capability, so that they round alike.
    """
    if device.type == "cpu":
        return ("cpu",)
    if device.type == "meta":  # shapes without numbers, which stand for any GPU that was not measured
        return (UNTUNED,)
    if triton is None:
        return ("without triton",)
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)), torch.cuda.get_device_name(device), UNTUNED


Blocks = dict[tuple[str, int], dict[str, int]]  # (kernel, bits of the storage type) -> block sizes, warps and stages


def block_sizes(
    kernel: str, num_warps: int, num_stages: int = 1, *, bits: tuple[int, ...] = (16, 32), **sizes: int
) -> Blocks:
    """The rows of one kernel; the same for 16 and 32 bits where it is bound by memory, as it computes in fp32 then."""
    row = {**sizes, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return {(kernel, width): row for width in bits}


def blocks(table: Mapping[str, Blocks], kernel: str, x: Tensor, least: int = 16, **counts: int) -> dict[str, int]:
    """Block sizes, warps and stages of one kernel for the dtype and device of `x`, of a file's BLOCKS: a name as in
    `names_of` -> rows. The interpreter on a CPU takes those of a GPU that was not measured. No block is larger than it
    takes to hold its count, where `counts` has one, but for the `least` size.
    """
    sizes = find_sizes(table, kernel, x)
    assert sizes is not None, f"{kernel} has no row"
    return sizes | {name: min(sizes[name], round_up(count, least)) for name, count in counts.items()}


def find_sizes(table: Mapping[str, Blocks], kernel: str, x: Tensor) -> dict[str, int] | None:
    """The row of `kernel` for the dtype and device of `x`, if there is one."""
    row, names = (kernel, 8 * x.element_size()), (*names_of(x.device), UNTUNED)
    return next((table[name][row] for name in names if row in table.get(name, {})), None)
