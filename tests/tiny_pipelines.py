"""Tiny pipelines of diffusers of every family, with random weights and no file but the demo's vocabulary; their widths
and depths can be chosen. No number of theirs is that of a published model, so that none in its place goes unnoticed.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from datasetdm_fast.engine.loading.folder import DEMO

SIZE = 64  # pixels of a side that every one of them can draw
TOKENS = 48  # of a text of CLIP
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIFTS = {"base_shift": 0.3, "max_shift": 1.4, "base_image_seq_len": 9, "max_image_seq_len": 300}
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


def clip_tokenizer():
    return CLIPTokenizer.from_pretrained(DEMO / "tokenizer", model_max_length=TOKENS)


def clip(kind, width=32, projection=32, layers=2):
    tokenizer = clip_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            layer_norm_eps=3e-4,
            hidden_act="gelu",
            **sizes,
            **ids,
        )
    )


def t5_tokenizer():
    words = ["▁a", "▁photo", "▁of", "▁the"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((word, -2.5) for word in words)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
    return T5TokenizerFast(vocab=pieces + letters, extra_ids=0, model_max_length=512)


def t5(width=32, layers=2):
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": layers, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **sizes))


def qwen_tokenizer():
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: place for place, letter in enumerate(letters)}, merges=[], model_max_length=1024
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(kind, width=32, layers=3, heads=4):
    heads = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 32 // heads}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return kind(Qwen3Config(vocab_size=300, **sizes, **heads))


def vae(channels, kind=AutoencoderKL, **settings):
    return kind(
        sample_size=32,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=DOWN,
        up_block_types=UP,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )


def flow_vae(channels=4):
    return vae(channels, scaling_factor=1.3, shift_factor=0.05, use_quant_conv=False, use_post_quant_conv=False)


def sdxl(width=32, depths=(0, 1, 2), text=32, guidance_embedding=None):
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        transformer_layers_per_block=list(depths),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        time_cond_proj_dim=guidance_embedding,
        projection_class_embeddings_input_dim=6 * 8 + text,
        cross_attention_dim=2 * text,
        norm_num_groups=8,
        norm_eps=3e-4,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.21),
        text_encoder=clip(CLIPTextModel, text),
        text_encoder_2=clip(CLIPTextModelWithProjection, text, text, 3),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.001,
            beta_end=0.013,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def sd3(width=32, layers=2, text=32, has_t5=True, channels=4):
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        joint_attention_dim=2 * text,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text,
        pos_embed_max_size=15,  # of which an odd rest is cut off
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5),
        vae=flow_vae(channels),
        text_encoder=clip(CLIPTextModelWithProjection, text, text),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, text, text, 3),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * text) if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )


def flux1(width=32, layers=2, singles=2, text=32, is_dev=True, channels=4):
    transformer = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=is_dev, shift=1.7, **SHIFTS),
        vae=flow_vae(channels),
        text_encoder=clip(CLIPTextModel, text),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(text),
        tokenizer_2=t5_tokenizer(),
    )


def flux2_klein(width=32, layers=1, singles=3, text=32, is_distilled=True, channels=4):
    transformer = Flux2Transformer2DModel(
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=3 * text,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=300,
        eps=1e-4,
        guidance_embeds=False,
    )
    autoencoder = vae(channels, AutoencoderKLFlux2, use_quant_conv=False, use_post_quant_conv=False)
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=2.5),
        vae=autoencoder,
        text_encoder=qwen3(Qwen3ForCausalLM, text, 28, heads=2),  # of four and two heads is Z-Image's
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
    )


def z_image(width=32, layers=2, refiners=1, text=32, channels=16):
    transformer = ZImageTransformer2DModel(
        in_channels=channels,
        dim=width,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=width // 16,
        n_kv_heads=width // 16,
        cap_feat_dim=text,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
        rope_theta=90.0,
        t_scale=700.0,
        norm_eps=3e-4,
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5),  # at most 3, as Turbo's
        vae=flow_vae(channels),
        text_encoder=qwen3(Qwen3Model, text),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image(width=32, layers=2, text=16, channels=4):
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    language = {"hidden_size": text, "intermediate_size": text, "num_hidden_layers": 2, "vocab_size": 300, **heads}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=language | {"rope_scaling": rope, "rope_theta": 1e6},
        vision_config=vision,
        vision_end_token_id=260,
        vision_start_token_id=261,
        vision_token_id=262,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=text,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=torch.randn(channels).tolist(),
        latents_std=(torch.rand(channels) + 0.5).tolist(),
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.05, **SHIFTS),
        vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
    )


FAMILIES = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux1": flux1,
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def build(family, seed=0, **sizes):
    """A pipeline of the family, in eval mode and silent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[family](**sizes)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            vary_constants(part, torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def vary_constants(part, generator):
    """Weights that begin as ones or zeros, as those of norms do, in whose place another's would go unnoticed."""
    for value in part.parameters():
        if value.ndim == 1 and (value == value[0]).all():
            value.add_(torch.randn(value.shape, generator=generator) / 8)


def save(folder: Path, family, seed=0, **sizes) -> Path:
    """The folder of a pipeline, as diffusers writes it."""
    build(family, seed, **sizes).save_pretrained(folder)
    return folder
