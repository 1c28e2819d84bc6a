"""TensorRT over the exported stages."""

from __future__ import annotations

from bench.peers.engine import EnginePeer, open_peer
from bench.setting import Setting
from datasetdm_fast.errors import Missing


def build(setting: Setting, batch: int) -> EnginePeer:
    if setting.device.type == "cpu":
        raise Missing("TensorRT: it runs on NVIDIA GPUs only", "measure on a GPU")
    return open_peer("trt", setting, batch)
