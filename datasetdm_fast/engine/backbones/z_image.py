"""Z-Image and Z-Image-Turbo: one stream of image and text tokens, as many of these as a prompt has; Qwen3 as text
encoder.
"""

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import Configs, Part, Read, flow_models
from datasetdm_fast.engine.backbones.fitting import check_channels, check_settings

LENGTH = 512  # tokens of a text at most
TURBO_SHIFT = 3.0  # of the schedule; the base model has 6


def _defaults(configs: Configs) -> Defaults:
    """Turbo has another shift, by which it is told from the base model."""
    steps, guidance = (8, 0.0) if configs["scheduler"].get("shift", 1.0) <= TURBO_SHIFT else (50, 5.0)
    reads = flow_models.seg4diff(configs["transformer"].n_layers * 3 // 8, depth=0)
    return Defaults(1024, steps, guidance, flow_models.CAPTURE, reads)


def _check(configs: Read, source: str) -> Read:
    check_channels(source, configs["transformer"].get("in_channels", 16), configs["vae"])
    check_settings(configs, source, "transformer", {"all_patch_size": ([2],), "siglip_feat_dim": (None,)})
    return configs


Z_IMAGE = flow_models.joint_backbone(
    name="z-image",
    title="Z-Image",
    parts={
        "tokenizer": Part("tokenizer", ("transformers:Qwen2Tokenizer", "transformers:Qwen2TokenizerFast")),
        "text_encoder": Part("text_encoder", ("transformers:Qwen3Model", "transformers:Qwen3ForCausalLM")),
        "transformer": Part("denoiser", ("diffusers:ZImageTransformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    guidance=lambda configs: "cfg",
    text=lambda configs: (LENGTH, configs["transformer"].cap_feat_dim),
    most_pixels=lambda configs: 16 * min(configs["transformer"].axes_lens[1:]),
    flow=FlowRule("uniform-fp32"),
    blocks=lambda configs: configs["transformer"].n_layers,
    defaults=_defaults,
    wrap=flow_models.chat(enable_thinking=True),
    guides_itself=True,
    pads_text=True,
    unguided=0.0,
    reference="datasetdm_fast.engine.backbones.z_image_reference:ZImageReference",
    network_plan="datasetdm_fast.engine.backbones.mmdit_plans:z_image",
    file_signs=("cap_pad_token", "noise_refiner."),
    name_adapter=flow_models.names_of("ZImagePipeline"),
    check=_check,
    text_widths=lambda configs: {"text": (configs["transformer"].cap_feat_dim, configs["text_encoder"].hidden_size)},
    licence=lambda configs: "apache-2.0",
    full_size={
        "text_encoder": flow_models.QWEN3_4B,
        "transformer": {  # of Turbo
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1024, 512, 512],
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "norm_eps": 1e-5,
        },
        "vae": flow_models.VAE,
        "scheduler": flow_models.FLOW_SCHEDULER | {"shift": TURBO_SHIFT},
        "model_index": {},
    },
    seed=60,
)
