"""The pipeline of diffusers under torch.compile, as its guide to fast generation sets it up: channels-last, packed
projections, autotuning.
"""

from __future__ import annotations

import torch

from bench.peers.diffusers import TunedDiffusers
from bench.setting import Setting

# On a GPU those of diffusers' guide; a CPU has neither graphs nor Triton, and autotuning its products takes minutes.
OPTIONS = {
    "cuda": {
        "max_autotune": True,
        "triton.cudagraphs": True,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    },
    "cpu": {"freezing": True},  # weights become constants, laid out once
}


def build(setting: Setting, batch: int) -> TunedDiffusers:
    peer = TunedDiffusers(setting, batch)
    options = OPTIONS[setting.device.type]
    peer.pipe.unet = torch.compile(peer.unet, fullgraph=True, dynamic=False, options=options)
    peer.pipe.vae.decode = torch.compile(peer.pipe.vae.decode, fullgraph=True, dynamic=False, options=options)
    return peer
