"""Loading: what is supported loads with equal weights, everything else is refused by name."""

import hashlib
import json
import logging
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_unets import with_small_unet
from transformers import CLIPTextConfig, CLIPTextModel

from datasetdm_fast.config import DEMO_DEFAULTS, SCHEDULERS, TASKS
from datasetdm_fast.engine.backbones import ANOTHER, OWN_MODELS, check_source, every_backbone, fitting, pipeline_of
from datasetdm_fast.engine.backbones.adapter_files import parse_adapter
from datasetdm_fast.engine.backbones.flow_models import DEMO_DIT_DEFAULTS
from datasetdm_fast.engine.backbones.sd import DOWN_BLOCKS, SD, SD_SCHEDULER, UP_BLOCKS, USUAL_SCHEDULE
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import PRESETS, load_model, lora, presets, saving, single_file, tokenizer
from datasetdm_fast.engine.loading import folder as model_folder
from datasetdm_fast.engine.loading.folder import download_model
from datasetdm_fast.engine.loading.model import (
    UNKNOWN_LICENCE,
    ConfigFile,
    Model,
    Network,
    ReadOnce,
    digest,
    folder_licence,
)
from datasetdm_fast.engine.loading.single_file import predicts_noise
from datasetdm_fast.engine.models.layers import Weights
from datasetdm_fast.engine.models.text_encoder import TextEncoder
from datasetdm_fast.engine.sampling.schedule import make_schedule
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import pickles
from datasetdm_fast.untrusted.tensors import check_finite


def pipeline(model, **parts) -> StableDiffusionPipeline:
    parts = {
        "vae": model.modules["vae"],
        "text_encoder": model.modules["text_encoder"],
        "tokenizer": model.tokenizers["tokenizer"],
        "unet": model.modules["unet"],
        **parts,
    }
    scheduler = PNDMScheduler.from_config({**model.scheduler, **parts.pop("scheduler", {})})
    return StableDiffusionPipeline(
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


@pytest.fixture(scope="module")
def tiny():
    return with_small_unet(load_model("tiny"))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def change(path: Path, **settings) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **settings}))


# Presets --------------------------------------------------------------------------------------------------------------


def test_tiny_is_seeded_and_leaves_the_global_generator_alone():
    tiny = load_model("tiny")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = load_model("tiny")
    assert torch.equal(torch.rand(1), expected)
    assert all(same_weights(tiny.modules[part], again.modules[part]) for part in ("unet", "vae", "text_encoder"))
    assert not any(parameter.requires_grad for part in tiny.modules.values() for parameter in part.parameters())
    assert not any(part.training for part in tiny.modules.values())
    assert (
        tiny.size == 128 and [level.side for level in tiny.levels] == [2, 4, 8, 16] and "seeded" in tiny.digests["unet"]
    )


def test_every_preset_is_known_before_torch_is_imported():
    assert tuple(PRESETS) == OWN_MODELS


def test_size_follows_the_wish():
    assert load_model("tiny", size=64).levels[-1].side == 8
    for size in (100, -64, 63):
        with pytest.raises(Refused, match=f"size: {size}"):
            load_model("tiny", size=size)


def test_the_largest_size_that_is_told_is_one_that_is_taken():
    fitting.check_size(64, 64, 100)
    with pytest.raises(Refused, match="at most 100 pixels a side") as stop:
        fitting.check_size(128, 64, 100)
    assert stop.value.remedy == "Use --size 64 or less."


def test_an_offset_of_the_steps_is_one_of_them():
    config = {"num_train_timesteps": 10, "beta_schedule": "linear"}
    fitting.check_scheduler(config | {"steps_offset": 9}, "config")
    with pytest.raises(Refused, match="steps, steps_offset or betas are out of range"):
        fitting.check_scheduler(config | {"steps_offset": 10}, "config")


def test_numbers_of_a_config_have_bounds():
    """Each number that is still taken, and the next one."""
    buckets, distance = fitting.BUCKETS, fitting.DISTANCE
    for taken, refused, told in (
        ({"num_layers": 128}, {"num_layers": 129}, "'num_layers' is 129, expected numbers of at most 128"),
        ({"num_layers": 1}, {"num_layers": 0}, "'num_layers' is 0, expected 1 or more"),
        ({"width": 2**20}, {"width": 2**20 + 1}, "expected numbers of at most 1048576"),
        ({"width": -(2**20)}, {"width": -(2**20) - 1}, "expected numbers of at most 1048576"),
        ({"widths": [3] * 128}, {"widths": [3] * 129}, "expected numbers of at most"),
        ({"widths": [3, 4]}, {"widths": [[3]]}, "expected numbers of at most"),
        ({"axes_lens": (1, 1)}, {"axes_lens": (1, 0)}, "'axes_lens' is .*, expected 1 or more"),
        ({"inner": {"num_heads": 1}}, {"inner": {"num_heads": 0}}, "'num_heads' is 0, expected 1 or more"),
        ({"transformer_layers_per_block": 0}, {"transformer_layers_per_block": -1}, "is -1, expected 0 or more"),
        ({buckets: 4}, {buckets: 3}, "is 3, expected 4 or more"),
        ({buckets: 12, distance: 4}, {buckets: 12, distance: 3}, "is 3, expected 4 or more"),
        ({distance: 9}, {distance: 8}, "is 8, expected 9 or more"),
    ):
        fitting.check_bounds(taken, Path("unet"))
        with pytest.raises(Refused, match=f"model: unet: the setting .*{told}"):
            fitting.check_bounds(refused, Path("unet"))
    with pytest.raises(Refused, match="at most 128, and no lists of them\nName such a model"):  # as SSD-1B has
        fitting.check_bounds({"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, Path("unet"))


def test_settings_of_a_schedule_have_bounds():
    """Each that is still taken, and the next one, of schedules of betas and of flows."""
    betas, flow = {"beta_schedule": "linear"}, {"use_dynamic_shifting": True}
    for is_flow, taken, refused, told in (
        (False, betas | {"num_train_timesteps": 100_000}, betas | {"num_train_timesteps": 100_001}, "out of range"),
        (False, betas | {"trained_betas": [0.1]}, betas | {"trained_betas": []}, "out of range"),
        (False, betas | {"beta_start": 1e-9}, betas | {"beta_start": 0.0}, "out of range"),
        (False, betas | {"beta_end": 0.999}, betas | {"beta_end": 1.0}, "out of range"),
        (False, {"trained_betas": [0.1]}, {"trained_betas": None}, "has no beta_schedule"),
        (False, {"trained_betas": [0.1], "beta_start": None}, betas | {"beta_start": None}, "beta_start is None"),
        (False, betas | {"set_alpha_to_one": None}, betas | {"set_alpha_to_one": 1}, "set_alpha_to_one is 1"),
        (False, betas | {"steps_offset": 0}, betas | {"steps_offset": -1}, "out of range"),
        (True, {"num_train_timesteps": 100_000}, {"num_train_timesteps": 100_001}, "out of range"),
        (True, {"shift": 1e-9}, {"shift": 0.0}, "out of range"),
        (True, {"shift_terminal": 0.99}, {"shift_terminal": 1.0}, "out of range"),
        (True, {"shift_terminal": None}, {"shift_terminal": -0.1}, "out of range"),
        (True, {"max_shift": None}, flow | {"max_shift": None}, "max_shift is None"),
    ):
        fitting.check_scheduler(taken, "model", is_flow=is_flow)
        with pytest.raises(Refused, match=told):
            fitting.check_scheduler(refused, "model", is_flow=is_flow)
    for size, nearest in ((1, 64), (100, 128), (95, 64)):
        with pytest.raises(Refused, match=f"{size} is not a positive multiple of 64") as stop:
            fitting.check_size(size, 64)
        assert stop.value.remedy == f"Try --size {nearest}; 0 takes what the model was made for."


def test_demo_loads_or_says_how_to_make_it(monkeypatch, tmp_path):
    if presets.DEMO.is_dir():
        model = load_model("demo")
        assert model.name == "demo" and model.size == 128 and model.modules["unet"].dtype == torch.float32
        assert model.licence != UNKNOWN_LICENCE
    monkeypatch.setattr("datasetdm_fast.engine.loading.folder.DEMO", tmp_path / "nowhere")
    with pytest.raises(Missing, match="demo model is not there"):
        load_model("demo")


def test_the_fast_engine_reads_networks_that_no_module_holds(tiny, tmp_path):
    model = load_model("tiny")
    engine = build_engine("fast", model, device="cpu")
    assert all(network._module is None for network in model.networks.values())
    assert engine.weight_distance() == 0
    source = model.networks["vae"].read()
    name = "decoder.conv_in.weight"
    assert (
        torch.equal(source.state_dict()[name], tiny.modules["vae"].state_dict()[name])
        and name not in source.state_dict()
    )
    assert model.modules["unet"] is model.modules["unet"] and model.networks["unet"].changes == 0
    model.modules["unet"].conv_out.weight.mul_(2)
    assert model.networks["unet"].changes == 1 and engine.weight_distance() > 0.4


def test_whether_a_weight_was_changed_is_asked_without_a_search_for_weights(monkeypatch):
    """As engines ask before every call: to find the 676 weights of the demo takes 1.7 ms."""
    module = torch.nn.Linear(2, 3)
    module.config = {}
    network = Network.of(module)
    monkeypatch.setattr(torch.nn.Module, "parameters", None)
    assert network.changes == 0
    module.bias.mul_(2)
    network.unload()
    assert network.changes == 1 and network.is_built


def test_a_folder_called_like_a_preset_is_named_by_its_path(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "tiny")
    assert load_model("./tiny").name == "./tiny" and load_model("tiny/").name == "tiny/" and not capsys.readouterr().err
    assert load_model("tiny").source == "preset tiny" and "--model ./tiny" in capsys.readouterr().err


def test_a_fast_engine_reads_weights_for_what_is_made_of_them_alone():
    engine = build_engine("fast", load_model("tiny"), device="cpu")
    absent = [name for name in ("widest", "_repr_html_", "network") if not hasattr(engine, name)]
    assert len(absent) == 3 and "unet" not in vars(engine)
    assert engine.side_by_side  # which depends on them
    assert engine.label_dtype == torch.float32 and "unet" in vars(engine)


def test_a_parameter_is_the_very_tensor_that_is_read_once_and_a_copy_of_any_other():
    value = torch.ones(2, 3)
    (given,), (copied,) = ([Weights(state).parameter("a")] for state in (ReadOnce({"a": value}), {"a": value}))
    assert given.data_ptr() == value.data_ptr() != copied.data_ptr()


def test_a_network_of_a_module_in_memory_is_that_module_again_once_it_was_unloaded():
    module = torch.nn.Linear(2, 3)
    module.config = {}
    network = Network.of(module)
    network.unload()
    assert network.changes == 0
    assert (
        not network.is_built and network.numel() == 9 and torch.equal(network.read().state_dict()["bias"], module.bias)
    )
    assert network.module is module


def test_a_network_that_is_built_again_lies_where_it_was_placed():
    module = torch.nn.Linear(2, 3)
    module.config = {}
    network = Network.of(module, lambda: torch.nn.Linear(2, 3))
    network.place(torch.device("meta"))  # as a GPU
    assert network.module.weight.is_meta
    network.unload()
    assert network.module.weight.is_meta and network.module is not module


def test_an_image_of_the_demo_model_needs_neither_other_libraries_nor_a_compiler():
    """Each would take longer to import than the networks take for the image; nor does a model of seeded weights."""
    code = (
        "import sys; from datasetdm_fast.engine.engines import open_engine; open_engine(device='cpu'); "
        "open_engine('tiny', tasks=['depth']); "
        "sys.exit(', '.join({'diffusers', 'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("random-sd35", [77, 77, 256]), ("random-flux", [77, 256]), ("random-klein", [512]), ("random-zimage", [512])],
)
def test_models_of_seeded_weights_cut_texts_where_their_families_do(name, lengths):
    model = load_model(name, size=512)
    assert [each.model_max_length for each in model.tokenizers.values()] == lengths
    assert model.tokenizer.model_max_length == (77 if name == "random-sd35" else lengths[-1])
    assert model.image_tokens == 32**2  # of 2 x 2 latent cells of 8 pixels
    seeded = {part: f"seeded: {name}, seed {model.backbone.seed + k}" for k, part in enumerate(model.networks)}
    assert {part: model.digests[part] for part in seeded} == seeded


def test_a_seeded_network_is_of_unit_gain_and_tells_its_size_and_its_most_pixels():
    model = load_model("tiny")
    network, vae = (model.networks[part] for part in ("unet", "vae"))
    state = network.read().state_dict()
    assert network.numel() == sum(value.numel() for value in state.values())
    assert float(state["down_blocks.0.resnets.0.conv1.weight"].flatten(1).norm(dim=1).mean()) == pytest.approx(1, 0.1)
    told = int(model.digests["vae"].rpartition("seed ")[2])
    assert same_weights(vae.module, presets.seed_network("vae", vae.config, told).module)
    with pytest.raises(Refused, match="positions for images of at most 8192 pixels a side, 8208 were"):
        load_model("random-zimage", size=8208)


def test_norms_of_random_models_are_near_one_and_biases_near_zero():
    draw = presets.Seeded(0)
    for name, mean in (("norm1.weight", 1), ("norm1.bias", 0), ("running_var", 1), ("conv.bias", 0)):
        drawn = draw(name, torch.empty(4096))
        assert abs(float(drawn.mean()) - mean) < 0.01 and float(drawn.std()) == pytest.approx(0.02, rel=0.05)


def test_the_tokenizer_of_the_demo_model_gives_the_ids_of_transformers():
    model, chance = load_model("demo"), random.Random(0)
    texts = ["", "A  Red\tBALL, and it's <|endoftext|> it", "a " * 90 + "b", "x" * 400]
    texts += ["".join(chance.choices("abc AB\u00e4\u00fc0129.,!?'\n\u2603\u6f22<|>", k=40)) for _ in range(300)]
    theirs, given = model.tokenizers["tokenizer"], {"padding": "max_length", "max_length": 77, "truncation": True}
    assert len(model.tokenizer) == len(theirs) and model.tokenizer.model_max_length == theirs.model_max_length
    assert model.tokenizer(texts).input_ids == theirs(texts).input_ids
    assert model.tokenizer(texts[1]).input_ids == theirs(texts[1]).input_ids
    ours, truth = (one(texts, **given, return_tensors="pt").input_ids for one in (model.tokenizer, theirs))
    assert torch.equal(ours, truth) and torch.equal(model.token_ids(texts), truth)


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_of_its_family_without_its_index_too(folder):
    assert model_folder.family_of(folder) is SD
    (folder / "model_index.json").unlink()
    assert model_folder.family_of(folder) is SD


def test_folder_gives_back_what_was_saved(tiny, saved):
    model = load_model(str(saved))
    assert all(same_weights(tiny.modules[part], model.modules[part]) for part in SD.networks)
    assert model.tokenizer(["a red ball"]).input_ids == tiny.tokenizer(["a red ball"]).input_ids
    assert model.levels == tiny.levels and model.defaults.size == 128 and model.defaults.steps == 50
    assert {key: model.scheduler[key] for key in SD_SCHEDULER} == SD_SCHEDULER
    assert (
        set(model.digests) == {"tokenizer", "text_encoder", "unet", "vae", "scheduler"}
        and model.licence == UNKNOWN_LICENCE
    )
    (saved / "tokenizer" / ".DS_Store").write_bytes(b"of a file manager")
    assert load_model(str(saved)).digests == model.digests
    (saved / "tokenizer" / ".DS_Store").unlink()


@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16"}, {"variant": "bf16"}, {"safe_serialization": False}],
    ids=["fp16 files only", "bf16 files only", "pickles only"],
)
@pytest.mark.usefixtures("pickles_are_read_by_forks")
def test_other_weight_files_load(tiny, tmp_path, options):
    pipeline(tiny).save_pretrained(tmp_path / "model", **options)
    assert same_weights(load_model(str(tmp_path / "model")).modules["unet"], tiny.modules["unet"])


@pytest.mark.usefixtures("pickles_are_read_by_forks")
def test_a_pickle_of_a_text_encoder_and_tensors_of_no_layer_load(tiny, folder):
    path = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"logvar": torch.zeros(1)}, path)
    model = load_model(str(folder))
    assert all(same_weights(model.modules[part], tiny.modules[part]) for part in ("text_encoder", "vae"))
    scale = "decoder.conv_in.weight_scale"
    save_file(state | {scale: torch.ones(())}, path)
    with pytest.raises(Refused, match=f"weights of 8 bits and their scales, the first is {scale}"):
        load_model(str(folder))
    deeper = "decoder.up_blocks.0.resnets.7.conv1.bias"
    save_file(state | {"logvar": torch.zeros(1), deeper: torch.zeros(16)}, path)
    with pytest.raises(Refused, match=f"1 tensor of layers that its config.json omits, the first is {deeper}"):
        load_model(str(folder))


@pytest.mark.usefixtures("pickles_are_read_by_forks")
def test_pickles_in_several_files_load(tiny, folder):
    for part, name in (("text_encoder", "pytorch_model"), ("unet", "diffusion_pytorch_model")):
        (path,) = (folder / part).glob("*.safetensors")
        state, places = load_file(path), {}
        for k in range(2):
            places |= dict.fromkeys(sorted(state)[k::2], f"{name}-0000{k + 1}-of-00002.bin")
        for file in set(places.values()):
            torch.save({key: state[key] for key, place in places.items() if place == file}, path.with_name(file))
        path.with_name(f"{name}.bin.index.json").write_text(json.dumps({"weight_map": places}))
        path.unlink()
    model = load_model(str(folder))
    assert all(same_weights(model.modules[part], tiny.modules[part]) for part in ("text_encoder", "unet"))
    assert model.digests["unet"] == digest(sorted((folder / "unet").glob("*.bin")))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_other_names_are_told_and_load_under_the_name_that_the_remedy_gives(tiny, folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    other = path.rename(path.with_name("model.non_ema.safetensors"))
    with pytest.raises(Refused, match=f"{part} holds model.non_ema.safetensors, none of which") as told:
        load_model(str(folder))
    assert "rename one that holds all of its weights" in told.value.remedy
    for name in re.findall(r"\w+\.safetensors", told.value.remedy):
        other = other.rename(other.with_name(name))
    assert same_weights(load_model(str(folder)).modules[part], tiny.modules[part])


def test_a_link_to_weights_that_are_gone_is_told(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/0")
    with pytest.raises(Refused, match="diffusion_pytorch_model.safetensors cannot be read .No such file"):
        load_model(str(folder))


def test_half_weights_load_without_a_bar_of_the_libraries(tiny, saved, folder, capsys):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tiny.modules["unet"].save_pretrained(folder / "unet", variant="fp16")
    capsys.readouterr()
    assert same_weights(load_model(str(folder)).modules["unet"], tiny.modules["unet"]) and not capsys.readouterr().err


def test_safetensors_are_read_before_pickles_of_every_name(folder):
    """Stable Diffusion 1.5 has both of its text encoder, and who fetches one kind alone has pointers of the other."""
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    folder.joinpath("text_encoder", "pytorch_model.bin").write_bytes(pointer)
    for part in ("unet", "vae"):
        folder.joinpath(part, "diffusion_pytorch_model.bin").write_bytes(pointer)
    path = folder / "text_encoder" / "model.safetensors"
    assert load_model(str(folder)).digests["text_encoder"] == digest([path])


def test_half_precision_files_become_fp32(tiny, folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    model = load_model(str(folder))
    assert model.modules["vae"].dtype == torch.float32 and model.digests["vae"] == digest([path])


def test_demo_model_and_decoders_name_their_licence():
    from datasetdm_fast.engine.decoders.config import find_decoders
    from datasetdm_fast.engine.engines import describe_decoders

    found = describe_decoders(find_decoders("demo"), TASKS)
    assert load_model("demo").defaults == DEMO_DEFAULTS and load_model("demo-dit").defaults == DEMO_DIT_DEFAULTS
    assert set(found) == set(TASKS) and {one["licence"] for one in found.values()} == {"apache-2.0"} == {
        load_model("demo").licence
    }


def test_licence_is_read_from_file_or_card(folder):
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Model\n")
    assert load_model(str(folder)).licence == "creativeml-openrail-m"
    (folder / "LICENSE").write_text("Do as you like.\n")
    assert load_model(str(folder)).licence == "Do as you like."


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("old", [{"steps_offset": 0, "clip_sample": True}, {}])
def test_the_scheduler_of_an_old_folder_is_put_right_as_diffusers_does(folder, kind, old):
    path = folder / "scheduler" / "scheduler_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "steps_offset"}
    path.write_text(json.dumps(kept | {"_class_name": kind} | old))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}))
    theirs, model = StableDiffusionPipeline.from_pretrained(folder).scheduler, load_model(str(folder))
    theirs.set_timesteps(10)
    assert model.scheduler["steps_offset"] == theirs.config.steps_offset == 1
    schedule = make_schedule(model.scheduler, "auto", 10, "0.14.0")
    assert list(schedule.timesteps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("kind", [name for name in SCHEDULERS if "Flow" not in name and "UniPC" not in name])
def test_the_scheduler_that_diffusers_has_written_is_read(folder, kind):
    scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    scheduler.save_pretrained(folder / "scheduler")  # that of DPM-Solver++ has -Infinity
    assert load_model(str(folder)).scheduler["_class_name"] == kind


@pytest.mark.parametrize("version, side", [("0.8.1", 64), ("0.9.0", 16), ("0.10.0", 16)])
def test_old_folders_are_made_for_512_pixels_as_in_diffusers(folder, version, side):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": version, "sample_size": 16}))
    assert StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size == side
    assert load_model(str(folder)).size == 8 * side


def test_second_generation_folder_with_heads_per_level_and_linear_projections(tiny, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64, 64),
        attention_head_dim=[1, 2, 4, 4],
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=8,
        down_block_types=DOWN_BLOCKS,
        up_block_types=UP_BLOCKS,
        upcast_attention=True,
    )
    pipeline(tiny, unet=unet, scheduler={"prediction_type": "v_prediction"}).save_pretrained(tmp_path / "second")
    model = load_model(str(tmp_path / "second"))
    assert [level.heads for level in model.levels] == [(4,), (4,) * 5, (2,) * 5, (1,) * 5] and model.scheduler[
        "prediction_type"
    ] == "v_prediction"
    engine = build_engine("torch", model, device="cpu")
    latents, text = torch.randn(1, 4, 16, 16), engine.encode_text(["", "a cube"])
    noise, capture = engine.denoise_and_capture(latents, 1, text)
    assert torch.allclose(noise, engine.denoise(latents, 1, text), atol=1e-4)
    for level, maps in zip(model.levels, capture.maps, strict=True):
        assert [layer.shape for layer in maps] == [(1, heads, level.side**2, 77) for heads in level.heads]


def set_nan(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"][0] = float("nan")
    save_file(state, path)


def test_finite_weights_may_have_a_sum_that_is_not():
    check_finite({"large": torch.full((4,), 6e4, dtype=torch.float16), "none": torch.zeros(0)}, "")
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(Refused, match="b: w holds NaN or infinite values"):
            check_finite({"a": torch.ones(3), "w": torch.tensor([1, wrong, -wrong])}, "b: ")
    for narrow in (torch.float8_e4m3fn, torch.float8_e5m2):
        check_finite({"w": torch.ones(2).to(narrow)}, "")
        with pytest.raises(Refused, match="w holds NaN"):
            check_finite({"w": torch.tensor([1, float("nan")]).to(narrow)}, "")


def drop_tensor(part: str, key: str):
    def spoil(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        state = load_file(path)
        (found,) = [name for name in state if name.endswith(key)]
        save_file({name: value for name, value in state.items() if name != found}, path, {"format": "pt"})

    return spoil


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def configure(name: str, **settings):
    return lambda folder: change(folder / name, **settings)


def all_of(*changes):
    return lambda folder: [change(folder) for change in changes]


def forget_words(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


SPOILT = {
    "no unet": (remove("unet"), "no unet"),
    "no vae": (remove("vae"), "no vae"),
    "no text encoder": (remove("text_encoder"), "no text_encoder"),
    "no tokenizer": (remove("tokenizer"), "no tokenizer"),
    "no schedule": (remove("scheduler/scheduler_config.json"), "no scheduler"),
    "config without weights": (remove("vae/diffusion_pytorch_model.safetensors"), "no weights of its vae"),
    "weights cut off": (cut, r"diffusion_pytorch_model.safetensors is truncated"),
    "weights are no safetensors": (
        write("vae/diffusion_pytorch_model.safetensors", b"nonsense" * 10),
        "truncated or not a safetensors",
    ),
    "weights are a git-lfs pointer": (
        write("unet/diffusion_pytorch_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
    "config is no json": (write("unet/config.json", b"{"), "not readable as JSON"),
    "tensor missing in the unet": (drop_tensor("unet", "conv_out.bias"), "conv_out.bias"),
    "tensor missing in the text encoder": (
        drop_tensor("text_encoder", "final_layer_norm.bias"),
        "final_layer_norm.bias",
    ),
    "not a number": (set_nan, "conv_out.bias holds NaN"),
    "weights of another size": (
        configure("unet/config.json", block_out_channels=[32, 32, 64, 96]),
        "do not fit its config.json",
    ),
    "two text encoders": (
        configure("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXL|text_encoder_2",
    ),
    "another family": (configure("model_index.json", _class_name="KandinskyPipeline"), "a KandinskyPipeline"),
    "inpainting": (configure("unet/config.json", in_channels=9), "inpainting"),
    "three levels": (configure("unet/config.json", down_block_types=list(DOWN_BLOCKS[1:])), "down_block_types"),
    "deeper transformers": (
        configure("unet/config.json", transformer_layers_per_block=[1, 2, 10, 10]),
        "transformer_layers_per_block",
    ),
    # Weights of these fit, and only diffusers' modules would do what they say.
    **{
        f"a UNet with another {name}": (configure("unet/config.json", **{name: value}), f"the unet's {name} is")
        for name, value in {
            "act_fn": "gelu",
            "center_input_sample": True,
            "downsample_padding": 0,
            "mid_block_scale_factor": 2,
            "time_embedding_act_fn": "silu",
            "timestep_post_act": "silu",
            "time_cond_proj_dim": 256,
        }.items()
    },
    "an autoencoder with another activation": (configure("vae/config.json", act_fn="gelu"), "the vae's act_fn is"),
    **{
        f"a scale of {value!r}": (configure("vae/config.json", scaling_factor=value), "the vae's scaling_factor is")
        for value in (0, "0.18", None, True)
    },
    "an autoencoder of factor four": (configure("vae/config.json", block_out_channels=[8, 16, 16]), "4 x 4"),
    "flow matching": (
        write("scheduler/scheduler_config.json", b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}'),
        "FlowMatchEulerDiscreteScheduler",
    ),
    "vocabulary gone": (forget_words, "vocabulary"),
    "a part of another class": (
        configure("model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        "its unet is a 'UNet3DConditionModel' of 'diffusers', expected UNet2DConditionModel",
    ),
    "a second generation without a schedule": (
        all_of(remove("scheduler"), configure("unet/config.json", use_linear_projection=True)),
        "has no scheduler, and models like Stable Diffusion 2.x were trained with several",
    ),
    "layers that are no number": (configure("unet/config.json", layers_per_block=[2, 2, 2, 2]), "layers_per_block"),
    "a setting beyond all bounds": (configure("vae/config.json", norm_num_groups=10**9), "expected numbers of at most"),
    "a schedule without sense": (
        configure("scheduler/scheduler_config.json", num_train_timesteps=[1000]),
        "num_train_timesteps",
    ),
    "a tokenizer of no bytes": (
        all_of(
            remove("tokenizer/tokenizer.json"),
            write("tokenizer/vocab.json", b'{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}'),
            write("tokenizer/merges.txt", b"#version: 0.2\n"),
        ),
        "fewer than the 256 bytes",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_folder_is_refused_by_name(folder, case):
    spoil, word = SPOILT[case]
    spoil(folder)
    with pytest.raises(Refused, match=word) as stop:
        load_model(str(folder))
    assert "\n" not in stop.value.cause


def test_parts_of_different_models_are_refused(tiny, folder):
    config = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    with pytest.raises(Refused, match="width 32, the encoders give 64"):
        load_model(str(folder))


def test_names_that_are_nothing_here(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    names = {
        tmp_path / "empty": "none of the parts",
        tmp_path / "other": "none of the parts",
        tmp_path / "no" / "such" / "path": "neither",
        "sd": "neither",
    }
    for name, word in names.items():
        with pytest.raises(Refused, match=word):
            load_model(str(name))
    with pytest.raises(Refused, match="--allow-download"):
        load_model("someone/some-model")


# Single files ---------------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_key(key: str) -> str:
    """Where the original code keeps a tensor of a diffusers UNet with two layers per block."""
    for new, old in ENDS.items():
        if key.startswith(new + "."):
            return key.replace(new, old, 1)
    place, *rest = key.split(".")
    if place == "mid_block":
        kind, number, *tail = rest
        block, inner = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}", ".".join(tail)
    else:
        level, kind, number, *tail = rest
        first, inner = int(level) * 3, ".".join(tail)
        if kind == "downsamplers":
            return f"input_blocks.{first + 3}.0.op.{tail[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{first + 2}.{1 if level == '0' else 2}.conv.{tail[-1]}"
        block = (
            f"input_blocks.{first + int(number) + 1}"
            if place == "down_blocks"
            else f"output_blocks.{first + int(number)}"
        )
        block += ".0" if kind == "resnets" else ".1"
    if kind == "resnets":
        for new, old in RESNET.items():
            inner = inner.replace(new, old)
    return f"{block}.{inner}"


def original_vae(state: dict) -> dict:
    """The autoencoder's tensors as the original code keeps them: levels of the decoder counted upwards, attention as
    convolutions.
    """
    result = {}
    for key, value in state.items():
        if "up_blocks." in key:
            before, after = key.split("up_blocks.")
            key = f"{before}up.{3 - int(after[0])}{after[1:]}"
        key = (
            key.replace("down_blocks.", "down.")
            .replace("resnets.", "block.")
            .replace("conv_shortcut", "nin_shortcut")
            .replace("conv_norm_out", "norm_out")
        )
        key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        key = (
            key.replace("mid_block.block.0", "mid.block_1")
            .replace("mid_block.block.1", "mid.block_2")
            .replace("mid_block.attentions.0", "mid.attn_1")
        )
        if "attn_1" in key:
            key = key.replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_", "")
            value = value[:, :, None, None] if value.dim() == 2 else value
        result[key] = value
    return result


def original_open_clip(state: dict, layers: int) -> dict:
    """SD 2.x's text tensors as open_clip keeps them, with the last layer that Stable Diffusion does not use."""
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    width = state["final_layer_norm.weight"].shape[0]
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.eye(width),
        "logit_scale": torch.ones(()),
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            for new, old in names.items():
                result[f"transformer.resblocks.{layer}.{old}.{kind}"] = state[f"encoder.layers.{layer}.{new}.{kind}"]
    last = {
        key.replace("resblocks.0.", f"resblocks.{layers}."): torch.zeros_like(value)
        for key, value in result.items()
        if "resblocks.0." in key
    }
    return {**result, **last}


def original(unet, vae, text: dict) -> dict:
    state = {f"model.diffusion_model.{original_unet_key(key)}": value for key, value in unet.state_dict().items()}
    state |= {f"first_stage_model.{key}": value for key, value in original_vae(vae.state_dict()).items()}
    return {key: value.contiguous().clone() for key, value in {**state, **text}.items()}


@pytest.fixture(scope="module")
def first_generation(tiny):
    """Parts with what the shapes of a file do not say set as in SD 1.x: 8 heads, 32 groups, heads of 64 in the text
    encoder.
    """
    torch.manual_seed(1)
    widths, blocks = (32, 32, 64, 64), {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS}
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, attention_head_dim=8, cross_attention_dim=64, **blocks
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=2, latent_channels=4, **blocks)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
        )
    )
    state = original(
        unet, vae, {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.state_dict().items()}
    )
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return unet, vae, text, state


def with_vocabulary(tiny, folder: Path) -> Path:
    tiny.tokenizers["tokenizer"].save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_of_the_first_generation(tiny, first_generation, tmp_path, suffix):
    unet, vae, text, state = first_generation
    path = with_vocabulary(tiny, tmp_path) / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file(state, path, {"modelspec.license": "openrail"})
    model = load_model(str(path), size=128)
    assert (
        same_weights(model.modules["unet"], unet)
        and same_weights(model.modules["vae"], vae)
        and same_weights(model.modules["text_encoder"], text)
    )
    assert (
        model.modules["unet"].config.attention_head_dim == 8
        and model.modules["vae"].config.scaling_factor == 0.18215
        and model.modules["text_encoder"].config.hidden_act == "quick_gelu"
    )
    assert model.scheduler == SD_SCHEDULER and model.defaults.size == 512 and model.size == 128
    assert model.licence == ("openrail" if suffix == "safetensors" else UNKNOWN_LICENCE) and set(model.digests) == {
        "file"
    }


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
)
def test_a_single_file_with_a_tensor_of_other_axes_is_damaged(tiny, first_generation, tmp_path, key):
    *_, state = first_generation
    path = with_vocabulary(tiny, tmp_path) / "model.safetensors"
    save_file({**state, key: state[key].flatten()[:9].clone()}, path)
    with pytest.raises(Refused, match=f"the tensor {key} has 1 axes, expected [24]"):
        load_model(str(path))


def test_what_a_single_file_says_of_its_prediction_type_counts(tiny, first_generation, tmp_path):
    path = with_vocabulary(tiny, tmp_path) / "model.safetensors"
    for said, prediction in (("v", "v_prediction"), ("epsilon", "epsilon")):
        save_file(first_generation[-1], path, {"modelspec.prediction_type": said})
        model = load_model(str(path), size=128)
        assert model.scheduler["prediction_type"] == prediction and model.defaults.size == 512


V_CONFIG = "model:\n  target: ldm.LatentDiffusion\n  params:\n    {}image_size: 64 # unused\n"


def test_what_a_configuration_beside_a_single_file_says_of_its_prediction_counts(tiny, first_generation, tmp_path):
    path, beside = with_vocabulary(tiny, tmp_path) / "model.safetensors", tmp_path / "model.yaml"
    save_file(first_generation[-1], path)
    own = load_model(str(path), size=128)
    for line, notes, prediction, is_noted in (
        ('parameterization: "v"\n    ', {}, "v_prediction", True),
        ("parameterization: eps\n    ", {}, "epsilon", False),
        ("", {}, "epsilon", False),
        ("parameterization: v\n    ", {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ("", {"modelspec.prediction_type": "v"}, "v_prediction", False),
    ):
        save_file(first_generation[-1], path, notes)
        beside.write_text(V_CONFIG.format(line))
        model = load_model(str(path), size=128)
        assert model.scheduler == {**own.scheduler, "prediction_type": prediction}
        assert model.digests.get("prediction") == (prediction if is_noted else None)
    beside.write_text(V_CONFIG.format("parameterization: [x0]\n    "))
    with pytest.raises(Refused, match=r"model.yaml: parameterization is .*, expected eps or v"):
        load_model(str(path))
    for other in ("- a list", "model: [1]", ""):  # of something else
        beside.write_text(other)
        assert load_model(str(path)).scheduler["prediction_type"] == "v_prediction"


def test_single_file_of_the_second_generation(tiny, first_generation, tmp_path, monkeypatch):
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(64, 64, 128, 128),
        attention_head_dim=[1, 1, 2, 2],
        use_linear_projection=True,
        cross_attention_dim=64,
        down_block_types=DOWN_BLOCKS,
        up_block_types=UP_BLOCKS,
    )
    config = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="gelu",
    )
    text = CLIPTextModel(config)
    clip = {f"cond_stage_model.model.{key}": value for key, value in original_open_clip(text.state_dict(), 2).items()}
    path = with_vocabulary(tiny, tmp_path) / "second.safetensors"
    save_file(original(unet, first_generation[1], clip), path)
    model = load_model(str(path), size=64)
    assert same_weights(model.modules["unet"], unet) and same_weights(model.modules["text_encoder"], text)
    assert model.modules["text_encoder"].config.hidden_act == "gelu"  # Open CLIP's, not CLIP's quick_gelu
    assert [level.heads[0] for level in model.levels] == [
        2,
        2,
        1,
        1,
    ] and model.modules["text_encoder"].config.num_hidden_layers == 2
    assert (
        model.scheduler["prediction_type"] == "v_prediction" and model.defaults.size == 768
    )  # untrained: its output is not its input
    monkeypatch.setattr(single_file, "predicts_noise", lambda unet: True)
    model = load_model(str(path), size=64)
    assert (model.scheduler["prediction_type"], model.defaults.size) == ("epsilon", 512)  # of the base model


@pytest.mark.parametrize(("is_second", "padding"), [(False, "<|endoftext|>"), (True, "!")])
def test_a_single_file_without_a_vocabulary_is_padded_as_its_generation_is(tmp_path, monkeypatch, is_second, padding):
    known = transformers.CLIPTokenizer.from_pretrained(presets.DEMO / "tokenizer")
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", lambda *name, **options: known)
    found = tokenizer.tokenizer_beside(tmp_path / "model.safetensors", is_second, allow_download=False)
    assert found.pad_token == padding


def test_a_noise_predictor_is_told_from_a_velocity_predictor():
    class Predictor(torch.nn.Module):
        config = type("Config", (), {"cross_attention_dim": 8})

        def __init__(self, share: float):
            super().__init__()
            self.share = share

        def forward(self, noise, timestep, context):
            clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
            return type("Output", (), {"sample": self.share * noise + (1 - self.share**2) ** 0.5 * clean})

    assert predicts_noise(Predictor(0.95)) and not predicts_noise(Predictor(0.07))


class Payload:
    def __reduce__(self):
        return (open, ("unwanted", "w"))


FILES = {
    "LoRA": ({"lora_unet_down.lora_up.weight": torch.zeros(2)}, "LoRA"),
    "SDXL's refiner": ({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}, "another family"),
    "Chroma": ({"double_blocks.0.img_mod.lin.weight": torch.zeros(2)}, "another family"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": torch.zeros(2)}, "ControlNet"),
    "a UNet in diffusers layout": ({"conv_in.weight": torch.zeros(2)}, "no unet .*conv_in.weight"),
    "nothing": ({}, "no tensor at all"),
}


@pytest.mark.parametrize("case", FILES)
def test_other_files_are_refused_by_what_they_are(tmp_path, case):
    state, word = FILES[case]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=word) as stop:
        load_model(str(tmp_path / "model.safetensors"))
    assert "\n" not in stop.value.cause
    assert stop.value.remedy == (fitting.ADAPTER if case == "LoRA" else ANOTHER)  # no folder of such would be taken


def test_a_checkpoint_gives_its_tensors_and_the_names_of_what_is_left_out(tmp_path, monkeypatch):
    kinds = {name: type("Thing", (), {"__module__": name}) for name in ("pytorch_lightning.callbacks", "other.thing")}
    with monkeypatch.context() as patch:  # which nobody who reads a checkpoint has to have
        for name, kind in kinds.items():
            patch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
            patch.setitem(sys.modules, name, module := ModuleType(name))
            module.Thing = kind
        known, other = (kind() for kind in kinds.values())
        content = {"state_dict": {"a": torch.arange(6.0), "b": 3}, "epoch": 1, "callbacks": known}
        torch.save(content | {f"k{k}": k for k in range(40)}, tmp_path / "known.ckpt")
        torch.save(content | {"other": other}, tmp_path / "other.ckpt")
    try:
        tensors, others = pickles.read_tensors(tmp_path / "known.ckpt")
    finally:
        torch.serialization.clear_safe_globals()
    assert list(tensors) == ["a"] and others == ["epoch", "callbacks", *(f"k{k}" for k in range(30))]
    with pytest.raises(ValueError, match="it asks for other.thing.Thing"):
        pickles.read_tensors(tmp_path / "other.ckpt")
    whole = torch.arange(6.0)
    parts = {"whole": whole, "again": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}
    pickles._save(parts, ["epoch"], tmp_path / "copy.safetensors")  # which takes no two tensors of one memory
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert json.loads(file.metadata()[pickles.OTHERS]) == ["epoch"]
        assert all(torch.equal(file.get_tensor(name), part) for name, part in parts.items())


def test_a_colon_in_the_name_of_an_adapter_is_no_scale_where_that_file_is_there(tmp_path):
    path = tmp_path / "style:2"
    assert parse_adapter(str(path)) == (tmp_path / "style", 2.0) and parse_adapter("style") == (Path("style"), 1.0)
    assert parse_adapter("style:best") == (Path("style:best"), 1.0)
    path.touch()
    assert parse_adapter(str(path)) == (path, 1.0)
    assert parse_adapter("style:-100") == (Path("style"), -100.0)
    for scale in ("100.5", "nan", "-inf"):
        with pytest.raises(Refused, match=f"the scale is {scale}, expected a number up to 100"):
            parse_adapter(f"style:{scale}")


def test_adapters_that_hold_nothing_or_do_not_fit_are_refused(tiny, tmp_path):
    name, layer = next((n, m) for n, m in tiny.modules["unet"].named_modules() if isinstance(m, torch.nn.Conv2d))
    wide, high, side = layer.in_channels, layer.out_channels, layer.kernel_size[0]
    down, up = torch.zeros(2, wide, side, side), torch.zeros(high, 2, 1, 1)
    for pair, said in (
        (None, "it holds no tensor"),
        ((down[..., :1], up), "its product does not fit a weight of"),
        ((down, up + torch.inf), "or is not finite"),
    ):
        places = (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight")
        save_file(dict(zip(places, map(torch.Tensor.contiguous, pair))) if pair else {}, tmp_path / "x.safetensors")
        with pytest.raises(Refused, match=f"x.safetensors: .*{said}"):
            lora.fuse_adapters(tiny, [str(tmp_path / "x.safetensors")])


def test_an_adapter_names_layers_with_underscores_and_none_that_the_model_lacks(tiny, tmp_path):
    name, path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", tmp_path / "x.safetensors"
    weight = tiny.modules["unet"].get_submodule(name).weight
    high, wide = weight.shape
    pair = {"lora_down.weight": torch.ones(2, wide), "lora_up.weight": torch.ones(high, 2)}
    state = {f"lora_unet_{name.replace('.', '_')}.{ending}": value for ending, value in pair.items()}
    save_file(state, path)
    fused = lora.fuse_adapters(tiny, [str(path)])
    torch.testing.assert_close(fused.modules["unet"].get_submodule(name).weight, weight + 2)
    save_file(state | {"lora_unet_other.lora_up.weight": torch.ones(3, 2)}, path)
    lacking = replace(tiny.backbone, name_adapter=lambda state, configs: dict(sorted(state.items())[:2]))
    with pytest.raises(Refused, match=f"3 of its {high + 3} rows are of layers that the model lacks"):
        lora.fuse_adapters(replace(tiny, backbone=lacking), [str(path)])


def test_a_folder_of_an_adapter_alone_is_told_as_such(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(Refused, match="holds a LoRA, which only changes another model"):
        load_model(str(tmp_path))


def test_a_model_that_the_hub_does_not_give_is_told_with_the_reason(monkeypatch, tmp_path):
    asked = {}

    def download(name, allow_patterns, local_files_only):
        assert not local_files_only
        asked[name] = allow_patterns
        if name == "nobody/nothing":
            raise OSError("no such repository\nand more")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert download_model("somebody/model", True) == tmp_path
    wanted = {"model_index.json", "unet/*.safetensors", "scheduler/*.json", "tokenizer/*.txt", "tokenizer_2/*.jinja"}
    assert wanted | {"README.md", "LICENSE*"} <= set(asked["somebody/model"])
    assert not any(pattern.endswith((".bin", ".py", ".ckpt")) for pattern in asked["somebody/model"])
    with pytest.raises(Missing, match=r"nobody/nothing could not be downloaded \(no such repository\)"):
        download_model("nobody/nothing", True)


def test_a_model_in_the_local_cache_of_the_hub_needs_no_download(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Refused, match="it would have to be downloaded"):
        load_model("somebody/model")
    repository, commit = tmp_path / "models--somebody--model", "0" * 40
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_model("somebody/model").name == "somebody/model"
    shutil.rmtree(repository / "snapshots" / commit / "vae")
    with pytest.raises(Refused, match="has no vae(.|\n)*If its download was interrupted, add --allow-download"):
        load_model("somebody/model")
    with pytest.raises(Refused, match="'some--body/model' is not a folder here"):
        load_model("some--body/model")


def test_a_model_of_the_hub_is_read_at_the_size_and_under_the_name_that_was_asked_for(saved, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.loading.download_model", lambda name, allow_download: saved)
    model = load_model("somebody/v1.5-model", size=64, allow_download=True)
    assert (model.name, model.size, model.source) == ("somebody/v1.5-model", 64, str(saved))


def test_what_may_be_a_model_is_told_by_its_name(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    for name in ("demo", str(tmp_path), str(tmp_path / "weights.safetensors")):
        check_source(name, allow_download=False)
    for name in ("a/b", "Lykon/dreamshaper-xl-1.0", "s_o.m-e/x"):
        check_source(name, allow_download=True)
        with pytest.raises(Refused, match="would have to be downloaded"):
            check_source(name, allow_download=False)
    for name in ("a", "a/b/c", ".hidden/b", "a/.b"):
        with pytest.raises(Refused, match="neither one of demo, .* nor an existing folder or file"):
            check_source(name, allow_download=True)


def test_a_text_encoder_of_an_unknown_activation_is_refused():
    with pytest.raises(Refused, match="text encoder: its activation is 'tanh', supported are"):
        TextEncoder(SimpleNamespace(config=SimpleNamespace(hidden_act="tanh")), None)


def test_files_and_settings_without_sense_are_damaged():
    with pytest.raises(Refused, match="x lacks the tensor a.bias, which every checkpoint of Stable Diffusion"):
        single_file._shape({"a.weight": torch.zeros(2)}, "a.bias", Path("x"))
    for error in (KeyError("a"), TypeError("b"), ZeroDivisionError("c")):
        with pytest.raises(Refused, match=f"its configs are inconsistent .{type(error).__name__}"):
            with model_folder._making_sense(Path("x")):
                raise error


def test_a_setting_may_have_another_form_of_its_usual_value():
    same = [(8.0, 8), (8, 1.5), (2.5, 1.0), (None, False), (True, False), ([1], (1, 2)), ([], ()), ({}, {}), (3, "x")]
    for value, usual in [*same, ([1], None), (None, "x")]:
        assert model_folder._could_replace(value, usual, takes_lists=False), (value, usual)
    for value, usual in [(8.5, 8), (None, 8), (None, ()), (True, 8), ([1], 8), ([], (1,)), ({}, ()), ("x", 8)]:
        assert not model_folder._could_replace(value, usual, takes_lists=False), (value, usual)
    assert model_folder._could_replace([1], 8, takes_lists=True)
    assert not model_folder._could_replace([], 8, takes_lists=True)


def test_a_denoiser_without_the_name_of_its_class_may_be_of_every_family(tmp_path):
    assert not model_folder._could_be(tmp_path, SD)
    (tmp_path / "unet").mkdir()
    for config, could in (({}, True), ({"_class_name": "UNet2DConditionModel"}, True), ({"_class_name": "X"}, False)):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        assert model_folder._could_be(tmp_path, SD) is could


def test_every_file_of_an_index_lies_in_its_folder_and_is_checked(tmp_path, monkeypatch):
    index, checked = tmp_path / "model.safetensors.index.json", []
    monkeypatch.setattr(model_folder, "check_readable", checked.append)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())

    def read(*names):
        index.write_text(json.dumps({"weight_map": {str(k): name for k, name in enumerate(names)}}))
        return model_folder._files_of_index(index, ".safetensors")

    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert read("b.safetensors", "a.safetensors", "b.safetensors") == files and checked == [*files]
    for names in (
        (),
        ("../a.safetensors",),
        ("a.safetensors", "a.bin"),
        ("inner/a.safetensors",),
        ("a.safetensors", 5),
    ):
        with pytest.raises(Refused, match="it names no .safetensors files of its folder"):
            read(*names)
    with pytest.raises(Refused, match="lacks 2 of its 3 weight files, the first is c.safetensors"):
        read("a.safetensors", "d.safetensors", "c.safetensors")
    (tmp_path / "unet").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_bytes(b"v")
    digests = model_folder.folder_digests(tmp_path, SD, {"unet": model_folder._Weights(files, None)})
    assert digests == {"tokenizer": sha256(b"v"), "unet": sha256(b"ab"), "scheduler": USUAL_SCHEDULE}


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_file_that_may_not_be_read_is_told(monkeypatch, tmp_path):
    with pytest.raises(Refused, match="x.safetensors cannot be read"):
        fitting.check_readable(tmp_path / "x.safetensors")


def test_a_tokenizer_that_its_library_cannot_read_is_refused_whatever_is_raised(tmp_path):
    class Panic(BaseException):
        """As the tokenizers library raises."""

    for error, expected in (
        (Panic("no merge\nand more"), Refused),
        (Missing("gone", "Look."), Missing),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(expected) as stop, tokenizer._refusing(tmp_path):
            raise error
        assert expected is not Refused or "cannot be read as a tokenizer (no merge)" in stop.value.cause


def test_a_library_sees_the_words_and_marks_of_a_tokenizer_alone(tmp_path):
    settings = {"pad_token": "!", "auto_map": {"AutoTokenizer": "evil.Words"}, "tokenizer_class": "CLIPTokenizer"}
    files = {"tokenizer_config.json": json.dumps(settings), "evil.py": "", "vocab.json": "{}", "merges.txt": "#"}
    files |= {"chat_template.jinja": "{}", "config.json": "{}"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with tokenizer._only_vocabulary(tmp_path) as safe:
        read = {path.name: path.read_text() for path in safe.iterdir()}
    assert json.loads(read.pop("tokenizer_config.json")) == {"pad_token": "!", "tokenizer_class": "CLIPTokenizer"}
    assert read == {"vocab.json": "{}", "merges.txt": "#", "chat_template.jinja": "{}"} and not safe.exists()


def test_the_vocabulary_of_the_hub_is_taken_where_none_lies_beside_a_file(monkeypatch, tmp_path):
    class Vocabulary(list):
        pad_token = "end"

    given = [Vocabulary([0] * 256), Vocabulary([0] * 256), Vocabulary([0] * 2), OSError("not in the cache")]
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", mock.Mock(side_effect=given))
    assert tokenizer.tokenizer_beside(tmp_path / "a", False, True).pad_token == "end"
    assert tokenizer.tokenizer_beside(tmp_path / "a", True, True).pad_token == "!"
    for _ in range(2):
        with pytest.raises(Missing, match="holds no vocabulary, and neither"):
            tokenizer.tokenizer_beside(tmp_path / "a", False, False)


def test_single_files_that_are_spoilt(tiny, first_generation, tmp_path):
    *_, state = first_generation
    path = with_vocabulary(tiny, tmp_path) / "model.safetensors"
    first, bias = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.bias"
    without_vae = {key: value for key, value in state.items() if not key.startswith("first_stage_model")}
    wide = {**state, first: torch.zeros(32, 9, 3, 3)}
    for spoilt, word in (
        (without_vae, "no vae"),
        (wide, "inpainting"),
        ({key: value for key, value in state.items() if key != bias}, "conv_out.bias"),
        ({**state, bias: torch.full((4,), float("inf"))}, "conv_out.bias holds NaN or inf"),
        ({**state, bias: torch.zeros(5)}, r"\[5\] for \[4\]"),
        ({**state, "first_stage_model.post_quant_conv.weight": torch.zeros(8, 8, 1, 1)}, "latent_channels"),
        ({**state, "first_stage_model.encoder.extra.weight": torch.zeros(1)}, None),
    ):
        save_file(spoilt, path)
        if word is None:
            load_model(str(path), size=64)  # the conversion leaves out what it does not know, as stock diffusers does
        else:
            with pytest.raises(Refused, match=word):
                load_model(str(path), size=64)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(Refused, match="is a .bin file"):
        load_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_weights_of_8_bits_are_no_damage(tiny, first_generation, tmp_path, scale):
    *_, state = first_generation
    path, name = with_vocabulary(tiny, tmp_path) / "model.safetensors", "model.diffusion_model.out.2.weight"
    narrow = state | {name: state[name].to(torch.float8_e4m3fn)}
    save_file(narrow, path)
    assert torch.equal(load_model(str(path), size=64).modules["unet"].conv_out.weight, narrow[name].float())
    save_file(narrow | {name.replace("weight", scale): torch.ones(())}, path)
    with pytest.raises(Refused, match="weights of 8 bits, the first is model.diffusion_model.out.2.weight") as caught:
        load_model(str(path))
    assert caught.value.remedy == "Take a file in 16 or 32 bits."


def test_a_conversion_goes_on_in_a_folder_of_its_own_parts_alone(tmp_path):
    saving.check_new(tmp_path / "none")
    for name in ("unet", "scheduler", ".7.part"):
        (tmp_path / name).mkdir()
    saving.check_new(tmp_path)
    for name, told in (("b", "b"), ("a", "a, b"), ("d", "a, b, d"), ("c", r"a, b, c \.\.\.")):
        (tmp_path / name).touch()
        with pytest.raises(Refused, match=f": it holds {told}\n"):
            saving.check_new(tmp_path)


def test_what_a_killed_conversion_left_is_removed_where_that_is_possible(tmp_path, monkeypatch):
    backbone = SimpleNamespace(parts={"unet": None}, index={"own": 1})
    model = SimpleNamespace(
        modules={}, tokenizers={}, scheduler={"_class_name": "Ours"}, backbone=backbone, index={"own": 2}
    )
    monkeypatch.setattr(saving, "pipeline_of", lambda backbone: "Pipeline")
    (tmp_path / ".7.part").mkdir()
    (tmp_path / ".8.part").touch()  # which is no folder
    assert saving.save_model(model, tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [".8.part", "model_index.json", "scheduler"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    wanted = {"_class_name": "Pipeline", "unet": [None, None], "own": 2, "scheduler": ["diffusers", "Ours"]}
    assert index.pop("_diffusers_version") and index == wanted
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == "Ours"


def test_a_folder_is_written_as_of_the_first_pipeline_of_its_family():
    names = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
    names += ["Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline"]
    assert list(map(pipeline_of, every_backbone())) == names


def test_a_card_names_the_licence_of_a_model_and_what_it_draws(tmp_path):
    for head, licence, draws in (
        ("license: mit\ndraws: [ball, 'red cube',]", "mit", ("ball", "red cube")),
        ("license: other\nlicense_name: own-terms", "own-terms", ()),
        ("license: mit\nlicense_name: own-terms", "mit", ()),
        ("licence: own\nlicense: mit", "own", ()),
        ('license: "mit"\ndraws: []', "mit", ()),
        ("tags: [a]", UNKNOWN_LICENCE, ()),
    ):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\nlicense: none\n")
        assert (folder_licence(tmp_path), Model.draws.func(SimpleNamespace(source=tmp_path))) == (licence, draws)
    (tmp_path / "README.md").write_text("license: mit\ndraws: [ball]\n")  # which is no head
    assert (folder_licence(tmp_path), Model.draws.func(SimpleNamespace(source=tmp_path))) == (UNKNOWN_LICENCE, ())
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "licence.txt").write_text(" Own terms \n")
    assert folder_licence(tmp_path) == "Own terms"
    (tmp_path / "COPYING").write_text("Those of the first file")
    assert folder_licence(tmp_path) == "Those of the first file"


def test_what_is_read_once_gives_matrices_away_and_keeps_vectors():
    def read(stored):
        values = {"bias": torch.ones(2), "weight": torch.ones(2, 3), "count": torch.tensor(7)}
        return {name: value.to(stored(name, value)) for name, value in values.items()}

    network = Network(ConfigFile(a=1), lambda: None, read, lambda: 9)
    source = network.read(computed_as=torch.bfloat16)
    state = source.state_dict()
    assert source.config.a == 1 and network.numel() == 9 and state.computed_as == torch.bfloat16
    assert state["bias"] is state["bias"] and state["weight"].shape == (2, 3) and set(state) == {"bias", "count"}
    assert state["count"].dtype == torch.int64 and state["bias"].dtype == torch.float32
    halves = network.read(lambda name, value: torch.float16 if name == "weight" else value.dtype).state_dict()
    assert [halves[name].dtype for name in ("weight", "bias")] == [torch.float16, torch.float32]
    with pytest.raises(AttributeError, match="b"):
        _ = source.config.b


def test_networks_that_were_built_before_a_block_outlast_it():
    model = load_model("tiny")
    assert model.modules["vae"] is model.modules["vae"]
    with model.built_for_now():
        assert model.modules["unet"] and model.networks["unet"].is_built
    assert model.networks["vae"].is_built and not model.networks["unet"].is_built
    weights = model.networks["vae"].take().state_dict()
    assert not model.networks["vae"].is_built and set(weights) == set(model.modules["vae"].state_dict())


def test_pickles_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "evil.ckpt")
    with pytest.raises(Refused, match="more than tensors"):
        load_model("evil.ckpt")  # test_proofs.py has every form of such files
    assert not Path("unwanted").exists()


def test_file_without_vocabulary_says_where_to_put_one(first_generation, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "VOCABULARY", "nobody/nothing")
    save_file(first_generation[-1], tmp_path / "model.safetensors")
    with pytest.raises(Missing, match="vocab.json"):
        load_model(str(tmp_path / "model.safetensors"))


def test_a_vocabulary_of_sentencepiece_alone_says_which_library_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    tmp_path.joinpath("spiece.model").write_bytes(b"x")
    with pytest.raises(Missing, match="spiece.model alone") as stop:
        tokenizer.load_tokenizer(tmp_path, ("transformers:T5TokenizerFast",))
    assert "pip install sentencepiece" in stop.value.remedy


LINEAR = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "layers_per_block": 1,
}


@pytest.mark.parametrize("source", ["tiny", *(name for name in PRESETS if name.startswith("random-")), "linear"])
def test_seeded_networks_have_the_tensors_and_settings_of_their_modules(source):
    """Their own tables of shapes and settings are what the libraries would have told."""
    model = load_model(source if source != "linear" else "tiny")
    networks = model.networks if source != "linear" else {"unet": presets.seed_network("unet", LINEAR, 3)}
    for part, network in networks.items():
        record = model.backbone.parts[part]
        with torch.device("meta"):
            module = presets.build_module(record, network.config)
        theirs = {name.removeprefix("text_model."): tuple(value.shape) for name, value in module.state_dict().items()}
        ours = presets.shapes_of(record, network.config)
        assert {name.removeprefix("text_model."): shape for name, shape in ours.items()} == theirs
        known = module.config.to_dict() if record.kind == "text_encoder" else module.config
        assert {name: known[name] for name in network.config} == network.config


SHARED = {  # numbers of the tiny model that are Stable Diffusion's, too
    *("in_channels", "out_channels", "latent_channels", "freq_shift"),  # of all models of these families
    "max_position_embeddings",  # test_models.py has a model of 48 tokens,
    "layers_per_block",  # and one of 1
}


def test_a_number_of_stable_diffusion_written_as_a_constant_is_wrong_for_the_model_of_tests():
    tiny = load_model("tiny")
    shared = {
        name
        for part, settings in SD.full_size.items()
        if part in SD.networks
        for name, value in settings.items()
        if type(value) in (int, float) and value == tiny.networks[part].config[name]
    }
    assert shared <= SHARED


def test_a_model_whose_decoders_read_both_halves_has_rows_of_negative_prompts_without_guidance():
    model = load_model("tiny")
    assert model.guidance == model.guidance_at(7.5) == "cfg" and model.guidance_at(model.backbone.unguided) == "none"
    assert model.has_negative(7.5) and model.has_negative(model.backbone.unguided) and model.halves == 2


def test_libraries_are_quiet_while_a_model_is_read_and_as_before_afterwards():
    libraries = transformers.utils.logging, diffusers.utils.logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with fitting.quiet_libraries():
        assert all(library.get_verbosity() == logging.ERROR for library in libraries)
        assert not any(library.is_progress_bar_enabled() for library in libraries)
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before


def test_a_model_is_read_after_an_import_of_diffusers_was_interrupted(monkeypatch):
    """Python imports `diffusers.utils` anew then, but not its part that was complete, which becomes no attribute."""
    monkeypatch.delattr(diffusers.utils, "logging")
    with fitting.quiet_libraries():
        assert sys.modules["diffusers.utils.logging"].get_verbosity() == logging.ERROR


def test_a_digest_is_of_every_byte_of_files_in_their_order(tmp_path):
    """Also of what lies beyond the blocks of 4 MiB that are read at once."""
    first, second = bytes(range(256)) * 20_480, b"end"  # 5 MiB
    files = [tmp_path / "b", tmp_path / "a"]
    for file, data in zip(files, (first, second)):
        file.write_bytes(data)
    assert digest(files) == f"sha256:{hashlib.sha256(first + second).hexdigest()}"
