"""Plans built for real by TensorRT-RTX, which needs no GPU for that: every stage of two models, and whatever can go
wrong on the way.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from skips import IS_LONG, long_test

from datasetdm_fast.config import SD_DEFAULTS
from datasetdm_fast.engine.decoders import checkpoint
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.loading import load_model, presets
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export import __main__ as command
from datasetdm_fast.export.manifest import FileInfo, Manifest
from datasetdm_fast.export.onnx import to_onnx
from datasetdm_fast.export.tensorrt import flavours, plans, to_tensorrt
from datasetdm_fast.export.tensorrt.to_tensorrt import describe_row

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
CARDS = "sm80,sm86,sm89,sm120" if IS_LONG else "sm120"
# a plan for each batch size, but one of the text encoder
PLANS = 2 * 10 + 1 if IS_LONG else 6
BATCHES = "1,2" if IS_LONG else "1"


@cache
def rtx() -> flavours.Flavour:
    found = flavours.find_flavour("tensorrt-rtx")
    assert found.module  # imported before a test names another one
    return found


def export(*flags: str) -> int:
    return command.main(["--to", "tensorrt-rtx", *flags])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Flags that choose the stages: all of the demo model, or those of one decoder and of a model with every operator
    of the demo's, but attention at one level alone: most of the time goes into attentions.
    """
    if IS_LONG:
        yield ("--raw-capture",)
        return
    preset = presets.preset
    down, up = ("CrossAttnDownBlock2D", *("DownBlock2D",) * 3), (*("UpBlock2D",) * 3, "CrossAttnUpBlock2D")
    kinds = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1}

    def with_few_attentions(name, parts, *others, **named):
        return preset(name, parts | {"unet": parts["unet"] | kinds}, *others, **named)

    folder = tmp_path_factory.mktemp("decoders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "preset", with_few_attentions)
        model = load_model("tiny")
        sizes = {"levels": model.levels, "text_width": model.text_width, "width": 32, "depth_width": 24}
        depth = checkpoint.build_decoder(upstream("depth", **sizes, upscale=2, outlines="image"))
        checkpoint.save_decoder(depth, folder / "depth")
        yield ("--model", "tiny", "--decoder", str(folder))


@pytest.fixture(scope="module")
def built(tmp_path_factory, stages):
    """The plans as the command builds them, and what it says of them."""
    folder = tmp_path_factory.mktemp("plans")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = export("--out", str(folder), "--batch", BATCHES, "--capability", CARDS, "--json", *stages)
    assert code == 0
    return folder, json.loads(said.getvalue())


@long_test
def test_every_stage_of_the_demo_model_becomes_a_plan_for_cards_that_are_not_here(built, record_property):
    folder, told = built
    rows = {row["stage"]: row for row in told["plans"]}
    assert set(rows) == set(Manifest.read(folder).stages) and len(rows) == 10 + IS_LONG
    for row in told["plans"]:
        record_property("told", f"demo, {told['flavour']}: {row['stage']}, {row['layers']} layers")
    for stage, row in rows.items():
        weights = sum(
            (folder / name).stat().st_size
            for name in {Manifest.read(folder).stages[stage].data} - {""}
            if "unet" not in name
        )
        assert row["layers"] > 5 and row["seconds"] > 0 and row["built"] and row["bytes"] > weights
    assert told["capabilities"] == CARDS.split(",")
    assert {rows[stage]["fused_attentions"] for stage in ("denoise", "denoise_and_capture")} == {20}


def test_the_same_line_again_reads_what_is_there(built, stages, monkeypatch, capsys):
    folder, _ = built
    monkeypatch.setattr(to_tensorrt, "run_builder", lambda *arguments: pytest.fail("built again"))
    assert export("--out", str(folder), "--batch", BATCHES, "--capability", CARDS, *stages) == 0
    assert capsys.readouterr().err.count("exists, built") == PLANS


def test_what_must_not_be_used_is_built_anew(built, stages, capsys, monkeypatch):
    folder, _ = built
    found = {path.name.split("-")[0]: path for path in folder.glob("*.plan")}
    text, image, other = found["encode_text"], found["decode_image"], found["encode_image"]
    originals = {path: path.read_bytes() for path in (text, image, other)}
    manifests = {path: path.with_name(f"{path.name}.json").read_text() for path in originals}
    flipped = bytearray(originals[text])
    flipped[len(flipped) // 2] ^= 1
    text.write_bytes(flipped)
    image.write_bytes(originals[image][:-100])
    other.write_bytes(originals[text])

    rebuilt = []
    monkeypatch.setattr(
        to_tensorrt,
        "run_builder",
        lambda graph, order, part, *rest: rebuilt.append(order.stage) or part.write_bytes(b"new") and NOTES,
    )
    assert export("--out", str(folder), "--batch", BATCHES, "--capability", CARDS, *stages) == 0
    assert sorted(rebuilt) == ["decode_image", "encode_image", "encode_text"]
    refusals = [line for line in capsys.readouterr().err.splitlines() if line.endswith("it is rebuilt")]
    assert len(refusals) == 3
    for path, content in originals.items():
        path.write_bytes(content)
        path.with_name(f"{path.name}.json").write_text(manifests[path])


NOTES = {"layers": 9, "fused_attentions": 0, "seconds": 0.1}


# A model as wide as a quarter of Stable Diffusion ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def quarter(tmp_path_factory):
    """Graphs in fp16 of Stable Diffusion 1.x with every width divided by four, and of one decoder of each kind as
    upstream shapes them.
    """
    parts = {
        "text_encoder": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3},
        "unet": {"block_out_channels": (80, 160, 320, 320), "cross_attention_dim": 192, "norm_num_groups": 16},
        "vae": {"block_out_channels": (32, 64, 128, 128)},
    }
    model = presets.preset("quarter", parts, SD_DEFAULTS, 512, seed=4)
    narrow = {
        "levels": model.levels,
        "width": 64,
        "feed_forward": 256,
        "layers": 2,
        "mask_dim": 64,
        "text_width": 192,
        "depth_width": 256,
    }
    torch.manual_seed(0)
    kinds = {"semantic": "segmentation", "open-vocabulary": "open-vocabulary", "depth": "depth", "pose": "heatmap"}
    made = {
        task: checkpoint.for_inference(checkpoint.build_decoder(upstream(kind, **narrow)), strict=False)
        for task, kind in kinds.items()
    }
    folder = tmp_path_factory.mktemp("quarter")
    return folder, to_onnx.export(model, made, folder, precision="fp16")


STAGES = ("encode_text", "denoise", "denoise_and_capture", "decode_image", "encode_image")
STAGES += tuple(f"annotate_{task}" for task in ("semantic", "open-vocabulary", "depth", "pose"))


@long_test
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_quarter_of_stable_diffusion_builds(quarter, stage, tmp_path, record_property):
    folder, manifest = quarter
    assert set(manifest.stages) == set(STAGES)
    order = to_tensorrt.make_order(stage, manifest, to_tensorrt.Target(rtx(), ("sm89",)), 2)
    notes = to_tensorrt.run_builder(folder / manifest.stages[stage].file, order, tmp_path / "plan", rtx())
    row = {"stage": stage, "batch": 2, "bytes": (tmp_path / "plan").stat().st_size, "built": True, **notes}
    record_property("told", f"a quarter of SD, {rtx().title}: {describe_row(row)}")
    assert notes["layers"] > 5
    if stage.startswith("denoise"):
        assert notes["fused_attentions"] == 32  # 16 transformers, each with an attention to itself and one to the text


# Refusals -------------------------------------------------------------------------------------------------------------


def graph(tmp_path, *nodes) -> Path:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4, 16, 16]) for name in ("latents", "noise")]
    model = helper.make_model(
        helper.make_graph(list(nodes), "small", info[:1], info[1:]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


ORDER = plans.PlanOrder("denoise", 1, "", "", {"latents": (1, 4, 16, 16)}, "fp32", "tensorrt-rtx", "1", "13", ("sm89",))


def run(tmp_path, *nodes, order=ORDER, flavour=None):
    return to_tensorrt.run_builder(graph(tmp_path, *nodes), order, tmp_path / "plan", flavour or rtx())


RELU = helper.make_node("Relu", ["latents"], ["noise"], name="a relu")


def test_a_refused_operator_is_named_with_its_node(tmp_path):
    with pytest.raises(Refused, match=r"denoise: TensorRT-RTX .* gives no plan: node 'the odd one' \(Det\): "):
        run(tmp_path, helper.make_node("Det", ["latents"], ["noise"], name="the odd one"))
    assert not (tmp_path / "plan").exists()


def test_shapes_that_do_not_fit_the_graph_are_refused(tmp_path):
    with pytest.raises(Refused, match="denoise: .* gives no plan: "):
        run(tmp_path, RELU, order=dataclasses.replace(ORDER, shapes={"latents": (1, 4, 8, 8)}))


def test_a_builder_that_crashes_takes_only_itself_along(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_that_crashes.py").write_text(
        "import os, signal\nos.write(2, b'out of places')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    installed = rtx()
    monkeypatch.setitem(to_tensorrt.MODULES, "tensorrt-rtx", "tensorrt_that_crashes")
    with pytest.raises(Refused, match="its builder ended by SIGSEGV, saying: .*out of places"):
        run(tmp_path, RELU, flavour=installed)


def test_what_a_builder_throws_is_told_without_where(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_that_throws.py").write_text(
        "ILogger = object\ndef Builder(logger): raise TypeError('factory function\\nreturned nullptr')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    installed = rtx()
    monkeypatch.setitem(to_tensorrt.MODULES, "tensorrt-rtx", "tensorrt_that_throws")
    with pytest.raises(Refused, match="gives no plan: TypeError: factory function returned nullptr"):
        run(tmp_path, RELU, flavour=installed)
    assert not (tmp_path / "plan").exists()


def test_a_builder_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(to_tensorrt, "LONGEST_BUILD", 0.01)
    with pytest.raises(Refused, match="denoise: TensorRT-RTX .* gave no plan within "):
        run(tmp_path, RELU)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (
            ("--capability", "sm90"),
            2,
            "--capability sm90: TensorRT-RTX 1.7.1.116 builds here for sm75, sm80, sm86, sm89, sm120, sm121",
        ),
        (("--batch", "0"), 2, "--batch 0: expected numbers from 1 to 256"),
        (("--batch", "1,many"), 2, "--batch many: expected numbers from 1 to 256"),
    ],
)
def test_what_cannot_come_out_well_is_refused_before_a_model_is_read(flags, code, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flavours, "gpu_capabilities", list)
    monkeypatch.setattr("datasetdm_fast.engine.loading.load_model", lambda *_, **__: pytest.fail("the model was read"))
    assert export("--out", str(tmp_path), *flags) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(said)


def test_the_full_tensorrt_is_missing_or_builds_for_the_gpu_here_alone():
    full = flavours.Flavour("tensorrt", "10.16.1", "13")
    with pytest.raises(Missing, match="TensorRT 10.16.1 builds on the GPU it builds for"):
        flavours.check_capabilities(full, (), [])
    with pytest.raises(Refused, match="--capability sm80: TensorRT 10.16.1 builds here for sm90"):
        flavours.check_capabilities(full, ("sm80",), ["sm90"])
    assert flavours.check_capabilities(full, (), ["sm90"]) == ("sm90",)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (helper.make_node("EPContext", ["tokens"], ["y"], domain="com.microsoft"), "would load compiled code"),
        (helper.make_node("Evil", ["tokens"], ["y"], domain="evil"), "'Evil' of 'evil' is not supported"),
        (None, "external data '../secret' leads out of its folder"),
    ],
)
def test_a_hostile_graph_in_the_named_folder_is_refused_before_tensorrt_reads_it(
    node, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(to_tensorrt, "run_builder", lambda *arguments: pytest.fail("it was given to TensorRT"))
    folder, line = tmp_path / "engines", ["--model", "tiny", "--decoder", "none", "--size", "64", "--quiet"]
    line += ["--precision", "fp16", "--out", str(folder)]
    assert command.main(["--to", "onnx", *line]) == 0
    path = folder / "encode_text.onnx"
    model = onnx.load(path, load_external_data=False)
    if node:
        model.graph.node.append(node)
    else:
        secret = model.graph.initializer.add(name="secret", data_type=TensorProto.FLOAT, dims=[1])
        secret.data_location = TensorProto.EXTERNAL
        secret.external_data.add(key="location", value="../secret")
    data = model.SerializeToString()
    path.write_bytes(data)
    manifest = Manifest.read(folder)
    files = {**manifest.files, path.name: FileInfo(hashlib.sha256(data).hexdigest(), len(data))}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    capsys.readouterr()
    assert export(*line) == 2
    assert said in capsys.readouterr().err.splitlines()[0]


def test_a_graph_that_is_not_its_manifests_is_not_built(built, tmp_path):
    import shutil

    folder, _ = built
    for name in ("encode_text.onnx", "encode_text.data"):
        shutil.copy(folder / name, tmp_path)
    manifest = Manifest.read(folder)
    with (tmp_path / "encode_text.data").open("r+b") as file:
        file.write(b"other weights")
    order = to_tensorrt.make_order("encode_text", manifest, to_tensorrt.Target(rtx(), ("sm89",)), 1)
    with pytest.raises(Refused, match="encode_text.data: the graph is not the one that its manifest describes"):
        to_tensorrt.open_plan(plans.PlanFolder(tmp_path), order, manifest, rtx(), lambda stage: {})


def _build_text_encoder(folder, done):
    manifest = Manifest.read(folder)
    order = to_tensorrt.make_order("annotate_depth", manifest, to_tensorrt.Target(rtx(), ("sm89",)), 4)
    opened = plans.PlanFolder(folder, lambda line: None)
    plan = to_tensorrt.open_plan(opened, order, manifest, rtx(), lambda stage: {})
    done.put((plan.is_new, len(plan.content)))


def test_two_processes_at_once_make_one_build(built):
    folder, _ = built
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    processes = [context.Process(target=_build_text_encoder, args=(folder, done)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [done.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(is_new for is_new, _ in answers) == [False, True] and answers[0][1] == answers[1][1]
