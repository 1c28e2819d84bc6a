"""Stable Diffusion 1.x and 2.x: a U-Net of four levels, one CLIP text encoder, classifier-free guidance."""

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import SD_DEFAULTS, Defaults
from datasetdm_fast.engine.backbones import ANOTHER, Backbone, Configs, Latents, Part, Read
from datasetdm_fast.engine.backbones.fitting import check_autoencoder, check_settings
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import Level
from datasetdm_fast.untrusted import documents

PIXELS = 8  # of a side of a latent cell
DOWN_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
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
FULL_SIZE: Read = {  # of Stable Diffusion 1.4
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    },
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": DOWN_BLOCKS,
        "up_block_types": UP_BLOCKS,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "cross_attention_dim": 768,
        "use_linear_projection": False,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    },
    "vae": {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
}
# diffusers' pipeline puts these right in the scheduler of old folders: the offset is 1, and samples are not clipped.
CORRECTED = {"steps_offset": 1, "clip_sample": False}
# So it does with a sample_size that such versions wrote too small.
OLD, LEAST_SIDE = re.compile(r"0\.[0-8]\b"), 64
LARGEST_SIDE = 512  # latent cells
# What is read of the text encoder's config: other settings change no network of this kind.
TEXT_SETTINGS = set(
    "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads hidden_act "
    "max_position_embeddings layer_norm_eps attention_dropout initializer_range initializer_factor pad_token_id "
    "bos_token_id eos_token_id architectures model_type".split()
)
USUAL_SCHEDULE = "the schedule of Stable Diffusion 1.x"  # in place of a digest where a folder holds none
CLIP_TOKENIZER = Part("tokenizer", ("transformers:CLIPTokenizer", "transformers:CLIPTokenizerFast"))
SUPPORTED = "supported are text-to-image models of Stable Diffusion 1.x and 2.x"
OTHER_KINDS = {9: "an inpainting model", 8: "an image-editing model"}  # by channels that the UNet reads
ACTIVATION = ("silu", "swish")  # two names of one function
# Settings by which a network is another one although its weights may have the same shapes -> the values that are
# supported, first the default.
FORMS: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "in_channels": (4,),
        "_class_name": ("UNet2DConditionModel",),
        "out_channels": (4,),
        "down_block_types": (list(DOWN_BLOCKS),),
        "up_block_types": (list(UP_BLOCKS),),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "transformer_layers_per_block": (1, [1] * 4),
        "act_fn": ACTIVATION,
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "attention_type": ("default",),
        "resnet_time_scale_shift": ("default",),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "class_embeddings_concat": (False,),
        **dict.fromkeys(
            "addition_embed_type class_embed_type encoder_hid_dim encoder_hid_dim_type num_class_embeds "
            "reverse_transformer_layers_per_block cross_attention_norm time_embedding_act_fn timestep_post_act "
            "time_cond_proj_dim".split(),
            (None,),
        ),
    },
    "vae": {"_class_name": ("AutoencoderKL",), "latent_channels": (4,), "act_fn": ACTIVATION},
}


def check_network(part: str, config: Mapping[str, Any], source: Path | str) -> None:
    """Refuses a UNet or autoencoder of another form than that of SD 1.x and 2.x, by the first setting that differs."""
    channels = config.get("in_channels")
    if part == "unet" and isinstance(channels, int) and channels in OTHER_KINDS:
        raise Refused(f"model: {source}: its unet reads {channels} channels, as {OTHER_KINDS[channels]} does", ANOTHER)
    check_settings({part: dict(config)}, str(source), part, FORMS[part])
    if not isinstance(config.get("layers_per_block", 2), int):
        raise Refused(f"model: {source}: the {part}'s layers_per_block is no number; {SUPPORTED}", ANOTHER)
    if part == "vae":
        check_autoencoder(config, source)


def check_configs(configs: Read, source: str) -> Read:
    """The configs as diffusers' pipeline takes them, refused where they are of another kind of model."""
    text, unet = configs["text_encoder"], configs["unet"]
    configs = configs | {"text_encoder": {name: value for name, value in text.items() if name in TEXT_SETTINGS}}
    for part in ("unet", "vae"):
        check_network(part, configs[part], source)
    side = unet.get("sample_size")
    if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
        raise Refused(
            f"model: {source}: the UNet's sample_size is {documents.quote(side)}, expected a number up to "
            f"{LARGEST_SIDE}; {SUPPORTED}",
            ANOTHER,
        )
    schedule = configs.get("scheduler") or _usual_schedule(source, unet)
    scheduler = {key: value for key, value in schedule.items() if key != "_diffusers_version"}
    return configs | {"scheduler": scheduler | CORRECTED}


def _usual_schedule(source: str, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of Stable Diffusion 1.x, for a folder that holds networks alone; those of 2.x have several."""
    if unet.get("use_linear_projection"):
        raise Refused(
            f"model: {source} has no scheduler, and models like Stable Diffusion 2.x were trained with several",
            "Add the folder scheduler of the same model.",
        )
    print(f"model: {source} has no scheduler, so {USUAL_SCHEDULE} is taken", file=sys.stderr)
    return dict(SD_SCHEDULER)


def heads_per_block(unet: Mapping[str, Any]) -> tuple[int, ...]:
    """Attention heads of the down blocks; diffusers calls this number attention_head_dim."""
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    return (heads,) * len(unet["block_out_channels"]) if isinstance(heads, int) else tuple(heads)


def levels(unet: Mapping[str, Any], tokens: int, size: int) -> tuple[Level, ...]:
    """The four levels a UNet of this diffusers config yields at size x size pixels, low to highest."""
    width, count, heads = unet["block_out_channels"], unet["layers_per_block"], heads_per_block(unet)
    side = size // PIXELS
    low = Level(
        "low",
        side // 8,
        (width[2],) + (width[3],) * count + (width[3],) + (width[3],) * (count + 1),
        (heads[3],),
        tokens,
    )
    rest = []
    for depth, name in ((2, "mid"), (1, "high"), (0, "highest")):
        entry = width[depth] if depth == 0 else width[depth - 1]  # conv_in, or the downsampler of the block above
        features = (entry,) + (width[depth],) * count + (width[depth + 1],) + (width[depth],) * (count + 1)
        rest.append(Level(name, side >> depth, features, (heads[depth],) * (2 * count + 1), tokens))
    return (low, *rest)


def _text(configs: Configs) -> tuple[int, int]:
    text = configs["text_encoder"]
    return text.max_position_embeddings, text.hidden_size


def _levels(configs: Configs, size: int, halves: int) -> tuple[Level, ...]:
    assert halves == 2, "a call of Stable Diffusion has two halves"
    return levels(configs["unet"], _text(configs)[0], size)


def _defaults(configs: Configs) -> Defaults:
    unet = configs["unet"]
    side = max(unet.sample_size, LEAST_SIDE if OLD.match(str(unet.get("_diffusers_version"))) else 0)
    return replace(SD_DEFAULTS, size=side * PIXELS)


SD = Backbone(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "text_encoder": Part("text_encoder", ("transformers:CLIPTextModel",)),
        "unet": Part("denoiser", ("diffusers:UNet2DConditionModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    denoiser="unet",
    guidance=lambda configs: "cfg",
    latents=lambda configs: Latents(channels=4, pixels=PIXELS, scale=configs["vae"].scaling_factor),
    text=_text,
    multiple=64,
    flow=None,
    levels=_levels,
    defaults=_defaults,
    reference="datasetdm_fast.engine.backbones.sd_reference:SDReference",
    fast="datasetdm_fast.engine.engines.fast:FastEngine",
    text_network="datasetdm_fast.engine.models.text_encoder:PromptEncoder",
    has_plans=True,
    index={"safety_checker": [None] * 2, "feature_extractor": [None] * 2, "requires_safety_checker": False},
    name_adapter=lambda state, configs: state,
    has_averages=True,
    has_deep_features=True,
    check=check_configs,
    text_widths=lambda configs: {"text": (configs["unet"].cross_attention_dim, configs["text_encoder"].hidden_size)},
    full_size={**FULL_SIZE, "scheduler": SD_SCHEDULER},
    seed=14,
)
