"""Batches that fit: the default batch size of a device, and smaller batches where memory runs out."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from datasetdm_fast.errors import Missing

Result = TypeVar("Result")
BATCH = 8  # of engines whose memory cannot be measured
CPU_CELLS = 4096  # latent cells per call on a CPU: 16 demo images, one of 512 x 512
SHARE = 0.8  # of the free memory; the rest is for what other batches of the pipeline hold
# of mallopt of glibc: freed bytes that are retained in all, bytes of a tensor from which not, arenas: what one thread
# frees serves the others
MALLOC_OPTIONS = {-1: 2**28, -3: 2**25, -8: 1}
LARGEST_SUGGESTED_BATCH = 32  # beyond it a GPU is busy anyway, and images only wait for each other


def suggest_batch(side: int, device: torch.device, bytes_of: Callable[[int], int] | None = None) -> int:
    """The batch size for images of `side` latent cells; `bytes_of` measures a call with so many on a GPU."""
    if device.type == "cpu" or bytes_of is None:
        return max(min(CPU_CELLS // side**2, LARGEST_SUGGESTED_BATCH), 2)
    try:
        single, double = bytes_of(1), bytes_of(2)
    except torch.OutOfMemoryError:  # where not even one fits, its first call reports it
        return 1
    free = torch.cuda.mem_get_info(device)[0]
    largest = 1 + (SHARE * free - single) / max(double - single, 1)
    return max(min(int(largest) // 2 * 2, LARGEST_SUGGESTED_BATCH), 1)


def halve_until_fits(
    run: Callable[[int], Result], size: int, forget: Callable[[], None], times: int = 1
) -> tuple[Result, int]:
    """run(size) and the size, halved up to so many times where memory runs out after `forget` freed caches."""
    while True:
        try:
            return run(size), size
        except torch.OutOfMemoryError as error:
            if size == 1 or not times:
                raise Missing(
                    f"memory: the GPU does not have enough memory for {size} image{'s' * (size > 1)} at once",
                    "Choose a smaller --batch-size or --size, or free its memory.",
                ) from error
        forget()
        size, times = -(-size // 2), times - 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine, by PyTorch's message or by ours."""
    return isinstance(error, torch.OutOfMemoryError) or "enough memory" in str(error)


def _c_library() -> ctypes.CDLL:
    """The libraries that the process has loaded; nothing is opened for it."""
    return ctypes.CDLL(None, handle=ctypes.pythonapi._handle)


def trim() -> None:
    """Returns freed memory that the C library retains to the system, where it has a function for that."""
    if hasattr(library := _c_library(), "malloc_trim"):
        library.malloc_trim(0)


def release() -> None:
    """Returns unused memory to the system: of circular objects, of the C library and of PyTorch."""
    gc.collect()
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def retain_freed() -> None:
    """Lets glibc retain freed memory, as fresh pages cost a training more than its computation."""
    if hasattr(library := _c_library(), "mallopt"):
        for parameter, value in MALLOC_OPTIONS.items():
            library.mallopt(parameter, value)
