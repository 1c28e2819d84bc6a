"""Time, energy and memory of calls that take turns in one process."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.errors import Missing

STATUS, CLEAR, CORES = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/stat")
TICKS = os.sysconf("SC_CLK_TCK")  # a second
RESET_PEAK = "5"
SLOWER = 1.1  # times as long as usual for all calls alike: what else the hardware did then is not the calls' doing


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@dataclass
class Rounds:
    """What every round of one call took."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all cores at work
    joules: list[float] = field(default_factory=list)  # empty where nobody counts them

    def add(self, more: "Rounds") -> None:
        for name in ("seconds", "cpu_seconds", "joules"):
            getattr(self, name).extend(getattr(more, name))

    def only(self, kept: Sequence[int]) -> "Rounds":
        """These rounds alone."""
        lists = (self.seconds, self.cpu_seconds, self.joules)
        return Rounds(*([values[k] for k in kept] if values else [] for values in lists))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    meter: Callable[[], float | None] = lambda: None,
    *,
    least: int = 3,
    most: int = 200,
    lasting: float = 0.0,
) -> dict[str, Rounds]:
    """Rounds of every call in turn, A B A B, for about `seconds` in all; `meter` returns once a device is idle, with
    the joules it has used. In every round a call is made until that took `lasting` seconds, and its mean counts.
    """
    taken = {name: Rounds() for name in calls}
    end = time.perf_counter() + seconds
    count = 0
    while calls and count < most and (count < least or time.perf_counter() < end):
        count += 1
        for name, call in calls.items():
            used, cpu, begin, made = meter(), time.process_time(), time.perf_counter(), 0
            while not made or time.perf_counter() - begin < lasting:
                call()
                made += 1
            now = meter()
            taken[name].seconds.append((time.perf_counter() - begin) / made)
            taken[name].cpu_seconds.append((time.process_time() - cpu) / made)
            if used is not None and now is not None:
                taken[name].joules.append((now - used) / made)
    return taken


def undisturbed(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    meter: Callable[[], float | None] = lambda: None,
    *,
    least: int,
    lasting: float,
) -> tuple[dict[str, Rounds], int]:
    """At least `least` rounds of every call, and how many were set aside and made again: those in which the machine was
    slower for all calls alike. Where that happens to most rounds, all of them count.
    """
    taken = interleaved(calls, seconds, meter, least=least, lasting=lasting)
    for _ in range(least + 1):
        kept = _as_usual(taken)
        if len(kept) >= least:
            made = max(len(one.seconds) for one in taken.values())
            return {name: one.only(kept) for name, one in taken.items()}, made - len(kept)
        for name, more in interleaved(calls, 0.0, meter, least=1, lasting=lasting).items():
            taken[name].add(more)
    return taken, 0


def _as_usual(taken: Mapping[str, Rounds]) -> list[int]:
    """The rounds in which the calls took as long as usual, by the median over them."""
    slowness = zip(*([value / statistics.median(one.seconds) for value in one.seconds] for one in taken.values()))
    return [k for k, found in enumerate(slowness) if statistics.median(found) <= SLOWER]


@dataclass
class CpuShare:
    """How much of the machine went to this process, and how much to others, while something was timed."""

    load_average: float = 0.0  # of the last minute, before
    cpu_per_wall: float = 0.0  # cores at work for this process
    others: float = 0.0  # share of all cores that others used, another machine on the same hardware among them


@contextmanager
def watched() -> Iterator[CpuShare]:
    """What went on within the block, once it is over."""
    found = CpuShare(round(os.getloadavg()[0], 2))
    begin, own, (busy, whole) = time.perf_counter(), time.process_time(), core_seconds()
    yield found
    seconds, worked = max(time.perf_counter() - begin, 1e-9), time.process_time() - own
    found.cpu_per_wall = round(worked / seconds, 3)
    busy, whole = (after - before for after, before in zip(core_seconds(), (busy, whole), strict=True))
    found.others = round(max(busy - worked, 0.0) / whole, 3) if whole else 0.0


def core_seconds() -> tuple[float, float]:
    """Seconds that all cores have been busy since the machine started, and all of their seconds; zeros where Linux does
    not tell them.
    """
    if not CORES.exists():
        return 0.0, 0.0
    ticks = [int(word) for word in CORES.read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # waiting for the disk among it
    return (sum(ticks) - idle) / TICKS, sum(ticks) / TICKS


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Least, median and most, and every round."""
    kept = [float(f"{value:.5g}") for value in values]
    return {"least": min(kept), "median": float(f"{statistics.median(values):.5g}"), "most": max(kept), "rounds": kept}


def mib(count: int) -> float:
    return round(count / 2**20, 1)


def wait(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def meter(device: torch.device) -> Callable[[], float | None]:
    """Waits for the device and reads its energy counter, where it has one."""

    def read() -> float | None:
        wait(device)
        return machine.nvml(device).joules if device.type == "cuda" else None

    return read


def held(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch holds in this process when what is free was given back; 0 on a CPU, whose peaks are
    what a call adds.
    """
    if device.type == "cpu":
        return 0
    release()
    return torch.cuda.memory_reserved(device)


def peak(device: torch.device, call: Callable[[], Any], others: int = 0) -> tuple[Any, int]:
    """The answer of `call` and the most bytes it needed: of the GPU all that PyTorch held, the memory of recorded
    graphs among it, without what `others` hold there; of a CPU what the process grew by.
    """
    if device.type == "cpu":
        return with_peak(call)
    release()
    torch.cuda.reset_peak_memory_stats(device)
    answer = call()
    wait(device)
    return answer, torch.cuda.max_memory_reserved(device) - others


def with_peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """The answer of `call` and the most bytes the process grew by while it ran, whoever allocated them; never less than
    a page.

    Run its code before: pages of the libraries count as well.
    """
    reset_peak()
    before = status("VmRSS")
    answer = call()
    return answer, max(status("VmHWM") - before, 4096)


def reset_peak() -> None:
    """Gives back what is free, and begins to count the most memory of this process anew."""
    release()
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError as error:
        raise Missing(
            f"peak memory: {CLEAR} cannot be written ({error.strerror})",
            "measure on Linux, outside a sandbox that hides /proc",
        ) from None


def status(field: str) -> int:
    """Bytes of one field of this process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
