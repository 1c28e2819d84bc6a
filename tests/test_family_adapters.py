"""Low-rank adapters of every family, in the names that trainers write, fused as W + scale * alpha / rank * B A."""

from importlib.util import find_spec

import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file

from datasetdm_fast.engine.loading import load_model, lora
from datasetdm_fast.errors import Refused

RANK = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> its tiny model, loaded when it is first needed."""
    folder, loaded = tmp_path_factory.mktemp("families"), {}

    def load(family):
        if family not in loaded:
            loaded[family] = load_model(str(tiny_pipelines.save(folder / family, family)), size=tiny_pipelines.SIZE)
        return loaded[family]

    return load


def adapter(module):
    """down, up and their product for a linear layer or a convolution."""
    high, wide, *window = module.weight.shape
    down, up = torch.randn(RANK, wide, *window), torch.randn(high, RANK, *([1] * len(window)))
    return down, up, (up.flatten(1) @ down.flatten(1)).view_as(module.weight)


def fuse(model, path, state, scale=1.0):
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return lora.fuse_adapters(model, [f"{path}:{scale}"])


def check(model, fused, changes):
    """Each part's weights are those before plus what is in `changes`, (part, layer) -> change."""
    for part, module in model.modules.items():
        after = fused.modules[part].state_dict()
        for name, value in module.state_dict().items():
            change = changes.pop((part, name.removesuffix(".weight")), 0) if name.endswith(".weight") else 0
            torch.testing.assert_close(after[name], value + change, rtol=1e-6, atol=1e-6)
    assert not changes


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_adapters_of_diffusers_are_fused_into_every_linear_layer(models, family, tmp_path):
    model = models(family)
    state, changes = {}, {}
    for part in (model.backbone.denoiser, *(["text_encoder_2"] if family in ("sdxl", "sd3") else [])):
        for name, layer in model.modules[part].named_modules():
            if isinstance(layer, torch.nn.Linear):
                down, up, product = adapter(layer)
                state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
                changes[part, name] = 0.5 * product
    check(model, fuse(model, tmp_path / "style.safetensors", state, 0.5), changes)


KOHYA = {  # family -> names of kohya's and other trainers' layers -> part and the layers that take its rows
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
            "unet",
            ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"],
        ),
        "lora_unet_middle_block_1_proj_in": ("unet", ["mid_block.attentions.0.proj_in"]),
        "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_0_proj": (
            "unet",
            ["up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"],
        ),
        "lora_unet_input_blocks_1_0_in_layers_2": ("unet", ["down_blocks.0.resnets.0.conv1"]),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder",
            ["encoder.layers.0.self_attn.q_proj"],
        ),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_encoder_2", ["encoder.layers.1.mlp.fc1"]),
    },
    "flux1": {
        "lora_unet_double_blocks_0_img_attn_qkv": (
            "transformer",
            [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        ),
        "lora_unet_single_blocks_1_linear2": ("transformer", ["single_transformer_blocks.1.proj_out"]),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder",
            ["encoder.layers.0.self_attn.q_proj"],
        ),
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj": (
            "text_encoder",
            ["encoder.layers.1.self_attn.out_proj"],
        ),
        "lora_te1_text_model_encoder_layers_1_mlp_fc2": ("text_encoder", ["encoder.layers.1.mlp.fc2"]),
    },
    "flux2-klein": {
        "lora_unet_double_blocks_0_img_attn_qkv": (
            "transformer",
            [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"],
        )
    },
    "z-image": {"diffusion_model.layers.0.attention.to_q": ("transformer", ["layers.0.attention.to_q"])},
    "qwen-image": {
        "lora_unet_transformer_blocks_0_attn_to_q": ("transformer", ["transformer_blocks.0.attn.to_q"]),
    },
}


@pytest.mark.parametrize("family", KOHYA)
def test_adapters_of_other_trainers_are_fused_where_their_names_say(models, family, tmp_path):
    model, state, changes = models(family), {}, {}
    for name, (part, places) in KOHYA[family].items():
        layers = [place_of(model.modules[part], place) for place in places]
        heights = [layer.weight.shape[0] for _, layer in layers]
        down, ups = adapter(layers[0][1])[0], [adapter(layer)[1] for _, layer in layers]
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
        assert sum(heights) == len(state[f"{name}.lora_up.weight"])
        for (place, layer), up in zip(layers, ups):
            changes[part, place] = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight) / RANK
    check(model, fuse(model, tmp_path / "style.safetensors", state), changes)


OTHERS = {  # family -> names of a layer's tensors by XLabs and by DiffSynth-Studio -> the layers that take its rows
    "flux1": (
        "double_blocks.1.processor.qkv_lora2.{}.weight",
        ("down", "up"),
        [f"add_{n}_proj" for n in "qkv"],
    ),
    "qwen-image": ("transformer_blocks.1.attn.to_k.lora_{}.default.weight", ("A", "B"), ["to_k"]),
}


@pytest.mark.parametrize("family", OTHERS)
def test_adapters_without_alpha_are_fused_where_diffusers_knows_their_names(models, family, tmp_path):
    model, (name, kinds, layers) = models(family), OTHERS[family]
    places = [f"transformer_blocks.1.attn.{layer}" for layer in layers]
    modules = [model.modules["transformer"].get_submodule(place) for place in places]
    down, ups = adapter(modules[0])[0], [adapter(module)[1] for module in modules]
    changes = {("transformer", place): up @ down for place, up in zip(places, ups, strict=True)}
    state = {name.format(kinds[0]): down, name.format(kinds[1]): torch.cat(ups)}
    check(model, fuse(model, tmp_path / "style.safetensors", state), changes)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("names", ("diffusers", "kohya"))
@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_fused_weights_are_those_that_diffusers_fuses(models, family, names, tmp_path):
    model, state = models(family), {}
    if names == "kohya":
        for name, (part, places) in KOHYA.get(family, {}).items():
            layers = [place_of(model.modules[part], place)[1] for place in places]
            down, up = adapter(layers[0])[0], torch.cat([adapter(layer)[1] for layer in layers])
            if part != "text_encoder":  # diffusers tells nobody's names by one layer of it
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                state[f"{name}.alpha"] = torch.tensor(1.0)
    else:
        part = model.backbone.denoiser
        for name, layer in model.modules[part].named_modules():
            if isinstance(layer, torch.nn.Linear):
                down, up, _ = adapter(layer)
                state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    if not state:
        return
    fused, stock = fuse(model, tmp_path / "style.safetensors", state, 0.5), tiny_pipelines.build(family)
    stock.load_lora_weights(str(tmp_path / "style.safetensors"))
    parts = [part for part in stock._lora_loadable_modules if getattr(stock, part, None) is not None]
    stock.fuse_lora(components=parts, lora_scale=0.5)
    stock.unload_lora_weights()
    for part, module in fused.modules.items():
        expected = getattr(stock, part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def place_of(module, ending):
    return next((name, layer) for name, layer in module.named_modules() if name.endswith(ending))


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_adapters_of_another_family_or_shape_are_refused_in_a_sentence(models, family, tmp_path):
    model, path = models(family), tmp_path / "bad.safetensors"
    part = model.backbone.denoiser
    name, layer = next((n, m) for n, m in model.modules[part].named_modules() if isinstance(m, torch.nn.Linear))
    down, up, _ = adapter(layer)
    pair = {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    other = "flux1" if family != "flux1" else "sdxl"
    kohya = {
        f"{next(iter(KOHYA[other]))}.{ending}": value
        for ending, value in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(1.0)))
    }
    for state in (
        {f"{part}.nowhere.lora_A.weight": down, f"{part}.nowhere.lora_B.weight": up},
        pair | {f"{part}.{name}.lora_A.weight": down[:, 1:]},
        {f"{part}.{name}.lora_A.weight": down},
        {**pair, f"{part}.{name}.dora_scale": up[:, 0]},
        {"text.weight": down},
        kohya,
    ):
        with pytest.raises(Refused, match=r"--lora .*bad.safetensors: "):
            fuse(model, path, state)
