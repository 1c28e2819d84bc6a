"""Plans built for real by TensorRT-RTX, which needs no GPU for that: every stage of two models, and whatever can go
wrong on the way.
"""

import os
import select
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fake_tensorrt
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from skips import IS_LONG, long_test
from small_unets import FEW_ATTENTIONS, with_small_unet

from datasetdm_fast import export_cli
from datasetdm_fast.config import SD_DEFAULTS
from datasetdm_fast.engine.decoders import checkpoint
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines.exported.trt import dynamic_shapes
from datasetdm_fast.engine.loading import load_model, presets
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.onnx import to_onnx
from datasetdm_fast.export.tensorrt import flavours, plan_builder

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@cache
def rtx() -> flavours.Flavour:
    return flavours.Flavour(pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed"))


STAGES = ("encode_text", "denoise", "denoise_and_capture", "decode_image", "encode_image")
STAGES += tuple(f"annotate_{task}" for task in ("semantic", "open-vocabulary", "depth", "pose"))


def test_every_stage_of_a_tiny_model_becomes_a_plan_for_a_card_that_is_not_here(tmp_path):
    model = with_small_unet(load_model("tiny"), FEW_ATTENTIONS)
    sizes = {"levels": model.levels, "text_width": model.text_width, "width": 32, "depth_width": 24}
    depth = checkpoint.build_decoder(upstream("depth", **sizes, upscale=2, outlines="image"))
    manifest = to_onnx.export(model, {"depth": fold(depth)}, tmp_path)
    assert set(manifest.stages) == {*STAGES[:5], "annotate_depth"}
    graphs = {stage: onnx.load(tmp_path / one.file, load_external_data=False) for stage, one in manifest.stages.items()}
    kinds = {stage: {node.op_type for node in graph.graph.node} for stage, graph in graphs.items()}
    assert kinds["denoise"] <= kinds["denoise_and_capture"]  # so that the short form builds the second alone
    for stage, tensors in manifest.stages.items():
        if stage == "denoise" and not IS_LONG:
            continue
        path = tmp_path / f"{stage}.plan"
        plan_builder.build_plan(tmp_path / tensors.file, path, dynamic_shapes(tensors, 1), rtx(), "sm120")
        assert path.stat().st_size > 10_000


def test_the_command_writes_a_plan_beside_each_graph(tmp_path, monkeypatch, capsys):
    built, out = fake_tensorrt.fake_builder(monkeypatch), tmp_path / "plans"
    line = ["--model", "tiny", "--decoder", "none", "--to", "tensorrt", "--out", str(out)]
    monkeypatch.setattr(flavours, "gpu_capabilities", list)
    for flags, code, words in (
        (["--capability", "sm90"], 2, "builds plans for sm75, sm80"),
        ([], 3, "needs an NVIDIA GPU"),
    ):
        assert export_cli.main([*line, *flags]) == code and not out.exists()
        assert words in capsys.readouterr().err
    assert export_cli.main([*line, "--capability", "sm89", "--batch", "3"]) == 0
    stages = {path.stem for path in out.glob("*.plan")}
    assert stages == {name for name, _, _ in built} == {"encode_text", "denoise", "decode_image", "encode_image"}
    sizes = {name: next(iter(shapes.values()))[0] for name, shapes, _ in built}
    assert sizes == {"encode_text": 8, "denoise": 3, "decode_image": 3, "encode_image": 3}
    assert {capability for *_, capability in built} == {"sm89"} and not list(out.glob("*.part"))
    line = ["--model", "tiny", "--decoder", "none", "--out", str(out), "--quiet"]
    assert export_cli.main(line) == 0 and len(list(out.glob("*.plan"))) == 4  # of these very graphs
    (manifest := out / "manifest.json").write_text(manifest.read_text().replace('"denoise": {', '"../other": {'))
    (tmp_path / "other.plan").write_bytes(b"")
    assert export_cli.main([*line, "--precision", "bf16"]) == 0 and not list(out.glob("*.plan"))
    assert (tmp_path / "other.plan").exists()


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
    made = {task: fold(checkpoint.build_decoder(upstream(kind, **narrow))) for task, kind in kinds.items()}
    folder = tmp_path_factory.mktemp("quarter")
    return folder, to_onnx.export(model, made, folder, precision="fp16")


@long_test
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_quarter_of_stable_diffusion_builds(quarter, stage, tmp_path):
    folder, manifest = quarter
    assert set(manifest.stages) == set(STAGES)
    tensors, path = manifest.stages[stage], tmp_path / "plan"
    plan_builder.build_plan(folder / tensors.file, path, dynamic_shapes(tensors, 2), rtx(), "sm89")
    assert path.stat().st_size > 100_000


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


SHAPES = {"latents": (1, 4, 16, 16)}


def run(tmp_path, *nodes, shapes=SHAPES, flavour=None, capability="sm89"):
    return plan_builder.build_plan(graph(tmp_path, *nodes), tmp_path / "plan", shapes, flavour or rtx(), capability)


RELU = helper.make_node("Relu", ["latents"], ["noise"], name="a relu")


def test_a_refused_operator_is_named_with_its_node(tmp_path):
    with pytest.raises(Refused, match=r"small: TensorRT-RTX .* gives no plan: node 'the odd one' \(Det\): "):
        run(tmp_path, helper.make_node("Det", ["latents"], ["noise"], name="the odd one"))
    assert not (tmp_path / "plan").exists()


def test_shapes_that_do_not_fit_the_graph_are_refused(tmp_path):
    with pytest.raises(Refused, match="small: .* gives no plan: "):
        run(tmp_path, RELU, shapes={"latents": (1, 4, 8, 8)})


def stand_in(module):
    """A TensorRT of another module."""
    return SimpleNamespace(module=SimpleNamespace(__name__=module), title="TensorRT-RTX 0", capabilities=())


def test_a_builder_that_crashes_takes_only_itself_along(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_that_crashes.py").write_text(
        "import os, signal\nos.write(2, b'out of places')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    installed = stand_in("tensorrt_that_crashes")
    with pytest.raises(Refused, match="its builder ended by SIGSEGV, saying: .*out of places"):
        run(tmp_path, RELU, flavour=installed)


def test_what_a_builder_throws_is_told_without_where(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_that_throws.py").write_text(
        "ILogger = object\ndef Builder(logger): raise TypeError('factory function\\nreturned nullptr')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)]))
    installed = stand_in("tensorrt_that_throws")
    with pytest.raises(Refused, match="gives no plan: TypeError: factory function returned nullptr"):
        run(tmp_path, RELU, flavour=installed)
    assert not (tmp_path / "plan").exists()


STUCK = """
import os, time
held = open(os.environ["ALIVE"], "w")
open(os.environ["BEGUN"], "w").write("begun")
time.sleep(300)
"""
PARENT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from datasetdm_fast.export.tensorrt import plan_builder
flavour = SimpleNamespace(module=SimpleNamespace(__name__="tensorrt_that_is_stuck"), title="", capabilities=())
plan_builder.build_plan(Path("graph"), Path("plan"), {}, flavour, "")
"""


def test_a_builder_ends_with_the_process_that_started_it(tmp_path):
    """After kill -9, too: else it takes the cores for minutes, beside that of the same command."""
    (tmp_path / "tensorrt_that_is_stuck.py").write_text(STUCK)
    begun, alive = tmp_path / "begun", tmp_path / "alive"
    for place in (begun, alive):
        os.mkfifo(place)
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)])
    variables = {**os.environ, "PYTHONPATH": paths, "BEGUN": str(begun), "ALIVE": str(alive)}
    pipes = [os.open(place, os.O_RDONLY | os.O_NONBLOCK) for place in (begun, alive)]
    with subprocess.Popen([sys.executable, "-c", PARENT], env=variables, cwd=tmp_path) as process:
        has_begun = select.select(pipes[:1], [], [], 60)[0]
        process.kill()
        assert has_begun and select.select(pipes[1:], [], [], 60)[0] and os.read(pipes[1], 1) == b""  # its end
    for pipe in pipes:
        os.close(pipe)


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_on_a_full_disk.py").write_text(
        "ILogger = object\ndef Builder(logger): raise OSError(28, 'full')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)]))
    with pytest.raises(Missing, match="plan: the disk is full.*\nFree some space"):
        run(tmp_path, RELU, flavour=stand_in("tensorrt_on_a_full_disk"))


def test_a_builder_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_builder, "LONGEST_BUILD", 0.01)
    with pytest.raises(Refused, match="small: TensorRT-RTX .* gave no plan within "):
        run(tmp_path, RELU)
