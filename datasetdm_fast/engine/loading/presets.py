"""Models that need no download: the demo models, and seeded random weights in two sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.config import DEMO_DEFAULTS, DEMO_DIT_DEFAULTS, SD_DEFAULTS, Defaults
from datasetdm_fast.engine.backbones.record import Backbone, Part
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.backbones.sdxl import SDXL, SDXL_DEFAULTS
from datasetdm_fast.engine.loading import shapes
from datasetdm_fast.engine.loading.folder import class_of, load_folder
from datasetdm_fast.engine.loading.model import Model, check_model
from datasetdm_fast.engine.loading.network import ConfigFile, Network, as_filled
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer
from datasetdm_fast.errors import Missing

DEMO = Path(__file__).parents[2] / "demo" / "model"
DEMO_DIT = DEMO.with_name("model-dit")
SEEDED_LICENCE = "none: seeded random weights, nothing was trained"
SHAPES = {"text_encoder": shapes.of_text_encoder, "denoiser": shapes.of_unet, "vae": shapes.of_vae}  # by kind of part


class Seeded:
    """Draws seeded weights of unit gain, norms near one and small biases, so activations stay of order one."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, name: str, value: Tensor) -> Tensor:
        value.normal_(generator=self.generator)
        if value.dim() >= 2:
            return value.div_(math.sqrt(value[0].numel()))
        return value.mul_(0.02).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def seed_network(part: str, settings: Mapping[str, Any], seed: int, backbone: Backbone = SD) -> Network:
    """A network of the family's full size but for these settings, with seeded weights; the library of its module takes
    seconds and 0.2 GiB to be imported, and is not asked before the module is.
    """
    config, kind = ConfigFile({**backbone.full_size[part], **settings}), backbone.parts[part].kind
    shapes = SHAPES[kind](config)

    def build_filled() -> nn.Module:
        module, draw = build_empty(lambda: build_module(backbone.parts[part], config)), Seeded(seed)
        state = module.state_dict()
        for name in sorted(state):
            draw(name, state[name])
        return module

    return Network(config, build_filled, lambda stored: as_filled(shapes, Seeded(seed), stored))


def build_module(part: Part, config: Mapping[str, Any]) -> nn.Module:
    """A module of this config whose weights are whatever its library begins with."""
    kind = class_of(part)
    built: nn.Module = kind(kind.config_class(**config)) if part.kind == "text_encoder" else kind(**config)
    return built


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """A module with memory for its weights, not yet filled, and the buffers it begins with."""
    with torch.device("meta"):
        module = build()
    if list(module.buffers()):  # to_empty would lose what they hold
        with torch.random.fork_rng(devices=[]):
            return build()
    return module.to_empty(device="cpu")


def load_demo(size: int) -> Model:
    return load_folder(check_shipped(DEMO), size=size, name="demo", defaults=DEMO_DEFAULTS, is_own=True)


def load_demo_dit(size: int) -> Model:
    """Stable Diffusion 3 in form, without T5."""
    return load_folder(check_shipped(DEMO_DIT), size=size, name="demo-dit", defaults=DEMO_DIT_DEFAULTS, is_own=True)


def load_tiny(size: int) -> Model:
    """SD 1.x in form, small enough for tests: 28 features and 16 maps, 128 x 128 pixels, seeded random weights."""
    tokenizer = _tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_norm_eps": 2e-5,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }
    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 2,  # diffusers' name for the number of heads
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "norm_eps": 2e-5,
    }
    vae = {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 128,
        "scaling_factor": 0.37,
    }
    parts: dict[str, dict[str, Any]] = {"text_encoder": text, "unet": unet, "vae": vae}
    return preset("tiny", parts, replace(SD_DEFAULTS, size=128, steps=4), size, seed=1)


def load_random_sd14(size: int) -> Model:
    """Stable Diffusion 1.4 at full size with seeded random weights: about 4.3 GB in fp32."""
    return preset("random-sd14", {part: {} for part in SD.networks}, SD_DEFAULTS, size, seed=14)


def load_random_sdxl(size: int) -> Model:
    """Stable Diffusion XL at full size with seeded random weights: about 14 GB in fp32."""
    return preset("random-sdxl", {part: {} for part in SDXL.networks}, SDXL_DEFAULTS, size, seed=10, backbone=SDXL)


def preset(
    name: str,
    parts: Mapping[str, Mapping[str, Any]],
    defaults: Defaults,
    size: int,
    seed: int,
    backbone: Backbone = SD,
) -> Model:
    """A model whose networks have these settings and seeded weights.

    The tokenizer is the demo world's, as CLIP's is not shipped; its ids lie within CLIP's 49408.
    """
    networks = {part: seed_network(part, parts[part], seed + k, backbone) for k, part in enumerate(parts)}
    digests = {part: f"seeded: {name}, seed {seed + k}" for k, part in enumerate(networks)}
    numbers = backbone.full_size["scheduler"], defaults, size or defaults.size
    tokenizers = {part: _tokenizer() for part in backbone.of_kind("tokenizer")}
    model = Model(name, f"preset {name}", backbone, tokenizers, networks, *numbers, digests, SEEDED_LICENCE)
    return check_model(model, is_seeded=True)


def _tokenizer() -> OwnTokenizer:
    """The demo world's byte-pair tokenizer: any text works, words it does not know become pieces of bytes."""
    return OwnTokenizer(check_shipped(DEMO) / "tokenizer")


def check_shipped(folder: Path) -> Path:
    """The folder of a demo model, which must be there."""
    if not folder.is_dir():
        raise Missing(
            f"model: the demo model is not there, {folder} does not exist",
            "Install the package again, or name another model with --model.",
        )
    return folder
