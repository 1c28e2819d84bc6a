"""The engines over exported graphs run every family: they agree with the reference, and refuse what is no graph."""

from types import SimpleNamespace

import onnx
import pytest
import tiny_pipelines
import torch
from skips import long_test
from tiny_pipelines import SIZE

from datasetdm_fast import generate, verify
from datasetdm_fast.data import AttentionSums
from datasetdm_fast.engine.engines import build_engine, load_decoders
from datasetdm_fast.engine.engines.exported import graphs
from datasetdm_fast.engine.engines.exported.openvino import OpenVinoEngine
from datasetdm_fast.engine.engines.exported.ort import OrtEngine
from datasetdm_fast.engine.engines.fast import CHUNK_PIXELS
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.__main__ import main as export_command
from datasetdm_fast.export.manifest import Manifest
from datasetdm_fast.export.onnx.stage_names import RAW
from datasetdm_fast.export.onnx.to_onnx import export

# none of them the sizes of other tests; the guidance of a call
FAMILIES = {
    "sdxl": ({"width": 40}, 4.0),
    "sd3": ({"layers": 3, "width": 40}, 4.0),
    "flux1": ({"layers": 2, "singles": 2, "width": 48}, 3.0),
    "flux2-klein": ({"layers": 1, "singles": 2, "width": 48}, 0.0),
    "z-image": ({"layers": 3, "width": 48}, 2.0),
    "qwen-image": ({"layers": 2, "width": 48}, 3.0),
}
PROMPTS = ["a photo of the cat", "a", "the house, a photo of the house"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASETDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=FAMILIES, scope="module")
def opened(request, tmp_path_factory):
    """A folder, its model, a decoder, the reference, the guidance of a call, and latents of three images."""
    sizes, guidance = FAMILIES[request.param]
    folder = tiny_pipelines.save(tmp_path_factory.mktemp(request.param) / "model", request.param, **sizes)
    model = load_model(str(folder), size=SIZE)
    decoders, _ = load_decoders(model, "random", ["depth"])
    latents = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return folder, model, decoders, build_engine("torch", model, decoders, device="cpu"), guidance, latents


def distance(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def flat(capture):
    return [value for kind in (capture.features, capture.maps) for level in kind for value in level]


def check_engine(name, opened):
    """Texts, calls, captures, labels and images of a batch, and of one of its images alone."""
    _, model, decoders, reference, guidance, latents = opened
    engine = build_engine(name, model, decoders, device="cpu")
    text, ours = (call_text(each, PROMPTS, guidance) for each in (reference, engine))
    assert distance(ours.context, text.context) < 1e-6
    truth, capture = reference.denoise_and_capture(latents, 412.0, text)
    noise, sums = engine.denoise_and_capture(latents, 412.0, ours)
    assert distance(noise, truth) < 1e-5 and distance(engine.denoise(latents, 412.0, ours), truth) < 1e-5
    depth = reference.annotate("depth", capture)["depth"]
    assert distance(engine.annotate("depth", sums)["depth"], depth) < 1e-4
    one, alone = engine.denoise_and_capture(latents[2:], 412.0, call_text(engine, PROMPTS[2:], guidance))
    assert distance(one, truth[2::3]) < 1e-5 and distance(engine.annotate("depth", alone)["depth"], depth[2:]) < 1e-4
    images = reference.decode_image(latents)
    assert (engine.decode_image(latents).int() - images.int()).abs().max() <= 1
    assert distance(engine.encode_image(images), reference.encode_image(images)) < 1e-5
    is_graph = model.backbone.name != "qwen-image"
    assert ("decode_image" in engine.manifest.stages) == ("encode_image" in engine.manifest.stages) == is_graph
    return engine, capture, ours


def test_onnx_runtime_computes_what_the_reference_does(opened, monkeypatch):
    engine, capture, text = check_engine("ort", opened)
    _, model, _, reference, guidance, latents = opened
    _, raw = engine.denoise_and_capture_raw(latents, 412.0, text)
    for value, truth in zip(flat(raw), flat(capture), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-5)
    if "encode_image" not in engine.manifest.stages:
        images, read, encode = torch.zeros(3, SIZE, SIZE, 3, dtype=torch.uint8), [], engine._modules.encode_image
        monkeypatch.setitem(CHUNK_PIXELS, "cpu", 2 * SIZE**2)
        monkeypatch.setattr(engine._modules, "encode_image", lambda part, _: read.append(len(part)) or encode(part))
        assert len(engine.encode_image(images)) == 3 and read == [2, 1]
        decode, decoded = engine._modules.decode_and_check, []
        monkeypatch.setattr(engine._modules, "decode_and_check", lambda x: decoded.append(len(x)) or decode(x))
        assert len(engine.decode_image(latents)) == 3 and decoded == [2, 1]
    if model.guidance == "cfg":  # a call without guidance, of half the rows, is another graph
        plain, level = reference.encode_text(PROMPTS), model.levels[-1].halves
        if level == 1:
            assert distance(engine.denoise(latents, 300.0, plain), reference.denoise(latents, 300.0, plain)) < 1e-5
    if model.backbone.network_plan:
        zero = AttentionSums(torch.zeros(3, 16, 0), torch.zeros(3, 16, 512))
        with pytest.raises(Refused, match="ort does not average the attention of"):
            engine.denoise_and_average(latents, 412.0, text, text, zero)


@pytest.mark.parametrize(
    "opened",
    [family if family == "z-image" else pytest.param(family, marks=long_test) for family in FAMILIES],
    indirect=True,
)
def test_openvino_computes_what_the_reference_does(opened):
    check_engine("openvino", opened)


@long_test
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_all_gates_are_passed(opened, engine, tmp_path):
    line = ["--model", str(opened[0]), "--decoder", "random", "--size", str(SIZE), "--steps", "3", "--device", "cpu"]
    line += ["--engine", engine]
    assert verify.main([*line, "--against", "torch", "--number", "3", "--batch-size", "2", "--quiet"]) == 0
    run = ["--prompts", "a photo of the cat", "--number", "2", "--task", "semantic", "--quiet", "--out", str(tmp_path)]
    assert generate.main([*line, *run]) == 0 and len(list((tmp_path / "images").iterdir())) == 2


def test_the_command_writes_the_graphs_of_a_family(tmp_path, capsys):
    folder = tiny_pipelines.save(tmp_path / "model", "flux2-klein", width=48)
    line = ["--model", str(folder), "--size", str(SIZE), "--decoder", "none", "--quiet"]
    assert export_command([*line, "--raw-capture", "--out", str(tmp_path / "graphs")]) == 0
    names = ["denoise", "denoise_and_capture_raw", "decode_image", "encode_image"]
    assert list(Manifest.read(tmp_path / "graphs").stages) == names
    capsys.readouterr()
    assert export_command([*line, "--precision", "fp16", "--out", str(tmp_path / "narrow")]) == 2
    assert "FLUX.2 klein leave fp16's range\nUse bf16 or fp32." in capsys.readouterr().err
    for name in names:  # every node's types, too
        onnx.checker.check_model(str(tmp_path / "graphs" / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize(
    "opened",
    [family if family == "z-image" else pytest.param(family, marks=long_test) for family in FAMILIES],
    indirect=True,
)
def test_graphs_in_bf16_round_as_the_fast_engine_does(opened, monkeypatch):
    """OpenVINO computes them in fp32, from weights and between layers that are in bf16."""
    _, model, decoders, reference, guidance, latents = opened
    monkeypatch.setattr(OpenVinoEngine, "graph_precision", "bf16")
    engine = build_engine("openvino", model, decoders, device="cpu", dtype="fp32")
    assert engine.manifest.precision == "bf16"
    for stage in engine.manifest.stages.values():  # every node's types
        onnx.checker.check_model(str(engine.folder / stage.file), full_check=True)
    fast, exact = (build_engine("fast", model, decoders, device="cpu", dtype=dtype) for dtype in ("bf16", "fp32"))
    text = call_text(reference, PROMPTS, guidance)
    truth, noise = (each.denoise(latents, 412.0, text) for each in (reference, fast))
    ours, sums = engine.denoise_and_capture(latents, 412.0, text)
    assert 0 < distance(ours, truth) < 1.5 * distance(noise, truth) < 0.04
    for value, wide in zip(sums.sums, exact.denoise_and_capture(latents, 412.0, text)[1].sums, strict=True):
        assert not wide.shape[1] or distance(value, wide) < 0.03
    _, raw = engine.denoise_and_capture_raw(latents, 412.0, text)
    for value, wide in zip(flat(raw), flat(reference.denoise_and_capture(latents, 412.0, text)[1]), strict=True):
        assert distance(value, wide) < 0.03


def test_writing_graphs_is_told_once_and_for_each_stage_of_its_own(tmp_path, monkeypatch):
    folder, written, told = tiny_pipelines.save(tmp_path / "model", "flux2-klein", width=48), [], []

    def export_nothing(model, decoders, on_stage, **options):
        for stage in written:
            on_stage(stage)
        return tmp_path, SimpleNamespace(stages=dict.fromkeys(written))

    monkeypatch.setattr(graphs, "export_cached", export_nothing)
    for model, first in ((load_model("tiny"), ["encode_text"]), (load_model(str(folder), size=SIZE), [])):
        line = f"writing the graphs of {model.name} for ONNX Runtime, once"
        written[:] = [*first, "denoise", "denoise_and_capture", "decode_image", "encode_image", "annotate_depth"]
        engine = OrtEngine(model, {}, device="cpu", on_message=told.append)
        assert told == [line]
        for stage in (RAW, "denoise_and_average_8_16"):
            written[:] = [stage]
            engine._export()
        assert told == [line] * 3
        told.clear()


def test_plans_are_built_of_stable_diffusion_alone(tmp_path):
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", "sd3")), size=SIZE)
    with pytest.raises(Refused, match="engine: trt does not run Stable Diffusion 3 and 3.5, torch does"):
        build_engine("trt", model, {})
    with pytest.raises(Refused, match="leave fp16's range"):
        export(model, {}, tmp_path / "graphs", precision="fp16")


def test_a_pooled_text_joins_a_timestep_in_fp32_where_a_graph_is_in_bf16(tmp_path):
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", "sd3")), size=SIZE)
    export(model, {}, tmp_path / "graphs", precision="bf16", only=["denoise"])
    onnx.checker.check_model(str(tmp_path / "graphs" / "denoise.onnx"), full_check=True)
