"""Stable Diffusion XL, with Turbo, Lightning and LCM: a U-Net of three levels whose transformers have several blocks,
and two CLIP text encoders.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import Defaults
from datasetdm_fast.engine.backbones import DAMAGED, Backbone, Configs, Latents, Part, Read
from datasetdm_fast.engine.backbones.fitting import check_channels, check_settings
from datasetdm_fast.engine.backbones.sd import ACTIVATION, CLIP_TOKENIZER, FORMS, heads_per_block
from datasetdm_fast.engine.backbones.sd import FULL_SIZE as SD_FULL_SIZE
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import Level
from datasetdm_fast.untrusted.documents import quote

if TYPE_CHECKING:
    from torch import Tensor

TIME_IDS = ("height", "width", "top", "left", "target height", "target width")  # that the U-Net reads beside a text
# What is supported otherwise than in the U-Net of Stable Diffusion 1.x, or asked for below.
OTHERWISE = ("in_channels", "transformer_layers_per_block", "time_cond_proj_dim")
UNET: dict[str, tuple[Any, ...]] = {  # settings -> what is supported, first what a missing one means
    **{name: values for name, values in FORMS["unet"].items() if name not in OTHERWISE},
    "down_block_types": (["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],),
    "up_block_types": (["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],),
    "addition_embed_type": ("text_time",),
}
SDXL_DEFAULTS = Defaults(1024, 50, 5.0)
FULL_SIZE: Read = {  # of the base model
    "text_encoder": {**SD_FULL_SIZE["text_encoder"], "bos_token_id": 0, "eos_token_id": 2},
    "text_encoder_2": {
        **SD_FULL_SIZE["text_encoder"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "projection_dim": 1280,
    },
    "unet": {
        **SD_FULL_SIZE["unet"],
        "sample_size": 128,
        "down_block_types": tuple(UNET["down_block_types"][0]),
        "up_block_types": tuple(UNET["up_block_types"][0]),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "time_cond_proj_dim": None,
    },
    "vae": {**SD_FULL_SIZE["vae"], "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    },
}


def _latents(configs: Configs) -> Latents:
    vae = configs["vae"]
    pixels, is_wide = 2 ** (len(vae.block_out_channels) - 1), getattr(vae, "force_upcast", True)
    if getattr(vae, "latents_mean", None) is None or getattr(vae, "latents_std", None) is None:
        return Latents(vae.latent_channels, pixels, vae.scaling_factor, leaves_fp16=is_wide)
    std = tuple(value / vae.scaling_factor for value in vae.latents_std)
    return Latents(vae.latent_channels, pixels, mean=tuple(vae.latents_mean), std=std, leaves_fp16=is_wide)


def _text(configs: Configs) -> tuple[int, int]:
    return configs["text_encoder_2"].max_position_embeddings, configs["unet"].cross_attention_dim


def _levels(configs: Configs, size: int, halves: int) -> tuple[Level, ...]:
    """The middle block as low; down and up blocks of one size as mid, high and highest, which has no attention to
    text. A transformer has one map, the mean over its blocks.
    """
    unet = configs["unet"]
    width, count, heads = unet.block_out_channels, unet.layers_per_block, heads_per_block(unet)
    tokens, side = _text(configs)[0], size // 8
    maps, last = 2 * count + 1, (width[2],) * (count + 1)
    return (
        Level("low", side // 4, (width[2],), (heads[2],), tokens, halves),
        Level("mid", side // 4, (width[1], *(width[2],) * count, *last), (heads[2],) * maps, tokens, halves),
        Level(
            "high",
            side // 2,
            (width[0], *(width[1],) * count, width[2], *(width[1],) * (count + 1)),
            (heads[1],) * maps,
            tokens,
            halves,
        ),
        Level(
            "highest", side, (width[0], *(width[0],) * count, width[1], *(width[0],) * (count + 1)), (), tokens, halves
        ),
    )


def _defaults(configs: Configs) -> Defaults:
    """Turbo, Lightning and LCM come with a schedule of few steps, by which they are told from the base model."""
    schedule, size = configs["scheduler"], configs["unet"].sample_size * 8
    is_few = schedule.get("_class_name") == "LCMScheduler" or schedule.get("timestep_spacing") == "trailing"
    return Defaults(size, 4, 1.0) if is_few else replace(SDXL_DEFAULTS, size=size)


def _licence(configs: Configs) -> str:
    """Turbo was made for images half as wide as those of the base model and what was distilled from it elsewhere."""
    return "openrail++" if configs["unet"].sample_size > 64 else "sai-nc-community"


def _check(configs: Read, source: str) -> Read:
    check_settings(configs, source, "unet", UNET)
    check_settings(configs, source, "vae", {"act_fn": ACTIVATION})
    check_channels(source, configs["unet"].get("in_channels", 4), configs["vae"])
    depths = configs["unet"].get("transformer_layers_per_block", 1)
    if 0 in ([depths] if isinstance(depths, int) else depths[1:]):
        raise Refused(
            f"model: {source}: the unet's transformer_layers_per_block is {quote(depths)}, expected 1 or more of each "
            "block that has attention",
            DAMAGED,
        )
    if type(width := configs["unet"].get("addition_time_embed_dim")) is not int:
        raise Refused(
            f"model: {source}: the unet's addition_time_embed_dim is {quote(width)}, expected a whole number", DAMAGED
        )
    return configs


def _text_widths(configs: Configs) -> dict[str, tuple[int, int]]:
    unet, first, second = configs["unet"], configs["text_encoder"], configs["text_encoder_2"]
    added = unet.projection_class_embeddings_input_dim - len(TIME_IDS) * unet.addition_time_embed_dim
    return {
        "text": (unet.cross_attention_dim, first.hidden_size + second.hidden_size),
        "pooled text": (added, second.projection_dim),
    }


def _name_adapter(state: dict[str, "Tensor"], configs: Configs) -> dict[str, "Tensor"]:
    """Kohya's scripts train the U-Net of the original code, whose layers diffusers knows the names of."""
    from diffusers.loaders import lora_conversion_utils as names

    if not any(block in key for key in state for block in ("input_blocks", "middle_block", "output_blocks")):
        return state
    named = {}
    for key, value in names._maybe_map_sgm_blocks_to_diffusers(dict(state), configs["unet"]).items():
        layer, _, ending = key.partition(".")
        if key.startswith("lora_unet_"):
            down = names._convert_unet_lora_key(f"{layer}.lora_down.weight")
            layer = "unet." + re.sub(r"[._]lora\.down\.weight$", "", down)
        named[f"{layer}.{ending}"] = value
    return named


SDXL = Backbone(
    name="sdxl",
    title="Stable Diffusion XL",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "text_encoder": Part("text_encoder", ("transformers:CLIPTextModel",)),
        "text_encoder_2": Part("text_encoder", ("transformers:CLIPTextModelWithProjection",)),
        "unet": Part("denoiser", ("diffusers:UNet2DConditionModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    denoiser="unet",
    # models distilled to read their guidance have an embedding of it
    guidance=lambda configs: "cfg" if configs["unet"].time_cond_proj_dim is None else "embedded",
    latents=_latents,
    text=_text,
    multiple=32,
    flow=None,
    levels=_levels,
    defaults=_defaults,
    reference="datasetdm_fast.engine.backbones.sdxl_reference:SDXLReference",
    fast="datasetdm_fast.engine.engines.fast:FastEngine",
    text_network="datasetdm_fast.engine.models.text_encoder:PairedPromptEncoder",
    name_adapter=_name_adapter,
    file_signs=("conditioner.embedders.1.",),
    file_parts={
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
    },
    file_tokenizers={"tokenizer": False, "tokenizer_2": True},
    has_averages=True,
    has_deep_features=True,
    check=_check,
    text_widths=_text_widths,
    licence=_licence,
    full_size=FULL_SIZE,
    seed=10,
)
