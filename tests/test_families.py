"""Folders of every family through the commands: generating with decoders, resuming, licences, refusals."""

import copy
import inspect
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from skips import IS_LONG
from tiny_pipelines import SIZE
from transformers import AutoTokenizer

from datasetdm_fast import Pipeline, generate
from datasetdm_fast.data import Text
from datasetdm_fast.engine import backbones
from datasetdm_fast.engine.backbones import fitting, flux2_klein, sd
from datasetdm_fast.engine.backbones.flux1 import FLUX1
from datasetdm_fast.engine.backbones.flux2_klein import FLUX2_KLEIN
from datasetdm_fast.engine.backbones.qwen_image import QWEN_IMAGE
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.backbones.sdxl import SDXL
from datasetdm_fast.engine.backbones.z_image import Z_IMAGE
from datasetdm_fast.engine.decoders.checkpoint import save_decoder, seeded_decoders
from datasetdm_fast.engine.engines.fast.engine import resolve_precision
from datasetdm_fast.engine.loading import in_memory, load_model
from datasetdm_fast.engine.loading.folder import family_of, load_folder
from datasetdm_fast.engine.loading.model import ConfigFile
from datasetdm_fast.engine.loop import diffusing
from datasetdm_fast.engine.models import text_encoder
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.stages import LEVELS, Level

pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")

STEPS, NUMBER, PROMPT = 3, 3, "a photo of the cat"
# family -> sizes of its tiny pipeline, flags of generate, options of the stock pipeline's call
FAMILIES = {
    "sdxl": ({}, ["--guidance", "4"], {"guidance_scale": 4.0}),
    "sd3": ({}, ["--guidance", "4"], {"guidance_scale": 4.0}),
    "flux1": ({"is_dev": False}, [], {"max_sequence_length": 256}),
    "flux2-klein": ({}, [], {}),
    "z-image": ({}, ["--guidance", "2"], {"guidance_scale": 2.0}),
    "qwen-image": ({}, ["--guidance", "3"], {"true_cfg_scale": 3.0, "negative_prompt": ""}),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models by family and sizes, written once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def save(family, **sizes):
        key = family, *sorted(sizes.items())
        if key not in made:
            made[key] = tiny_pipelines.save(root / str(len(made)), family, **sizes)
        return made[key]

    return save


@pytest.fixture(scope="module")
def folders(family, saved, tmp_path_factory):
    """A model and decoders that fit it."""
    root = tmp_path_factory.mktemp(family)
    shutil.copytree(saved(family, **FAMILIES[family][0]), root / "model")
    model = load_model(str(root / "model"), size=SIZE)
    for task, decoder in seeded_decoders(model.levels, model.text_width).items():
        save_decoder(decoder, root / "decoders" / task)
    return root


def run(folders, family, name, *flags):
    out = folders / name
    line = ["--model", str(folders / "model"), "--decoder", str(folders / "decoders"), "--engine", "torch"]
    line += ["--size", str(SIZE), "--steps", str(STEPS), "--number", str(NUMBER), "--prompts", PROMPT, "--quiet"]
    assert generate.main([*line, *FAMILIES[family][1], *flags, "--out", str(out)]) == 0
    return out


def pictures(out):
    return [np.asarray(Image.open(out / "images" / f"{index:08d}.png")).astype(int) for index in range(NUMBER)]


def test_a_run_makes_the_images_of_the_stock_pipeline_and_goes_on_where_it_ended(folders, family):
    whole = run(folders, family, "whole", "--batch-size", "2")
    files = sorted(path.relative_to(whole) for path in whole.glob("*/*.png"))
    assert len(files) > 2 * NUMBER
    if IS_LONG or family == "sd3":  # what is left to do is counted without the model
        run(folders, family, "cut", "--batch-size", "2", "--limit", "2")
        cut = run(folders, family, "cut", "--batch-size", "2")
        for path in files:
            assert (whole / path).read_bytes() == (cut / path).read_bytes(), path

    alone = run(folders, family, "alone", "--batch-size", "1")
    for one, other in zip(pictures(whole), pictures(alone), strict=True):
        assert np.abs(one - other).max() <= 1

    pipeline = DiffusionPipeline.from_pretrained(folders / "model")
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS}
    options = sizes | FAMILIES[family][2]
    sampler = json.loads((whole / "run.json").read_text())["sampling"]["sampler"]
    assert sampler == ("ddim" if family == "sdxl" else "euler")
    for seed, picture in enumerate(pictures(whole)):
        generator = torch.Generator().manual_seed(seed)
        stock = pipeline(prompt=PROMPT, generator=generator, output_type="np", **options).images[0]
        assert np.abs(stock * 255 - picture).max() <= 1.01


@pytest.fixture(scope="module")
def foreign(saved, tmp_path_factory):
    """The folder of a decoder for wider models of a family."""

    @cache
    def written(family):
        model = load_model(str(saved(family, width=64)), size=SIZE)
        folder = tmp_path_factory.mktemp("decoders")
        save_decoder(seeded_decoders(model.levels, model.text_width)["depth"], folder / "depth")
        return folder

    return written


def test_a_decoder_of_another_family_is_refused(folders, foreign, family, tmp_path, capsys):
    line = ["--model", str(folders / "model"), "--engine", "torch", "--size", str(SIZE), "--task", "depth"]
    line += ["--prompts", PROMPT, "--decoder", str(foreign("sd3" if family != "sd3" else "sdxl"))]
    assert generate.main([*line, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.splitlines()
    assert "depth decoder" in message[-2] and "channels" in message[-2]
    assert message[-1] == (
        "Name the model that it was trained on (--model), or train one on this one; --labeller attention needs none."
    )


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, kind=Refused):
    with pytest.raises(kind) as caught:
        load_folder(folder, size=SIZE)
    return str(caught.value)


@pytest.mark.parametrize(
    "family, sizes, licence, is_commercial",
    [
        ("sdxl", {}, "sai-nc-community", False),
        ("sd3", {}, "stabilityai-ai-community", True),
        ("flux1", {"is_dev": True}, "flux-1-dev-non-commercial-license", False),
        ("flux1", {"is_dev": False}, "apache-2.0", True),
        ("flux2-klein", {}, "apache-2.0", True),
        ("z-image", {}, "apache-2.0", True),
        ("qwen-image", {}, "apache-2.0", True),
    ],
)
def test_a_licence_that_forbids_commercial_use_is_named_before_the_first_image(
    saved, family, sizes, licence, is_commercial
):
    from datasetdm_fast.command_line.run_report import describe_model

    model = load_folder(saved(family, **sizes), size=SIZE)
    assert model.licence == licence
    assert ("NOT FOR COMMERCIAL USE" in describe_model(model)) != is_commercial


@pytest.mark.parametrize(
    ("record", "part", "sizes", "licence"),
    [
        (FLUX2_KLEIN, "transformer", {"num_attention_heads": 24}, "apache-2.0"),  # klein 4B
        (FLUX2_KLEIN, "transformer", {"num_attention_heads": 32}, "flux-non-commercial-license"),  # 9B
        (SDXL, "unet", {"sample_size": 64}, "sai-nc-community"),  # Turbo
        (SDXL, "unet", {"sample_size": 128}, "openrail++"),
    ],
)
def test_published_models_of_a_family_are_told_apart_by_their_sizes(record, part, sizes, licence):
    assert record.licence({part: SimpleNamespace(**sizes)}) == licence


DEV = {"transformer": {"guidance_embeds": True}}
TURBO = {"unet": {"sample_size": 64}, "scheduler": {"timestep_spacing": "trailing"}}


@pytest.mark.parametrize(
    ("record", "changes", "sampled", "tokens", "guided", "latents"),
    [
        (SD, {}, (512, 50, 5.0), 77, "cfg", (4, 8, 0.18215, 0.0)),
        (SD, {"unet": {"sample_size": 96}}, (768, 50, 5.0), 77, "cfg", (4, 8, 0.18215, 0.0)),
        (SDXL, {}, (1024, 50, 5.0), 77, "cfg", (4, 8, 0.13025, 0.0)),
        (SDXL, TURBO, (512, 4, 1.0), 77, "cfg", (4, 8, 0.13025, 0.0)),
        (SDXL, {"scheduler": {"_class_name": "LCMScheduler"}}, (1024, 4, 1.0), 77, "cfg", (4, 8, 0.13025, 0.0)),
        (SDXL, {"unet": {"time_cond_proj_dim": 256}}, (1024, 50, 5.0), 77, "embedded", (4, 8, 0.13025, 0.0)),
        (SD3, {}, (1024, 28, 7.0), 77 + 256, "cfg", (16, 8, 1.5305, 0.0609)),
        (SD3, {"model_index": {"max_sequence_length": 77}}, (1024, 28, 7.0), 154, "cfg", (16, 8, 1.5305, 0.0609)),
        (FLUX1, {}, (1024, 4, 0.0), 256, "none", (16, 8, 0.3611, 0.1159)),  # schnell
        (FLUX1, DEV, (1024, 28, 3.5), 512, "embedded", (16, 8, 0.3611, 0.1159)),
        (FLUX2_KLEIN, {}, (1024, 4, 1.0), 512, "none", None),
        (FLUX2_KLEIN, {"model_index": {"is_distilled": False}}, (1024, 50, 4.0), 512, "cfg", None),
        (Z_IMAGE, {}, (1024, 8, 0.0), 512, "cfg", (16, 8, 0.3611, 0.1159)),  # Turbo
        (Z_IMAGE, {"scheduler": {"shift": 6.0}}, (1024, 50, 5.0), 512, "cfg", (16, 8, 0.3611, 0.1159)),
    ],
)
def test_models_are_sampled_as_they_were_published(record, changes, sampled, tokens, guided, latents):
    parts = {**record.full_size, "model_index": record.full_size.get("model_index", {})}
    configs = {part: ConfigFile({**config, **changes.get(part, {})}) for part, config in parts.items()}
    usual = record.defaults(configs)
    assert (usual.size, usual.steps, usual.guidance) == sampled
    assert usual.capture == (0 if record in (SD, SDXL) else 500)  # upstream's, and half of a flow
    assert (record.text(configs)[0], record.guidance(configs)) == (tokens, guided)
    if latents:
        space = record.latents(configs)
        assert (space.channels, space.pixels, space.scale, space.shift) == latents


def test_the_card_of_a_folder_tells_its_licence(saved, tmp_path):
    folder = copy_of(saved("flux1", is_dev=False), tmp_path)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n")
    assert load_folder(folder, size=SIZE).licence == "flux-1-dev-non-commercial-license"


def test_a_missing_second_text_encoder_is_refused(saved, tmp_path):
    folder = copy_of(saved("sdxl"), tmp_path)
    shutil.rmtree(folder / "text_encoder_2")
    assert "no text_encoder_2" in refused(folder) and "Stable Diffusion XL" in refused(folder)


def test_pipelines_that_are_not_served_are_refused(saved, tmp_path):
    folder = copy_of(saved("sd3"), tmp_path)
    for name in ("FluxKontextPipeline", "KolorsPipeline", "StableDiffusionXLInpaintPipeline"):
        change(folder / "model_index.json", _class_name=name)
        assert f"holds a {name};" in refused(folder) and "supported are" in refused(folder)


def test_parts_of_other_kinds_of_models_are_refused(saved, tmp_path):
    folder = copy_of(saved("flux1", is_dev=True), tmp_path)
    change(folder / "transformer" / "config.json", in_channels=96)
    assert "edits images" in refused(folder)
    folder = shutil.copytree(saved("sdxl"), tmp_path / "other")
    change(folder / "unet" / "config.json", down_block_types=["CrossAttnDownBlock2D"] * 3)
    assert "down_block_types" in refused(folder)


@pytest.mark.parametrize(
    "family, part, values, said",
    [
        ("sd3", "vae", {"scaling_factor": 0}, "the vae's scaling_factor is 0, expected a number above 0"),
        ("flux1", "vae", {"shift_factor": [1]}, "the vae's shift_factor is [1], expected a number"),
        ("flux2-klein", "vae", {"block_out_channels": [8, 16, 16]}, "a latent cell of the vae is 4 x 4 pixels"),
        ("qwen-image", "vae", {"dim_mult": [1, 2, 2, 2, 2]}, "a latent cell of the vae is 16 x 16 pixels"),
        ("sd3", "scheduler", {"shift": "x"}, "the scheduler's shift is 'x', expected a number"),
        ("sd3", "scheduler", {"shift": None}, "the scheduler's shift is None, expected a number"),
        ("sdxl", "scheduler", {"_class_name": None}, "the scheduler's _class_name is None, expected text"),
        ("sd3", "scheduler", {"_class_name": ["x"]}, "the scheduler's _class_name is ['x'], expected text"),
        ("sdxl", "text_encoder_2", {"eos_token_id": [0, 0]}, "text_encoder_2's eos_token_id is [0, 0], expected a"),
        ("sdxl", "unet", {"norm_eps": [0, 0]}, "the unet's norm_eps is [0, 0], expected a value such as 1e-05"),
        ("sdxl", "unet", {"act_fn": "gelu"}, "the unet's act_fn is 'gelu' where 'silu' is expected"),
        ("sdxl", "unet", {"center_input_sample": True}, "the unet's center_input_sample is True where False is"),
        ("sdxl", "unet", {"mid_block_scale_factor": 2}, "the unet's mid_block_scale_factor is 2 where 1 is expected"),
        ("sdxl", "unet", {"downsample_padding": 0}, "the unet's downsample_padding is 0 where 1 is expected"),
        ("sdxl", "unet", {"timestep_post_act": "silu"}, "the unet's timestep_post_act is 'silu' where None is"),
        ("sdxl", "vae", {"act_fn": "relu"}, "the vae's act_fn is 'relu' where 'silu' is expected"),
        ("qwen-image", "transformer", {"use_layer3d_rope": True}, "use_layer3d_rope is True where False is expected"),
        ("qwen-image", "transformer", {"use_additional_t_cond": True}, "t_cond is True where False is expected"),
        ("qwen-image", "transformer", {"patch_size": 1}, "the transformer's patch_size is 1 where 2 is expected"),
        ("flux1", "transformer", {"patch_size": 2}, "the transformer's patch_size is 2 where 1 is expected"),
        ("flux2-klein", "transformer", {"patch_size": 2}, "the transformer's patch_size is 2 where 1 is expected"),
        ("sd3", "transformer", {"caption_projection_dim": 64}, "caption_projection_dim is 64 where 32 is expected"),
        ("sdxl", "unet", {"norm_num_groups": 1.5}, "the unet's norm_num_groups is 1.5, expected a value such as 32"),
        (
            "sdxl",
            "unet",
            {"reverse_transformer_layers_per_block": [1, 1, 1]},
            "reverse_transformer_layers_per_block is",
        ),
        ("sd3", "transformer", {"qk_norm": "layer_norm"}, "the transformer's qk_norm is 'layer_norm' where None is"),
        ("sd3", "vae", {"down_block_types": {}}, "the vae's down_block_types is {}, expected a value such as ("),
        ("sdxl", "scheduler", {"beta_start": None}, "the scheduler's beta_start is None, expected a number"),
        ("qwen-image", "scheduler", {"base_shift": None}, "the scheduler's base_shift is None, expected a number"),
        ("flux1", "scheduler", {"max_image_seq_len": None}, "the scheduler's max_image_seq_len is None, expected a n"),
        ("sd3", "text_encoder", {"eos_token_id": None}, "the text_encoder's eos_token_id is None, expected a value"),
        ("sdxl", "text_encoder_2", {"layer_norm_eps": None}, "the text_encoder_2's layer_norm_eps is None, expected"),
        ("sdxl", "text_encoder", {"num_attention_heads": -4}, "the setting 'num_attention_heads' is -4, expected 1"),
        ("z-image", "text_encoder", {"rms_norm_eps": None}, "the text_encoder's rms_norm_eps is None, expected a"),
        ("qwen-image", "text_encoder", {"text_config": None}, "the text_encoder's text_config is None, expected a"),
        ("qwen-image", "text_encoder", {"text_config": {"rope_parameters": None}}, "rope_parameters is None, expected"),
        ("sdxl", "unet", {"attention_head_dim": True}, "the unet's attention_head_dim is True, expected a value such"),
        ("sdxl", "unet", {"transformer_layers_per_block": 0}, "transformer_layers_per_block is 0, expected 1 or more"),
        ("sdxl", "unet", {"transformer_layers_per_block": [0, 1, 0]}, "_per_block is [0, 1, 0], expected 1 or more of"),
        ("flux1", "text_encoder_2", {"relative_attention_max_distance": 8}, "max_distance' is 8, expected 9 or more"),
        ("flux1", "text_encoder_2", {"relative_attention_num_buckets": 0}, "_num_buckets' is 0, expected 4 or more"),
        ("qwen-image", "vae", {"latents_mean": None}, "the vae's latents_mean is None, expected a number for each"),
        ("qwen-image", "vae", {"latents_std": [1.0] * 3}, "the vae's latents_std is [1.0, 1.0, 1.0], expected a"),
        ("qwen-image", "vae", {"latents_std": [1, 1, 0, 1]}, "the vae's latents_std is [1, 1, 0, 1], expected a"),
        ("sd3", "vae", {"scaling_factor": None}, "the vae's scaling_factor is None, expected a value such as 0.18215"),
        ("sdxl", "vae", {"norm_num_groups": -1}, "the setting 'norm_num_groups' is -1, expected 1 or more"),
        ("sd3", "tokenizer_2", {"pad_token": None}, "tokenizer_2: the tokenizer's pad_token is None, expected one"),
        ("sd3", "tokenizer", {"model_max_length": "x"}, "the tokenizer's model_max_length is 'x', expected a number"),
        ("sdxl", "tokenizer", {"model_max_length": None}, "tokenizer's model_max_length is 1000000000000000019884624"),
        ("sd3", "", {"tokenizer_3": [None, None]}, "has a text_encoder_3, and no tokenizer_3"),
        ("flux1", "", {"vae": "AutoencoderKL"}, "model_index.json says 'AutoencoderKL' of its vae, expected a library"),
        ("flux1", "", {"vae": ["diffusers"]}, "model_index.json says ['diffusers'] of its vae, expected a library"),
        ("flux1", "scheduler", {"num_train_timesteps": 0}, "steps, shift or shift_terminal are out of range"),
        ("z-image", "scheduler", {"shift_terminal": 1}, "steps, shift or shift_terminal are out of range"),
        ("sdxl", "unet", {"freq_shift": "x"}, "the unet's freq_shift is 'x', expected a value such as 0"),
        (
            "z-image",
            "transformer",
            {"rope_theta": "x"},
            "rope_theta is 'x', expected a value such as 256.0",
        ),
        (
            "flux1",
            "transformer",
            {"axes_dims_rope": "x"},
            "axes_dims_rope is 'x', expected a value such as (16,",
        ),
        ("flux1", "transformer", {"axes_dims_rope": [4, 4]}, "axes_dims_rope is [4, 4], expected a value such as (16,"),
        (
            "qwen-image",
            "transformer",
            {"axes_dims_rope": [4, 4, 4]},
            "axes_dims_rope is [4, 4, 4], expected a value such",
        ),
        (
            "flux2-klein",
            "transformer",
            {"rope_theta": [9, 9]},
            "the transformer's rope_theta is [9, 9], expected a value",
        ),
        ("z-image", "transformer", {"axes_lens": [0, 9, 9]}, "setting 'axes_lens' is [0, 9, 9], expected 1 or more"),
        ("z-image", "transformer", {"n_layers": 0}, "the setting 'n_layers' is 0, expected 1 or more"),
        ("sd3", "transformer", {"pos_embed_max_size": 0}, "the setting 'pos_embed_max_size' is 0, expected 1 or more"),
        ("flux1", "transformer", {"axes_dims_rope": None}, "axes_dims_rope is None, expected a value such as (16,"),
        ("flux1", "transformer", {"axes_dims_rope": 4}, "axes_dims_rope is 4, expected a value such as (16,"),
        ("flux1", "transformer", {"num_layers": 0}, "the setting 'num_layers' is 0, expected 1 or more"),
        ("sdxl", "text_encoder", {"num_hidden_layers": 0}, "the setting 'num_hidden_layers' is 0, expected 1 or more"),
        ("sdxl", "text_encoder", {"intermediate_size": 40}, "do not fit its config.json (tensors of other shapes)"),
        ("sdxl", "unet", {"freq_shift": []}, "the unet's freq_shift is [], expected a value such as 0"),
        ("sdxl", "unet", {"attention_head_dim": [2, -4, 8]}, "'attention_head_dim' is [2, -4, 8], expected 1 or more"),
        ("sdxl", "unet", {"addition_time_embed_dim": None}, "addition_time_embed_dim is None, expected a whole"),
        ("sdxl", "unet", {"freq_shift": None}, "the unet's freq_shift is None, expected a value such as 0"),
        ("flux1", "transformer", {"num_single_layers": 1}, "tensors of layers that its config.json omits"),
        ("z-image", "text_encoder", {"num_hidden_layers": 2, "layer_types": None}, "that its config.json omits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(saved, tmp_path, family, part, values, said):
    folder = copy_of(saved(family), tmp_path)
    change(next((folder / part).glob("*config.json" if part else "model_index.json")), **values)
    assert said in refused(folder)


@pytest.mark.parametrize("family", ["sd3", "flux1"])
def test_a_tokenizer_of_clip_may_go_by_the_name_of_its_fast_class(saved, tmp_path, family):
    folder = copy_of(saved(family), tmp_path)
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
    theirs = DiffusionPipeline.from_pretrained(folder).tokenizer
    tokenizer = load_folder(folder, size=SIZE).loaded_tokenizers["tokenizer"]
    assert tokenizer(PROMPT).input_ids == theirs(PROMPT).input_ids


@pytest.mark.parametrize("sections", [None, {}, [1, 1, 1], [1, 1.0, 2], [16, 24, 24]])
def test_sections_of_a_head_that_do_not_fill_it_are_refused(saved, tmp_path, sections):
    path = copy_of(saved("qwen-image"), tmp_path) / "text_encoder" / "config.json"
    text = json.loads(path.read_text())["text_config"]
    rope = text["rope_parameters"] | {"mrope_section": sections}
    if sections == [16, 24, 24]:  # what the library takes for none
        del rope["mrope_section"]
    change(path, text_config=text | {"rope_parameters": rope})
    said = f"mrope_section is {sections}, expected whole numbers whose sum is half a head, 4"
    assert said in refused(path.parents[1])


def test_parts_of_different_models_are_refused(saved, tmp_path):
    folder = copy_of(saved("sd3"), tmp_path)
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(folder / name)
        shutil.copytree(saved("sd3", text=64) / name, folder / name)
    assert "pooled text of width" in refused(folder)


def test_a_tokenizer_larger_than_its_text_encoder_is_refused(saved, tmp_path, family):
    for path in saved(family).glob("tokenizer*"):
        folder = shutil.copytree(saved(family), tmp_path / path.name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens([f"<{k}>" for k in range(500)])
        tokenizer.save_pretrained(folder / path.name)
        encoder = path.name.replace("tokenizer", "text_encoder")
        assert f"the tokenizer of the {encoder} has {len(tokenizer)} entries" in refused(folder)


def test_a_folder_without_an_index_is_of_the_family_whose_parts_it_has(saved, tmp_path, family):
    for part in saved(family).iterdir():
        if part.name != "model_index.json":
            (tmp_path / part.name).symlink_to(part)
    assert family_of(tmp_path).name == family
    if family == "sd3":
        model = load_folder(tmp_path, size=SIZE)
        assert "text_encoder_3" in model.networks and "tokenizer_3" in model.loaded_tokenizers
    if family == "sdxl":
        for name in ("text_encoder_2", "tokenizer_2"):
            (tmp_path / name).unlink()
        assert family_of(tmp_path) is SD


def test_code_of_a_model_is_not_run(saved, tmp_path):
    folder = copy_of(saved("z-image"), tmp_path)
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert "auto_map" in refused(folder)
    change(folder / "model_index.json", _class_name=["pipeline_own", "OwnPipeline"])
    assert "its pipeline is code of its own" in refused(folder)


def test_requests_that_a_family_cannot_serve_are_refused_in_a_sentence(folders, family, tmp_path, capsys):
    line = ["--model", str(folders / "model"), "--decoder", str(folders / "decoders"), "--size", str(SIZE)]
    line += ["--prompts", PROMPT, "--task", "depth", "--out", str(tmp_path / "run")]
    for flags, code, words in (
        (["--engine", "torch", "--dtype", "fp16"], 2, ("fp32 reference", "another engine")),
        (["--engine", "fast", "--dtype", "fp16"], 2, ("fp16", "--dtype bf16")),
        (["--dtype", "fp16", "--engine", "ort"], 2, ("fp16's range", "Use fp32")),
        (["--engine", "torch", "--size", "72"], 2, ("multiple of",)),
        (["--engine", "torch", "--lora", "adapter.safetensors"], 3, ("no such file",)),
        (["--engine", "torch", "--guidance", "1", "--negative-prompt", "rain"], 2, ("no negative prompt", "Drop it")),
    ):
        serves_narrow = family == "sdxl" and flags[-1] == "ort"
        if serves_narrow or family in ("sdxl", "z-image") and flags[-1] == "rain":
            continue  # what they serve
        assert generate.main([*line, *flags]) == code, flags
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("family", "most"), [("sd3", 240), ("z-image", 512)])
def test_images_larger_than_a_models_positions_are_refused_before_weights_are_read(saved, tmp_path, family, most):
    folder = copy_of(saved(family), tmp_path)
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(Refused, match=f"at most {most} pixels a side, {most + 64} were") as caught:
        load_model(str(folder), size=most + 64)
    assert f"--size {most} or less" in str(caught.value)


def test_a_gated_model_is_not_downloaded_unasked():
    with pytest.raises((Missing, Refused)) as caught:
        load_model("black-forest-labs/FLUX.1-dev")
    assert "--allow-download" in str(caught.value)


def test_parts_of_a_model_that_do_not_belong_together_are_refused():
    config, tokenizer = SimpleNamespace(vocab_size=10), range(11)
    backbone = SimpleNamespace(
        of_kind=lambda kind: ("text_encoder", "text_encoder_2"),
        text_widths=lambda configs: {"a text": (8, 8)},
        check_fit=lambda model: None,
    )
    configs = {"text_encoder": SimpleNamespace(text_config=config)}
    model = SimpleNamespace(name="x", backbone=backbone, configs=configs, loaded_tokenizers={"tokenizer": tokenizer})
    with pytest.raises(Refused, match="the tokenizer of the text_encoder has 11 entries, it knows 10"):
        fitting.check_fit(model)
    config.vocab_size = 11
    fitting.check_fit(model)
    read = max(flux2_klein.READ_LAYERS)
    config.num_hidden_layers = read - 1
    model.configs |= {"text_encoder": config}
    with pytest.raises(Refused, match=f"the text encoder has {read - 1} layers, and the states of layer {read}"):
        flux2_klein._check_fit(model)
    config.num_hidden_layers = read
    flux2_klein._check_fit(model)


def settings(**parts):
    return {name: SimpleNamespace(**values) if name != "model_index" else values for name, values in parts.items()}


WIDTHS = {  # family -> configs that fit together, and settings of which one more does not, with what is said
    "sd": (
        settings(unet={"cross_attention_dim": 5}, text_encoder={"hidden_size": 5}),
        {"text_encoder.hidden_size": "text of width 5, the encoders give 6"},
    ),
    "sdxl": (
        settings(
            unet={
                "cross_attention_dim": 11,
                "projection_class_embeddings_input_dim": 7 + 6 * 4,
                "addition_time_embed_dim": 4,
            },
            text_encoder={"hidden_size": 5},
            text_encoder_2={"hidden_size": 6, "projection_dim": 7},
        ),
        {
            "text_encoder.hidden_size": "text of width 11, the encoders give 12",
            "text_encoder_2.hidden_size": "text of width 11, the encoders give 12",
            "text_encoder_2.projection_dim": "pooled text of width 7, the encoders give 8",
            "unet.addition_time_embed_dim": "pooled text of width 1, the encoders give 7",
        },
    ),
    "sd3": (
        settings(
            transformer={"joint_attention_dim": 8, "pooled_projection_dim": 11},
            text_encoder={"projection_dim": 5},
            text_encoder_2={"projection_dim": 6},
            text_encoder_3={"d_model": 8},
        ),
        {
            "text_encoder.projection_dim": "pooled text of width 11, the encoders give 12",
            "text_encoder_2.projection_dim": "pooled text of width 11, the encoders give 12",
            "text_encoder_3.d_model": "text of width 8, the encoders give 9",
        },
    ),
    "flux1": (
        settings(
            transformer={"joint_attention_dim": 8, "pooled_projection_dim": 6},
            text_encoder={"hidden_size": 6},
            text_encoder_2={"d_model": 8},
        ),
        {
            "text_encoder.hidden_size": "pooled text of width 6, the encoders give 7",
            "text_encoder_2.d_model": "text of width 8, the encoders give 9",
        },
    ),
    "flux2-klein": (
        settings(transformer={"joint_attention_dim": 24}, text_encoder={"hidden_size": 8, "num_hidden_layers": 27}),
        {"text_encoder.hidden_size": "text of width 24, the encoders give 27"},
    ),
    "z-image": (
        settings(transformer={"cap_feat_dim": 5}, text_encoder={"hidden_size": 5}),
        {"text_encoder.hidden_size": "text of width 5, the encoders give 6"},
    ),
    "qwen-image": (
        settings(
            transformer={"joint_attention_dim": 16},
            text_encoder={
                "hidden_size": 16,
                "num_attention_heads": 2,
                "rope_parameters": {"mrope_section": [1, 1, 2]},
            },
        ),
        {"transformer.joint_attention_dim": "text of width 17, the encoders give 16"},
    ),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_text_is_as_wide_as_a_denoiser_reads_it(name):
    (configs, wrong), backbone = WIDTHS[name], next(each for each in backbones.every_backbone() if each.name == name)
    model = SimpleNamespace(name="x", backbone=replace(backbone, parts={}), configs=configs)
    fitting.check_fit(model)
    for place, said in wrong.items():
        part, setting = place.split(".")
        more = SimpleNamespace(**{**vars(configs[part]), setting: getattr(configs[part], setting) + 1})
        model.configs = configs | {part: more}
        with pytest.raises(Refused, match=f"model: x: the denoiser reads {said}, so"):
            fitting.check_fit(model)


def test_the_levels_of_transformers_lie_where_their_tokens_do():
    """By hand, of 8 blocks: low reads 3 and 4, mid 2, high 6."""

    def coarse(side, width, heads, tokens):
        blocks = (3, 4), (2,), (6,)
        return [
            Level(name, side, (width,) * len(read), (heads,) * len(read), tokens, 1, read)
            for name, read in zip(LEVELS, blocks)
        ]

    sizes = {"num_attention_heads": 3, "attention_head_dim": 5, "patch_size": 4, "joint_attention_dim": 9}
    two = settings(
        transformer=sizes | {"num_layers": 8, "in_channels": 20, "guidance_embeds": False},
        text_encoder={"max_position_embeddings": 7},
        model_index={"max_sequence_length": 9},
    )
    one = settings(transformer=sizes | {"num_layers": 3, "num_single_layers": 5, "in_channels": 20})
    one["transformer"].guidance_embeds = True
    thin = settings(transformer={"n_layers": 8, "dim": 15, "n_heads": 3, "in_channels": 20, "cap_feat_dim": 9})
    for record, configs, side, channels, tokens in (
        (SD3, two, 8, 20, 16),  # tokens of 4 x 4 cells
        (SD3, two | {"model_index": {}}, 8, 20, 263),
        (FLUX1, one, 16, 5, 512),
        (FLUX2_KLEIN, one, 16, 5, 512),
        (Z_IMAGE, thin, 16, 20, 512),
        (QWEN_IMAGE, two, 16, 5, 512),
    ):
        configs |= settings(vae={"z_dim" if record is QWEN_IMAGE else "latent_channels": channels})
        expected = (*coarse(side, 15, 3, tokens), Level("highest", 32, (channels,), (), tokens, 1))
        assert record.levels(configs, 256, 2) == expected, record.name
        assert record.blocks(configs) == 8 and record.text(configs) == (tokens, 9)


def test_a_record_of_another_package_is_asked_for_the_calls_that_its_labels_need(monkeypatch):
    calls, asked = dict.fromkeys(("encode", "predict", "capturing", "decode", "encode_image")), []
    maps, deep = ("predict_and_average",), ("predict_and_keep", "predict_from")

    def load_place(place):
        asked.append(place)
        return SimpleNamespace(**calls)

    monkeypatch.setattr(backbones, "load_place", load_place)
    monkeypatch.setattr(backbones.PIPELINES, "package", lambda pipeline: "foreign 1.0")
    places = {"reference": "a:R", "fast": "b:F", "network_plan": "c:P", "text_network": "d:T"}
    plain = replace(SD3, has_averages=False, has_text_maps=False, has_deep_features=False, **places)
    record = backbones._check_record("Mine", plain)
    assert record.package == "foreign 1.0" and asked == list(places.values())
    for flag, needed in (("has_averages", maps), ("has_text_maps", maps), ("has_deep_features", deep)):
        with pytest.raises(TypeError, match=f"^a:R has no {', '.join(sorted(needed))}$"):
            backbones._check_record("Mine", replace(plain, **{flag: True}))
    levels = tuple(Level(name, 2, (4,), (), 7) for name in LEVELS)
    assert backbones._check_levels(levels) is levels
    for wrong in (levels[::-1], levels[1:], (*levels[:-1], "highest")):
        with pytest.raises(TypeError, match="expected a Level for each of low, mid, high, highest"):
            backbones._check_levels(wrong)


OTHER_FORMS = (  # settings by which a U-Net of the same shapes would be another
    "in_channels _class_name out_channels down_block_types up_block_types mid_block_type transformer_layers_per_block "
    "act_fn dual_cross_attention only_cross_attention attention_type resnet_time_scale_shift center_input_sample "
    "downsample_padding mid_block_scale_factor addition_embed_type class_embed_type encoder_hid_dim "
    "encoder_hid_dim_type num_class_embeds reverse_transformer_layers_per_block cross_attention_norm "
    "time_embedding_act_fn timestep_post_act time_cond_proj_dim time_embedding_type conv_in_kernel conv_out_kernel "
    "class_embeddings_concat"
).split()


def test_networks_of_stable_diffusion_have_one_form():
    vae = {"block_out_channels": [8] * 4}
    sd.check_network("unet", {}, "x")
    sd.check_network("vae", vae | {"act_fn": "swish", "layers_per_block": 1}, "x")
    for part, names, config in (
        ("unet", OTHER_FORMS, {}),
        ("vae", ("_class_name", "latent_channels", "act_fn"), vae),
        ("unet", ("layers_per_block",), {}),
    ):
        for name in names:
            with pytest.raises(Refused, match=f"model: x: the {part}'s {name} is "):
                sd.check_network(part, config | {name: "other"}, "x")
    for channels, kind in ((9, "an inpainting model"), (8, "an image-editing model")):
        with pytest.raises(Refused, match=f"its unet reads {channels} channels, as {kind} does"):
            sd.check_network("unet", {"in_channels": channels}, "x")
    old = {"_diffusers_version": "0.1", "clip_sample": True, "steps_offset": 0, "beta_end": 0.5}
    read = {"text_encoder": {"hidden_size": 3, "own": 1}, "unet": {"sample_size": 512}, "vae": vae, "scheduler": old}
    found = sd.check_configs(read, "x")
    assert found["scheduler"] == {"steps_offset": 1, "clip_sample": False, "beta_end": 0.5}
    assert found["text_encoder"] == {"hidden_size": 3}
    for side in (0, 513, "64", None):
        with pytest.raises(Refused, match="the UNet's sample_size is .*, expected a number up to 512"):
            sd.check_configs(read | {"unet": {"sample_size": side}}, "x")


def test_a_setting_is_of_the_kind_of_its_supported_values():
    supported = {"padding": (1, [1, 1]), "is_dual": (False,), "act_fn": ("silu", "swish"), "embedding": (None,)}
    for settings in ({}, {"padding": [1, 1]}, {"act_fn": "swish", "embedding": None, "is_dual": False}, {"more": 3}):
        fitting.check_settings({"unet": settings}, "x", "unet", supported)
    for name, value in (("padding", True), ("padding", [1]), ("is_dual", True), ("act_fn", None), ("embedding", 0)):
        with pytest.raises(Refused, match=re.escape(f"model: x: the unet's {name} is {value!r} where ")):
            fitting.check_settings({"unet": {name: value}}, "x", "unet", supported)


def test_a_pipeline_without_one_of_its_parts_is_refused():
    pipe = type("StableDiffusionPipeline", (), {"unet": object(), "vae": object()})()
    with pytest.raises(Refused, match="StableDiffusionPipeline has no .*text_encoder.*scheduler; supported"):
        in_memory.model_of(pipe)


@pytest.mark.parametrize("forces", [True, False, None])
def test_a_model_of_two_encoders_may_zero_the_text_of_empty_prompts(forces):
    index = {} if forces is None else {"force_zeros_for_empty_prompt": forces}
    model = SimpleNamespace(configs={"model_index": index})
    text = Text(torch.ones(2, 3, 4), torch.ones(2, 5))
    found = text_encoder.PairedPromptEncoder.after(model, ["a ball", ""], text)
    assert found.context[0].all() and found.pooled[0].all()
    assert bool(found.context[1].any()) is bool(found.pooled[1].any()) is (forces is False)


@pytest.mark.parametrize(("dtype", "said"), [("half", "'half' is none of auto"), ("tf32", "a CPU has no TF32")])
def test_precisions_that_a_cpu_does_not_have_are_refused(dtype, said):
    with pytest.raises(Refused, match=f"dtype: .*{said}"):
        resolve_precision(dtype, torch.device("cpu"))


def test_a_model_without_the_schedule_that_it_was_trained_with_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved("sdxl"), tmp_path / "model")
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(Refused, match=r"has no scheduler \(scheduler/scheduler_config.json is missing\)"):
        load_model(str(folder))
    (folder / "scheduler").rmdir()
    with pytest.raises(Refused, match="has no scheduler") as refusal:
        load_model(str(folder))
    assert refusal.value.remedy == "Add the folder scheduler of the same model."


def images_of(pipeline, **choices):
    """Latents of two prompts from seeded noise, by the arguments of diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 2)]
    given = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "latent", **choices}
    return pipeline(prompt=[PROMPT, "a dog"], generator=generators, **given).images


@pytest.fixture(scope="module")
def paired():
    """A tiny pipeline of diffusers and ours of its weights, by family."""

    @cache
    def make(family, **sizes):
        theirs = tiny_pipelines.build(family, **sizes)
        return theirs, Pipeline.from_diffusers(theirs, engine="torch", device="cpu", size=SIZE)

    return make


@pytest.mark.parametrize("negative", [None, "", "fog", ["fog", ""]])
def test_an_empty_negative_prompt_that_is_given_is_encoded_as_in_diffusers(paired, negative):
    theirs, ours = paired("sdxl")  # which has zeros for a negative prompt that is left out
    given = [negative] * 2 if isinstance(negative, str) else negative
    expected = images_of(theirs, negative_prompt=given)
    found = images_of(ours.diffuse, negative_prompt=negative, tasks=())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "scale"), [("z-image", "guidance_scale"), ("qwen-image", "true_cfg_scale")])
def test_ends_of_lines_and_blanks_of_a_prompt_are_read_as_in_diffusers(paired, family, scale):
    theirs, ours = paired(family)
    texts = {"prompt": [" a photo\nof  the cat", "a dog "], "negative_prompt": [" ", "fog\n"], "num_inference_steps": 2}

    def images(call, **choices):
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 2)]
        given = {**copy.deepcopy(texts), "height": SIZE, "width": SIZE, "output_type": "np", **choices}
        return call(generator=generators, **given).images

    expected, found = images(theirs, **{scale: 6.0}), images(ours.diffuse, guidance_scale=6.0, tasks=())
    assert np.abs(expected - found).max() * 255 <= 1.01


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_guidance_and_steps_that_a_call_leaves_out_are_those_of_the_stock_pipeline(paired, family):
    theirs, ours = paired(family)
    torch.testing.assert_close(images_of(ours.diffuse, tasks=()), images_of(theirs), atol=1e-4, rtol=1e-4)
    defaults = inspect.signature(theirs.__call__).parameters
    steps, guidance = (defaults[name].default for name in ("num_inference_steps", "guidance_scale"))
    assert diffusing.fill_sampling(ours.engine.model, None, None) == (0, 0.0)
    assert (ours.engine.model.defaults.steps, ours.engine.model.defaults.guidance) == (steps, guidance)


def test_stable_diffusion_takes_the_steps_and_guidance_of_its_pipeline_and_others_their_own():
    defaults = inspect.signature(StableDiffusionPipeline.__call__).parameters
    steps, guidance = (defaults[name].default for name in ("num_inference_steps", "guidance_scale"))
    assert diffusing.fill_sampling(load_model("tiny"), None, None) == (steps, guidance)
    assert diffusing.fill_sampling(load_model("tiny"), 3, 2.0) == (3, 2.0)


@pytest.mark.parametrize("guidance", [0.5, 1.0])
def test_the_prompt_alone_counts_at_a_guidance_up_to_one_though_decoders_read_both_halves(paired, guidance):
    theirs, ours = paired("sdxl")
    expected = images_of(theirs, guidance_scale=guidance, output_type="np")
    for negative in ("", "fog"):
        generated = ours([PROMPT, "a dog"], [7, 2], steps=2, guidance=guidance, negative_prompt=negative, tasks=())
        assert np.abs(np.stack(generated.images) - expected * 255).max() <= 1.01
        assert generated.meta[0]["guidance"] == guidance
    features = [ours.features(prompt=PROMPT, timestep=300, steps=3, guidance=each) for each in (guidance, 1.0)]
    for first, second in zip(*(each.values() for each in features), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_a_model_that_reads_its_guidance_reads_what_is_given(paired, guidance):
    theirs, ours = paired("flux1")
    sides, images = {"output_type": "np", "guidance_scale": guidance}, []
    for make, choices in ((theirs, {}), (ours.diffuse, {"tasks": ()})):
        images.append(np.asarray(images_of(make, **sides, **choices)))
    assert np.abs(images[0] - images[1]).max() * 255 <= 1.01


def test_a_model_without_guidance_needs_none_named(paired):
    theirs, ours = paired("flux1", is_dev=False)
    images = [
        np.asarray(images_of(make, output_type="np", **choices))
        for make, choices in ((theirs, {"max_sequence_length": 256}), (ours.diffuse, {"tasks": ()}))
    ]
    assert np.abs(images[0] - images[1]).max() * 255 <= 1.01
