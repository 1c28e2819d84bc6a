"""Where the time of one UNet call goes, kernel by kernel, as the profiler of PyTorch sees it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.machine import wait
from bench.parity import Judge, fitted, fitted_pair
from bench.peers import PEERS, Peer
from bench.race import release
from bench.setting import Setting
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
CALLS = 3


def rows(setting: Setting, judge: Judge, names: Sequence[str], batches: dict[str, int]) -> list[dict[str, Any]]:
    """The share of each group of kernels in one call of each peer; idle is what no kernel filled."""
    made = []
    for name in names:
        try:
            peer = PEERS[name].build(setting, batches.get(name, 1))
        except Missing:
            continue
        made.append({"peer": name, **row_of(peer, setting, judge)})
        del peer
        release(setting.device)
    return made


def row_of(peer: Peer, setting: Setting, judge: Judge) -> dict[str, Any]:
    latents, context = fitted(judge.truth.seen[0], peer.batch).to(setting.device), fitted_pair(judge.truth.context, peer.batch).to(setting.device)
    groups, seconds = split(lambda: peer.denoise(latents, setting.recipe.schedule.timesteps[0], context), setting.device)
    shares = {group: round(value / seconds, 4) for group, value in groups.items()}
    return {"dtype": peer.dtype, "batch": peer.batch, "call_s": round(seconds / peer.batch, 6), "shares": shares}


def split(call: Callable[[], object], device: torch.device) -> tuple[dict[str, float], float]:
    """Seconds of each group in one call, and of the whole call."""
    call()
    wait(device)
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait(device)
        whole = (time.perf_counter() - begin) / CALLS
    groups = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in seen.key_averages():
        taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        groups[group_of(event.key)] += taken / 1e6 / CALLS
    busy = sum(groups.values())
    return {**groups, IDLE: max(whole - busy, 0.0)}, max(whole, busy)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), REST)
