"""AuraFlow: blocks of two streams, then of one; the text encoder of UMT5."""

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.engine.backbones import Backbone, Configs, Part, Read
from datasetdm_fast.engine.backbones.fitting import check_channels
from datasetdm_fast.engine.backbones.flow_models import CAPTURE, joint_levels, scaled_latents
from datasetdm_fast.stages import Level

LENGTH = 256  # tokens that the pipeline pads to


def _levels(configs: Configs, size: int, halves: int) -> tuple[Level, ...]:
    network = configs["transformer"]
    depth, heads = network.num_mmdit_layers + network.num_single_dit_layers, network.num_attention_heads
    width, stride = heads * network.attention_head_dim, 8 * network.patch_size
    return joint_levels(depth, width, heads, LENGTH, size, network.in_channels, stride)


def _check(configs: Read, source: str) -> Read:
    check_channels(source, configs["transformer"].get("in_channels", 4), configs["vae"])
    return configs


AURA_FLOW = Backbone(
    name="aura-flow",
    title="AuraFlow",
    parts={
        "tokenizer": Part(
            "tokenizer", ("transformers:LlamaTokenizerFast", "transformers:T5TokenizerFast", "transformers:T5Tokenizer")
        ),
        "text_encoder": Part("text_encoder", ("transformers:UMT5EncoderModel",)),
        "transformer": Part("denoiser", ("diffusers:AuraFlowTransformer2DModel",)),
        "vae": Part("vae", ("diffusers:AutoencoderKL",)),
    },
    denoiser="transformer",
    guidance=lambda configs: "cfg",
    latents=lambda configs: scaled_latents(configs["vae"]),
    text=lambda configs: (LENGTH, configs["transformer"].joint_attention_dim),
    multiple=16,
    flow=FlowRule(),
    levels=_levels,
    defaults=lambda configs: Defaults(1024, 50, 3.5, CAPTURE),
    reference="datasetdm_fast.engine.backbones.aura_flow_reference:AuraFlowReference",
    check=_check,
    text_widths=lambda configs: {"text": (configs["transformer"].joint_attention_dim, configs["text_encoder"].d_model)},
    licence=lambda configs: "apache-2.0",
)
