"""Nominal work of one image: the operations of the model as it is written, whoever leaves some of them out."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.stages import FACTOR

TERA = 1e12
HALVES = 2  # of a CFG batch


def flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions that `call` makes; a multiplication and its addition are
    two.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def stage_flops(model: Model) -> dict[str, int]:
    """Operations of the text encoder and of one UNet call for one prompt, and of the decoding of one image."""
    side = model.size // FACTOR
    with torch.device("meta"):  # shapes without numbers: full size costs nothing
        unet = UNet2DConditionModel.from_config(model.networks["unet"].config)
        vae = AutoencoderKL.from_config(model.networks["vae"].config)
        text = CLIPTextModel(model.modules["text_encoder"].config)
        tokens = text.config.max_position_embeddings
        latents, context = torch.empty(1, 4, side, side), torch.empty(1, tokens, text.config.hidden_size)
        work = {"text": flops(lambda: text(torch.zeros(1, tokens, dtype=torch.long)))}
        work["call"] = flops(lambda: unet(latents, 1, context))
        return work | {"image": flops(lambda: vae.decode(latents))}


def image_flops(stages: dict[str, int], calls: int) -> int:
    """Operations of one finished image: both halves of every call, its prompt, its decoding; the decoders of labels are
    left out.
    """
    return calls * HALVES * stages["call"] + stages["text"] + stages["image"]
