"""Where the time of one UNet call goes, kernel by kernel, as the profiler of PyTorch sees it, and csrc itself."""

import functools
import re
import time
from collections.abc import Callable
from itertools import chain

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from bench.machine.measure import wait
from bench.peers import PEERS
from bench.report import charts
from bench.report.tables import WHO, Cell, Table, figure, percent
from bench.rows.measurement import BenchRun, Measurement, Rows
from datasetdm_fast import _C
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.errors import Missing

# The first that matches a kernel's name, or on a CPU an operation's, names its group.
GROUPS = {
    "attention": r"attention|flash|fmha|softmax|bmm|baddbmm",
    "convolution": r"conv|wgrad|dgrad|fprop|implicit|winograd",
    "norm": r"norm|welford|rowwise|moments",
    "linear": r"gemm|addmm|::mm$|matmul|linear|cutlass|cublas|nvjet|splitk",
    "layout": r"copy|cat|transpose|nchw|nhwc|clone|memcpy|memset|contiguous|_to_",
}
REST = "elementwise"
IDLE = "idle"
PROFILED = ("upstream", "diffusers", "ours")
CALLS = 3
BATCH = 8  # of a peer whose best one is not known yet
BUSY = 0.05  # of the time


def rows(run: BenchRun) -> Rows:
    """The share of each group of kernels in one call of each peer; idle is what no kernel filled."""
    found = []
    for name in PROFILED:
        try:
            peer = PEERS[name].build(run.setting, PEERS[name].batch or run.batches.get(name, BATCH))
        except Missing:
            continue
        call = functools.partial(peer.denoise, *run.judge.inputs(0, peer.batch))
        shares, seconds = split(call, run.setting.device)
        row = {"peer": name, "dtype": peer.dtype, "batch": peer.batch, "call_s": round(seconds / peer.batch, 6)}
        found.append(row | {"shares": shares})
        del peer, call
        release()
    return found


def split(call: Callable[[], object], device: torch.device) -> tuple[dict[str, float], float]:
    """The share of each group in one call, and the seconds of the call."""
    call()
    wait(device)
    is_cpu = device.type == "cpu"
    options = {"experimental_config": _ExperimentalConfig(profile_all_threads=True)} if is_cpu else {}
    with profile(activities=[ProfilerActivity.CPU if is_cpu else ProfilerActivity.CUDA], **options) as seen:
        _C.take_times(True)
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait(device)
        whole = time.perf_counter() - begin
        ours = _C.take_times(False)
    # PyTorch's operations, and what csrc does, which it does not know. A thread that hands out work does not do it.
    workers = [
        [groups for groups in threads if sum(groups.values()) > BUSY * whole]
        for threads in (threads_of(seen, is_cpu), ours)
    ]
    spent = {group: sum(one.get(group, 0.0) for one in chain(*workers)) for group in (*GROUPS, REST)}
    filled = max(max(map(len, workers)) * whole, sum(spent.values()))
    shares = {group: round(seconds / filled, 4) for group, seconds in spent.items()}
    return {**shares, IDLE: round(max(1 - sum(shares.values()), 0.0), 4)}, whole / CALLS


def threads_of(seen: profile, is_cpu: bool) -> list[dict[str, float]]:
    """Seconds of each group in each thread of a CPU, or on a GPU."""
    threads: dict[int, dict[str, float]] = {}
    for event in seen.events() if is_cpu else seen.key_averages():
        place, name = (event.thread, event.name) if is_cpu else (0, event.key)
        groups = threads.setdefault(place, dict.fromkeys((*GROUPS, REST), 0.0))
        groups[group_of(name)] += (event.self_cpu_time_total if is_cpu else event.self_device_time_total) / 1e6
    return list(threads.values())


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def share_of(group: str) -> Cell:
    return lambda row: percent(row["shares"].get(group))


COLUMNS = {**WHO, "ms/image": figure("call_s", 1e3), **{group: share_of(group) for group in (*GROUPS, REST, IDLE)}}
MEASUREMENT = Measurement(
    "profile",
    "Time of one UNet call by kind of kernel",
    rows,
    (Table(COLUMNS),),
    {"profile": charts.profile},
    least_seconds=60,
)
