"""A loaded diffusion model: its networks, tokenizers, sampler settings and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datasetdm_fast.config import Defaults
from datasetdm_fast.engine.backbones.record import Backbone, Configs, Guidance, Latents
from datasetdm_fast.engine.loading.checks import check_size
from datasetdm_fast.engine.loading.network import Network
from datasetdm_fast.engine.loading.provenance import drawable_things
from datasetdm_fast.engine.loading.tokenizer import LimitedTokenizer, OwnTokenizer
from datasetdm_fast.stages import Level
from datasetdm_fast.untrusted.tensors import check_finite


class Modules(Mapping[str, nn.Module]):
    """The modules of networks; each is built when it is first read."""

    def __init__(self, networks: Mapping[str, Network]):
        self._networks = networks

    def __getitem__(self, part: str) -> nn.Module:
        return self._networks[part].module

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)


@dataclass(frozen=True, eq=False)
class Model:
    """A text-to-image model in fp32, in eval mode, without gradients, with what is to be written down about it."""

    name: str
    source: str
    backbone: Backbone
    loaded_tokenizers: Mapping[str, Any]  # by part
    networks: Mapping[str, Network]  # by part
    scheduler: dict[str, Any]
    defaults: Defaults
    size: int  # pixels of a side
    digests: dict[str, str]  # part -> SHA-256 of its files, or the recipe of seeded weights
    licence: str
    index: Mapping[str, Any] = field(default_factory=dict)  # of its model_index.json
    scale: float = 0.0  # the guidance that it is sampled with; 0: its default

    @cached_property
    def draws(self) -> tuple[str, ...]:
        """The things that it can draw, if its card lists them."""
        return drawable_things(Path(self.source)) if self.source else ()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By part, the modules of diffusers and transformers."""
        return Modules(self.networks)

    @property
    def denoiser(self) -> Network:
        """What is called at each step."""
        return self.networks[self.backbone.denoiser]

    @cached_property
    def tokenizer(self) -> Any:
        """The one by whose tokens the length of a prompt is told."""
        present = self.loaded_tokenizers
        tokenizer = present.get(self.backbone.tokenizer) or next(iter(present.values()))
        most = self.backbone.text(self.configs)[0]
        return tokenizer if tokenizer.model_max_length <= most else LimitedTokenizer(tokenizer, most)

    @cached_property
    def tokenizers(self) -> Mapping[str, Any]:
        """By part, as transformers have them."""
        return {
            part: tokenizer.load() if isinstance(tokenizer, OwnTokenizer) else tokenizer
            for part, tokenizer in self.loaded_tokenizers.items()
        }

    @cached_property
    def configs(self) -> Configs:
        parts = {part: network.config for part, network in self.networks.items()}
        return {**parts, "scheduler": self.scheduler, "model_index": self.index}

    @cached_property
    def latents(self) -> Latents:
        return self.backbone.latents(self.configs)

    @cached_property
    def guidance(self) -> Guidance:
        kind, scale = self.backbone.guidance(self.configs), self.scale or self.defaults.guidance
        return "none" if kind == "cfg" and self.backbone.is_guided_above_one and scale <= 1 else kind

    @property
    def halves(self) -> int:
        """Rows of a call for each image at the model's own guidance: two with classifier-free guidance."""
        return 2 if self.guidance_at(self.defaults.guidance) == "cfg" else 1

    def guidance_at(self, guidance: float) -> Guidance:
        """How calls are guided by so much."""
        return "none" if self.guidance == "cfg" and guidance <= self.backbone.unguided else self.guidance

    def has_negative(self, guidance: float) -> bool:
        """Whether a call at this guidance has rows of negative prompts, for its output or for what decoders read."""
        return self.guidance_at(guidance) == "cfg" or self.levels[-1].halves == 2

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in a transformer."""
        return int((self.latent_shape()[1] // self.backbone.patch) ** 2)

    @property
    def flow(self) -> dict[str, Any]:
        """What makes its schedule one of a flow, as make_schedule takes it."""
        return {} if self.backbone.flow is None else {"flow": self.backbone.flow, "tokens": self.image_tokens}

    def latent_shape(self, size: int = 0) -> tuple[int, int, int]:  # C, h, w
        """Of the latents of a square image, by default of the model's size."""
        side = (size or self.size) // self.latents.pixels
        return self.latents.channels, side, side

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
        return int(self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        """Numbers of a token, as the denoiser reads it."""
        return self.backbone.text(self.configs)[1]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of its captures, low to highest."""
        return self.backbone.levels(self.configs, self.size, self.halves)

    def token_ids(self, prompts: Sequence[str], part: str = "") -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end; of the tokenizer `part`, or
        of the one by which the length of a prompt is told.
        """
        ids: Tensor = (self.loaded_tokenizers[part] if part else self.tokenizer)(
            list(prompts), padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


def check_model(model: Model, *, is_seeded: bool = False) -> Model:
    """The model once the last checks of every source are passed: its parts fit, their numbers are finite, as those of
    seeded ones always are.
    """
    check_size(model.size, model.backbone.multiple, model.backbone.most_pixels(model.configs))
    model.backbone.check_fit(model)
    for name in model.networks if not is_seeded else ():
        check_finite(model.networks[name].read().state_dict(), f"model: {model.name}: {name}.")
    return model
