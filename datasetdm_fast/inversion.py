"""A real image back into the network: encode, noise to the capture timestep, one CFG call, capture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from datasetdm_fast import sampling
from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.errors import Refused
from datasetdm_fast.models.decoder_config import DecoderConfig


def invert(engine, images: Tensor, captions: Sequence[str], timestep: int, seeds: Sequence[int], *, is_raw: bool = False) -> Capture | ProjectedCapture:
    """The capture of images [B, H, W, 3] uint8 at a UNet timestep; image b's noise comes from seeds[b] alone.

    `is_raw` asks for the features and maps themselves, where an engine would give only what its decoders make of them.
    """
    clean = engine.encode_image(images)
    noise = torch.stack([sampling.initial_noise(seed, *clean.shape[1:]) for seed in seeds]).to(clean)
    latents = sampling.add_noise(engine.model.scheduler, clean, noise, timestep)
    context = torch.cat([engine.encode_text([""] * len(captions)), engine.encode_text(list(captions))])
    call = engine.denoise_and_keep if is_raw else engine.denoise_and_capture
    return call(latents, timestep, context)[1]


def capture_timestep(configs: Iterable[DecoderConfig]) -> int:
    """The one UNet timestep all decoders were trained at; 0, upstream's, where they do not say."""
    named = {config.task: config.capture_timestep or 0 for config in configs}
    if len(set(named.values())) > 1:
        raise Refused(
            f"decoders: trained at different timesteps ({', '.join(f'{task} {t}' for task, t in named.items())}), one capture cannot serve them",
            "run them apart",
        )
    return next(iter(named.values()))
