"""Models of each family in one file in the layout of the original code, with folders of what it does not hold."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusionXLPipeline
from safetensors.torch import save_file
from test_loading import original_open_clip, original_unet_key, original_vae

from datasetdm_fast import convert
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.loading import folder, load_model, single_file
from datasetdm_fast.errors import Refused

PREFIX = "model.diffusion_model."


def write(folder, family, state, *held):
    """A tiny pipeline's folder in which a file stands in the place of the weights of these parts."""
    tiny_pipelines.save(folder, family)
    for part in held:
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "style.safetensors")
    return folder / "style.safetensors"


def check(path, family, seed=0):
    """That each part of the file's model has the weights of the pipeline."""
    model, pipeline = load_model(str(path), size=tiny_pipelines.SIZE), tiny_pipelines.build(family, seed)
    assert model.backbone.name == family and "file" in model.digests
    index = json.loads((path.parent / "model_index.json").read_text())
    told = {name for name in index if name[0] != "_"}.difference(model.backbone.parts)
    assert model.index == {name: index[name] for name in told}
    for part, module in model.modules.items():
        theirs = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in module.state_dict().items()), part


def test_a_file_of_sdxl_with_two_text_encoders(tmp_path):
    parts = tiny_pipelines.build("sdxl")
    second = {name.removeprefix("text_model."): value for name, value in parts.text_encoder_2.state_dict().items()}
    projection = second.pop("text_projection.weight")
    state = {f"{PREFIX}{unet_key(name)}": value for name, value in parts.unet.state_dict().items()}
    state |= {f"first_stage_model.{name}": value for name, value in original_vae(parts.vae.state_dict()).items()}
    first = "conditioner.embedders.0.transformer.text_model."
    state |= {f"{first}{name}": value for name, value in parts.text_encoder.state_dict().items()}
    state[f"{first}embeddings.position_ids"] = torch.arange(tiny_pipelines.TOKENS)[None]
    clip = original_open_clip(second, 3)
    clip = {name: value for name, value in clip.items() if "resblocks.3." not in name}
    clip["text_projection"] = projection.T
    state |= {f"conditioner.embedders.1.model.{name}": value for name, value in clip.items()}
    path = write(tmp_path / "model", "sdxl", state, "unet", "vae", "text_encoder", "text_encoder_2")
    check(path, "sdxl")
    assert convert.main([str(path), "--to", "diffusers", "--out", str(tmp_path / "new"), "--quiet"]) == 0
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "new", local_files_only=True)
    check_noise_of_a_file(path, state)
    beside = "conditioner.embedders.1.model.text_projection"  # as transformers have it where it ends with weight
    save_file({name: v.contiguous().clone() for name, v in state.items() if name != beside}, path)
    with pytest.raises(Refused, match="missing: text_projection.weight") as caught:
        load_model(str(path))
    assert caught.value.remedy == folder.MATCHING  # the file's own config.json lies there
    weight = {f"{beside}.weight": projection}
    save_file({name: v.contiguous().clone() for name, v in (state | weight).items() if name != beside}, path)
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert torch.equal(model.modules["text_encoder_2"].state_dict()["text_projection.weight"], projection)
    shutil.rmtree(path.parent / "unet")
    with pytest.raises(Refused, match="unet: .* tensors do not fit the config of Stable Diffusion XL") as caught:
        load_model(str(path))
    assert caught.value.remedy.startswith("Put the config.json of the same model's unet into a folder unet")


def check_noise_of_a_file(path, state):
    """That a file tells what its U-Net predicts, or before it the configuration, where no schedule lies beside it."""
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert model.scheduler["prediction_type"] == "epsilon" and "prediction" not in model.digests
    path.with_suffix(".yaml").unlink()
    shutil.rmtree(path.parent / "scheduler")
    marked = {name: value.contiguous().clone() for name, value in state.items()} | {"v_pred": torch.zeros(1)}
    save_file(marked, path)
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert model.scheduler["prediction_type"] == "v_prediction" and "prediction" not in model.digests
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert model.scheduler["prediction_type"] == model.digests["prediction"] == "epsilon"
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")  # as the file says, too
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert model.scheduler["prediction_type"] == "v_prediction" and "prediction" not in model.digests
    path.with_suffix(".yaml").unlink()


def test_a_file_notes_what_its_unet_predicts():
    mark, noted = {"v_pred": torch.zeros(1)}, {"modelspec.prediction_type": "v"}

    def schedule(*given):
        return single_file._noted_schedule(Path("a"), *given)

    predicted = {"prediction_type": "v_prediction"}
    assert schedule({}, {}) == {} and schedule(mark, {}) == schedule({}, noted) == predicted
    plain = {"prediction_type": "epsilon"}
    assert schedule(mark, {"modelspec.prediction_type": "epsilon"}) == plain
    assert schedule(mark | {"ztsnr": torch.zeros(1)}, {}) == predicted | {"rescale_betas_zero_snr": True}
    with pytest.raises(Refused, match=r"a holds edm_mean, and models of that noise \(EDM\) are not sampled here"):
        schedule({"edm_mean": torch.zeros(4)}, {})


def unet_key(name):
    for new, old in (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2")):
        name = name.replace(new, old)
    return name if name.startswith("label_emb") else original_unet_key(name)


def original_sd3(state, layers, dual):
    """A transformer's tensors as the original code names them, which has one product for queries, keys and values."""
    result = {"pos_embed": state["pos_embed.pos_embed"]}
    ends = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        **{f"t_embedder.mlp.{2 * k}": f"time_text_embed.timestep_embedder.linear_{k + 1}" for k in (0, 1)},
        **{f"y_embedder.mlp.{2 * k}": f"time_text_embed.text_embedder.linear_{k + 1}" for k in (0, 1)},
    }
    swapped = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    fused, norms = {}, {}
    for k in range(layers):
        new, old, is_last = f"transformer_blocks.{k}.", f"joint_blocks.{k}.", k == layers - 1
        for side, place, query, key, value, out in (
            ("x_block.attn", "attn", "to_q", "to_k", "to_v", "to_out.0"),
            ("context_block.attn", "attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *([("x_block.attn2", "attn2", "to_q", "to_k", "to_v", "to_out.0")] if k in dual else []),
        ):
            fused[f"{old}{side}.qkv"] = [f"{new}{place}.{name}" for name in (query, key, value)]
            added = "added_" if side.startswith("context") else ""
            norms |= {f"{old}{side}.ln_{n}.weight": f"{new}{place}.norm_{added}{n}.weight" for n in "qk"}
            if not (is_last and added):
                ends[f"{old}{side}.proj"] = f"{new}{place}.{out}"
        ends[f"{old}x_block.adaLN_modulation.1"] = f"{new}norm1.linear"
        (swapped if is_last else ends)[f"{old}context_block.adaLN_modulation.1"] = f"{new}norm1_context.linear"
        for side, place in (("x_block", "ff"), *([] if is_last else [("context_block", "ff_context")])):
            ends |= {f"{old}{side}.mlp.fc1": f"{new}{place}.net.0.proj", f"{old}{side}.mlp.fc2": f"{new}{place}.net.2"}
    for kind in ("weight", "bias"):
        result |= {f"{name}.{kind}": state[f"{place}.{kind}"] for name, place in ends.items()}
        for name, place in swapped.items():
            result[f"{name}.{kind}"] = torch.cat(state[f"{place}.{kind}"].chunk(2)[::-1])
        for name, places in fused.items():
            result[f"{name}.{kind}"] = torch.cat([state[f"{place}.{kind}"] for place in places])
    return result | {name: state[place] for name, place in norms.items() if place in state}


@pytest.mark.parametrize(("width", "layers", "is_second"), [(768, 12, False), (1024, 24, True)])
def test_the_text_encoder_of_a_single_file_has_the_published_form(width, layers, is_second):
    """Stable Diffusion 2 reads the states before the last of 24 layers."""
    config = transformers.CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width)
    with torch.device("meta"):
        state = transformers.CLIPTextModel(config).state_dict()
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    if is_second:
        state = {
            "token_embedding.weight": state["embeddings.token_embedding.weight"],
            "positional_embedding": state["embeddings.position_embedding.weight"],
            "transformer.resblocks.0.mlp.c_fc.weight": state["encoder.layers.0.mlp.fc1.weight"],
            **{f"transformer.resblocks.{k}.ln_1.weight": torch.empty(width) for k in range(layers)},
        }
    start = single_file.OPEN_CLIP if is_second else single_file.CLIP
    read, is_of_second = single_file._text_config({start + key: value for key, value in state.items()}, Path("a"))
    assert is_of_second is is_second and read.num_attention_heads == width // 64
    assert (read.hidden_size, read.intermediate_size, read.vocab_size) == (width, 4 * width, 49408)
    assert (read.num_hidden_layers, read.max_position_embeddings) == (layers - is_second, 77)


@pytest.mark.parametrize(("layers", "side", "dual"), [(24, 192, ()), (38, 192, ()), (24, 384, tuple(range(13)))])
def test_the_form_of_an_sd3_is_read_off_its_file(layers, side, dual):
    """Of SD 3 medium, 3.5 large and 3.5 medium."""
    sizes = {"caption_projection_dim": 64 * layers, "pos_embed_max_size": side, "dual_attention_layers": dual}
    sizes |= {"qk_norm": "rms_norm" if (layers, side) != (24, 192) else None, "num_attention_heads": layers}
    with torch.device("meta"):
        wanted = SD3Transformer2DModel(num_layers=layers, attention_head_dim=64, **sizes).state_dict()
        config = SD3.full_size["transformer"] | SD3.file_config(original_sd3(wanted, layers, dual))
        found = SD3Transformer2DModel(**config).state_dict()
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}


def test_a_file_of_sd3_with_its_clips(tmp_path):
    parts = tiny_pipelines.build("sd3")
    state = {f"{PREFIX}{name}": v for name, v in original_sd3(parts.transformer.state_dict(), 2, (0,)).items()}
    state |= {f"first_stage_model.{name}": value for name, value in original_vae(parts.vae.state_dict()).items()}
    for part, start in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        module = getattr(parts, part).state_dict()
        module.pop("encoder.embed_tokens.weight", None)  # which is the shared table, and in no such file
        state |= {f"text_encoders.{start}.transformer.{name}": value for name, value in module.items()}
    held = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    path = write(tmp_path / "model", "sd3", state, *held)
    check(path, "sd3")
    index = json.loads((path.parent / "model_index.json").read_text())
    (path.parent / "model_index.json").write_text(json.dumps(index | {"_class_name": "Other", "own": 3}))
    (path.parent / "README.md").write_text("---\nlicense: mit\n---\n")  # of the folder, as its index is
    model = load_model(str(path), size=tiny_pipelines.SIZE)
    assert model.index == {} and model.licence == "stabilityai-ai-community"
    shutil.rmtree(path.parent / "scheduler")
    assert load_model(str(path), size=tiny_pipelines.SIZE).scheduler["shift"] == 3.0  # that of the usual model
    shutil.rmtree(path.parent / "tokenizer_3")
    with pytest.raises(Refused, match="needs also tokenizer_3") as caught:
        load_model(str(path))
    assert "\n" not in caught.value.cause


def test_tensors_that_begin_as_no_part_does_are_those_of_the_denoiser_alone():
    backbone = SimpleNamespace(denoiser="net", file_parts={"net": "model.", "vae": "vae."})
    state = {"vae.a": 1, "blocks.0": 2, "x_embedder": 3}
    assert single_file._parts_of(state, backbone) == {"net": {"blocks.0": 2, "x_embedder": 3}, "vae": {"vae.a": 1}}
    assert single_file._parts_of({"model.b": 4}, backbone) == {"net": {"model.b": 4}}


def test_files_of_a_transformer_alone_are_read_with_the_folders_beside_them(tmp_path):
    parts = tiny_pipelines.build("z-image")
    names = {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder", "to_out.0": "out"}
    names |= {"norm_k": "k_norm", "norm_q": "q_norm"}
    state = {}
    for name, value in parts.transformer.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = value
    for name in [name for name in state if name.endswith("to_q.weight")]:
        rows = [state.pop(name.replace("to_q", f"to_{each}")) for each in "qkv"]
        state[name.replace("to_q", "qkv")] = torch.cat(rows)
    path = write(tmp_path / "z-image", "z-image", state, "transformer")
    check(path, "z-image")
    state = tiny_pipelines.build("qwen-image").transformer.state_dict()
    path = write(tmp_path / "qwen-image", "qwen-image", state, "transformer")
    check(path, "qwen-image")
    config_file = path.parent / "transformer" / "config.json"
    config = config_file.read_text()
    config_file.write_text(json.dumps(json.loads(config) | {"out_channels": -1}))
    with pytest.raises(Refused, match="its transformer is not laid out as that of Qwen-Image .Trying to create"):
        load_model(str(path))
    shutil.rmtree(config_file.parent)
    with pytest.raises(Refused, match="holds the transformer of Qwen-Image, and needs also transformer/config.json"):
        load_model(str(path))
    config_file.parent.mkdir()
    config_file.write_text(config)
    check(path, "qwen-image")
    narrow = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    save_file(narrow, path)
    with pytest.raises(Refused, match="weights of 8 bits"):
        load_model(str(path))


FLUX2 = {  # names of diffusers' transformer -> those of the original code
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out.weight": "linear2.weight",
}


def test_a_file_of_flux_2_klein_whose_names_begin_as_those_of_a_whole_model(tmp_path):
    state = tiny_pipelines.build("flux2-klein").transformer.state_dict()
    for name in [name for name in state if name.endswith(("attn.to_q.weight", "attn.add_q_proj.weight"))]:
        rows = [state.pop(name.replace("_q", f"_{each}")) for each in "qkv"]
        stream = "txt_attn" if "add" in name else "img_attn"
        state[f"{name.partition('attn.')[0]}{stream}.qkv.weight"] = torch.cat(rows)
    named = {}
    for name, value in state.items():
        place = "" if name.startswith("single_t") else "img_attn."
        for which, key in (("q", "query"), ("k", "key")):
            name = name.replace(f"attn.norm_{which}.weight", f"{place}norm.{key}_norm.scale")
        value = torch.cat(value.chunk(2)[::-1]) if name.startswith("norm_out") else value
        for new, old in FLUX2.items():
            name = name.replace(new, old) if name.startswith(new) or f".{new}" in name else name
        name = name.replace("single_transformer_blocks", "single_blocks").replace("transformer_blocks", "double_blocks")
        named[f"{PREFIX}{name}"] = value
    check(write(tmp_path / "model", "flux2-klein", named, "transformer"), "flux2-klein")


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("FLUX.1", ("double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight")),
        ("FLUX.2 klein", ("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight")),
        ("Stable Diffusion 3 and 3.5", ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight")),
    ],
)
def test_a_file_alone_is_refused_by_what_it_needs(tmp_path, title, names):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=f"holds the transformer of {title}, and needs also .*vae") as caught:
        load_model(str(tmp_path / "model.safetensors"))
    assert "\n" not in caught.value.cause


def test_a_file_of_flux_dev_needs_the_schedule_of_dev(tmp_path):
    path = write(tmp_path / "model", "flux1", {"double_blocks.0": torch.zeros(2), "vector_in.0": torch.zeros(2)})
    with pytest.raises(Refused, match="its transformer is not laid out as that of FLUX.1"):
        load_model(str(path), size=tiny_pipelines.SIZE)
    shutil.rmtree(path.parent / "scheduler")
    with pytest.raises(Refused, match="has no scheduler") as caught:
        load_model(str(path), size=tiny_pipelines.SIZE)
    assert caught.value.remedy == "Add the folder scheduler of the same model."
