"""The device of an engine: which it is, how its calls round, its threads, and batches that fit its memory."""

import ctypes
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from datasetdm_fast.cores import cores_of_mask, count_cores, find_groups
from datasetdm_fast.errors import Missing, Refused, is_out_of_gpu, is_out_of_ram, nearest

Method = TypeVar("Method", bound=Callable[..., Any])


def resolve_device(name: str) -> torch.device:
    """The device `name` stands for; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refused(
            f"device: {name!r} is none of auto, cpu, cuda, cuda:N{nearest(name, ('auto', 'cpu', 'cuda'))}",
            "Choose one of these with --device, such as cuda:0.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Missing(
            f"device: {name} is not available, this machine has {torch.cuda.device_count()} CUDA devices",
            "Use --device cpu or --device auto.",
        )
    return device


def set_threads(threads: int) -> None:
    """Sets PyTorch's number of threads; 0 leaves it, or lowers it where a container has time of fewer cores."""
    if not threads and count_cores() < cores_of_mask():
        threads = min(torch.get_num_threads(), count_cores())
    if threads:
        torch.set_num_threads(threads)


def half_of(device: torch.device) -> str:
    """The half precision that is fast on `device`, "" where none is."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if multiplies_bf16(device) else ""


def slow_in_fp16(setting: str) -> Refused:
    """The refusal of fp16 on a CPU."""
    return Refused(
        f"{setting}: fp16 convolutions take a CPU hundreds of times longer than fp32 ones",
        "Use --dtype bf16 or --dtype fp32.",
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bf16; GPUs before Ampere only emulate them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of fp8 run there; a CPU rounds as a GPU does, and is slow."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


STREAMS = 32  # of a GPU that PyTorch hands out in turn, the first after the last
_HELD, _HELD_TURN = weakref.WeakSet[Any](), threading.Lock()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other holder has: a graph would record what another thread queues on the stream that it is
    recorded on.
    """
    with _HELD_TURN:
        for _ in range(STREAMS):
            if (stream := torch.cuda.Stream(device)) not in _HELD:
                break
        _HELD.add(stream)
        return stream


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Whether convolutions in fp32 round their factors to TF32 on a GPU, as PyTorch by itself lets them; products never
    do. The settings are the process's. That of products is put back after the last `in_own_precision`, the other is
    not: another thread of the engine may be in the middle of a call.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = is_allowed, False


def choose_by_shape(device: torch.device) -> None:
    """Lets cuDNN choose by shape and GPU alone, among algorithms that round alike every time: a choice by timing, which
    a program around the engine may have asked for, differs from rank to rank. The setting is the process's.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def engine_call(method: Method) -> Method:
    """A call without gradients, whose algorithms round alike, and with TF32 only where precision is not fp32."""

    @functools.wraps(method)
    def call(engine: Any, *arguments: Any, **options: Any) -> Any:
        if engine.device.type == "cuda":
            allow_tf32(engine.device, engine.precision != "fp32")
            choose_by_shape(engine.device)
        with torch.inference_mode():
            return method(engine, *arguments, **options)

    return call  # type: ignore[return-value]


class Lanes:
    """Computes several slices in parallel, each on its share of PyTorch's threads, or on one.

    The slices come from the caller and never from the number of threads, so that this number cannot change a result.
    Some of PyTorch's operations (sigmoid, softmax, single products) round differently on several threads: what uses
    them belongs on one.
    """

    def __init__(self, is_single: bool = False):
        self._is_single = is_single
        self._pool: ThreadPoolExecutor | None = None
        self._key: tuple[int, int, int] | None = None
        self._turn = threading.Lock()  # of callers, who may need other pools

    def map(self, call: Callable[..., Any], slices: Sequence[tuple[Any, ...]], most: int = 0) -> list[Any]:
        """call(*slice) of every slice, in order; at most so many in parallel, 0 = one a thread."""
        threads = torch.get_num_threads()
        lanes = min(threads, len(slices), most or threads)
        if lanes < 2:  # here, as another thread has other memory, too
            is_limited = self._is_single and threads > 1
            try:
                if is_limited:
                    torch.set_num_threads(1)
                return [call(*arguments) for arguments in slices]
            finally:
                if is_limited:
                    torch.set_num_threads(threads)

        def run(arguments: tuple[Any, ...]) -> Any:
            with torch.inference_mode():
                return call(*arguments)

        with self._turn:
            results = self._start(lanes, threads).map(run, slices)
        return list(results)

    def _start(self, lanes: int, threads: int) -> ThreadPoolExecutor:
        key = (os.getpid(), lanes, threads)  # threads do not survive a fork
        if self._pool is None or self._key != key:
            pool, self._pool = self._pool, None  # as an interrupt may come
            if pool is not None and self._key is not None and self._key[0] == key[0]:
                pool.shutdown()
            ready = threading.Barrier(lanes)
            share = 1 if self._is_single else threads // lanes
            pool = ThreadPoolExecutor(lanes, "lane", initializer=_limit, initargs=(share,))
            try:  # Once every lane has started, each has set its number of threads.
                list(pool.map(lambda _: ready.wait(), range(lanes)))
            finally:
                ready.abort()
                torch.set_num_threads(threads)
            self._pool, self._key = pool, key
        return self._pool


def _limit(threads: int) -> None:
    """Sets this thread's number of threads, after PyTorch has set the process's at its first query."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
    torch.set_num_threads(threads)


Result = TypeVar("Result")
BATCH = 8  # of engines whose memory cannot be measured
CPU_CELLS = 4096  # latent cells per call on a CPU: 16 demo images, one of 512 x 512
SHARE = 0.8  # of the free memory; the rest is for what other batches of the pipeline hold
C_LIBRARY = ctypes.CDLL(None, handle=ctypes.pythonapi._handle)  # what the process has loaded; nothing is opened
# of mallopt of glibc: freed bytes that are retained in all, bytes of a tensor from which not, arenas: what one thread
# frees serves the others
MALLOC_OPTIONS = {-1: 2**28, -3: 2**25, -8: 1}
MEMORY = Path("/proc/meminfo")
MEMORY_OF_GROUP = {  # of version 1 or not -> files with its limit and what it uses, and the name of its cached files
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    False: ("memory.max", "memory.current", "inactive_file"),
}
LARGEST_SUGGESTED_BATCH = 32  # beyond it a GPU is busy anyway, and images only wait for each other


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that this machine and the containers of this process still have; 0 where Linux does not tell."""
    try:
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        groups = list(find_groups("memory"))
    except (OSError, StopIteration):
        return 0
    free = [int(line.split()[1]) * 1024]
    for is_first, folder in groups:
        most, used, cached = MEMORY_OF_GROUP[is_first]
        if (folder / most).exists() and (limit := (folder / most).read_text().strip()) != "max":
            free.append(int(limit) - int((folder / used).read_text()))
            with suppress(OSError):  # Linux gives up cached files first
                figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free[-1] += int(figures.get(cached, 0))
    return max(min(free), 0)


def suggest_batch(side: int, device: torch.device, bytes_of: Callable[[int], int] | None = None) -> int:
    """The batch size for images of `side` latent cells; `bytes_of` measures a call with so many on a GPU."""
    if device.type == "cpu" or bytes_of is None:
        return max(min(CPU_CELLS // side**2, LARGEST_SUGGESTED_BATCH), 2)
    try:
        single, double = bytes_of(1), bytes_of(2)
    except RuntimeError as error:
        if not is_out_of_gpu(error):
            raise
        return 1  # where not even one fits, its first call reports it
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
        except RuntimeError as error:
            if not is_out_of_gpu(error):
                raise
            if size == 1 or not times:
                raise Missing(
                    f"memory: the GPU does not have enough memory for {size} image{'s' * (size > 1)} at once",
                    "Choose a smaller --batch-size or --size, or free its memory.",
                ) from error
        forget()
        size, times = -(-size // 2), times - 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine, by PyTorch's message or by ours."""
    return is_out_of_gpu(error) or is_out_of_ram(error) or "enough memory" in str(error)


def trim() -> None:
    """Returns freed memory that the C library retains to the system, where it has a function for that."""
    if hasattr(C_LIBRARY, "malloc_trim"):
        C_LIBRARY.malloc_trim(0)


def release() -> None:
    """Returns unused memory to the system: of circular objects, of the C library and of PyTorch."""
    gc.collect()
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def retain_freed() -> None:
    """Lets glibc retain freed memory, as fresh pages cost a training more than its computation."""
    if hasattr(C_LIBRARY, "mallopt"):
        for parameter, value in MALLOC_OPTIONS.items():
            C_LIBRARY.mallopt(parameter, value)
