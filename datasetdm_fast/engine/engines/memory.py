"""Batches that fit: how many images a device takes at once, and what happens when it was asked too much."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from datasetdm_fast.errors import Missing

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine

Answer = TypeVar("Answer")
BATCH = 8  # of engines whose graphs tell nothing about their memory
CPU_CELLS = 4096  # latent cells a CPU works on at once: 16 demo images, one of 512 x 512
SHARE = 0.8  # of the free memory; the rest is for what other batches of the pipeline hold
# of mallopt of glibc: bytes freed in all that are kept, bytes of a tensor from which not, arenas: what one thread frees
# serves the others
KEPT = {-1: 2**28, -3: 2**25, -8: 1}
LARGEST_SUGGESTED_BATCH = 32  # beyond it a GPU is busy anyway, and images only wait for each other


def suggest_batch(side: int, device: torch.device, bytes_of: Callable[[int], int] | None = None) -> int:
    """Images of `side` latent cells to make together; `bytes_of` says what a call with so many takes on a GPU."""
    if device.type == "cpu":
        return max(min(CPU_CELLS // side**2, LARGEST_SUGGESTED_BATCH), 2)
    try:
        one, two = bytes_of(1), bytes_of(2)
    except torch.OutOfMemoryError:  # where not even one fits, its first call says so
        return 1
    free = torch.cuda.mem_get_info(device)[0]
    most = 1 + (SHARE * free - one) / max(two - one, 1)
    return max(min(int(most) // 2 * 2, LARGEST_SUGGESTED_BATCH), 1)


def free_bytes(device: torch.device) -> float:
    """Memory that is left: of a GPU with what PyTorch keeps unused, of a machine as far as it says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # other systems than Linux
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def weight_bytes(engine: Engine) -> int:
    """Memory of the networks of the reference engine."""
    model = engine.model
    return sum(
        weight.numel() * weight.element_size()
        for network in (model.text_encoder, model.unet, model.vae, *engine.decoders.values())
        for weight in network.parameters()
    )


def halving(run: Callable[[int], Answer], size: int, forget: Callable[[], None], times: int = 1) -> tuple[Answer, int]:
    """run(size), halved up to so many times where memory runs out, each time after `forget` dropped caches; and the
    size that worked.
    """
    while True:
        try:
            return run(size), size
        except torch.OutOfMemoryError as error:
            if size == 1 or not times:
                raise _too_large(size) from error
        forget()
        size, times = -(-size // 2), times - 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, of a GPU or of the machine, in PyTorch's words or in ours."""
    return isinstance(error, torch.OutOfMemoryError) or "enough memory" in str(error)


def _loaded() -> ctypes.CDLL:
    """All that the process has loaded; nothing is opened for it."""
    return ctypes.CDLL(None, handle=ctypes.pythonapi._handle)


def trim() -> None:
    """Gives back what the C library keeps of freed memory, where it has a function for that."""
    if hasattr(library := _loaded(), "malloc_trim"):
        library.malloc_trim(0)


def release() -> None:
    """Gives back memory that nobody uses any more: of objects that refer to themselves, as engines of plans do, and
    what the C library and PyTorch keep.
    """
    gc.collect()
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def keep_freed() -> None:
    """Lets glibc keep freed memory for what is asked for next: a step of a training frees all that the next one needs,
    and fresh pages cost more than the work on them.
    """
    if hasattr(library := _loaded(), "mallopt"):
        for parameter, value in KEPT.items():
            library.mallopt(parameter, value)


def _too_large(size: int) -> Missing:
    return Missing(
        f"memory: the GPU does not have enough memory for {size} image{'s' * (size > 1)} at once",
        "Choose a smaller --batch-size or --size, or free its memory.",
    )
