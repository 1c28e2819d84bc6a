"""FLUX.1 dev, schnell and Krea-dev: blocks of two streams, then of one; CLIP's pooled text and T5."""

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import Configs, Part, Read, flow_models
from datasetdm_fast.engine.backbones.fitting import check_channels, check_settings
from datasetdm_fast.engine.backbones.sd import CLIP_TOKENIZER

DEV_LICENCE = "flux-1-dev-non-commercial-license"  # of Krea-dev, too


def _text(configs: Configs) -> tuple[int, int]:
    """Dev was trained with 512 tokens, schnell with 256."""
    network = configs["transformer"]
    return 512 if network.guidance_embeds else 256, network.joint_attention_dim


def _defaults(configs: Configs) -> Defaults:
    network = configs["transformer"]
    steps, guidance = (28, 3.5) if network.guidance_embeds else (4, 0.0)
    return Defaults(1024, steps, guidance, flow_models.CAPTURE, flow_models.seg4diff_of_flux(network.num_layers))


def _check(configs: Read, source: str) -> Read:
    check_channels(source, configs["transformer"].get("in_channels", 64), configs["vae"], 4)
    check_settings(configs, source, "transformer", {"patch_size": (1,)})
    return configs


def _text_widths(configs: Configs) -> dict[str, tuple[int, int]]:
    network = configs["transformer"]
    return {
        "text": (network.joint_attention_dim, configs["text_encoder_2"].d_model),
        "pooled text": (network.pooled_projection_dim, configs["text_encoder"].hidden_size),
    }


FLUX1 = flow_models.joint_backbone(
    name="flux1",
    title="FLUX.1",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": Part("tokenizer", ("transformers:T5TokenizerFast", "transformers:T5Tokenizer")),
        "text_encoder": Part("text_encoder", ("transformers:CLIPTextModel",)),
        "text_encoder_2": Part("text_encoder", ("transformers:T5EncoderModel",)),
        "transformer": Part("denoiser", ("diffusers:FluxTransformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    guidance=lambda configs: "embedded" if configs["transformer"].guidance_embeds else "none",
    text=_text,
    flow=FlowRule("uniform"),
    blocks=flow_models.count_blocks,
    defaults=_defaults,
    tokenizer="tokenizer_2",
    reference="datasetdm_fast.engine.backbones.flux1_reference:Flux1Reference",
    network_plan="datasetdm_fast.engine.backbones.mmdit_plans:flux1",
    file_signs=("double_blocks.", "vector_in."),
    name_adapter=flow_models.names_of("FluxPipeline"),
    check=_check,
    text_widths=_text_widths,
    licence=lambda configs: DEV_LICENCE if configs["transformer"].guidance_embeds else "apache-2.0",
    full_size={
        "text_encoder": flow_models.CLIP,
        "text_encoder_2": flow_models.T5,
        "transformer": {  # of schnell
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        "vae": flow_models.VAE,
        "scheduler": flow_models.FLOW_SCHEDULER | {"shift": 1.0},
        "model_index": {},
    },
    seed=20,
)
