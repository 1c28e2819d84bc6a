"""FLUX.2 klein, distilled and base: blocks of two streams, then of one; states of three layers of Qwen3 as text."""

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import Configs, Latents, LoadedModel, Part, Read, flow_models
from datasetdm_fast.engine.backbones.fitting import TOGETHER, check_channels, check_settings
from datasetdm_fast.errors import Refused

LENGTH = 512  # tokens of a text
CONCEPT_PLACE = 510  # of them, where the published ConceptAttention has every word
HEADS_OF_4B = 24  # of the transformer; 9B has 32
READ_LAYERS = (9, 18, 27)  # of the text encoder


def _is_distilled(configs: Configs) -> bool:
    return bool(configs["model_index"].get("is_distilled"))


def _defaults(configs: Configs) -> Defaults:
    steps, guidance = (4, 1.0) if _is_distilled(configs) else (50, 4.0)
    reads = flow_models.seg4diff_of_flux(configs["transformer"].num_layers)
    return Defaults(1024, steps, guidance, flow_models.CAPTURE, reads)


def _licence(configs: Configs) -> str:
    heads = configs["transformer"].num_attention_heads
    return "apache-2.0" if heads <= HEADS_OF_4B else "flux-non-commercial-license"


def _check(configs: Read, source: str) -> Read:
    check_channels(source, configs["transformer"].get("in_channels", 128), configs["vae"], 4)
    check_settings(configs, source, "transformer", {"guidance_embeds": (False,), "patch_size": (1,)})
    return configs


def _text_widths(configs: Configs) -> dict[str, tuple[int, int]]:
    return {
        "text": (configs["transformer"].joint_attention_dim, len(READ_LAYERS) * configs["text_encoder"].hidden_size)
    }


def _check_fit(model: LoadedModel) -> None:
    layers: int = model.configs["text_encoder"].num_hidden_layers
    if layers < max(READ_LAYERS):
        raise Refused(
            f"model: {model.name}: the text encoder has {layers} layers, and the states of layer {max(READ_LAYERS)} "
            "are read",
            TOGETHER,
        )


FLUX2_KLEIN = flow_models.joint_backbone(
    name="flux2-klein",
    title="FLUX.2 klein",
    parts={
        "tokenizer": Part("tokenizer", ("transformers:Qwen2TokenizerFast", "transformers:Qwen2Tokenizer")),
        "text_encoder": Part("text_encoder", ("transformers:Qwen3ForCausalLM",)),
        "transformer": Part("denoiser", ("diffusers:Flux2Transformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKLFlux2",)),
    },
    guidance=lambda configs: "none" if _is_distilled(configs) else "cfg",
    latents=lambda configs: Latents(configs["transformer"].in_channels, 16),
    text=lambda configs: (LENGTH, configs["transformer"].joint_attention_dim),
    flow=FlowRule("uniform", "empirical"),
    patch=1,
    blocks=flow_models.count_blocks,
    defaults=_defaults,
    wrap=flow_models.chat(enable_thinking=False),
    reference="datasetdm_fast.engine.backbones.flux2_klein_reference:Flux2KleinReference",
    network_plan="datasetdm_fast.engine.backbones.mmdit_plans:flux2",
    file_signs=("double_blocks.", "single_stream_modulation."),
    name_adapter=flow_models.names_of("Flux2KleinPipeline"),
    check=_check,
    text_widths=_text_widths,
    check_fit=_check_fit,
    licence=_licence,
    full_size={
        "text_encoder": flow_models.QWEN3_4B,
        "transformer": {  # of klein 4B
            "in_channels": 128,
            "num_layers": 5,
            "num_single_layers": 20,
            "attention_head_dim": 128,
            "num_attention_heads": HEADS_OF_4B,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
            "axes_dims_rope": (32, 32, 32, 32),
            "rope_theta": 2000,
            "eps": 1e-6,
        },
        "vae": {
            **{name: flow_models.VAE[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")},
            "latent_channels": 32,
        },
        "scheduler": flow_models.FLOW_SCHEDULER | {"shift": 3.0, "use_dynamic_shifting": True},
        "model_index": {"is_distilled": True},
    },
    seed=40,
)
