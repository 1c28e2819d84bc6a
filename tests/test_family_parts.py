"""Weights in several files, rows of text of different lengths, and records whose classes exist."""

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from diffusers.utils import hub_utils
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from datasetdm_fast import generate
from datasetdm_fast.data import Text, join_texts
from datasetdm_fast.engine.backbones import Latents, Part, every_backbone, flow_models, flux2_klein, mmdit_plans
from datasetdm_fast.engine.backbones.flow_models import seg4diff_of_flux
from datasetdm_fast.engine.backbones.flux1 import FLUX1
from datasetdm_fast.engine.backbones.flux2_klein import FLUX2_KLEIN
from datasetdm_fast.engine.backbones.joint_attention import AttentionReader, ConceptReader
from datasetdm_fast.engine.backbones.qwen_image import QWEN_IMAGE
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.backbones.z_image import Z_IMAGE
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model, presets
from datasetdm_fast.engine.loading.folder import _weight_files
from datasetdm_fast.engine.models.text_encoder import PairedPromptEncoder
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels import plain
from datasetdm_fast.plugins import load_place


@pytest.fixture
def folder(tmp_path):
    return tiny_pipelines.save(tmp_path / "model", "flux1")


def test_weights_in_several_files_are_read_by_their_index(folder):
    whole = load_model(str(folder), size=64)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    whole.modules["transformer"].save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    theirs, ours = (model.modules["transformer"].state_dict() for model in (whole, load_model(str(folder), size=64)))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    next((folder / "transformer").glob("*-00002-*")).unlink()
    with pytest.raises(Refused, match="lacks 1 of its .* weight files"):
        load_model(str(folder))


def test_a_tokenizer_of_no_length_is_cut_where_its_model_reads_no_more(folder):
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": None}))
    model = load_model(str(folder), size=64)
    assert model.tokenizer.model_max_length == model.backbone.text(model.configs)[0]


def test_safetensors_of_a_later_name_come_before_pickles_of_an_earlier_one(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    save_file({"x": torch.zeros(2)}, tmp_path / "model.fp16.safetensors")
    assert [path.name for path in _weight_files(tmp_path).files] == ["model.fp16.safetensors"]


def test_full_precision_comes_before_half_in_the_files_of_one_kind(tmp_path):
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        save_file({"x": torch.zeros(2)}, tmp_path / name)
    found = _weight_files(tmp_path)
    assert (found.variant, [path.name for path in found.files]) == (None, ["diffusion_pytorch_model.safetensors"])


def test_weights_of_half_precision_in_several_files_are_read_by_their_own_index(tmp_path):
    names = [f"diffusion_pytorch_model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for number, name in enumerate(names):
        save_file({str(number): torch.zeros(2)}, tmp_path / name)
    index = tmp_path / hub_utils._add_variant("diffusion_pytorch_model.safetensors.index.json", "fp16")
    index.write_text(json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}}))
    found = _weight_files(tmp_path)
    assert (found.variant, found.index, [path.name for path in found.files]) == ("fp16", index, names)


def test_random_decoders_serve_a_family(folder, tmp_path):
    line = ["--model", str(folder), "--decoder", "random", "--task", "depth", "--steps", "1", "--number", "1"]
    line += ["--size", "64", "--prompts", "a red ball", "--quiet", "--out"]
    assert generate.main([*line, str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "run" / "depth").iterdir())) == 1


BILLIONS = {"random-sd35": 2.24, "random-flux": 11.9, "random-klein": 3.88, "random-zimage": 6.15, "random-sdxl": 2.57}


@pytest.mark.parametrize("name", BILLIONS)
def test_random_models_have_as_many_weights_as_the_published_ones(name):
    """Of SD 3.5 medium 2.5 billion are told, 0.2 of them positions that are not trained."""
    model = load_model(name)
    with torch.device("meta"):
        network = presets.build_module(model.backbone.parts[model.backbone.denoiser], model.denoiser.config)
    assert sum(value.numel() for value in network.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)
    assert not any(network.is_built for network in model.networks.values()) and model.levels and model.size == 1024


# What no number of weights shows, from the published files: part -> values
CLIP_L = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-5, "max_position_embeddings": 77}
CLIP_G = CLIP_L | {"hidden_act": "gelu", "num_attention_heads": 20}
T5 = {"num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 32, "use_quant_conv": False}
QWEN3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
UNET = {"norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0}
PUBLISHED = {
    "sd": {
        "text_encoder": CLIP_L | {"bos_token_id": 49406, "eos_token_id": 49407},
        "unet": UNET | {"sample_size": 64, "attention_head_dim": 8, "use_linear_projection": False},
        "vae": {"scaling_factor": 0.18215, "norm_num_groups": 32, "sample_size": 512},
        "scheduler": BETAS | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    },
    "sdxl": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "unet": UNET | {"sample_size": 128, "attention_head_dim": (5, 10, 20), "addition_time_embed_dim": 256},
        "vae": {"scaling_factor": 0.13025, "norm_num_groups": 32, "force_upcast": True},
        "scheduler": BETAS | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    },
    "sd3": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
        "transformer": {"sample_size": 128, "patch_size": 2, "attention_head_dim": 64, "qk_norm": "rms_norm"},
        "vae": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "norm_num_groups": 32, "use_quant_conv": False},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    },
    "flux1": {
        "text_encoder": CLIP_L,
        "text_encoder_2": T5,
        "transformer": {"axes_dims_rope": (16, 56, 56), "attention_head_dim": 128, "guidance_embeds": False},
        "vae": FLUX_VAE,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
    },
    "flux2-klein": {
        "text_encoder": QWEN3,
        "transformer": {"axes_dims_rope": (32,) * 4, "attention_head_dim": 128, "rope_theta": 2000, "eps": 1e-6},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
        "model_index": {"is_distilled": True},
    },
    "z-image": {
        "text_encoder": QWEN3,
        "transformer": {"axes_dims": (32, 48, 48), "axes_lens": (1024, 512, 512), "rope_theta": 256, "n_heads": 30}
        | {"t_scale": 1000, "norm_eps": 1e-5, "n_kv_heads": 30},
        "vae": FLUX_VAE,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_of_full_size_have_the_published_settings(family):
    backbone = next(each for each in every_backbone() if each.name == family)
    for part, values in PUBLISHED[family].items():
        config = backbone.full_size[part]
        told = {name: tuple(value) if isinstance(value := config[name], list) else value for name in values}
        assert told == values, part


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("tiny", (True, True, True)),  # decoders of U-Nets read the rows of both prompts
        ("random-sdxl", (True, True, True)),
        ("random-sd35", (False, False, True)),
        ("random-zimage", (False, True, True)),  # its scale is one less
        ("random-flux", (False, False, False)),
    ],
)
def test_a_negative_prompt_counts_where_calls_or_decoders_read_it(name, needed):
    model = load_model(name)
    assert tuple(model.has_negative(guidance) for guidance in (0.0, 1.0, 1.5)) == needed


def test_the_second_clip_of_single_files_pads_as_open_clip_does():
    padded = {each.name: each.file_tokenizers for each in every_backbone() if each.file_tokenizers}
    assert padded == dict.fromkeys(("sdxl", "sd3"), {"tokenizer": False, "tokenizer_2": True})


@pytest.mark.parametrize("family", ["sd3", "flux1", "flux2-klein", "z-image"])
def test_random_weights_of_a_family_make_images(family):
    pipeline = tiny_pipelines.build(family, **({"is_dev": False} if family == "flux1" else {}))
    backbone = next(each for each in every_backbone() if each.name == family)
    configs = {}
    for part in backbone.networks:
        config = getattr(pipeline, part).config
        if backbone.parts[part].kind == "text_encoder":
            known = config.to_dict() | {"vocab_size": 1000, "max_position_embeddings": 77}  # for the shipped tokenizer
            configs[part] = {name: known[name] for name in backbone.full_size[part]}
        else:
            configs[part] = {name: value for name, value in config.items() if not name.startswith("_")}
    small = replace(backbone, full_size=backbone.full_size | configs)
    model = presets.load_random("small", tiny_pipelines.SIZE, small)
    engine = build_engine("fast", model)
    assert not any(network.is_built for network in model.networks.values())
    text = engine.encode_text(["a red ball"] * model.halves)
    output = engine.denoise(torch.randn(1, *model.latent_shape()), 500.0, text)
    images, is_finite = engine.decode_and_check(output)
    assert is_finite.all() and images.float().std() > 1


@pytest.mark.parametrize("backbone", every_backbone(), ids=lambda backbone: backbone.name)
def test_the_parts_of_a_record_are_classes_of_the_libraries(backbone):
    assert backbone.parts[backbone.denoiser].kind == "denoiser"
    for part in backbone.parts.values():
        assert load_place(part.classes[0])


def test_texts_of_different_lengths_are_padded_and_masked():
    short, long = Text(torch.ones(1, 2, 3)), Text(torch.ones(2, 4, 3))
    both = join_texts([short, long])
    assert both.context.shape == (3, 4, 3) and both.mask.tolist() == [[True] * 2 + [False] * 2, *[[True] * 4] * 2]
    assert join_texts([long, long]).mask is None and len(both[1:]) == 2 and len(short.expand(5)) == 5


@pytest.mark.parametrize("end", [7, 2])
@torch.inference_mode()
def test_pooled_text_is_that_of_the_end_also_behind_a_word_that_was_added(end):
    """The end of CLIP's published texts has their largest id; words of textual inversion have larger ones. Where the
    first configs say 2 it is the largest id all the same.
    """
    torch.manual_seed(0)
    first, second = (tiny_pipelines.clip(kind) for kind in (CLIPTextModel, CLIPTextModelWithProjection))
    second.config.eos_token_id = second.text_model.eos_token_id = end
    ids = torch.tensor([[1, 9, 5, 7, 7], [1, 5, 7, 7, 7]])
    made = PairedPromptEncoder({"text_encoder": first, "text_encoder_2": second}, plain).of_tokens(ids, ids)
    torch.testing.assert_close(made.pooled, second(ids).text_embeds, rtol=1e-4, atol=1e-5)


def test_what_a_setting_of_a_transformer_decides():
    network = SimpleNamespace(sample_size=64, num_layers=24)
    assert SD3.defaults({"transformer": network}).size == 512
    assert Z_IMAGE.most_pixels({"transformer": SimpleNamespace(axes_lens=[4, 64, 32])}) == 512
    read = {"transformer": {"siglip_feat_dim": 1152}, "vae": {"latent_channels": 16, "block_out_channels": [8] * 4}}
    with pytest.raises(Refused, match="siglip_feat_dim"):
        Z_IMAGE.check(read, "a folder")


def test_an_empty_prompt_of_sdxl_is_zeros_unless_the_index_of_its_model_says_no():
    name, text = "force_zeros_for_empty_prompt", Text(torch.ones(2, 3, 4), torch.ones(2, 5))
    usual = inspect.signature(diffusers.StableDiffusionXLPipeline).parameters[name].default
    for index, is_zero in (({}, usual), ({name: True}, True), ({name: False}, False)):
        model = SimpleNamespace(configs={"model_index": index})
        read = PairedPromptEncoder.after(model, ["", "a dog"], text)
        for part in (read.context, read.pooled):
            assert bool(part[0].any()) is not is_zero and part[1].all()


def test_places_of_qwen_image_are_counted_from_the_middle_as_in_diffusers():
    """Of five rows and columns from -3 to 1; the text goes on along the diagonal from half a side, rounded down."""
    config = SimpleNamespace(num_layers=0, num_attention_heads=1, attention_head_dim=6, axes_dims_rope=(2, 2, 2))
    places = mmdit_plans.qwen_image(config, {}).places(5, 2, None, torch.device("cpu"))
    cells = [[0, row, column] for row in range(-3, 2) for column in range(-3, 2)]
    assert places.tolist() == [[*cells, [2, 2, 2], [3, 3, 3]]]


def test_an_encoder_of_just_as_many_layers_as_klein_reads_fits():
    encoder = SimpleNamespace(num_hidden_layers=27)
    model = SimpleNamespace(name="it", configs={"text_encoder": encoder})
    FLUX2_KLEIN.check_fit(model)
    encoder.num_hidden_layers = 26
    with pytest.raises(Refused, match="26 layers, and the states of layer 27 are read"):
        FLUX2_KLEIN.check_fit(model)


@pytest.mark.parametrize(("backbone", "theirs"), [(Z_IMAGE, "ZImagePipeline"), (FLUX2_KLEIN, "Flux2KleinPipeline")])
def test_prompts_are_wrapped_as_chat_as_diffusers_wraps_them(backbone, theirs):
    thinking = re.findall(r"enable_thinking=(\w+)", inspect.getsource(getattr(diffusers, theirs)))
    tokenizer = SimpleNamespace(apply_chat_template=lambda messages, **options: str(options["enable_thinking"]))
    assert {backbone.wrap(tokenizer, "a red ball")} == set(thinking)


def test_the_published_sizes_read_the_published_blocks_for_attention():
    assert seg4diff_of_flux(19).blocks == (12, 17)
    assert SD3.defaults({"transformer": SimpleNamespace(num_layers=24, sample_size=128)}).attention.blocks == (9,)
    # as deep in those whose attention nobody published
    assert QWEN_IMAGE.defaults({"transformer": SimpleNamespace(num_layers=60)}).attention.blocks == (22,)
    configs = {"transformer": SimpleNamespace(n_layers=30), "scheduler": {"shift": 3.0}}
    assert Z_IMAGE.defaults(configs).attention.blocks == (11,)


def test_numbers_that_records_of_flow_models_share():
    vae = SimpleNamespace(block_out_channels=[1] * 3, latent_channels=5, scaling_factor=0.7, shift_factor=None)
    assert flow_models.scaled_latents(vae) == Latents(5, 4, 0.7, 0.0)
    vae.shift_factor = -0.2
    assert flow_models.scaled_latents(vae) == Latents(5, 4, 0.7, -0.2)
    odd = flow_models.seg4diff(1, 2, depth=5, timestep=300)
    assert (odd.blocks, odd.concept_blocks, odd.timestep) == ((1, 2), (2, 3, 4), 300)
    assert [seg4diff_of_flux(depth).blocks for depth in (19, 5, 1)] == [(12, 17), (3, 4), (0,)]
    assert flow_models.blocks_read(8) == ((3, 4), (2,), (6,)) and flow_models.blocks_read(1) == ((0,),) * 3
    assert flow_models.spread_blocks((7, 2, 4)) == ((4,), (2,), (7,))
    assert flow_models.spread_blocks((7, 2)) == ((2, 7), (2,), (7,))


def test_records_of_flux_and_qwen_image_tell_their_models_apart():
    flux = {"transformer": SimpleNamespace(num_layers=19, num_single_layers=38, guidance_embeds=True)}
    read = FLUX1.defaults(flux).attention
    assert read.blocks == (12, 17) and read.concept_blocks == tuple(range(9, 19))
    assert flux2_klein.CONCEPT_PLACE == 510  # as in the published code of ConceptAttention
    asked = inspect.signature(diffusers.Flux2KleinPipeline.__call__).parameters
    assert flux2_klein.READ_LAYERS == asked["text_encoder_out_layers"].default
    assert flux2_klein.LENGTH == asked["max_sequence_length"].default
    klein = {"transformer": SimpleNamespace(num_layers=5)}
    for index, steps, guidance, kind in (
        ({}, 50, 4.0, "cfg"),
        ({"is_distilled": False}, 50, 4.0, "cfg"),
        ({"is_distilled": True}, 4, 1.0, "none"),
    ):
        found = FLUX2_KLEIN.defaults(klein | {"model_index": index})
        assert (found.steps, found.guidance, found.attention.blocks) == (steps, guidance, (3, 4))
        assert FLUX2_KLEIN.guidance({"model_index": index}) == kind
    configs = {"transformer": {}, "vae": {"latent_channels": 32, "block_out_channels": [8] * 4}}
    assert FLUX2_KLEIN.check(configs, "x") is configs
    with pytest.raises(Refused, match="the transformer's guidance_embeds is True where False is expected"):
        FLUX2_KLEIN.check(configs | {"transformer": {"guidance_embeds": True}}, "x")
    configs = {"transformer": {}, "vae": {"z_dim": 16, "dim_mult": [1, 2, 2, 2]}}
    assert QWEN_IMAGE.check(configs, "x") is configs
    for name, numbers, end in (("latents_mean", [None] * 16, ""), ("latents_std", [0] * 16, " above 0")):
        with pytest.raises(Refused) as stop:
            QWEN_IMAGE.check(configs | {"vae": configs["vae"] | {name: numbers}}, "x")
        assert stop.value.cause.endswith(f"expected a number for each of its channels{end}")


def test_a_model_that_read_other_blocks_reads_its_own_again():
    model = load_model("random-sd35")
    own = [level.blocks for level in model.levels[:3]]
    other = model.reading(((1,), (2,), (3,)))
    assert [level.blocks for level in other.levels[:3]] == [(1,), (2,), (3,)] and other.levels[3] == model.levels[3]
    for again in (other.reading(()), other.reading(own)):
        assert again.blocks == () and again.levels == model.levels


def test_engines_serve_the_families_that_have_what_they_need():
    served = {
        backbone.name: [need for need in ("network", "export", "plans", "") if backbone.served_by(need)]
        for backbone in every_backbone()
    }
    assert served.pop("sd") == ["network", "export", "plans", ""]
    assert len(served) == 6 and all(needs == ["network", "export", ""] for needs in served.values())
    bare = replace(SD3, fast=None, network_plan="", text_network=None)
    assert not any(map(bare.served_by, ("network", "export", "plans"))) and bare.served_by("reference")
    with pytest.raises(TypeError, match="expected a tuple of library:class"):
        Part("vae", ("AutoencoderKL",))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("is_added", [False, True])
def test_shares_of_the_text_follow_every_mask_of_an_attention(rows, is_added):
    mask = torch.tensor([[True, False, True, True, True, True]]).repeat(2, 1, rows, 1)
    mask[1, 0, 0, 3] = False  # where queries have a mask each, that of a text token alone
    mask = mask.float().roll(1, 2) if is_added else mask.roll(1, 2)

    class Attention(torch.nn.Module):
        def forward(self, hidden_states):
            tokens = hidden_states[:, None]
            return F.scaled_dot_product_attention(tokens, tokens, values, attn_mask=mask)

    values = torch.eye(6).expand(2, 1, 6, 6)  # whose attention is the shares themselves
    attention = Attention()
    reader = AttentionReader([attention])
    reader.images, reader.image, reader.text = 1, slice(2, 6), slice(0, 2)
    with reader.reading():
        shares = attention(torch.randn(2, 6, 4))
    torch.testing.assert_close(reader.maps[attention], shares[1:, :, 2:, :2])


@pytest.mark.parametrize("is_added", [False, True])
def test_words_beside_a_text_leave_a_mask_of_every_query_as_it_was(is_added):
    tokens, words = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 2, 4)
    mask = (torch.arange(36).view(1, 1, 6, 6) % 5 > 0).float()
    mask = mask if is_added else mask.bool()
    wide = F.pad(mask, (0, 2, 0, 2), value=1)  # as a network makes it of a longer text, whose end the words are
    order = [0, 1, 6, 7, 2, 3, 4, 5]
    joined = torch.cat([tokens, words], 2)[:, :, order]
    with ConceptReader([0], 1, slice(4, 8), slice(2, 4)):
        found = F.scaled_dot_product_attention(joined, joined, joined, attn_mask=wide[:, :, order][..., order])
    expected = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)
    torch.testing.assert_close(torch.cat([found[:, :, :2], found[:, :, 4:]], 2), expected)
