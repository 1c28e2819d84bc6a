"""Models of seeded random weights: a tiny one, and one of each family's full size."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.config import SD_DEFAULTS, Defaults
from datasetdm_fast.engine.backbones import RANDOM_MODELS, Backbone, Configs, Part
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.loading import shapes
from datasetdm_fast.engine.loading.folder import DEMO, check_shipped, class_of
from datasetdm_fast.engine.loading.model import ConfigFile, Model, Network, as_filled, check_model
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.plugins import load_place

SEEDED_LICENCE = "none: seeded random weights, nothing was trained"
SHAPES = {  # class of a part -> names and shapes of its tensors, known without its library
    "CLIPTextModel": shapes.of_text_encoder,
    "CLIPTextModelWithProjection": shapes.of_text_encoder,
    "UNet2DConditionModel": shapes.of_unet,
    "AutoencoderKL": shapes.of_vae,
}
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a message as language models read it here


class Seeded:
    """Draws seeded weights of unit gain, norms near one and small biases, so activations stay of order one."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():  # how many batches were seen
            return value.zero_()
        value.normal_(generator=self.generator)
        if value.dim() >= 2:
            return value.div_(math.sqrt(value[0].numel()))
        is_near_one = "norm" in name and name.endswith("weight") or name.endswith("running_var")
        return value.mul_(0.02).add_(1.0 if is_near_one else 0.0)


def seed_network(part: str, settings: Mapping[str, Any], seed: int, backbone: Backbone = SD) -> Network:
    """A network of the family's full size but for these settings, with seeded weights; the library of its module takes
    seconds and 0.2 GiB to be imported, and is not asked before the module is.
    """
    config, record = ConfigFile({**backbone.full_size[part], **settings}), backbone.parts[part]

    def build_filled() -> nn.Module:
        draw = Seeded(seed)
        with Uninitialised():
            module = build_module(record, config)
        state = module.state_dict()
        for name in sorted(state):
            draw(name, state[name])
        return module

    return Network(
        config,
        build_filled,
        lambda stored: as_filled(shapes_of(record, config), Seeded(seed), stored),
        lambda: sum(map(math.prod, shapes_of(record, config).values())),
    )


def shapes_of(part: Part, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a part."""
    if known := SHAPES.get(part.classes[0].partition(":")[2]):
        return known(config)
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_module(part, config).state_dict().items()}


def build_module(part: Part, config: Mapping[str, Any]) -> nn.Module:
    """A module of this config whose weights are whatever its library begins with."""
    kind = class_of(part)
    return kind(kind.config_class(**config)) if part.kind == "text_encoder" else kind(**config)


def load_tiny(size: int) -> Model:
    """SD 1.x in form, small enough for tests: 28 features and 16 maps, 128 x 128 pixels, seeded random weights."""
    tokenizer = OwnTokenizer(check_shipped(DEMO) / "tokenizer")
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


def load_random(name: str, size: int, backbone: Backbone | None = None) -> Model:
    """The family's model of full size with seeded random weights, which are drawn when a network is first needed; of
    one of RANDOM_MODELS, or another record.
    """
    backbone = backbone or load_place(RANDOM_MODELS[name])
    parts: dict[str, dict[str, Any]] = {part: {} for part in backbone.networks if part in backbone.full_size}
    defaults = backbone.defaults({part: ConfigFile(config) for part, config in backbone.full_size.items()})
    return preset(name, parts, defaults, size, backbone.seed, backbone)


def preset(
    name: str, parts: Mapping[str, Mapping[str, Any]], defaults: Defaults, size: int, seed: int, backbone: Backbone = SD
) -> Model:
    """A model whose networks have these settings and seeded weights.

    The tokenizer is the demo world's, as CLIP's is not shipped; its ids lie within CLIP's 49408.
    """
    networks = {part: seed_network(part, parts[part], seed + k, backbone) for k, part in enumerate(parts)}
    digests = {part: f"seeded: {name}, seed {seed + k}" for k, part in enumerate(networks)}
    numbers = backbone.full_size["scheduler"], defaults, size or defaults.size
    index = backbone.full_size.get("model_index", {})
    configs = {part: network.config for part, network in networks.items()} | {"model_index": index}
    tokenizers = {part: _tokenizer(backbone, part, configs) for part in backbone.of_kind("tokenizer")}
    proof = digests, SEEDED_LICENCE, index
    return check_model(Model(name, f"preset {name}", backbone, tokenizers, networks, *numbers, *proof), is_seeded=True)


def _tokenizer(backbone: Backbone, part: str, configs: Configs) -> OwnTokenizer:
    """The demo world's byte-pair tokenizer: any text works, words it does not know become pieces of bytes."""
    folder, settings = check_shipped(DEMO) / "tokenizer", backbone.full_size.get(part, {})
    if "CLIP" in backbone.parts[part].classes[0]:
        return OwnTokenizer(folder)
    return OwnTokenizer(folder, settings.get("model_max_length") or backbone.text(configs)[0], CHAT)
