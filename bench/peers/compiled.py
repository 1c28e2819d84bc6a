"""The pipeline of diffusers under torch.compile, as its guide to fast generation sets it up: channels-last, packed
projections; without autotuning.
"""

from __future__ import annotations

import torch

from bench.peers.diffusers import TunedDiffusers
from bench.setting import Setting

# On a GPU Inductor's own: products stay with cuBLAS, convolutions with cuDNN, whose algorithms are chosen by timing.
# Autotuning takes ten seconds for each of some thirty shapes of products. Of the eight tried on an H200 it kept cuBLAS
# for three of the four with the most rows and gained 8 % in the other; Triton's kernels won the four small ones.
OPTIONS = {"cuda": {}, "cpu": {"freezing": True}}  # frozen weights become constants, laid out once


def build(setting: Setting, batch: int) -> TunedDiffusers:
    peer = TunedDiffusers(setting, batch)
    options = OPTIONS[setting.device.type]
    peer.pipe.unet = torch.compile(peer.unet, fullgraph=True, dynamic=False, options=options)
    peer.pipe.vae.decode = torch.compile(peer.pipe.vae.decode, fullgraph=True, dynamic=False, options=options)
    return peer
