"""Milliseconds of a piece of GPU work, without the host's launches and without what the cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.kernels.inputs import BATCH
from bench.machine.measure import wait
from bench.machine.work import HALVES

Build = Callable[[], Callable[[], object]]  # makes inputs, and the call on them

SETS = 4  # of inputs, in turn: the L2 cache does not stand for the memory
ROUNDS, REPLAYS = 5, 5


class Inputs:
    """Random tensors of the precision that networks have on a device; on a CPU, which tries the parts out, small."""

    def __init__(self, device: torch.device):
        self.device, self.dtype = device, torch.float16 if device.type == "cuda" else torch.bfloat16
        self.scale = 1 if device.type == "cuda" else 8  # widths and sides are divided by
        self.rows = HALVES * BATCH // self.scale

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def image(self, *shape: int) -> Tensor:
        return self.tensor(*shape).contiguous(memory_format=torch.channels_last)


def milliseconds(build: Build, device: torch.device, sets: int = SETS) -> float:
    """The median of a call over several sets of inputs, as one CUDA graph; on a CPU of one call."""
    calls = [build() for _ in range(sets)]
    for call in (*calls, *calls):
        call()
    wait(device)
    if device.type == "cpu":
        begin = time.perf_counter()
        calls[0]()
        return round(1e3 * (time.perf_counter() - begin), 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * REPLAYS:
            call()
    taken = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / (sets * REPLAYS))
    return round(statistics.median(taken), 4)


def row(name: str, forms: Mapping[str, Build], device: torch.device, sets: int = SETS) -> dict[str, object]:
    """Milliseconds of every form of one operation; of one that does not run here, why not."""
    found: dict[str, object] = {}
    for form, build in forms.items():
        try:
            with torch.inference_mode():
                found[form] = milliseconds(build, device, sets)
        except Exception as error:  # whatever a library throws at what it does not serve: the row says it
            found[form] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    return {"what": name, "ms": found}
