"""Decoders with seeded weights, as large as those of upstream: for the speed and memory of seeded models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from datasetdm_fast.engine.decoders.checkpoint import build_decoder, upstream
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.stages import Level

COUNTED = {"semantic": 19, "instance": 80}  # classes of upstream's Cityscapes and COCO decoders
KINDS = {task: ("segmentation", {"classes": tuple(map(str, range(count)))}) for task, count in COUNTED.items()}
KINDS |= {"depth": ("depth", {}), "pose": ("heatmap", {})}


def untrained_decoders(levels: Sequence[Level], text_width: int) -> dict[str, Decoder]:
    """A decoder for each task but the open-vocabulary one, as wide against the UNet as upstream's, in training mode."""
    channels = levels[-1].features[0]
    width = max(16, 256 * channels // 320 // 16 * 16)
    sizes = {"levels": levels, "text_width": text_width, "width": width}
    sizes |= {"mask_dim": width, "depth_width": 4 * width, "feed_forward": 8 * width}
    decoders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for task, (kind, names) in KINDS.items():
            decoders[task] = build_decoder(upstream(kind, task=task, min_area=0, **sizes, **names))
    return decoders


def seeded_decoders(levels: Sequence[Level], text_width: int) -> dict[str, Decoder]:
    """Decoders with seeded weights for every task, whose depth depends on the image."""
    decoders = untrained_decoders(levels, text_width)
    for place in (0, 2):  # as initialised, the depth head gives the same depth everywhere and hides its inputs
        weight, generator = decoders["depth"].last_layer_depth[place].weight, torch.Generator().manual_seed(1)
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
    return decoders
