"""The fast engine of this package."""

from __future__ import annotations

from bench.peers.engine import EnginePeer, open_peer
from bench.setting import Setting


def build(setting: Setting, batch: int) -> EnginePeer:
    """In its own precision: fp32 on a CPU, fp16 on a GPU."""
    return open_peer("fast", setting, batch)


def build_bf16(setting: Setting, batch: int) -> EnginePeer:
    return open_peer("fast", setting, batch, "bf16")
