"""What the records of flow models have in common: their levels and latents, and how adapters name their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import AttentionDefaults, Defaults
from datasetdm_fast.engine.backbones import Backbone, Configs, Latents, NameAdapter
from datasetdm_fast.engine.backbones.sdxl import FULL_SIZE as SDXL_FULL_SIZE
from datasetdm_fast.stages import Level

if TYPE_CHECKING:
    from torch import Tensor

EIGHTHS = {"low": (3, 4), "mid": (2,), "high": (6,)}  # of its depth: the blocks whose input a level is
JOINT_ENGINE = "datasetdm_fast.engine.engines.fast.joint:JointEngine"
CAPTURE = 500  # the timestep whose call tells most of what is where
# Configs of parts that several families have.
CLIP = SDXL_FULL_SIZE["text_encoder"]
OPEN_CLIP = SDXL_FULL_SIZE["text_encoder_2"]
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
VAE = {
    **SDXL_FULL_SIZE["vae"],
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def blocks_read(depth: int) -> tuple[tuple[int, ...], ...]:
    """Per level low, mid and high, the blocks of so many that it reads."""
    return tuple(tuple(sorted({depth * eighth // 8 for eighth in level})) for level in EIGHTHS.values())


def count_blocks(configs: Configs) -> int:
    """Those of a transformer whose first blocks have two streams, and its last ones a single one."""
    network = configs["transformer"]
    return int(network.num_layers + network.num_single_layers)


def spread_blocks(blocks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Some blocks per level low, mid and high, as blocks_read has them: mid reads the first, high the last, and low
    those between, of two both.
    """
    first, last = min(blocks), max(blocks)
    between = {*blocks} - {first, last} or {first, last}
    return tuple(sorted(between)), (first,), (last,)


def joint_levels(
    depth: int, width: int, heads: int, tokens: int, size: int, channels: int, stride: int = 16
) -> tuple[Level, ...]:
    """The levels of a transformer whose image and text tokens attend to one another: the input of some blocks of the
    conditional half, with their attention to text, at `stride` pixels a token; and as highest the image that the call
    points to, of so many channels at 8 pixels a cell.
    """
    coarse = [
        Level(name, size // stride, (width,) * len(blocks), (heads,) * len(blocks), tokens, 1, blocks)
        for name, blocks in zip(EIGHTHS, blocks_read(depth))
    ]
    return (*coarse, Level("highest", size // 8, (channels,), (), tokens, 1))


def scaled_latents(vae: Any) -> Latents:
    """The space of an autoencoder that has a scale and a shift."""
    pixels = 2 ** (len(vae.block_out_channels) - 1)
    return Latents(vae.latent_channels, pixels, vae.scaling_factor, vae.shift_factor or 0.0)


def joint_backbone(
    *,
    text: Callable[[Configs], tuple[int, int]],
    blocks: Callable[[Configs], int],
    stride: Callable[[Configs], int] = lambda configs: 16,
    **others: Any,
) -> Backbone:
    """The record of a family whose image and text tokens attend to one another, at `stride` pixels a token of an image,
    with the fields that are alike in most.
    """

    def levels(configs: Configs, size: int, halves: int) -> tuple[Level, ...]:
        network, vae = configs["transformer"], configs["vae"]
        heads = network.n_heads if hasattr(network, "n_heads") else network.num_attention_heads
        width = network.dim if hasattr(network, "dim") else heads * network.attention_head_dim
        channels = vae.z_dim if hasattr(vae, "z_dim") else vae.latent_channels
        return joint_levels(blocks(configs), width, heads, text(configs)[0], size, channels, stride(configs))

    usual: dict[str, Any] = {
        "denoiser": "transformer",
        "latents": lambda configs: scaled_latents(configs["vae"]),
        "multiple": 16,
        "has_text_maps": True,
        "fast": JOINT_ENGINE,
        "halves": ("bf16",),
        "file_parts": {"transformer": "model.diffusion_model."},
    }
    return Backbone(text=text, blocks=blocks, levels=levels, **usual | others)


def names_of(pipeline: str) -> NameAdapter:
    """Names the layers of adapters as this pipeline of diffusers does when it loads them."""

    def name_adapter(state: dict[str, Tensor], configs: Configs) -> dict[str, Tensor]:
        import diffusers

        named: Any = getattr(diffusers, pipeline).lora_state_dict(dict(state), return_alphas=True)
        return {**named[0], **(named[1] or {})} if isinstance(named, tuple) else dict(named)

    return name_adapter


def chat(**options: Any) -> Callable[[Any, str], str]:
    """(tokenizer, prompt) -> the prompt as a message to a language model."""
    options |= {"tokenize": False, "add_generation_prompt": True}
    return lambda tokenizer, prompt: tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)


def seg4diff(*blocks: int, depth: int, timestep: int = 500) -> AttentionDefaults:
    """The numbers with which labels are read from some blocks of a joint attention at one call, and those of concepts
    from the second half of its `depth` blocks of two streams.
    """
    concepts = tuple(range(depth // 2, depth))
    return AttentionDefaults(0, 0.5, 0.4, 1, 1, False, blocks=blocks, timestep=timestep, concept_blocks=concepts)


def seg4diff_of_flux(depth: int) -> AttentionDefaults:
    """Those of blocks 12 and 17 of the 19 of two streams of FLUX.1, as deep among so many."""
    return seg4diff(*sorted({depth * block // 19 for block in (12, 17)}), depth=depth)


# More steps give the same pictures; up to timestep 300 its features tell of kinds and depth alike, and less after it.
DEMO_DIT_DEFAULTS = Defaults(
    size=128, steps=16, guidance=2.5, capture=200, attention=seg4diff(1, depth=6, timestep=300)
)
