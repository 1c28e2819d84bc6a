"""What the machine can do at most, measured beside what is done on it: matrix products, copies, exponentials."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.machine.measure import wait
from bench.peers.upstream import arithmetic
from datasetdm_fast.kernels import launch
from datasetdm_fast.kernels.launch import jit, tl

# Name -> storage, and whether TF32 is allowed.
TYPES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "fp16": (torch.float16, False)}
TYPES |= {"tf32": (torch.float32, True)}
MEASURED_TYPES = {"cpu": ("fp32", "bf16"), "cuda": tuple(TYPES)}
WINDOW = 0.01  # seconds; the fastest counts, and short ones meet a moment that nothing disturbs
REPLAY, MOST_RECORDED = 2e-3, 64  # seconds of the calls of one graph, and how many it has at most
# Which of them is fastest depends on the library; none is tried after one that takes LONG seconds, as bfloat16 does on
# a CPU without instructions for it.
PRODUCT_SIDES = {"cpu": (512, 768, 1024), "cuda": (4096, 8192)}
LONG = 0.1
# Images, channels in and out, cells a side; on a CPU faster than any product.
CONVOLUTION = {"cpu": (16, 96, 16), "cuda": (16, 640, 64)}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**31}  # far beyond any cache
CACHED = {"cpu": 2**16, "cuda": 2**24}  # numbers whose exponentials are taken, near the cores
TURNS = 256  # exponentials a GPU thread takes of one number before it writes it
BLOCK = 1024


def rate(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls per second: the fastest of all windows of WINDOW seconds, at least three, within about `seconds`."""
    call()
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    count = max(1, int(WINDOW / max(time.perf_counter() - begin, 1e-7)))
    end, fastest, windows = time.perf_counter() + seconds, 0.0, 0
    while windows < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        wait(device)
        fastest, windows = max(fastest, count / (time.perf_counter() - begin)), windows + 1
    return fastest


def device_rate(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The same of the device alone: on a GPU calls are replayed as one CUDA graph, as the engine's are, since what is
    small there takes less time than its launch.
    """
    if device.type != "cuda":
        return rate(call, device, seconds)
    call()
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    count = min(max(1, int(REPLAY / max(time.perf_counter() - begin, 1e-7))), MOST_RECORDED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return count * rate(graph.replay, device, seconds)


def measure(device: torch.device, seconds: float = 0.6) -> dict[str, Any]:
    """TFLOP/s of matrix products and 3x3 convolutions, whichever are faster, by type; GB/s of copies (bytes read plus
    bytes written), G/s of exponentials.
    """
    products = {name: product_rate(device, *TYPES[name], seconds) for name in MEASURED_TYPES[device.type]}
    rates = {"tflops": products, "gbps": copy_rate(device, seconds), "gexps": exp_rate(device, seconds)}
    return rates | {"seconds": seconds}


def product_rate(device: torch.device, dtype: torch.dtype, tf32: bool, seconds: float) -> float:
    sides = PRODUCT_SIDES[device.type]
    seconds /= 1 + len(sides)
    with arithmetic(tf32):
        call, work = convolution(*CONVOLUTION[device.type], device, dtype)
        fastest = rate(call, device, seconds) * work
        for side in sides:
            call, work = product(side, device, dtype)
            calls = rate(call, device, seconds)
            fastest = max(fastest, calls * work)
            if calls * LONG < 1:
                break
        return round(fastest / 1e12, 3)


def product(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of two square matrices, and its operations."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out), 2 * side**3


def convolution(
    images: int, channels: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    shapes = ((images, channels, side, side), (channels, channels, 3, 3))
    drawn = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in drawn)
    return lambda: functional.conv2d(x, weight, padding=1), 2 * 9 * channels**2 * images * side**2


def copy_rate(device: torch.device, seconds: float) -> float:
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return round(rate(lambda: target.copy_(source), device, seconds) * 2 * source.nbytes / 1e9, 1)


def exp_rate(device: torch.device, seconds: float) -> float | None:
    """None on a GPU without Triton: there a plain exp() measures the memory."""
    x = torch.rand(CACHED[device.type], device=device)
    if device.type == "cpu":
        out = torch.empty_like(x)
        return round(rate(lambda: torch.exp(x, out=out), device, seconds) * len(x) / 1e9, 2)
    if launch.triton is None:
        return None
    return round(rate(lambda: exponentials(x), device, seconds) * len(x) * TURNS / 1e9, 1)


def exponentials(x: Tensor) -> Tensor:
    """Every number of `x` [N] through TURNS exponentials in registers."""
    out = torch.empty_like(x)
    _exponentials_kernel[(len(x) // BLOCK,)](x, out, TURNS=TURNS, BLOCK=BLOCK)
    return out


@jit
def _exponentials_kernel(x_ptr, out_ptr, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    for _ in range(TURNS):
        x = tl.exp2(x) - 1.0  # stays between 0 and 1, so that nothing is short-cut
    tl.store(out_ptr + place, x)


def peak_tflops(limits: dict[str, Any], dtype: str) -> float:
    """The fastest products with which a result of this type can be computed: where half precision is emulated, fp32."""
    products: dict[str, float] = limits["tflops"]
    return max(products.get(dtype, 0.0), products["fp32"])


def nearest_limit(
    flops: float, moved: float, exps: float, seconds: float, limits: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Rates of a piece of work, the limit it would meet first, and its share of that."""
    least = {
        "products": flops / (peak_tflops(limits, dtype) * 1e12),
        "memory": moved / (limits["gbps"] * 1e9),
        "exponentials": exps / (limits["gexps"] * 1e9) if limits["gexps"] else 0.0,
    }
    bound = max(least, key=least.get)
    rates = {"tflops": round(flops / seconds / 1e12, 4), "gbps": round(moved / seconds / 1e9, 2)}
    rates["flop_per_byte"] = round(flops / max(moved, 1), 2)
    return {**rates, "bound": bound, "share": round(least[bound] / seconds, 4)}
