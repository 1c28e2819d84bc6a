"""Stable Diffusion 3 and 3.5: a transformer of two streams, two CLIP text encoders and T5, or zeros in its place."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import DAMAGED, Configs, Part, Read, flow_models
from datasetdm_fast.engine.backbones.fitting import check_channels, check_settings
from datasetdm_fast.engine.backbones.sd import CLIP_TOKENIZER
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

T5_LENGTH = 256  # tokens of T5 that the pipeline pads to, and of the zeros where there is no T5
LENGTH = "max_sequence_length"  # the pipeline's name of another such number, which a model_index.json may hold


def t5_length(configs: Configs) -> int:
    return int(configs["model_index"].get(LENGTH, T5_LENGTH))


def _text(configs: Configs) -> tuple[int, int]:
    tokens = configs["text_encoder"].max_position_embeddings + t5_length(configs)
    return tokens, configs["transformer"].joint_attention_dim


def _defaults(configs: Configs) -> Defaults:
    network = configs["transformer"]
    reads = flow_models.seg4diff(network.num_layers * 3 // 8, depth=network.num_layers)  # block 9 of 24
    return Defaults(network.sample_size * 8, 28, 7.0, flow_models.CAPTURE, reads)


def _file_config(state: Mapping[str, "Tensor"]) -> dict[str, Any]:
    """SD 3 medium, 3.5 medium and 3.5 large have as many heads as blocks."""
    depth = 1 + max((int(number) for key in state for number in re.findall(r"^joint_blocks\.(\d+)\.", key)), default=-1)
    side = math.isqrt(state["pos_embed"].shape[1]) if "pos_embed" in state else 0
    return {
        "num_layers": depth,
        "num_attention_heads": depth,
        "caption_projection_dim": 64 * depth,
        "pos_embed_max_size": side,
        "dual_attention_layers": [k for k in range(depth) if f"joint_blocks.{k}.x_block.attn2.qkv.weight" in state],
        "qk_norm": "rms_norm" if any(".ln_q." in key for key in state) else None,
    }


def _check(configs: Read, source: str) -> Read:
    network = configs["transformer"]
    check_channels(source, network.get("in_channels", 16), configs["vae"])
    width = network.get("num_attention_heads", 18) * network.get("attention_head_dim", 64)
    supported = {"qk_norm": (None, "rms_norm"), "caption_projection_dim": (width,)}
    check_settings(configs, source, "transformer", supported)
    if "text_encoder_3" in configs and "tokenizer_3" not in configs:
        raise Refused(f"model: {source} has a text_encoder_3, and no tokenizer_3", DAMAGED)
    if (length := configs["model_index"].get(LENGTH, 0)) not in range(513):
        raise Refused(f"model: {source}: {LENGTH} is {length!r}, expected 0 to 512 tokens", DAMAGED)
    return configs


def _text_widths(configs: Configs) -> dict[str, tuple[int, int]]:
    network, clips = configs["transformer"], (configs["text_encoder"], configs["text_encoder_2"])
    widths = {"pooled text": (network.pooled_projection_dim, sum(clip.projection_dim for clip in clips))}
    if "text_encoder_3" in configs:
        widths["text"] = network.joint_attention_dim, configs["text_encoder_3"].d_model
    return widths


SD3 = flow_models.joint_backbone(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "tokenizer_3": Part(
            "tokenizer", ("transformers:T5TokenizerFast", "transformers:T5Tokenizer"), is_optional=True
        ),
        "text_encoder": Part("text_encoder", ("transformers:CLIPTextModelWithProjection",)),
        "text_encoder_2": Part("text_encoder", ("transformers:CLIPTextModelWithProjection",)),
        "text_encoder_3": Part("text_encoder", ("transformers:T5EncoderModel",), is_optional=True),
        "transformer": Part("denoiser", ("diffusers:SD3Transformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    guidance=lambda configs: "cfg",
    text=_text,
    most_pixels=lambda configs: 8 * configs["transformer"].patch_size * configs["transformer"].pos_embed_max_size,
    flow=FlowRule(),
    blocks=lambda configs: configs["transformer"].num_layers,
    stride=lambda configs: 8 * configs["transformer"].patch_size,
    defaults=_defaults,
    long_text=lambda configs: ("tokenizer_3", t5_length(configs)),
    reference="datasetdm_fast.engine.backbones.sd3_reference:SD3Reference",
    network_plan="datasetdm_fast.engine.backbones.mmdit_plans:sd3",
    file_signs=("joint_blocks.", "context_embedder."),
    file_parts={
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
        "transformer": "model.diffusion_model.",
        "vae": "first_stage_model.",
    },
    file_config=_file_config,
    file_tokenizers={"tokenizer": False, "tokenizer_2": True},
    name_adapter=flow_models.names_of("StableDiffusion3Pipeline"),
    check=_check,
    text_widths=_text_widths,
    licence=lambda configs: "stabilityai-ai-community",
    full_size={
        "text_encoder": {**flow_models.CLIP, "projection_dim": 768},
        "text_encoder_2": flow_models.OPEN_CLIP,
        "text_encoder_3": flow_models.T5,
        "tokenizer_3": {"model_max_length": T5_LENGTH},
        "transformer": {  # of SD 3.5 medium
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": flow_models.VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": flow_models.FLOW_SCHEDULER | {"shift": 3.0},
        "model_index": {},
    },
    seed=35,
)
