"""A loaded diffusion model: its networks, tokenizer, sampler settings and where they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from datasetdm_fast.config import Defaults
from datasetdm_fast.errors import Refused
from datasetdm_fast.loading.checks import check_finite, check_size
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

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of its captures, low to highest."""
        return levels(self.unet.config, self.text_encoder.config.max_position_embeddings, self.size)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids


def checked(model: Model) -> Model:
    """The model once the last checks of every source are passed: its parts fit, their numbers are finite."""
    check_size(model.size)
    width, hidden = model.unet.config.cross_attention_dim, model.text_encoder.config.hidden_size
    if width != hidden:
        raise Refused(
            f"model: {model.name}: the UNet reads text of width {width}, the text encoder gives {hidden}, so they "
            "belong to different models"
        )
    if len(model.tokenizer) > (known := model.text_encoder.config.vocab_size):
        raise Refused(
            f"model: {model.name}: the tokenizer has {len(model.tokenizer)} entries, the text encoder knows {known}"
        )
    for part in ("text_encoder", "unet", "vae"):
        module = getattr(model, part).eval().requires_grad_(False)
        check_finite(f"{model.name}: {part}", module.state_dict())
    return model
