"""A loaded diffusion model: its networks, tokenizer, sampler settings and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from datasetdm_fast.config import Defaults
from datasetdm_fast.errors import Refused
from datasetdm_fast.loading.checks import _check_finite, _check_size
from datasetdm_fast.stages import Level, levels

SD_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, eq=False)
class Model:
    """A text-to-image model in fp32, in eval mode, without gradients, with what is to be written down about it."""

    name: str
    source: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: dict
    defaults: Defaults
    size: int  # pixels of a side
    digests: dict[str, str]  # part -> SHA-256 of its files, or the recipe of seeded weights
    licence: str
    levels: tuple[Level, ...]

    def token_ids(self, prompts: Sequence[str]) -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids


def _model(name, source, tokenizer, text_encoder, unet, vae, scheduler, defaults, size, digests, licence) -> Model:
    """The last checks of every source: the parts fit, their numbers are finite, the size is possible."""
    size = size or defaults.size
    _check_size(size)
    width, hidden = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if width != hidden:
        raise Refused(
            f"model: {name}: the UNet reads text of width {width}, the text encoder gives {hidden}, so they belong "
            "to different models"
        )
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise Refused(
            f"model: {name}: the tokenizer has {len(tokenizer)} entries, the text encoder knows "
            f"{text_encoder.config.vocab_size}"
        )
    for part, module in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        module.eval().requires_grad_(False)
        _check_finite(f"{name}: {part}", module.state_dict())
    scheduler = {key: value for key, value in scheduler.items() if key != "_diffusers_version"}
    tokens = text_encoder.config.max_position_embeddings
    return Model(
        name,
        source,
        tokenizer,
        text_encoder,
        unet,
        vae,
        scheduler,
        defaults,
        size,
        digests,
        licence,
        levels(unet.config, tokens, size),
    )
