"""The openvino engine: agrees with the reference stage by stage, whatever its streams and threads, and says at once
what is missing.
"""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from skips import long_test

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[openvino]'")

from bench.decoders import load_decoders
from datasetdm_fast import verify
from datasetdm_fast.data import Text, join_texts
from datasetdm_fast.engine.engines import build_engine, check_engine
from datasetdm_fast.engine.engines.exported import openvino as openvino_engine
from datasetdm_fast.engine.engines.exported.graphs import join_parts, split_batch
from datasetdm_fast.engine.engines.exported.openvino import (
    OpenVinoEngine,
    OpenVinoStage,
    input_names,
    open_core,
    resolve_precision,
    split_graph,
)
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.sampling.schedule import ImageNoise
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import StageFile, TensorInfo

HAS_BF16 = "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PROMPTS = ("a green star on a yellow table at night", "three cones", "a person between two trees, in fog")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASETDM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def one_stage_of_a_graph():
    """Engines of one precision over equal graphs compile them once: that takes a second for each size of a batch."""
    open_stage, opened = OpenVinoEngine._open, {}

    def reopened(engine, folder, manifest, stage):
        key = folder, stage, engine.precision, engine.streams
        if key not in opened:
            opened[key] = open_stage(engine, folder, manifest, stage)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVinoEngine, "_open", reopened)
        yield


@pytest.fixture(scope="module")
def engine(cache) -> OpenVinoEngine:
    return build_engine("openvino", load_model("demo"), load_decoders("demo"), device="cpu")


def inputs(engine, batch: int) -> tuple[torch.Tensor, Text]:
    latents = ImageNoise(range(batch), (4, 16, 16)).draw()
    return latents, join_texts([engine.encode_text([""] * batch), engine.encode_text(PROMPTS[:batch])])


def test_verify_passes_for_every_task(cache, capsys):
    """Every stage and every label, of a whole batch and of a smaller one, under the limits that ort has."""
    line = "--engine openvino --against torch --number 3 --batch-size 2 --steps 2 --device cpu --quiet --json"
    assert verify.main(line.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["agrees"] and document["engine"]["engine"] == "openvino" and document["engine"]["openvino"]
    assert document["decoders"] == ["depth", "instance", "open-vocabulary", "pose", "semantic"]
    assert all(row["passed"] for row in document["measures"]) and len(document["measures"]) == 27


@long_test
def test_streams_and_threads_change_no_bit(engine):
    latents, text = inputs(engine, 3)
    before, kept = torch.get_num_threads(), engine.streams
    found = []
    try:
        for threads, streams in ((1, 0), (2, 1), (2, 2)):
            torch.set_num_threads(threads)
            engine._stages.clear()
            engine.streams = streams
            found.append(engine.denoise(latents, 100, text))
    finally:
        torch.set_num_threads(before)
        engine._stages.clear()
        engine.streams = kept
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_a_timestep_alone_decides_is_computed_beside_the_graph(engine):
    """Compiled apart, both halves in fp32, they answer as the whole does."""
    latents, text = inputs(engine, 1)
    whole = engine.denoise(latents, 999, text)
    path, core = engine.manifest.graph(engine.folder, "denoise"), open_core()
    graph = core.read_model(str(path))
    beside = split_graph(graph, ["timestep"])
    assert [given.any_name for given in beside.inputs] == ["timestep"] and "timestep" not in input_names(graph)
    left = [node.get_type_name() for node in graph.get_ordered_ops()]
    assert not {"Sin", "Cos"} & set(left) and left.count("Convolution") > 20
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    made = core.compile_model(beside, "CPU", exact)({"timestep": np.float32(999)})
    given = {output.any_name: value for output, value in made.items()}
    given |= {"latents": latents.numpy(), "context": text.context.numpy()}
    (noise,) = core.compile_model(graph, "CPU", exact)(given).values()
    assert float((torch.from_numpy(noise) - whole).norm() / whole.norm()) < 1e-6


@pytest.fixture(scope="module")
def rounded(engine) -> OpenVinoEngine:
    return build_engine("openvino", engine.model, engine.decoders, device="cpu", dtype="bf16")


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for bf16")
@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_bf16_is_as_close_at_late_timesteps_as_at_early_ones(engine, rounded, timestep):
    latents, text = inputs(engine, 2)
    truth, found = (one.denoise(latents, timestep, text) for one in (engine, rounded))
    assert 1e-4 < float((found - truth).norm() / truth.norm()) < 7.3e-3  # 8.0e-3 at 500 with phases in bf16
    assert rounded._stages["denoise"]._time_model is not None and engine._stages["denoise"]._time_model is None


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for bf16")
def test_phases_of_an_embedded_guidance_are_fp32_in_bf16_too(tmp_path):
    """A bf16 has 8 bits: 1,000 times a guidance of 7.3 is rounded to a multiple of 32; sines have periods of 6."""
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", "flux1")), size=tiny_pipelines.SIZE)
    exact, rounded = (build_engine("openvino", model, {}, device="cpu", dtype=name) for name in ("fp32", "bf16"))
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    found = []
    for guidance in (7.3, 3.0):
        text = call_text(exact, PROMPTS[:1], guidance)
        truth, noise = (one.denoise(latents, 412.0, text) for one in (exact, rounded))
        found.append(noise)
        assert float((noise - truth).norm() / truth.norm()) < 1.5e-2  # 8e-2 and 5e-2 with phases in bf16
    assert not torch.equal(*found)  # numbers are computed anew where the guidance alone is another


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for bf16")
def test_what_a_timestep_decides_is_found_under_the_names_of_a_compiled_graph(tmp_path):
    """A scale that every token of FLUX.2 klein is multiplied with got another name, and each call failed."""
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", "flux2-klein")), size=tiny_pipelines.SIZE)
    reference, rounded = (
        build_engine(name, model, {}, device="cpu", dtype=dtype)
        for name, dtype in (("torch", "fp32"), ("openvino", "bf16"))
    )
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    text = call_text(reference, PROMPTS[:1], 0.0)
    truth, noise = (one.denoise(latents, 412.0, text) for one in (reference, rounded))
    assert 1e-4 < float((noise - truth).norm() / truth.norm()) < 1e-2


def test_openvino_is_imported_without_what_sends_events_to_its_maker():
    program = (
        "import sys, datasetdm_fast.engine.engines.exported, openvino; "
        "print(*(name for name in sys.modules if name.startswith('openvino_telemetry.')))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "\n"


def test_a_signal_is_handled_after_cores_have_gone(engine):
    """Where two had gone in the order they came, it was a segmentation fault without a word."""
    assert engine.core is open_core()
    cores = [open_core(), open_core()]
    assert all(core.get_property("CPU", "FULL_DEVICE_NAME") for core in cores)  # loads the plug-in
    while cores:
        del cores[0]
        gc.collect()
    if not (child := os.fork()):
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(143))
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_networks_that_the_export_alone_needs_are_let_go(cache):
    model = load_model("demo")
    engine = build_engine("openvino", model, {}, device="cpu")
    assert not any(network.is_built for network in model.networks.values())
    kept = load_model("demo")
    unet = kept.modules["unet"]
    build_engine("openvino", kept, {}, device="cpu")
    assert kept.modules["unet"] is unet and not kept.networks["vae"].is_built
    engine.encode_image(torch.zeros(1, 128, 128, 3, dtype=torch.uint8))
    assert not model.networks["vae"].is_built


def test_results_are_the_callers_own(engine):
    latents, text = inputs(engine, 1)
    first = engine.denoise(latents, 100, text)
    copy = first.clone()
    second = engine.denoise(latents, 900, text)
    assert torch.equal(first, copy) and not torch.equal(first, second)
    with pytest.raises(AssertionError, match="3 rows for 1 images"):
        engine.denoise(latents, 100, join_texts([text, text[:1]]))


def test_one_word_an_image_or_several(engine):
    latents, text = inputs(engine, 2)
    _, sums = engine.denoise_and_capture(latents, 100, text)
    words = engine.encode_classes(["ball", "cube"])
    one = engine.annotate("open-vocabulary", sums, words)
    both = engine.annotate("open-vocabulary", sums, words.expand(2, -1, -1))
    assert torch.allclose(one["pred_masks"][1], both["pred_masks"][1, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch, size, counts", [(1, 1, [1]), (5, 2, [2, 2, 1]), (4, 8, [4])])
def test_a_batch_is_cut_and_joined(batch, size, counts):
    """Halves of guidance stay beside their images, and a single number goes to every part."""
    latents, context = torch.arange(batch), torch.arange(2 * batch)
    parts = split_batch({"latents": latents, "timestep": torch.tensor(7.0), "context": context}, size)
    assert [len(part["latents"]) for part in parts] == counts and all(part["timestep"] == 7 for part in parts)
    for part in parts:
        assert torch.equal(part["context"], torch.cat([part["latents"], part["latents"] + batch]))
    whole = join_parts([{"noise": part["context"], "sums_low": part["latents"]} for part in parts], 2)
    assert torch.equal(whole["noise"], context) and torch.equal(whole["sums_low"], latents)


def stage_of(*names: str, core=None, takes_any_batch=False, streams=0) -> OpenVinoStage:
    """A stage whose outputs are called y and z."""
    inputs, outputs = (
        tuple(TensorInfo(name, (), () if name == "timestep" else ("B", 2), "float32") for name in some)
        for some in (names, "yz")
    )
    file = StageFile("some.onnx", "", inputs, outputs)
    return OpenVinoStage(core, Path("some.onnx"), file, "f32", streams, takes_any_batch)


def test_a_graph_is_compiled_once_for_all_its_shapes_streams_and_threads():
    compiled, shapes = [], []

    def compile_model(graph, place, options):
        compiled.append((options["NUM_STREAMS"], options["INFERENCE_NUM_THREADS"]))
        return SimpleNamespace(create_infer_request=lambda: object())

    core = SimpleNamespace(read_model=lambda path: SimpleNamespace(reshape=shapes.append), compile_model=compile_model)
    stage = stage_of("a", "b", core=core)
    calls = [([(1, 2), (1, 3)], 2, 4), ([(1, 2), (1, 4)], 2, 4), ([(2, 2), (1, 3)], 2, 4)]
    calls += [([(1, 2), (1, 3)], 1, 4), ([(1, 2), (1, 3)], 2, 8)]
    requests = [stage._open_requests(*call) for call in calls]
    assert [len(each) for each in requests] == [2, 2, 2, 1, 2] and compiled == [call[1:] for call in calls]
    assert shapes == [dict(zip("ab", each)) for each, *_ in calls]
    assert all(stage._open_requests(*call) is each for call, each in zip(calls, requests)) and len(compiled) == 5
    anything = stage_of("a", "b", core=core, takes_any_batch=True)
    assert anything._open_requests(*calls[0]) is anything._open_requests(*calls[1])
    assert anything._open_requests(*calls[0]) is not anything._open_requests(*calls[4]) and len(shapes) == 5


def test_parts_run_at_once_on_no_more_streams_than_threads():
    before = torch.get_num_threads()
    try:
        for threads, streams, counts in ((2, 5, [2, 2, 1]), (4, 0, [4, 1]), (4, 3, [3, 2]), (8, 0, [5])):
            torch.set_num_threads(threads)
            stage, seen = stage_of("a", streams=streams), []
            stage._run_streams = lambda parts, *more, seen=seen: seen.append((len(parts), *more)) or list(parts)
            assert stage(list(range(5))) == list(range(5))
            assert seen == [(count, counts[0], threads) for count in counts]
    finally:
        torch.set_num_threads(before)


def test_what_follows_from_a_timestep_is_computed_once_for_it():
    given, asked = {}, []

    class TimeModel:
        outputs = (SimpleNamespace(any_name="renamed"),)

        def __call__(self, inputs):
            asked.append(float(inputs["timestep"]))
            return [np.array(inputs["timestep"] * 2)]

    request = SimpleNamespace(
        set_tensor=lambda name, tensor: given.update({name: np.array(tensor.data)}),
        start_async=lambda: None,
        wait=lambda: None,
        get_tensor=lambda name: SimpleNamespace(data=given["timestep.0"] + ord(name)),
    )
    stage = stage_of("a", "timestep")
    stage._open_requests, stage._time_model = lambda *_: [request], TimeModel()
    for timestep in (5.0, 5.0, 7.0, 5.0):
        (found,) = stage._run_streams([{"a": torch.ones(1, 2), "timestep": torch.tensor(timestep)}], 1, 1)
        assert {*given} == {"a", "timestep.0"}
        assert {name: float(value) for name, value in found.items()} == {
            "y": 2 * timestep + 121,
            "z": 2 * timestep + 122,
        }
    assert asked == [5.0, 7.0, 5.0]


def test_texts_and_labels_are_computed_in_fp32_in_every_precision(monkeypatch):
    opened = {}
    monkeypatch.setattr(
        openvino_engine, "OpenVinoStage", lambda core, path, file, hint, streams, any_batch: (hint, any_batch)
    )
    stages = ("encode_text", "denoise", "denoise_and_capture", "decode_image", "encode_image", "annotate_depth")
    manifest = SimpleNamespace(graph=lambda folder, stage: stage, stages=dict.fromkeys(stages))
    for precision in ("fp32", "bf16"):
        engine = SimpleNamespace(core=None, streams=0, precision=precision)
        opened[precision] = {stage: OpenVinoEngine._open(engine, None, manifest, stage) for stage in stages}
    assert {hint for hint, _ in opened["fp32"].values()} == {"f32"}
    assert {stage for stage, (hint, _) in opened["bf16"].items() if hint == "f32"} == {"encode_text", "annotate_depth"}
    assert [stage for stage, (_, any_batch) in opened["bf16"].items() if any_batch] == ["encode_text"]


@long_test
def test_generate_makes_the_same_bytes_again(cache, tmp_path):
    from datasetdm_fast.generate import main

    line = "--engine openvino --number 2 --batch-size 2 --steps 3 --prompts ball --task semantic,depth --quiet --out"
    assert main([*line.split(), str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())["engine"]
    assert told["engine"] == "openvino" and told["dtype"] == "fp32"
    paths = [tmp_path / "run" / kind / "00000001.png" for kind in ("images", "semantic", "depth")]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert main(["--only", "00000001", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("module", ["openvino", "onnx"])
def test_a_missing_library_is_said_at_once(module, monkeypatch, capsys):
    from datasetdm_fast.generate import main

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "datasetdm_fast.engine.engines.exported.providers.find_spec",
        lambda name: None if name == module else found(name),
    )
    assert main(["--engine", "openvino"]) == 3
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == f"engine: openvino needs the library {module}, which is not installed"
    assert "datasetdm-fast[openvino]" in remedy


def test_it_is_asked_for_before_torch_is_imported(tmp_path):
    code = """
import sys
from datasetdm_fast.engine.engines import check_engine
check_engine("openvino")
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0


def test_what_does_not_fit_is_refused(engine, monkeypatch):
    with pytest.raises(Refused, match="--streams: OpenVINO has streams, and the engine is fast"):
        check_engine("fast", streams=2)
    with pytest.raises(Refused, match="--streams: -1 is less than 0"):
        check_engine("openvino", streams=-1)
    with pytest.raises(Refused, match="no instructions for bf16"):
        resolve_precision("bf16", ["FP32", "INT8"])
    with pytest.raises(Refused, match="fp32 or bf16 here, not in fp16"):
        resolve_precision("fp16", ["FP32", "FP16"])
    assert resolve_precision("bf16", ["FP32", "BF16"]) == "bf16" and resolve_precision("auto", []) == "fp32"
    with pytest.raises((Refused, Missing), match="device: "):
        build_engine("openvino", engine.model, {}, device="cuda")
    monkeypatch.setattr(openvino_engine, "resolve_device", torch.device)
    with pytest.raises(Refused, match="device: OpenVINO is used on a CPU, not on cuda"):
        build_engine("openvino", engine.model, {}, device="cuda")
