"""Models that need no download: the demo model, and seeded random weights in two sizes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasetdm_fast.config import DEMO_DEFAULTS, SD_DEFAULTS, Defaults
from datasetdm_fast.errors import Missing
from datasetdm_fast.loading.checks import DOWN_BLOCKS, UP_BLOCKS
from datasetdm_fast.loading.folder import load_folder
from datasetdm_fast.loading.model import SD_SCHEDULER, Model, checked
from datasetdm_fast.loading.network import Network, as_filled

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

DEMO = Path(__file__).parents[1] / "demo" / "model"
SEEDED_LICENCE = "none: seeded random weights, nothing was trained"


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


def seeded(build: Callable[[], nn.Module], seed: int) -> Network:
    """A network of seeded weights, built without its own initialisation, which costs seconds and draws from the global
    generator.
    """
    with torch.device("meta"):
        empty = build()
    shapes = {name: value.shape for name, value in empty.state_dict().items()}

    def filled() -> nn.Module:
        module, draw = build_empty(build), Seeded(seed)
        state = module.state_dict()
        for name in sorted(state):
            draw(name, state[name])
        return module

    return Network(empty.config, filled, lambda stored: as_filled(shapes, Seeded(seed), stored))


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """A module with memory for its weights, not yet filled, and the buffers it begins with."""
    with torch.device("meta"):
        module = build()
    if list(module.buffers()):  # to_empty would lose what they hold
        with torch.random.fork_rng(devices=[]):
            return build()
    return module.to_empty(device="cpu")


def _small_tokenizer() -> CLIPTokenizer:
    """The demo world's byte-pair tokenizer: any text works, words it does not know become pieces of bytes."""
    from datasetdm_fast.scenes.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def load_demo(size: int) -> Model:
    if not DEMO.is_dir():
        raise Missing(
            f"model: the demo model is not there, {DEMO} does not exist",
            f"train it: python -m datasetdm_fast.demo.train --out {DEMO}; or name another with --model",
        )
    return load_folder(DEMO, size=size, name="demo", defaults=DEMO_DEFAULTS, is_own=True)


def load_tiny(size: int) -> Model:
    """SD 1.x in form, small enough for tests: 28 features and 16 maps, 128 x 128 pixels, seeded random weights."""
    from transformers import CLIPTextConfig

    tokenizer = _small_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 2,  # diffusers' name for the number of heads
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 128,
    }
    return _preset("tiny", tokenizer, text, unet, vae, Defaults(128, 4, SD_DEFAULTS.guidance), size, seed=1)


def load_random_sd14(size: int) -> Model:
    """Stable Diffusion 1.4 at full size with seeded random weights: about 4.3 GB in fp32.

    The tokenizer is the demo world's, as CLIP's is not shipped; its ids lie within CLIP's 49408.
    """
    from transformers import CLIPTextConfig

    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    unet = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
    return _preset("random-sd14", _small_tokenizer(), text, unet, vae, SD_DEFAULTS, size, seed=14)


def _preset(
    name: str, tokenizer, text: CLIPTextConfig, unet: dict, vae: dict, defaults: Defaults, size: int, seed: int
) -> Model:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    blocks = {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS, "layers_per_block": 2}
    networks = {
        "text_encoder": seeded(lambda: CLIPTextModel(text), seed),
        "unet": seeded(lambda: UNet2DConditionModel(**blocks, **unet), seed + 1),
        "vae": seeded(lambda: AutoencoderKL(**vae), seed + 2),
    }
    digests = {part: f"seeded: {name}, seed {seed + k}" for k, part in enumerate(networks)}
    numbers = SD_SCHEDULER, defaults, size or defaults.size
    model = Model(name, f"preset {name}", tokenizer, networks, *numbers, digests, SEEDED_LICENCE)
    return checked(model, is_seeded=True)
