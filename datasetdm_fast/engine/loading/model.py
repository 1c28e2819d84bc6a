"""A loaded diffusion model: its networks, tokenizer, sampler settings and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from datasetdm_fast.config import Defaults
from datasetdm_fast.engine.loading.checks import check_size
from datasetdm_fast.engine.loading.network import Network
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer, load_tokenizer
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import Level, levels
from datasetdm_fast.untrusted.tensors import check_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

TOGETHER = "Take every part from the same model."
NETWORKS = ("text_encoder", "unet", "vae")
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
    tokenizer: CLIPTokenizer | OwnTokenizer
    networks: Mapping[str, Network]  # of NETWORKS
    scheduler: dict[str, Any]
    defaults: Defaults
    size: int  # pixels of a side
    digests: dict[str, str]  # part -> SHA-256 of its files, or the recipe of seeded weights
    licence: str

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.networks["text_encoder"].module

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.networks["unet"].module

    @property
    def vae(self) -> AutoencoderKL:
        return self.networks["vae"].module

    @cached_property
    def clip_tokenizer(self) -> CLIPTokenizer:
        """The tokenizer as transformers has it."""
        is_builtin = isinstance(self.tokenizer, OwnTokenizer)
        return load_tokenizer(self.tokenizer.folder) if is_builtin else self.tokenizer

    def with_modules(self, **modules: nn.Module) -> Model:
        """A copy of this model in which these networks replace those of the same name."""
        return replace(
            self, networks={**self.networks, **{name: Network.of(module) for name, module in modules.items()}}
        )

    @contextmanager
    def built_for_now(self) -> Iterator[None]:
        """Unloads at the end of the block the networks that are built within it."""
        unbuilt = [network for network in self.networks.values() if not network.is_built]
        try:
            yield
        finally:
            for network in unbuilt:
                network.unload()

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return min(self.tokenizer.model_max_length, self.networks["text_encoder"].config.max_position_embeddings)

    @property
    def text_width(self) -> int:
        """Numbers of a token, as the text encoder gives it."""
        return self.networks["text_encoder"].config.hidden_size

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of its captures, low to highest."""
        length = self.networks["text_encoder"].config.max_position_embeddings
        return levels(self.networks["unet"].config, length, self.size)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end."""
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).input_ids


def check_model(model: Model, *, is_seeded: bool = False) -> Model:
    """The model once the last checks of every source are passed: its parts fit, their numbers are finite, as those of
    seeded ones always are.
    """
    check_size(model.size)
    text, unet = model.networks["text_encoder"].config, model.networks["unet"].config
    width, hidden = unet.cross_attention_dim, text.hidden_size
    if width != hidden:
        raise Refused(
            f"model: {model.name}: the UNet reads text of width {width}, the text encoder gives {hidden}, so they "
            "belong to different models",
            TOGETHER,
        )
    if len(model.tokenizer) > (known := text.vocab_size):
        raise Refused(
            f"model: {model.name}: the tokenizer has {len(model.tokenizer)} entries, the text encoder knows {known}",
            TOGETHER,
        )
    for name in NETWORKS if not is_seeded else ():
        check_finite(model.networks[name].read().state_dict(), f"model: {model.name}: {name}.")
    return model
