"""ONNX Runtime over the exported stages."""

from __future__ import annotations

from bench.peers.engine import EnginePeer, open_peer
from bench.setting import Setting


def build(setting: Setting, batch: int) -> EnginePeer:
    return open_peer("ort", setting, batch)
