"""Qwen-Image: a transformer of two streams that reads the states of Qwen2.5-VL, and an autoencoder made for video."""

import math
from typing import Any

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import DAMAGED, Configs, Latents, LoadedModel, Part, Read
from datasetdm_fast.engine.backbones.fitting import check_channels, check_settings
from datasetdm_fast.engine.backbones.flow_models import CAPTURE, joint_backbone, names_of, seg4diff
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import quote

USUAL_CHANNELS = 16  # of the autoencoder
USUAL_SECTIONS = [16, 24, 24]  # numbers of a head of the text encoder that turn by time, row and column
LENGTH = 512  # tokens of a text at most
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = 34  # tokens of the template before the prompt, whose states are dropped


def _latents(configs: Configs) -> Latents:
    vae = configs["vae"]
    pixels = 2 ** len(vae.temperal_downsample)
    return Latents(vae.z_dim, pixels, mean=tuple(vae.latents_mean), std=tuple(vae.latents_std))


def _defaults(configs: Configs) -> Defaults:
    depth = configs["transformer"].num_layers
    return Defaults(1024, 50, 4.0, CAPTURE, seg4diff(depth * 3 // 8, depth=depth))


def _check(configs: Read, source: str) -> Read:
    vae = configs["vae"]
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        numbers = vae.get(name, [1.0] * USUAL_CHANNELS)
        is_list = isinstance(numbers, list) and len(numbers) == vae.get("z_dim", USUAL_CHANNELS)
        if not is_list or not all(isinstance(number, (int, float)) and number > least for number in numbers):
            raise Refused(
                f"model: {source}: the vae's {name} is {quote(numbers)}, expected a number for each of its channels"
                f"{' above 0' * (least == 0)}",
                DAMAGED,
            )
    check_channels(source, configs["transformer"].get("in_channels", 64), configs["vae"], 4)
    others = "guidance_embeds zero_cond_t use_layer3d_rope use_additional_t_cond".split()
    check_settings(configs, source, "transformer", dict.fromkeys(others, (False,)) | {"patch_size": (2,)})
    return configs


def _text_config(configs: Configs) -> Any:
    return getattr(configs["text_encoder"], "text_config", configs["text_encoder"])


def _check_fit(model: LoadedModel) -> None:
    text = _text_config(model.configs)
    sections = text.rope_parameters.get("mrope_section", USUAL_SECTIONS)
    is_list, half = isinstance(sections, list), text.hidden_size // text.num_attention_heads // 2
    if not is_list or not all(type(part) is int and part > 0 for part in sections) or sum(sections) != half:
        raise Refused(
            f"model: {model.name}: the text_encoder's mrope_section is {quote(sections)}, expected whole numbers whose "
            f"sum is half a head, {half}",
            DAMAGED,
        )


QWEN_IMAGE = joint_backbone(
    name="qwen-image",
    title="Qwen-Image",
    parts={
        "tokenizer": Part("tokenizer", ("transformers:Qwen2Tokenizer", "transformers:Qwen2TokenizerFast")),
        "text_encoder": Part("text_encoder", ("transformers:Qwen2_5_VLForConditionalGeneration",)),
        "transformer": Part("denoiser", ("diffusers:QwenImageTransformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKLQwenImage",)),
    },
    guidance=lambda configs: "cfg",
    latents=_latents,
    text=lambda configs: (LENGTH, configs["transformer"].joint_attention_dim),
    flow=FlowRule("uniform", is_imposed=True),
    blocks=lambda configs: configs["transformer"].num_layers,
    defaults=_defaults,
    wrap=lambda tokenizer, prompt: TEMPLATE.format(prompt),
    dropped=INSTRUCTION,
    guides_itself=True,
    pads_text=True,
    reference="datasetdm_fast.engine.backbones.qwen_image_reference:QwenImageReference",
    network_plan="datasetdm_fast.engine.backbones.mmdit_plans:qwen_image",
    file_signs=("transformer_blocks.0.img_mod.", "txt_norm."),
    name_adapter=names_of("QwenImagePipeline"),
    check=_check,
    text_widths=lambda configs: {
        "text": (configs["transformer"].joint_attention_dim, _text_config(configs).hidden_size)
    },
    check_fit=_check_fit,
    licence=lambda configs: "apache-2.0",
)
