"""Where the kernels meet Triton: its one import, the tensors it serves, and the table of block sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.errors import Missing

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain forms need none
    triton = tl = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides at decoration, that is when the kernel files are imported.
IS_INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Three passes of the tensor cores keep fp32 products exact to about 2^-21; a single one would round the factors to 10
# bits.
PRECISION = "tf32x3"


def jit(kernel: Callable) -> Any:
    """The kernel for Triton; where Triton is missing it stays a function that nobody calls."""
    return triton.jit(kernel) if triton else kernel


def is_served(op: str, *tensors: Tensor) -> bool:
    """Whether a kernel runs where the tensors lie: on a GPU always, on a CPU in Triton's interpreter only.

    Tensors on several devices, of a dtype without a kernel, or on a GPU without Triton are refused.
    """
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: the tensors lie on {' and '.join(sorted(map(str, devices)))}, move them to one device")
    if tensors[0].device.type == "cpu" and not IS_INTERPRETED:
        return False
    if triton is None:
        raise Missing(
            f"{op}: Triton is not installed, the kernels for {tensors[0].device} need it",
            "pip install 'datasetdm-fast[triton]'",
        )
    for x in tensors:
        if x.dtype not in DTYPES:
            raise ValueError(f"{op}: {x.dtype} has no kernel, use one of {', '.join(map(str, DTYPES))}")
    return True


def ceil_divide(size: int, block: int) -> int:
    return -(-size // block)


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`, at least what a matrix product of tiles needs."""
    return max(least, 1 << (size - 1).bit_length())


def plane_strides(op: str, x: Tensor) -> tuple[int, int, int]:
    """Strides of `x` [B, C, h, w] along image, channel and cell."""
    height, width = x.shape[2:]
    cell = x.stride(3) if width > 1 else x.stride(2)
    if height > 1 and width > 1 and x.stride(2) != width * cell:
        raise ValueError(
            f"{op}: rows of strides {x.stride()} do not follow each other, pass a contiguous or channels-last tensor"
        )
    return x.stride(0), x.stride(1), cell


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "untuned"


def blocks(name: str, x: Tensor) -> dict[str, int]:
    """Block sizes, warps and stages of one kernel for the dtype and device of `x`."""
    row = (name, 8 * x.element_size())
    return TABLE.get(_device_name(x.device), {}).get(row) or TABLE["untuned"][row]


def _row(num_warps: int, num_stages: int = 1, **sizes: int) -> dict[str, int]:
    return {**sizes, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _both(name: str, row: dict[str, int]) -> dict[tuple[str, int], dict[str, int]]:
    """The same row for 16 and 32 bits: kernels that are bound by memory compute in fp32 anyway."""
    return {(name, 16): row, (name, 32): row}


# Device name -> (kernel, bits of the storage type) -> sizes. A row that was measured stands under the name of the
# device it was measured on.
TABLE: dict[str, dict[tuple[str, int], dict[str, int]]] = {
    "untuned": {
        **_both("group_norm_silu", _row(4, BLOCK_S=64, BLOCK_C=64)),
        **_both("group_norm_silu combine", _row(4, BLOCK_N=16)),
        **_both("layer_norm", _row(4, BLOCK_S=2)),
        **_both("geglu", _row(4, BLOCK_S=4, BLOCK_C=512)),
        **_both("guided_step", _row(4, BLOCK=1024)),
        **_both("image_norm", _row(4, BLOCK_S=64, BLOCK_C=32)),
        **_both("image_norm planes", _row(4, BLOCK_S=1024, BLOCK_C=1)),
        **_both("pyramid resize", _row(4, BLOCK_S=32, BLOCK_F=64)),
        **_both("depth_head sum", _row(4, BLOCK=512)),
        ("pyramid", 16): _row(8, 3, BLOCK_S=64, BLOCK_F=64, BLOCK_C=32),
        ("pyramid", 32): _row(8, 1, BLOCK_S=64, BLOCK_F=64, BLOCK_C=32),
        ("attention_capture", 16): _row(8, 1, BLOCK_S=64, BLOCK_D=16, BLOCK_F=64),
        ("attention_capture", 32): _row(8, 1, BLOCK_S=32, BLOCK_D=16, BLOCK_F=16),
        ("attention 64", 16): _row(8, 3, BLOCK_N=128, BLOCK_S=64),
        ("attention 128", 16): _row(8, 2, BLOCK_N=128, BLOCK_S=32),
        ("attention 256", 16): _row(8, 2, BLOCK_N=128, BLOCK_S=16),
        ("attention 64", 32): _row(4, 1, BLOCK_N=64, BLOCK_S=16),
        ("masked_attention", 16): _row(4, 2, BLOCK_N=64, BLOCK_S=32, BLOCK_D=32),
        ("masked_attention", 32): _row(4, 1, BLOCK_N=32, BLOCK_S=32, BLOCK_D=32),
        ("mask_head", 16): _row(4, 2, BLOCK_N=64, BLOCK_S=64, BLOCK_D=16),
        ("mask_head", 32): _row(4, 1, BLOCK_N=32, BLOCK_S=64, BLOCK_D=16),
        ("depth_head", 16): _row(8, 1, BLOCK_O=32, BLOCK_X=256),
        ("depth_head", 32): _row(8, 1, BLOCK_O=16, BLOCK_X=128),
    },
}
