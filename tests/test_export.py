"""Exported stages against diffusers' own modules in ONNX Runtime, and the folder they lie in: same bytes, whole or
absent, refused when wrong.
"""

import errno
import json
import multiprocessing
import os
import pwd
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fault_server
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from skips import IS_LONG, long_test

from bench.decoders import load_decoders
from datasetdm_fast import Pipeline, stages
from datasetdm_fast.data import AttentionSums, Text, join_texts
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.presets import seed_network
from datasetdm_fast.engine.models.capture import AttentionSlot
from datasetdm_fast.engine.sampling.schedule import ImageNoise
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export import staging
from datasetdm_fast.export.__main__ import main as export_command
from datasetdm_fast.export.manifest import NAME, Manifest
from datasetdm_fast.export.onnx import to_onnx
from datasetdm_fast.export.onnx.capture import ProjectingHook
from datasetdm_fast.export.onnx.graph import DataFile, Extent, Graph, digest, tensor_bytes, trace_module
from datasetdm_fast.export.onnx.operators import OPERATORS
from datasetdm_fast.export.onnx.stage_names import average_name
from datasetdm_fast.export.onnx.to_onnx import export, exporter_files, source_digest
from datasetdm_fast.kernels import pyramid
from datasetdm_fast.stages import LEVELS

PROMPTS = ("a green star on a yellow table at night", "three cones", "a person between two trees, in fog")
SMALL = dict(
    width=16,
    heads=2,
    layers=3,
    feed_forward=24,
    mask_dim=8,
    queries=5,
    depth_width=70,
    text_width=32,
    capture_timestep=1,
)
KINDS = {
    "semantic": ("segmentation", {"classes": ("wall", "ball", "cone")}),
    "open-vocabulary": ("open-vocabulary", {"text_centre": True}),
    "depth": ("depth", {}),
    "pose": ("simcc", {"joints": ("head", "hand")}),
    "instance": ("segmentation", {"classes": ("ball",), "normalisation": "running"}),
}
EXACT = 6e-6  # relative L2 of one stage in fp32, a few roundings


def relative(value, truth) -> float:
    value, truth = (torch.as_tensor(x).double() for x in (value, truth))
    assert value.shape == truth.shape
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


class Exported:
    """A folder of stages, run by plain ONNX Runtime sessions."""

    def __init__(self, folder):
        self.folder, self.manifest, self.sessions = folder, Manifest.read(folder), {}
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = 1

    def __call__(self, stage: str, **inputs) -> dict[str, np.ndarray]:
        if stage not in self.sessions:
            path = str(self.folder / self.manifest.stages[stage].file)
            self.sessions[stage] = onnxruntime.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        names = [info.name for info in self.manifest.stages[stage].outputs]
        return dict(
            zip(
                names,
                self.sessions[stage].run(names, {name: np.asarray(value) for name, value in inputs.items()}),
                strict=True,
            )
        )

    def graph(self, stage: str) -> onnx.ModelProto:
        return onnx.load(self.folder / self.manifest.stages[stage].file, load_external_data=False)


def second_generation(tiny):
    """The tiny model with heads per level, linear projections and one layer a block, as SD 2.x has them."""
    config = dict(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=[1, 2, 4, 4],
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=True,
        layers_per_block=1,
    )
    unet = seed_network("unet", config, seed=3)
    return replace(tiny, networks={**tiny.networks, "unet": unet})


def upstream_decoders(model) -> dict:
    """Every kind of decoder as DatasetDM has it, but for its widths."""
    torch.manual_seed(5)
    return {
        task: fold(build_decoder(upstream(kind, task=task, levels=model.levels, **SMALL, **more))).requires_grad_(False)
        for task, (kind, more) in KINDS.items()
    }


class World:
    """One model with its decoders, the reference engine over it, and its export."""

    def __init__(self, model, decoders, folder):
        self.model, self.torch = model, build_engine("torch", model, decoders, device="cpu")
        self.sides = model.levels[-1].side, model.levels[-2].side
        self.manifest = export(model, decoders, folder, raw_capture=True, averages=self.sides)
        self.exported = Exported(folder)


@pytest.fixture(scope="module", params=["demo", "SD 2.x, 192 pixels", *["SD 1.x, 192 pixels", "SD 2.x"] * IS_LONG])
def world(request, tmp_path_factory) -> World:
    folder, name = tmp_path_factory.mktemp("engines"), request.param
    if name == "demo":
        return World(load_model("demo"), load_decoders("demo"), folder)
    # At 192 pixels the decoders resize by ratios that no float holds.
    model = load_model("tiny", size=192 if name.endswith("pixels") else 0)
    model = second_generation(model) if name.startswith("SD 2.x") else model
    return World(model, upstream_decoders(model), folder)


@pytest.fixture(scope="module")
def demo():
    model = load_model("demo")
    dict(model.modules)  # built here once, and not by each export
    return model, load_decoders("demo")


def test_graphs_of_calls_with_another_number_of_rows_have_another_name(demo):
    """The levels of a transformer are those of one half, however many a call has."""
    usual, one, two = (source_digest(demo[0], {}, rows) for rows in (0, 1, 2))
    assert usual == two != one


def inputs(world, batch: int) -> dict:
    side = world.model.size // 8
    latents = ImageNoise([70 + seed for seed in range(batch)], (4, side, side)).draw()
    text = join_texts([world.torch.encode_text([""] * batch), world.torch.encode_text(PROMPTS[:batch])])
    return {"latents": latents, "timestep": torch.tensor(321.0), "context": text.context}


# Against diffusers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_every_stage_says_what_diffusers_says(world, batch):
    run, given = world.exported, inputs(world, batch)
    assert (
        relative(run("encode_text", tokens=world.model.token_ids(PROMPTS[:batch]))["context"], given["context"][batch:])
        <= EXACT
    )
    noise, capture = world.torch.denoise_and_capture(given["latents"], 321, Text(given["context"]))
    raw, captured = run("denoise_and_capture_raw", **given), run("denoise_and_capture", **given)
    for found in (raw, captured, run("denoise", **given)):
        assert relative(found["noise"], noise) <= EXACT
    kept = {
        f"{kind}_{level}_{k}"
        for kind in ("features", "maps")
        for level, row in zip(LEVELS, getattr(capture, kind))
        for k in range(len(row))
    }
    assert kept == set(raw) - {"noise"}
    for kind in ("features", "maps"):
        for level, row in zip(LEVELS, getattr(capture, kind)):
            assert all(relative(raw[f"{kind}_{level}_{k}"], value) <= EXACT for k, value in enumerate(row))
    for task, own in world.manifest.channels.items():
        weights = world.torch.decoders[task].projections()
        assert set(own) == set(weights)
        for place, level in enumerate(world.model.levels):
            if level.name in own:
                expected = pyramid.reference(
                    capture.features[place], capture.maps[place], weights[level.name], level.side
                )
                assert relative(captured[f"sums_{level.name}"][:, slice(*own[level.name])], expected) <= EXACT


@pytest.mark.parametrize("batch", [1, 3])
def test_averages_of_the_attention_are_those_of_diffusers(world, batch):
    given, words = inputs(world, batch), world.torch.encode_text(["ball", "cube", "a tall tree"][:batch])
    nothing = AttentionSums(
        torch.zeros(batch, world.sides[0] ** 2, world.sides[0] ** 2),
        torch.zeros(batch, world.sides[1] ** 2, words.context.shape[1]),
    )
    noise, sums = world.torch.denoise_and_average(given["latents"], 321, Text(given["context"]), words, nothing)
    found = world.exported(average_name(*world.sides), **given, class_context=words.context)
    for name, truth in (("noise", noise), ("cells", sums.cells), ("tokens", sums.tokens)):
        assert relative(found[name], truth) <= EXACT


@pytest.mark.parametrize("batch", [1, 3])
def test_every_decoder_says_what_it_says_of_the_raw_capture(world, batch):
    given = inputs(world, batch)
    _, capture = world.torch.denoise_and_capture(given["latents"], 321, Text(given["context"]))
    found = world.exported("denoise_and_capture", **given)
    words = world.torch.encode_classes(["ball", "cube", "a tall tree"][:batch]).expand(batch, -1, -1)
    for task, kind in world.manifest.tasks.items():
        own = {
            f"sums_{level}": found[f"sums_{level}"][:, slice(*part)]
            for level, part in world.manifest.channels[task].items()
        }
        text = {"text": words} if kind == "open-vocabulary" else {}
        answers, expected = (
            world.exported(f"annotate_{task}", **own, **text),
            world.torch.annotate(task, capture, **text),
        )
        tells_words = bool(world.torch.decoders[task].config.word_heads)
        table = stages.annotate(kind, list(own), tells_words).outputs
        assert set(answers) == set(expected) == set(table)
        for name, value in expected.items():
            assert relative(answers[name], value) <= 2e-5, (task, name)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_autoencoder(world, batch):
    latents = inputs(world, batch)["latents"]
    image = world.torch.decode_image(latents)
    difference = (torch.from_numpy(world.exported("decode_image", latents=latents)["image"]).int() - image.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3
    moments = world.exported("encode_image", image=image)["moments"]
    assert (
        relative(moments[:, :4] * world.model.modules["vae"].config.scaling_factor, world.torch.encode_image(image))
        <= EXACT
    )


def test_graphs_are_plain_onnx(world):
    """Checked with inferred shapes and types; no control flow, no foreign operators, nothing large outside the data
    file.
    """
    for stage, told in world.manifest.stages.items():
        onnx.checker.check_model(str(world.exported.folder / told.file), full_check=True)
        model = world.exported.graph(stage)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", world.manifest.opset)]
        assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "SequenceMap"}
        assert all(len(one.raw_data) <= 2048 for one in model.graph.initializer)
        for infos, values in ((told.inputs, model.graph.input), (told.outputs, model.graph.output)):
            shapes = [
                tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim) for value in values
            ]
            assert [info.name for info in infos] == [value.name for value in values] and [
                info.shape for info in infos
            ] == shapes
    captured = world.manifest.stages["denoise_and_capture"]
    assert captured.data == world.manifest.stages["denoise"].data == "unet.data"
    assert {info.name for info in captured.outputs} <= set(stages.STAGES["denoise_and_capture"].outputs)


# Precisions -----------------------------------------------------------------------------------------------------------


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in [*inferred.value_info, *inferred.input, *inferred.output]
    } | {one.name: one.data_type for one in model.graph.initializer}


@pytest.mark.parametrize(
    ("precision", "storage"), [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
def test_norms_and_softmax_stay_fp32_between_narrow_products(demo, tmp_path, precision, storage):
    model, decoders = demo
    export(
        model,
        {"depth": decoders["depth"]},
        tmp_path,
        precision=precision,
        only=["denoise", "denoise_and_capture", "annotate_depth"],
    )
    run = Exported(tmp_path)
    for stage in ("denoise", "denoise_and_capture"):
        onnx.checker.check_model(str(tmp_path / f"{stage}.onnx"), full_check=True)
        graph = run.graph(stage)
        types = types_of(graph)
        for node in graph.graph.node:
            place = types[node.input[0]]
            if node.op_type in ("Softmax", "InstanceNormalization"):
                assert place == onnx.TensorProto.FLOAT, node.name
            if node.op_type == "LayerNormalization":
                assert (
                    place == storage
                    and {one.name: one.i for one in node.attribute}["stash_type"] == onnx.TensorProto.FLOAT
                )
            if node.op_type == "Conv" or (node.op_type == "MatMul" and not node.name.startswith("times")):
                assert {types[name] for name in node.input} == {storage}, node.name
        assert all(types[value.name] == onnx.TensorProto.FLOAT for value in [*graph.graph.input, *graph.graph.output])
    assert {one.data_type for one in run.graph("annotate_depth").graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    if precision == "fp16":
        reference = build_engine("torch", model, device="cpu")
        text = join_texts([reference.encode_text([""]), reference.encode_text(PROMPTS[:1])])
        latents = ImageNoise([3], (4, 16, 16)).draw()
        found = run("denoise", latents=latents, timestep=np.float32(321), context=text.context)["noise"]
        assert 1e-5 < relative(found, reference.denoise(latents, 321, text)) < 2e-3


# The folder -----------------------------------------------------------------------------------------------------------


def test_equal_input_gives_equal_bytes(demo, tmp_path):
    first, second = (export(*demo, tmp_path / name) for name in ("a", "b"))
    assert first == second and all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in (NAME, *first.files)
    )
    other = export(demo[0], {}, tmp_path / "d", only=["encode_text"])
    assert other.source != first.source


def test_weights_and_configuration_decide_the_source(demo, tmp_path):
    model, decoders = demo
    before = export(model, decoders, tmp_path, only=["encode_text"]).source
    bias = decoders["pose"].final_layer.bias
    bias[0] += 1e-3
    try:
        assert export(model, decoders, tmp_path, only=["encode_text"]).source != before
    finally:
        bias[0] -= 1e-3


def test_a_whole_export_is_left_alone_and_a_damaged_one_is_mended(demo, tmp_path):
    model, decoders = demo
    told = []

    def again(**which) -> Manifest:
        told.clear()
        return export(model, decoders, tmp_path, on_stage=told.append, **which)

    some = ("denoise", "denoise_and_capture_raw", "annotate_pose")
    manifest = again(raw_capture=True, only=some)
    assert told == list(some) and again(raw_capture=True, only=some) == manifest and not told
    content = bytearray(whole := (tmp_path / "unet.data").read_bytes())
    content[-1] ^= 1
    (tmp_path / "unet.data").write_bytes(content)
    with pytest.raises(Refused, match="unet.data: its SHA-256 is"):
        manifest.check_files(tmp_path)
    assert again(raw_capture=True, only=some) == manifest and told
    (tmp_path / "unet.data").write_bytes(content[:-1])
    with pytest.raises(Refused, match=f"unet.data: {len(content) - 1} bytes, expected {len(content)} bytes"):
        manifest.check_files(tmp_path)
    (tmp_path / "annotate_pose.data").unlink()
    (tmp_path / "unet.data").write_bytes(whole)
    with pytest.raises(Refused, match="annotate_pose.data: no such file"):
        manifest.check_files(tmp_path)
    smaller = again(only=some[::2])
    smaller.check_files(tmp_path)
    assert set(os.listdir(tmp_path)) == {NAME, ".lock", *smaller.files}  # the stage that is no longer asked for is gone


def test_manifests_say_all_and_are_read_with_care(demo, tmp_path):
    model, decoders = demo
    manifest = export(model, decoders, tmp_path, only=["denoise_and_capture"])
    text = (tmp_path / NAME).read_text()
    assert Manifest.from_json(text) == manifest == Manifest.read(tmp_path)
    assert manifest.model["name"] == "demo" and manifest.model["unet"] == model.digests["unet"] and manifest.size == 128
    assert manifest.digest() == Manifest.from_json(text).digest()
    tensors = {info.name: info for info in manifest.stages["denoise_and_capture"].outputs}
    assert (
        tensors["sums_high"].axes == ("B", "F", "h", "w")
        and tensors["sums_high"].shape[0] == "B"
        and tensors["sums_high"].shape[2:] == (8, 8)
    )
    stops = [part for own in manifest.channels.values() for part in [own["mid"]]]
    assert stops[0][0] == 0 and stops[-1][1] == tensors["sums_mid"].shape[1]
    good = json.loads(text)
    for change in (
        lambda values: values["files"].update({"../escaped": {"sha256": "0", "size": 1}}),
        lambda values: values["stages"]["denoise_and_capture"].update(file="/etc/passwd"),
        lambda values: values["stages"]["denoise_and_capture"].update(data="elsewhere.data"),
        lambda values: values["files"].update({".lock": {"sha256": "0", "size": 1}}),
        lambda values: values.update(format=99),
        lambda values: values.update(format=0),
        lambda values: values.pop("format"),
        lambda values: values.pop("source"),
        lambda values: values.update(stages=[]),
    ):
        values = json.loads(json.dumps(good))
        change(values)
        with pytest.raises(Refused) as refusal:
            Manifest.from_json(json.dumps(values), "m.json")
        assert refusal.value.cause.startswith("m.json: ") and refusal.value.remedy
    for text in ("", "[]", "{", "3"):
        with pytest.raises(Refused, match="m.json"):
            Manifest.from_json(text, "m.json")
    with pytest.raises(Missing, match="there is none"):
        Manifest.read(tmp_path / "nowhere")


def test_what_cannot_be_exported_is_refused(demo, tmp_path):
    model, decoders = demo
    with pytest.raises(Refused, match="precision: 'int8' is none of fp32, fp16, bf16"):
        export(model, decoders, tmp_path, precision="int8")
    with pytest.raises(Refused, match="runtime: 'x'"):
        export(model, decoders, tmp_path, runtime="x")
    with pytest.raises(Refused, match="stage: 'annotate_lanes' is none of encode_text, "):
        export(model, decoders, tmp_path, only=["annotate_lanes"])
    with pytest.raises(Refused, match="depth decoder: its spectral norms change"):
        export(model, load_decoders_strictly("depth"), tmp_path)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Missing, match="cannot be written to"):
        export(model, {}, tmp_path / "file" / "out")


def load_decoders_strictly(task: str) -> dict:
    from datasetdm_fast.engine.decoders.checkpoint import read_decoder
    from datasetdm_fast.engine.decoders.config import DEMO

    return {task: read_decoder(DEMO / task)}


def test_nothing_is_left_of_an_export_that_failed(demo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataFile, "chunks", full)
    with pytest.raises(Missing, match="the disk is full"):
        export(demo[0], {}, tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    (tmp_path / ".123.part").mkdir()  # of a process that was killed
    (tmp_path / ".123.part" / "unet.data").write_text("half")
    monkeypatch.undo()
    export(demo[0], {}, tmp_path, only=["encode_text"])
    assert not (tmp_path / ".123.part").exists()


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path / "mine"))
    assert storage.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DATASETDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "datasetdm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / ".cache" / "datasetdm_fast"
    monkeypatch.setenv("DATASETDM_CACHE", "~/other")  # as a service's settings have it, which no shell has read
    assert storage.cache_folder() == tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATASETDM_CACHE", ".")
    assert storage.cache_folder() == Path()


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"DATASETDM_CACHE": "file/mine"}, r"file/mine: there can be no cache \(Not a directory\)"),
        ({"HOME": "file"}, r"file/\.cache/datasetdm_fast: there can be no cache \(Not a directory\)"),
        ({}, "no folder for the cache is known: HOME is not set, and this user has no home"),
    ],
)
def test_where_there_can_be_no_cache_the_variable_is_named(monkeypatch, tmp_path, environment, cause):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name in ("DATASETDM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])  # a container's user that nobody has entered
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Missing, match=f"^{cause}") as stop:
        storage.cache_folder()
    assert stop.value.remedy == "Name a folder of your own with DATASETDM_CACHE." and os.listdir() == ["file"]


def test_a_cache_that_everyone_may_write_to_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path / "mine"))
    before = os.umask(0)
    try:
        assert storage.cache_folder().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(Refused, match="every user can write to this cache"):
        storage.cache_folder()


def test_a_manifest_of_something_else_is_not_replaced(demo, tmp_path):
    (tmp_path / NAME).write_text('{"name": "a web page"}')
    with pytest.raises(Refused, match="does not describe an export, so it is not replaced"):
        export(demo[0], {}, tmp_path, only=["encode_text"])
    assert (tmp_path / NAME).read_text() == '{"name": "a web page"}' and set(os.listdir(tmp_path)) == {NAME, ".lock"}
    (tmp_path / NAME).write_text('{"exporter": "of ours, but edited')
    whole = export(demo[0], {}, tmp_path, only=["encode_text"]).to_json()
    for length in (len(whole) // 2, 3):  # the name of the exporter is at the end
        (tmp_path / NAME).write_text(whole[:length])
        export(demo[0], {}, tmp_path, only=["encode_text"]).check_files(tmp_path)


# The command ----------------------------------------------------------------------------------------------------------


def line(*arguments) -> list[str]:
    return [sys.executable, "-m", "datasetdm_fast.export", "--to", "onnx", *map(str, arguments)]


@long_test
def test_two_processes_make_one_export_of_the_same_bytes(demo, tmp_path):
    """Of two at once one waits for the other; and what another interpreter writes, with other hashes of strings, is the
    same.
    """
    other = subprocess.Popen(
        line("--out", tmp_path / "a"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert other.stderr.readline() == "encode_text\n"
    told = []
    export(*demo, tmp_path / "a", on_stage=told.append)
    out, err = other.communicate(timeout=300)
    assert other.returncode == 0 and out == f"{tmp_path / 'a'}\n" and "denoise" in err.splitlines() and not told
    export(*demo, tmp_path / "b")
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "a" / NAME).read_bytes()
    assert not list(tmp_path.glob("*/.*.part"))


def _export_and_hang(model, out, begun):
    def told(stage):
        (out / f".{os.getpid()}.part" / "half.onnx").write_text("half")
        begun.set()
        time.sleep(600)

    export(model, {}, out, only=["encode_text"], on_stage=told)


def _export_into(model, out, done):
    done.put(export(model, {}, out, only=["encode_text"]).digest())


def test_of_two_processes_one_is_killed_and_the_other_goes_on(tmp_path, capfd):
    model, context = load_model("tiny"), multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Queue()
    first = context.Process(target=_export_and_hang, args=(model, tmp_path, begun))
    second = context.Process(target=_export_into, args=(model, tmp_path, done))
    first.start()
    assert begun.wait(60)
    second.start()
    said, deadline = "", time.monotonic() + 60
    while "waiting for another process" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.05)
    first.kill()
    assert (
        done.get(timeout=120) == Manifest.read(tmp_path).digest() and "waiting for another process that fills" in said
    )
    for process in (first, second):
        process.join(60)
    Manifest.read(tmp_path).check_files(tmp_path)
    assert set(os.listdir(tmp_path)) == {NAME, ".lock", "encode_text.onnx", "encode_text.data"}


FAULTS = """
import ctypes, os, sys
from dataclasses import replace
from pathlib import Path
import torch
from datasetdm_fast.errors import Missing
from datasetdm_fast.export.manifest import NAME, Manifest
from datasetdm_fast.export.onnx.to_onnx import export
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.model import Network
class Weights(torch.nn.Module):  # of a network, without the library of its module, which takes seconds to import
    def __init__(self, network):
        super().__init__()
        self.config, self.state = network.config, dict(network.read().state)
    def state_dict(self):
        return self.state
shim = ctypes.CDLL(os.environ["FAULT_SHIM"])
shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
shim.fault_seen.restype = ctypes.c_int64
model, out = load_model("tiny"), Path(sys.argv[1])
# read here once, and not by each child
model = replace(model, networks={part: Network.of(Weights(network)) for part, network in model.networks.items()})
export(model, {}, out, only=["encode_text"])
whole = {path.name: path.read_bytes() for path in out.iterdir()}
# changed, so that every export finds an earlier one in its place
state = model.modules["text_encoder"].state
(name,) = (name for name in state if name.endswith("final_layer_norm.bias"))
first = state[name].clone()
step = int(sys.argv[2])
for kind in map(int, sys.argv[3:]):
    ends = {1: (0, 3), 2: (0, 3), 3: (0,), 4: (0, 3), 5: (-9,), 6: (-9,)}[kind]
    at, is_met = 0, True
    while is_met:
        state[name] += 1
        reader, writer = os.pipe()
        if not (child := os.fork()):
            shim.fault_arm(str(out).encode(), kind, at, 0)
            try:
                export(model, {}, out, only=["encode_text"])
                code = 0
            except Missing as missing:
                code = 3 if missing.cause and missing.remedy else 98
            seen = shim.fault_seen()
            shim.fault_arm(b"", 0, 0, 0)
            os.write(writer, str(seen).encode())
            os._exit(code)
        os.close(writer)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        is_met = code != 0 or int(os.read(reader, 99)) > at
        os.close(reader)
        assert code in ends if is_met else code == 0, (kind, at, code)
        if (out / NAME).exists():
            Manifest.read(out).check_files(out)
        at += step
    print(kind, at, flush=True)
    state[name].copy_(first)
    export(model, {}, out, only=["encode_text"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole, kind
assert not {"diffusers", "transformers"} & set(sys.modules)
os._exit(0)  # to take apart what torch imported takes a second
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fault library is preloaded as Linux does it")
def test_every_call_to_the_disk_may_fail_or_be_the_last(tmp_path):
    """What is there afterwards is whole or has no manifest, and the next export makes it the same bytes."""
    shim = str(fault_server.build_shim(tmp_path))
    environment = os.environ | {"LD_PRELOAD": shim, "FAULT_SHIM": shim}
    chosen, step = (fault_server.KINDS[1:], "1") if IS_LONG else (("full", "kill before"), "16")  # every 16th call
    kinds = [str(fault_server.KINDS.index(kind)) for kind in chosen]
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(tmp_path / "out"), step, *kinds],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    met = dict(line.split() for line in done.stdout.splitlines())
    assert list(met) == kinds and all(int(met[kind]) > 2 for kind in kinds) and int(met[kinds[0]]) > 8, met


@long_test
def test_a_signal_leaves_nothing_half_written(tmp_path):
    # A suite that was started in the background hands on that SIGINT is ignored.
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen(
        line("--out", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard
    )
    assert process.stderr.readline() == "encode_text\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130 and os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("--precision", "int8"), 2),
        (("--model", "none"), 2),
        (("--decoder", "."), 3),
        (("--size", "100"), 2),
        (("--too", "onnx"), 2),
        (("--capability", "sm90"), 2),
        (("--batch", "4"), 2),
        (("--precision", "fp8"), 2),
    ],
)
def test_the_command_refuses_in_two_lines(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export_command([*arguments, *(("--out", "engines") if arguments else ())]) == code
    assert len(capsys.readouterr().err.splitlines()) == 2 and not os.listdir(tmp_path)


def test_the_command_writes_what_it_is_asked_for(tmp_path, capsys):
    arguments = [
        "--model",
        "tiny",
        "--decoder",
        "none",
        "--raw-capture",
        "--precision",
        "fp16",
        "--size",
        "64",
        "--out",
        str(tmp_path),
    ]
    assert export_command([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    manifest = Manifest.from_json(said.out)
    assert manifest == Manifest.read(tmp_path) and said.err.splitlines() == list(manifest.stages)
    assert set(manifest.stages) == {"encode_text", "denoise", "denoise_and_capture_raw", "decode_image", "encode_image"}
    assert (manifest.precision, manifest.size, manifest.runtime) == ("fp16", 64, "any")
    assert export_command([*arguments, "--quiet"]) == 0 and capsys.readouterr().err == ""


# Parts ----------------------------------------------------------------------------------------------------------------


def test_the_program_of_the_page_makes_what_the_pipeline_makes(demo, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    export(demo[0], {task: demo[1][task] for task in ("pose", "depth")}, "graphs")
    names: dict = {}
    exec(program, names)
    pipe = Pipeline.from_pretrained("demo", outlines="decoder")
    choices = {"steps": 10, "guidance": 7.5, "sampler": "ddim", "tasks": ("depth",)}
    expected = pipe(["a red ball beside a cube"], seeds=[7], **choices)
    assert names["is_finite"].all()
    assert np.abs(names["image"][0].astype(int) - expected.images[0]).max() <= 1
    np.testing.assert_allclose(names["metres"][0, 0], expected.depth[0].metres, atol=1e-4)


def test_sizes_known_at_run_time_are_counted_by_name():
    batch, words = Extent(1, ("B",)), Extent(1, ("K",))
    assert (
        str(2 * batch) == "2B"
        and (2 * batch) // 2 == batch
        and words * batch == batch * words
        and str(batch * words) == "BK"
    )
    with pytest.raises(ValueError, match="does not divide"):
        batch // 2


def test_a_graph_refuses_what_it_cannot_say():
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    x = graph.input("x", [Extent(1, ("B",)), 4], torch.float32)
    with pytest.raises(NotImplementedError, match="no ONNX form of cumsum"):
        torch.cumsum(x, 1)
    with pytest.raises(TypeError, match="control flow"):
        bool(x < 0)
    y = x.add_(1.0)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        x.sigmoid()
    with pytest.raises(ValueError, match="do not broadcast"):
        y + torch.zeros(3)
    with pytest.raises(AttributeError, match="storage"):
        _ = y.storage


def test_the_squares_of_an_rms_norm_are_added_up_in_fp32():
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    x = graph.input("x", [Extent(1, ("B",)), 4], torch.bfloat16)
    weight = graph.constant(torch.ones(4, dtype=torch.bfloat16))
    assert torch.nn.functional.rms_norm(x, (4,), weight, 1e-6).dtype == torch.bfloat16
    kinds = [node.op_type for node in graph._nodes]
    casts = [node.attribute[0].i for node in graph._nodes if node.op_type == "Cast"]
    assert kinds == ["Cast", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Cast", "Mul"]
    assert casts == [onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16]


def test_an_image_is_resized_by_a_ratio_only_where_that_is_exact():
    """In fp32 7 / 3 of 3 cells are less than 7."""
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    for side, inputs in ((7, 4), (6, 3)):  # the size itself, or the ratio
        x = graph.input(f"x{side}", [Extent(1, ("B",)), 2, 3, 3], torch.float32)
        torch.nn.functional.interpolate(x, (side, side), mode="bilinear")
        assert len(graph._nodes[-1].input) == inputs


def test_what_changes_nothing_leaves_no_node():
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    x = graph.input("x", [Extent(1, ("B",)), 4], torch.float32)
    assert x.expand(-1, 4) is x and x.repeat_interleave(1, 0) is x
    weight = trace_module(torch.nn.Linear(3, 3), graph, "layer").weight
    assert torch.is_floating_point(weight) is True  # no tensor, and known when the graph is written


def test_a_level_that_no_decoder_reads_has_no_maps():
    ops = SimpleNamespace(attention=lambda *given: given)
    hook = ProjectingHook(SimpleNamespace(widths=(0, 4)), ops, 1)
    assert hook.attend(AttentionSlot(0, 0, 0, 1), "q", "k", "v") == ("q", "k", "v")


def test_a_network_that_is_no_graph_is_refused():
    backbone = SimpleNamespace(title="Some model", served_by=lambda what: what != "export")
    with pytest.raises(Refused, match="export: Some model has no network that is written as graphs"):
        to_onnx._check(SimpleNamespace(backbone=backbone), {}, "fp32", "ort")


def test_a_folder_is_filled_after_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    (tmp_path / ".7.part").mkdir()
    (tmp_path / ".model.onnx.8.part").write_bytes(b"half")
    with staging.fill_alone(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Missing, match="cannot be written to .No locks available"), staging.fill_alone(tmp_path):
        pass
    assert os.listdir("/proc/self/fd") == before


def test_the_manifest_is_the_last_file_and_absent_until_then(tmp_path, monkeypatch):
    for name in (NAME, "old.onnx", "both.onnx"):
        (tmp_path / name).write_text("old")
    moved, move = [], staging.storage.move

    def watch(source, target):
        assert not (tmp_path / NAME).exists() and not (tmp_path / "old.onnx").exists()
        moved.append(target.name)
        move(source, target)

    monkeypatch.setattr(staging.storage, "move", watch)
    with staging.stage_files(tmp_path, NAME, ["old.onnx", "both.onnx"]) as stage:
        for name in (NAME, "zebra.onnx", "both.onnx"):
            (stage / name).write_text("new")
    assert moved == ["both.onnx", "zebra.onnx", NAME] and sorted(os.listdir(tmp_path)) == sorted(moved)


def test_types_shapes_and_names_of_equal_bytes_have_other_digests():
    modules = [torch.nn.Module() for _ in range(4)]
    for module, value in zip(modules, (torch.zeros(6), torch.zeros(2, 3), torch.zeros(6, dtype=torch.int32), None)):
        module.register_buffer("weight" if value is not None else "bias", torch.zeros(6) if value is None else value)
    states = [module.state_dict() for module in modules]
    found = [digest([("part", state)]) for state in states] + [digest([("other", states[0])])]
    assert len(set(found)) == 5 and found[0] == digest([("part", states[0])])
    both = states[0] | states[3]  # in whatever order they are read
    assert digest([("part", both)]) == digest([("part", dict(reversed(both.items())))])


def test_large_tensors_begin_a_page_and_gaps_are_zeros():
    data, large = DataFile("some.data"), torch.arange(16384.0)
    assert data.place("a", torch.ones(3), torch.float32) == (0, 12)
    assert data.place("large", large, torch.float32) == (4096, 65536)
    assert data.place("b", torch.ones(2), torch.float16) == (4096 + 65536, 4)
    assert data.place("c", torch.ones(2), torch.bfloat16) == (4096 + 65536 + 64, 4)
    assert data.place("large", large, torch.float32) == (4096, 65536)
    whole = b"".join(data.chunks())
    assert len(whole) == data.size and whole[12:4096] == bytes(4084)
    assert np.array_equal(np.frombuffer(whole[4096 : 4096 + 65536], np.float32), large.numpy())


@pytest.fixture(scope="module")
def tiny():
    model = load_model("tiny")
    dict(model.modules)
    return model


def test_what_decides_the_source_and_what_does_not(tiny, monkeypatch):
    decoders = upstream_decoders(tiny)
    some = {name: decoders[name] for name in ("depth", "pose")}
    usual = source_digest(tiny, some)
    assert usual != source_digest(tiny, dict(reversed(some.items())))  # which decides that of the channels
    config = tiny.modules["unet"].config
    read_elsewhere = type(config)({**config, "_name_or_path": "elsewhere"})
    tiny.modules["unet"]._internal_dict, kept = read_elsewhere, tiny.modules["unet"]._internal_dict
    try:
        assert source_digest(tiny, some) == usual
    finally:
        tiny.modules["unet"]._internal_dict = kept
    depth, stored = some["depth"], some["depth"].config
    depth.config = replace(stored, max_depth=stored.max_depth * 2)  # which its weights do not tell
    assert source_digest(tiny, some) != usual
    depth.config = stored
    monkeypatch.setattr(to_onnx, "exporter", lambda: "another version")
    assert source_digest(tiny, some) != usual


def test_an_export_is_written_anew_for_all_that_decides_its_files(tiny, tmp_path, monkeypatch):
    written, write = [], to_onnx.StageExport.write
    monkeypatch.setattr(to_onnx.StageExport, "write", lambda self, to: written.append(self.request) or write(self, to))
    monkeypatch.setattr(to_onnx, "source_digest", lambda *_: "of equal weights")
    choices: dict = {"only": ["encode_text"]}
    for change in ({}, {"precision": "fp16"}, {"runtime": "onnxruntime"}):
        choices |= change
        for _ in range(2):  # the second is left as it is
            export(tiny, {}, tmp_path, **choices)
    export(replace(tiny, size=tiny.size // 2), {}, tmp_path, **choices)
    assert len(written) == 4 == len(set(written))


def test_rows_of_a_call_are_those_of_its_own_guidance():
    model = SimpleNamespace(has_negative=lambda guidance: guidance > 1, defaults=SimpleNamespace(guidance=5.0))
    assert [to_onnx.usual_rows(SimpleNamespace(**vars(model), scale=scale)) for scale in (0.0, 1.0, 2.0)] == [2, 1, 2]


def test_an_autoencoder_that_leaves_fp16_is_stored_in_fp32(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "latents", replace(tiny.latents, leaves_fp16=True))
    wide = {name: to_onnx.StageExport(replace(tiny), {}, precision=name).image_dtype for name in ("fp16", "bf16")}
    assert wide == {"fp16": torch.float32, "bf16": torch.bfloat16}


def test_undone_transpositions_leave_no_node():
    graph = Graph("some", DataFile("some.data"), OPERATORS)
    x = graph.input("x", [Extent(1, ("B",)), 4, 6], torch.float32)
    graph.output("y", x.transpose(1, 2).unflatten(1, (2, 3)).flatten(1, 2).transpose(1, 2) * 2.0)
    assert [node.op_type for node in graph.model({}).graph.node] == ["Mul"]


def test_constants_of_equal_names_are_equal_bytes():
    layer = trace_module(torch.nn.Linear(3, 3), graph := Graph("some", DataFile("some.data"), OPERATORS), "layer")
    x = graph.input("x", [Extent(1, ("B",)), 3], torch.float32)
    graph.output("y", layer(x) + layer.weight[0:1] + layer.weight[1:2])
    names = [one.name for one in graph.model({}).graph.initializer]
    assert len(names) == len(set(names)) == 4 and any("transpose" in name for name in names)
    square, row = torch.zeros(2, 2), torch.zeros(4)  # of equal bytes
    assert graph.store(square, torch.float32) != graph.store(row, torch.float32) == graph.store(row + 0, torch.float32)


# Full size ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.environ.get("DATASETDM_LONG_TESTS"), reason="takes a minute and 6 GB; set DATASETDM_LONG_TESTS=1"
)
def test_full_size_is_written_without_a_second_copy(tmp_path):
    """Peak memory against the size of what is written, for Stable Diffusion 1.x in fp16."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    arguments = line("--model", "random-sd14", "--decoder", "none", "--precision", "fp16", "--out", tmp_path)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    written = sum(info.size for info in Manifest.read(tmp_path).files.values())
    shutil.rmtree(tmp_path)
    assert before * 1024 < peak and peak <= 2.5 * written, f"{peak / 1e9:.2f} GB for {written / 1e9:.2f} GB"


def test_weights_of_a_gpu_are_copied_to_the_host_for_their_digest():
    """As `ort` exports a model that the reference engine has put on a GPU: NumPy reads no memory of one."""
    here = torch.arange(4.0)
    there = SimpleNamespace(dtype=here.dtype, detach=lambda: there, contiguous=lambda: there, cpu=lambda: here)
    assert bytes(tensor_bytes(there)) == here.numpy().tobytes()


def test_the_digest_of_the_exporter_covers_the_networks():
    names = {path.name for path in exporter_files()}
    assert {"unet.py", "vae.py", "trunk.py", "to_onnx.py", "operators.py", "stages.py"} <= names


def test_the_digest_of_the_exporter_covers_every_kernel_that_graphs_are_made_of(tiny, tmp_path):
    run: set[str] = set()
    sys.setprofile(lambda frame, event, _: run.add(frame.f_code.co_filename))
    try:
        export(tiny, upstream_decoders(tiny), tmp_path)
    finally:
        sys.setprofile(None)
    folder = os.path.realpath(os.path.dirname(pyramid.__file__))
    of_kernels = {path for path in map(os.path.realpath, run) if os.path.dirname(path) == folder}
    assert of_kernels and of_kernels <= {os.path.realpath(path) for path in exporter_files()}
