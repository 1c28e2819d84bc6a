"""DatasetDM's `ptp_utils`: images from prompts, with the features and attention of the last call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datasetdm_fast.compat.showlab_modules.attention import AttentionStore
from datasetdm_fast.compat.showlab_modules.unet import UNet2D
from datasetdm_fast.engine.sampling.walk import guide

CELL = 8  # pixels of a side of a latent cell
GAP = 0.02  # of the height, between images that are saved in one file


def register_attention_control(model: Any, controller: AttentionStore) -> None:
    """Makes a controller collect the attention of every captured call; no module is changed."""
    unet = model if isinstance(model, UNet2D) else model.unet
    unet.controller = controller
    controller.num_att_layers = 2 * sum(len(level.heads) for level in unet.model.levels)


def init_latent(
    latent: Tensor | None, unet: UNet2D, height: int, width: int, generator: Any, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Noise drawn on the CPU, and the same for a batch: one generator gives all images the same noise, a list of
    generators gives each its own.
    """
    shape = (1, unet.in_channels, height // CELL, width // CELL)
    if latent is None and isinstance(generator, Sequence):
        latent = torch.cat([torch.randn(shape, generator=each) for each in generator])
    elif latent is None:
        latent = torch.randn(shape, generator=generator)
    return latent, latent.expand(batch_size, *latent.shape[1:]).to(unet.device)


def latent2image(vae: Any, latents: Tensor) -> np.ndarray:  # [B, H, W, 3] uint8
    """The images of latents, values between two steps rounded down."""
    decoded = vae.decode(latents / vae.config.scaling_factor)["sample"]
    return ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def text2image(
    Unet: UNet2D,
    vae: Any,
    tokenizer: Any,
    text_encoder: Any,
    scheduler: Any,
    prompt: Sequence[str],
    controller: AttentionStore,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    generator: Any = None,
    latent: Tensor | None = None,
    low_resource: bool = False,
    Train: bool = True,
) -> tuple[np.ndarray, Tensor]:
    """Images of prompts and the noise they began with; with `Train` only the last call is made, on the given latent.

    Both halves of guidance are always one call, so `low_resource` changes nothing.
    """
    prompt = list(prompt)
    context = torch.cat([_encode(tokenizer, text_encoder, texts) for texts in ([""] * len(prompt), prompt)])
    latent, latents = init_latent(latent, Unet, Unet.size, Unet.size, generator, len(prompt))
    scheduler.set_timesteps(num_inference_steps)
    times = list(scheduler.timesteps)[-1 if Train else 0 :]
    Unet.controller = controller
    for k, time in enumerate(tqdm(times, leave=False, disable=None)):
        noise = Unet.predict_noise(latents, time, context.to(Unet.device), k == len(times) - 1)
        latents = scheduler.step(guide(noise, guidance_scale), time, latents)["prev_sample"]
        latents = controller.step_callback(latents)
    return latent2image(vae, latents.to(vae.device)), latent


def text2image_ldm_stable(
    model: Any, prompt: Sequence[str], controller: AttentionStore, *arguments: Any, **named: Any
) -> tuple[np.ndarray, Tensor]:
    """`text2image` from a pipeline with `unet`, `vae`, `tokenizer`, `text_encoder` and `scheduler`."""
    parts = model.unet, model.vae, model.tokenizer, model.text_encoder, model.scheduler
    return text2image(*parts, prompt, controller, *arguments, **named)


def _encode(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> Tensor:  # [B, T, D]
    length = tokenizer.model_max_length
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def save_images(
    images: np.ndarray | Sequence[np.ndarray], num_rows: int = 1, offset_ratio: float = GAP, out_put: str = ""
) -> None:
    """One file of all images, in rows with white gaps between them; PIL's defaults, so JPEG of quality 75."""
    planes = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else list(images)
    height, width = planes[0].shape[:2]
    gap, columns = int(height * offset_ratio), -(-len(planes) // num_rows)
    sides = columns * (width + gap) - gap, num_rows * (height + gap) - gap
    sheet = Image.new("RGB", sides, "white")
    for k, plane in enumerate(planes):
        row, column = divmod(k, columns)
        sheet.paste(Image.fromarray(plane.astype(np.uint8)), (column * (width + gap), row * (height + gap)))
    sheet.save(Path(out_put))
