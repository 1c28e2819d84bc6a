"""DatasetDM's checkpoints through the commands: what each is taken for, the same answers, the same bytes on the way
back, and what is refused; models in one file as diffusers folders.
"""

import io
import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoders import (
    DEMO_LEVELS,
    FARTHEST,
    GOLDEN,
    OUTPUTS,
    RECORDED,
    Payload,
    distance,
    recorded_inputs,  # noqa: F401 - a fixture
    seeded_state,
)
from test_loading import StableDiffusionPipeline, first_generation, folder, same_weights, saved, tiny, with_vocabulary  # noqa: F401 - fixtures
from upstream_rules import load_upstream

from datasetdm_fast import convert as command
from datasetdm_fast import generate, kernels
from datasetdm_fast.config import UPSTREAM_KINDS
from datasetdm_fast.engine.backbones.sd import CORRECTED, SD_SCHEDULER, USUAL_SCHEDULE
from datasetdm_fast.engine.decoders import upstream as checkpoints
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, load_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import DEMO, parts_of, read_config, upstream
from datasetdm_fast.engine.decoders.trunk import with_ops
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.loading import load_model, saving, single_file
from datasetdm_fast.engine.loading.single_file import EMA, UNET
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.checkpoints import to_diffusers
from datasetdm_fast.runs.run_folder.reader import open_run

MASKS = dict(width=16, layers=2, feed_forward=24, mask_dim=12, queries=20, text_width=10)
SMALL = {"segmentation": MASKS, "open-vocabulary": MASKS, "depth": dict(width=16, depth_width=8)}
GUESSED = {"lvis": "coco", "nyu": "", "kitti": "", "vkitti2": ""}  # what names and shapes say, where not the kind
pytestmark = pytest.mark.usefixtures("pickles_are_read_by_forks")
long_test = pytest.mark.skipif("DATASETDM_LONG_TESTS" not in os.environ, reason="the long form only")


def config_of(kind: str, **changes):
    network, settings = checkpoints.KINDS[kind]
    return upstream(network, **{**SMALL.get(network, {"width": 16}), **settings, **changes})


def state_of(config, prefix: str = "", seed: int = 4) -> dict[str, torch.Tensor]:
    """A state dict as upstream's class of this kind has it, with random weights."""
    shapes = {name: value.shape for name, value in build_decoder(config).state_dict().items()}
    shapes |= {name: torch.Size(shape) for name, shape in checkpoints.unused_shapes(config).items()}
    return {f"{prefix}{name}": value for name, value in seeded_state(shapes, seed).items()}


def convert(*arguments) -> int:
    return command.main([str(word) for word in arguments])


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_the_kinds_of_the_flag_are_those_of_the_reader():
    assert set(UPSTREAM_KINDS) == set(checkpoints.KINDS)


@pytest.mark.parametrize("kind", UPSTREAM_KINDS)
def test_a_kind_is_told_by_names_and_shapes_and_has_upstreams_settings(kind, tmp_path):
    """Without a pickle: a safetensors file is read as it is."""
    config = config_of(kind)
    save_file(state_of(config, "module." if len(kind) % 2 else ""), tmp_path / "w.safetensors")
    if (guess := GUESSED.get(kind, kind)) != "":
        assert checkpoints.open_checkpoint(tmp_path / "w.safetensors").kind == guess
    else:
        with pytest.raises(Refused, match="nyu, kitti, vkitti2 have the same"):
            checkpoints.open_checkpoint(tmp_path / "w.safetensors")
    assert checkpoints.open_checkpoint(tmp_path / "w.safetensors", kind).config == config
    assert config.min_area == (5000 if config.task == "semantic" else 0)
    assert (upstream("segmentation").queries, upstream("open-vocabulary").queries) == (100, 20)
    assert config.instance_class_from == ("prompt" if kind in ("coco", "lvis") else "decoder")
    assert config.max_depth == (80.0 if kind in ("kitti", "vkitti2") else 10.0)
    if kind in ("voc", "coco"):
        assert ("background", *config.classes) == builtin_table(kind).names


@pytest.mark.parametrize("kind,prefix", [("coco", "module."), ("pose-simcc", "")])
def test_a_checkpoint_becomes_a_folder_and_comes_back(kind, prefix, tmp_path, capsys):
    config = config_of(kind)
    state = state_of(config, prefix)
    source = tmp_path / f"latest_checkpoint.{'pth' if prefix else 'safetensors'}"
    (torch.save if prefix else save_file)(state, source)
    line = (source, "--to", "decoder", "--out", tmp_path / "d" / kind)
    assert convert(*line) == 0
    assert f"its tensors are those of a {kind} decoder" in capsys.readouterr().err
    assert read_config(tmp_path / "d" / kind) == config
    decoder, reference = load_decoder(tmp_path / "d" / kind), load_upstream(build_decoder(config), state)
    assert same(decoder.state_dict(), reference.state_dict())
    before = {path: path.read_bytes() for path in (tmp_path / "d" / kind).iterdir()}
    for left in ("d/.X.7.part", f"d/{kind}/.model.safetensors.7.part", ".back.pth.8.part"):  # of killed commands
        (tmp_path / left).write_bytes(b"half")
    assert convert(*line) == 0 and before == {path: path.read_bytes() for path in (tmp_path / "d" / kind).iterdir()}
    assert convert(tmp_path / "d" / kind, "--to", "pth", "--out", tmp_path / "back.pth") == 0
    assert same(torch.load(tmp_path / "back.pth"), state)
    assert [path.name for path in tmp_path.rglob(".*")] == [".X.7.part"]  # which is of another file
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "other.safetensors")
    assert convert(tmp_path / "other.safetensors", *line[1:]) == 2 and "another content" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "d" / kind).iterdir()}


@pytest.mark.parametrize("kind", ["nyu", "voc", "pose"])
def test_a_checkpoint_in_half_precision_comes_back_in_it(kind, tmp_path):
    state = {name: value.half() for name, value in state_of(config_of(kind)).items()}
    torch.save(state, tmp_path / "half.pth")
    place = tmp_path / "d" / kind
    assert convert(tmp_path / "half.pth", "--to", "decoder", "--kind", kind, "--out", place) == 0
    assert convert(place, "--to", "pth", "--out", tmp_path / "back.pth") == 0
    assert same(torch.load(tmp_path / "back.pth"), state)
    assert load_decoder(place).config.task == config_of(kind).task


def test_two_checkpoints_of_one_form_are_unpacked_each_for_itself(tmp_path):
    states = [state_of(config_of("pose"), seed=seed) for seed in (4, 5)]
    for name, state in zip("ab", states):
        save_file(state, tmp_path / f"{name}.safetensors")
    names = ",".join(f"pose:{tmp_path}/{name}.safetensors" for name in "aba")
    holders = checkpoints.unpack_decoders(names)
    assert holders[0] == holders[2] != holders[1]
    for holder, state in zip(holders, states):
        weights = load_file(holder / "pose" / "model.safetensors")
        assert torch.equal(weights["final_layer.bias"], state["final_layer.bias"])


def test_classes_without_names_are_told_where_a_checkpoint_has_a_number_of_its_own():
    for count, told in ((3, "4 class logits of classes without names"), (80, "81 class logits)")):
        config = config_of("coco", classes=checkpoints.number_classes(count))
        read = checkpoints.Checkpoint(Path("w.pth"), Path("copy"), "coco", False, config, "")
        assert f"w.pth: read as a coco decoder (segmentation, 20 queries, {told}" in read.description
    depth = checkpoints.Checkpoint(Path("w.pth"), Path("copy"), "nyu", False, config_of("nyu"), "")
    assert depth.description == "w.pth: read as a nyu decoder (depth)"


def test_a_comma_in_a_path_is_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "a,b"
    place.mkdir()
    torch.save(state_of(config_of("voc")), place / "w.pth")
    assert read_config(checkpoints.unpack_decoders("voc:a,b/w.pth")[0] / "voc").task == "open-vocabulary"
    assert parts_of(f"voc:{place}/w.pth, demo,a,b") == [
        Path(f"voc:{place}/w.pth"),
        DEMO,
        Path("a,b"),
    ]
    assert parts_of("demo, none ,a") == [DEMO, Path("none"), Path("a")] and parts_of("demo") == [DEMO]
    for nothing in ("", " , "):
        with pytest.raises(Refused, match="decoders: .* names none"):
            parts_of(nothing)
    many = [f"decoders{k}" for k in range(60)]  # together too long for the name of a file
    assert parts_of(",".join(many)) == list(map(Path, many))


def test_a_decoder_of_our_own_becomes_a_checkpoint_where_the_architecture_is_upstreams(tmp_path, capsys):
    decoder = build_decoder(config_of("cityscapes"))
    save_decoder(decoder, tmp_path / "semantic")
    assert convert(tmp_path / "semantic", "--to", "pth", "--out", tmp_path / "w.pth") == 0
    assert torch.load(tmp_path / "w.pth").keys() == state_of(decoder.config).keys()
    save_decoder(decoder, tmp_path / "narrow", "fp16")
    narrow = torch.load(io.BytesIO(checkpoints.as_checkpoint(tmp_path / "narrow")))
    assert {value.dtype for value in narrow.values()} == {torch.float32}
    others = {"upscale": 2}, {"normalisation": "running"}
    for config in (*(config_of("cityscapes", **change) for change in others), config_of("voc", text_centre=True)):
        save_decoder(build_decoder(config), tmp_path / "finer")
        assert convert(tmp_path / "finer", "--to", "pth", "--out", tmp_path / "x.pth") == 2
        assert "its architecture is not DatasetDM's" in capsys.readouterr().err and not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("kind, count", [("", 1203), ("", 4), ("coco", 4), ("lvis", 2)])
def test_instances_of_other_numbers_of_classes_and_queries_are_read(kind, count, tmp_path):
    config = config_of("lvis", classes=tuple(map(str, range(count))), queries=7, feed_forward=40)
    save_file(state_of(config), tmp_path / "w.safetensors")
    found = checkpoints.open_checkpoint(tmp_path / "w.safetensors", kind)
    assert (found.config.logits, found.config.queries, found.config.feed_forward) == (count + 1, 7, 40)
    assert found.kind == (kind or "coco") and found.config.is_open and len(found.config.classes) == count
    assert (
        f"7 queries, {count + 1} class logits{'' if count == 2 else ' of classes without names'}" in found.description
    )
    for other in ("cityscapes", "voc")[: 1 if count == 2 else 2]:  # three class logits are those of VOC, too
        with pytest.raises(Refused, match="tensors do not fit"):
            checkpoints.open_checkpoint(tmp_path / "w.safetensors", other)


def test_what_looks_the_same_is_said_with_the_flags_of_both_commands(tmp_path):
    save_file(state_of(config_of("coco")), path := tmp_path / "my w.safetensors")
    told = checkpoints.open_checkpoint(path).description
    assert told.endswith(f"a checkpoint of lvis looks the same, say so with --kind lvis or --decoder 'lvis:{path}'")
    save_file({**state_of(config_of("coco")), "x.y": torch.ones(2)}, path)
    with pytest.raises(Refused, match="1 tensor does not fit"):
        checkpoints.open_checkpoint(path)


def test_instances_are_not_read_from_a_decoder_of_classes(tmp_path):
    save_file(state_of(config_of("cityscapes")), tmp_path / "w.safetensors")
    for kind in ("coco", "lvis"):
        with pytest.raises(Refused, match=r"class_embed.bias \[20\] for \[81\]"):
            checkpoints.open_checkpoint(tmp_path / "w.safetensors", kind)


def broken(state: dict) -> dict[str, tuple[object, str, str]]:
    """name -> what is saved, --kind, and what the refusal says."""
    extra = {**state, "extra.weight": torch.ones(2)}
    wide = {**state, "decoder_norm.weight": torch.ones(3)}
    return {
        "wrong kind": (state, "nyu", "unexpected: class_embed (2)"),
        "extra": (extra, "", "unexpected: extra.weight"),
        "complex": (
            {**state, "query_feat.weight": torch.ones(20, 16).cfloat()},
            "",
            "found query_feat.weight complex64",
        ),
        "no prefix": (
            {**{f"module.{name}": value for name, value in state.items()}, "x.y": torch.ones(2)},
            "",
            "unexpected: x.y (without module.)",
        ),
        "shape": (wide, "", "decoder_norm.weight [3] for [16]"),
        "missing": ({k: v for k, v in state.items() if k != "query_embed.weight"}, "", "missing: query_embed.weight"),
        "NaN": ({**state, "class_embed.bias": torch.full((3,), torch.nan)}, "", "class_embed.bias holds NaN"),
        "optimiser": ({"state_dict": state, "optimizer": {"lr": 1}, "epoch": 3}, "", "it holds optimizer, epoch"),
        "code": ({**state, "payload": Payload()}, "", "which could run code"),
        "another project": ({"layer1.weight": torch.ones(2)}, "", "no decoder of DatasetDM: 1 tensors, layer1.weight"),
        "logits": ({**state, "class_embed.weight": torch.ones(7, 16)}, "", "class_embed.bias [3] for [7]"),
        "no class": ({**state, "class_embed.weight": torch.ones(1, 16)}, "", "it holds no decoder of DatasetDM"),
        "other U-Net": (state_of(config_of("voc", levels=DEMO_LEVELS)), "", "levels have "),
    }


def test_a_checkpoint_is_not_read_where_its_result_has_no_place(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert convert(tmp_path / "none.pth", "--to", "decoder", "--out", tmp_path / "file") == 2
    assert "there is a file of that name" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_all_of_it(tmp_path, capsys):
    state = state_of(config_of("voc"))
    for name, (content, kind, says) in broken(state).items():
        is_pickle = name in ("optimiser", "code")  # a process reads each of these
        path = tmp_path / ("w.pth" if is_pickle else "w.safetensors")
        (torch.save if is_pickle else save_file)(content, path)
        line = ("--to", "decoder", "--out", tmp_path / "d", *(("--kind", kind) if kind else ()))
        assert convert(path, *line) == 2, name
        assert says in capsys.readouterr().err, name
    for source in ("w.pth", "w.safetensors"):
        whole = (tmp_path / source).read_bytes()
        (tmp_path / f"cut{source}").write_bytes(whole[: len(whole) // 2])
        assert convert(tmp_path / f"cut{source}", "--to", "decoder", "--out", tmp_path / "d") == 2
        assert re.search("truncated|not a readable zip archive", capsys.readouterr().err)
    for line in (
        ("w.pth", "--to", "decoder"),
        ("w.pth", "--to", "decoder", "--out", tmp_path / "d", "--kind", "vocs"),
        ("w.pth", "--to", "pth", "--out", tmp_path / "d.pth", "--kind", "voc"),
        ("w.pth", "--to", "diffusers", "--out", tmp_path / "d"),
    ):
        assert convert(*line) == 2
    assert convert(tmp_path / "none.pth", "--to", "decoder", "--out", tmp_path / "d") == 3
    assert convert(tmp_path, "--to", "decoder", "--out", tmp_path / "d") == 2
    assert not (tmp_path / "d").exists() and not (tmp_path / "d.pth").exists()


def test_what_is_no_checkpoint_and_no_decoder_is_told(tmp_path):
    with pytest.raises(Refused, match=r"--kind: 'vocs' is none of voc, .*\(did you mean voc\?\)"):
        checkpoints.open_checkpoint(tmp_path / "w.safetensors", "vocs")
    save_file({}, tmp_path / "w.safetensors")
    with pytest.raises(Refused, match="it holds no tensor at all"):
        checkpoints.open_checkpoint(tmp_path / "w.safetensors")
    for missing in ("config.json", "model.safetensors"):
        with pytest.raises(Missing, match=f"{missing} is not there"):
            checkpoints.as_checkpoint(tmp_path)
        if missing == "config.json":
            save_decoder(build_decoder(config_of("voc")), tmp_path)
            (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "model.safetensors")
    for held, prefix in (({"x.y": torch.ones(2)}, ""), ({}, "other.")):
        save_file(held, tmp_path / checkpoints.SIDE_FILE, {"prefix": prefix})
        with pytest.raises(Refused, match="it holds other tensors than the unused ones"):
            checkpoints.as_checkpoint(tmp_path)
    for name in (checkpoints.SIDE_FILE, "model.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
        with pytest.raises(Refused, match=f"{name} is truncated"):
            checkpoints.as_checkpoint(tmp_path)


def test_generate_takes_a_checkpoint_and_the_prompt_names_its_instances(tmp_path, capsys):
    model = load_model("demo")
    state = state_of(config_of("coco", levels=model.levels, text_width=32))
    state["class_embed.bias"][3] = 9.0  # sure of a class that no prompt names
    torch.save(state, tmp_path / "latest_checkpoint.pth")
    line = ["--decoder", f"coco:{tmp_path / 'latest_checkpoint.pth'}", "--task", "instance", "--steps", "2", "--quiet"]
    line += ["--classes", "cube,ball", "--engine", "fast", "--number", "3", "--out", str(tmp_path / "run")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na cube\na ball and a cube\n")
    assert generate.main([*line, "--prompts", str(prompts)]) == 0
    told = capsys.readouterr().err
    assert "read as a coco decoder" in told and "is what its prompt names" in told
    run = open_run(tmp_path / "run")
    found = [{sample.instances.classes[k] for k in sample.instances.class_ids} for sample in run]
    assert found == [{"ball"}, {"cube"}, {"ball"}]
    kinds = json.loads((tmp_path / "run/instances.json").read_text())["categories"]
    assert [kind["name"] for kind in kinds] == ["cube", "ball"]
    assert generate.main([*line, "--prompts", "a red cone", "--out", str(tmp_path / "other")]) == 2
    assert "name none of the class words cube, ball" in capsys.readouterr().err


@long_test
@pytest.mark.parametrize("prefix", ("", "module."))
@pytest.mark.parametrize("kind", ("cityscapes", "voc", "nyu", "pose", "pose-simcc"))
def test_the_recorded_answers_through_the_command(kind, prefix, recorded_inputs, tmp_path):  # noqa: F811
    network, settings = checkpoints.KINDS[kind]
    state = state_of(upstream(network, **settings), prefix, GOLDEN["seed"])
    torch.save(state, tmp_path / "w.pth")
    assert convert(tmp_path / "w.pth", "--to", "decoder", "--kind", kind, "--out", tmp_path / kind) == 0
    assert convert(tmp_path / kind, "--to", "pth", "--out", tmp_path / "back.pth") == 0
    assert same(torch.load(tmp_path / "back.pth"), state)
    decoder = with_ops(load_decoder(tmp_path / kind), kernels.plain if kind == "nyu" else kernels.reference)
    with torch.inference_mode():
        answer = decoder(*recorded_inputs)
    names = OUTPUTS.get(network, ("pred_logits", "pred_masks"))
    for name, recorded in zip(names, GOLDEN[RECORDED[network]].values(), strict=True):
        assert distance(answer[name].flatten()[recorded["at"]], recorded["values"]) <= FARTHEST.get(network, 1e-4)


# ---- models


def test_a_folder_of_networks_alone_takes_the_usual_schedule_and_says_so(folder, capsys):  # noqa: F811
    for path in sorted((folder / "scheduler").iterdir()):
        path.unlink()
    (folder / "scheduler").rmdir()
    (folder / "model_index.json").unlink()
    model = load_model(str(folder))
    assert model.scheduler == SD_SCHEDULER | CORRECTED and model.digests["scheduler"] == USUAL_SCHEDULE
    assert "has no scheduler, so the schedule of Stable Diffusion 1.x is taken" in capsys.readouterr().err
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(Refused, match="are needed: tokenizer, text_encoder, unet, vae\n"):
        load_model(str(folder))


def test_a_model_file_that_is_not_there_is_told_as_such(tmp_path, capsys):
    line = (tmp_path / "v1-5.ckpt", "--to", "diffusers", "--out", tmp_path / "folder")
    assert convert(*line) == 3 and f"{tmp_path / 'v1-5.ckpt'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_single_file_is_read_and_written_unless_it_is_a_dry_run(tmp_path, monkeypatch, is_dry):
    asked, written, source, out = [], [], tmp_path / "a.ckpt", tmp_path / "out"
    source.touch()
    monkeypatch.setattr(single_file, "load_file", lambda path, **more: asked.append((path, more)) or "model")
    monkeypatch.setattr(saving, "check_new", lambda place: asked.append(place))
    monkeypatch.setattr(saving, "save_model", lambda model, place: written.append((model, place)))
    told = to_diffusers(source, out, ema=True, is_dry=is_dry)
    assert asked == [out, (source, {"allow_download": False, "ema": True})] and written == [("model", out)] * (
        not is_dry
    )
    assert told["path"] == str(out) and "the averaged weights of" in told["told"]


@pytest.mark.parametrize("averaged", (False, True))
def test_a_file_becomes_a_diffusers_folder(averaged, tiny, first_generation, tmp_path, capsys):  # noqa: F811
    unet, vae, text, state = first_generation
    path, names = with_vocabulary(tiny, tmp_path) / "model.safetensors", [key for key in state if key.startswith(UNET)]
    averages = {EMA + "".join(key.split(".")[1:]): state[key] + 1 for key in names}
    save_file({**state, **(averages if averaged else {})}, path)
    line = (path, "--to", "diffusers", "--out", tmp_path / "folder")
    assert convert(*line, *(("--ema",) if averaged else ())) == 0
    model = load_model(str(tmp_path / "folder"), size=128)
    assert (
        same_weights(model.modules["vae"], vae)
        and same_weights(model.modules["text_encoder"], text)
        and model.scheduler == SD_SCHEDULER | CORRECTED
    )
    ours, theirs = model.modules["unet"].state_dict(), unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name] + averaged) for name in theirs)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "folder").unet.config.attention_head_dim == 8
    if averaged:  # diffusers gives advice about a flag that is none of ours
        heard, handler = [], logging.Handler()
        handler.emit = heard.append
        logging.getLogger("diffusers").addHandler(handler)
        load_model(str(path))
        logging.getLogger("diffusers").removeHandler(handler)
        assert heard == []
    capsys.readouterr()
    assert convert(*line) == 2 and "it holds model_index.json" in capsys.readouterr().err
    if not averaged:
        assert convert(*line[:4], tmp_path / "averaged", "--ema") == 2
        assert "has no averaged weights" in capsys.readouterr().err and not (tmp_path / "averaged").exists()
