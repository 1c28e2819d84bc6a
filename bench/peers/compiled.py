"""The pipeline of diffusers under torch.compile, as its guide to fast generation sets it up: channels-last, packed
projections, autotuning.
"""

from __future__ import annotations

import torch

from bench.peers.diffusers import TunedDiffusers
from bench.setting import Setting

# On a GPU those of diffusers' guide for products. Convolutions stay with cuDNN, whose algorithms are chosen by timing:
# trying Triton's in their place takes many minutes, and so does coordinate descent. At the batches that are raced one
# call takes a hundred milliseconds, and recorded graphs would only hold memory. Autotuning would take a CPU minutes.
OPTIONS = {
    "cuda": {
        "max_autotune": True,
        "max_autotune_conv_backends": "ATEN",
        "triton.cudagraphs": False,
        "conv_1x1_as_mm": True,
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
