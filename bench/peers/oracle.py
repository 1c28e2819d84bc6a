"""The reference engine of this package: diffusers' modules in fp32, several images at a time."""

from __future__ import annotations

from bench.peers.engine import EnginePeer
from bench.setting import Setting


def build(setting: Setting, batch: int) -> EnginePeer:
    return EnginePeer(setting.reference, setting, batch)
