"""The ort engine: agrees with the oracle in every stage and label, keeps its graphs in a cache, and says at once what
is missing.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.decoders import load_decoders
from datasetdm_fast import verify
from datasetdm_fast.data import Capture, ProjectedCapture, Text, join_texts
from datasetdm_fast.engine.engines import build_engine, check_engine
from datasetdm_fast.engine.engines.exported import graphs, ort, providers
from datasetdm_fast.engine.engines.exported.ort import OrtEngine, resolve_precision, resolve_provider
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.sampling.schedule import ImageNoise
from datasetdm_fast.errors import Missing, Refused

PROMPTS = ("a green star on a yellow table at night", "three cones", "a person between two trees, in fog")
has_cuda_provider = "CUDAExecutionProvider" in providers.installed_providers()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache of these tests' own, also for the processes they start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASETDM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def one_session_of_a_graph():
    """A graph that is opened again, for as many threads, has the session of before: to open one takes a second."""
    open_session, opened = ort.open_session, {}

    def reopened(path, *choices):
        key = path, path.stat().st_mtime_ns, *map(str, choices)
        if key not in opened:
            opened[key] = open_session(path, *choices)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "open_session", reopened)
        yield open_session


class Pair:
    def __init__(self):
        self.model = load_model("demo")
        self.torch = build_engine("torch", self.model, load_decoders("demo"), device="cpu")
        self.ort = build_engine("ort", self.model, self.torch.decoders, device="cpu")


@pytest.fixture(scope="module")
def pair(cache) -> Pair:
    return Pair()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert value.shape == truth.shape
    return float((value - truth).double().norm() / truth.double().norm().clamp(min=1e-30))


def inputs(engine, batch: int) -> tuple[torch.Tensor, Text]:
    latents = ImageNoise(range(batch), (4, 16, 16)).draw()
    return latents, join_texts([engine.encode_text([""] * batch), engine.encode_text((PROMPTS * 3)[:batch])])


# Agreement ------------------------------------------------------------------------------------------------------------


def test_verify_passes_for_every_task(cache, capsys):
    """A whole batch and a smaller one, every stage and every label."""
    arguments = [
        "--engine",
        "ort",
        "--against",
        "torch",
        "--number",
        "3",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--quiet",
        "--json",
    ]
    assert verify.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["agrees"] and document["engine"]["engine"] == "ort" and document["engine"]["provider"] == "cpu"
    assert (
        document["decoders"] == ["depth", "instance", "open-vocabulary", "pose", "semantic"]
        and document["engine"]["onnxruntime"]
    )
    assert all(row["passed"] for row in document["measures"]) and len(document["measures"]) == 27


def test_fp16_stays_within_its_budget(pair):
    """A CPU computes such graphs in fp32, step by step, from weights and to results in fp16."""
    engine = OrtEngine(pair.model, pair.torch.decoders, dtype="fp16", device="cpu")
    latents, text = inputs(pair.torch, 1)
    noise, raw = pair.torch.denoise_and_capture(latents, 100, text)
    found, sums = engine.denoise_and_capture(latents, 100, text)
    assert engine.fingerprint()["dtype"] == "fp16" and 1e-6 < relative(found, noise) <= 2e-3
    assert relative(engine.annotate("depth", sums)["depth"], pair.torch.annotate("depth", raw)["depth"]) <= 2e-3
    assert (engine.decode_image(latents).int() - pair.torch.decode_image(latents).int()).abs().max() <= 4


@pytest.mark.parametrize("batch", [1, 3])
def test_stages(pair, batch):
    latents, text = inputs(pair.torch, batch)
    assert relative(pair.ort.encode_text(PROMPTS[:batch]).context, text.context[batch:]) <= 1e-5
    assert relative(pair.ort.encode_classes(["ball"]), pair.torch.encode_classes(["ball"])) <= 1e-5
    noise, raw = pair.torch.denoise_and_capture(latents, 100, text)
    found, sums = pair.ort.denoise_and_capture(latents, 100, text)
    assert isinstance(sums, ProjectedCapture) and (sums.batch, sums.side) == (batch, 16)
    kept, capture = pair.ort.denoise_and_capture_raw(latents, 100, text)
    assert (
        isinstance(capture, Capture)
        and max(relative(one, noise) for one in (found, kept, pair.ort.denoise(latents, 100, text))) <= 1e-5
    )
    for kind in ("features", "maps"):
        for level, expected in zip(getattr(capture, kind), getattr(raw, kind), strict=True):
            assert all(relative(value, right) <= 1e-5 for value, right in zip(level, expected, strict=True))
    for task in pair.torch.decoders:
        text = pair.torch.encode_classes(["ball", "cube"]).expand(batch, -1, -1) if task == "open-vocabulary" else None
        expected = pair.torch.annotate(task, raw, text)
        for given in (sums, capture):
            answers = pair.ort.annotate(task, given, text)
            assert set(answers) == set(expected) and all(
                relative(answers[name], value) <= 1e-4 for name, value in expected.items()
            ), task


def test_images(pair):
    latents, _ = inputs(pair.torch, 3)
    image = pair.torch.decode_image(latents)
    difference = (pair.ort.decode_image(latents).int() - image.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3
    assert relative(pair.ort.encode_image(image), pair.torch.encode_image(image)) <= 1e-5
    drawn = [
        engine.encode_image(image, [torch.Generator().manual_seed(seed) for seed in range(3)])
        for engine in (pair.ort, pair.torch)
    ]
    assert relative(*drawn) <= 1e-5


def test_one_word_an_image_or_several(pair):
    latents, text = inputs(pair.torch, 2)
    _, sums = pair.ort.denoise_and_capture(latents, 100, text)
    words = pair.torch.encode_classes(["ball", "cube"])
    one, both = (
        pair.ort.annotate("open-vocabulary", sums, words),
        pair.ort.annotate("open-vocabulary", sums, words.expand(2, -1, -1)),
    )
    assert relative(one["pred_masks"][1], both["pred_masks"][1, 1]) <= 1e-5 and one["pred_logits"].ndim == 3
    with pytest.raises(Refused, match=r"text is nothing, expected class embeddings \[2, 64\]"):
        pair.ort.annotate("open-vocabulary", sums)
    with pytest.raises(Refused, match=r"shape \[2, 7\]"):
        pair.ort.annotate("open-vocabulary", sums, torch.zeros(2, 7))


def test_results_are_the_callers_own(pair):
    """A later call writes into no tensor that an earlier one gave away."""
    latents, text = inputs(pair.torch, 1)
    first = pair.ort.denoise(latents, 100, text)
    copy = first.clone()
    second = pair.ort.denoise(latents, 900, text)
    assert torch.equal(first, copy) and not torch.equal(first, second)
    with pytest.raises(AssertionError, match="3 rows for 1 images"):
        pair.ort.denoise(latents, 100, join_texts([text, text[:1]]))
    wide = torch.stack([latents[0], latents[0]], -1)[None, ..., 0]  # not contiguous, as slices are
    assert torch.equal(pair.ort.denoise(wide, 100, text), first)


def test_generate_makes_the_same_bytes_again(tmp_path, monkeypatch, one_session_of_a_graph):
    from datasetdm_fast.generate import main

    arguments = [
        "--engine",
        "ort",
        "--number",
        "2",
        "--batch-size",
        "2",
        "--steps",
        "3",
        "--prompts",
        "a ball",
        "--task",
        "depth,instance,open-vocabulary,pose,semantic",
        "--quiet",
    ]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        document["engine"]["engine"] == "ort"
        and document["engine"]["dtype"] == "fp32"
        and document["engine"]["provider"] == "cpu"
    )
    paths = [tmp_path / "run" / kind / "00000001.png" for kind in ("images", "semantic", "depth")]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    monkeypatch.setattr(ort, "open_session", one_session_of_a_graph)  # with sessions of its own
    assert main(["--only", "00000001", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert [path.read_bytes() for path in paths] == before


# The cache ------------------------------------------------------------------------------------------------------------


def test_graphs_are_written_once_and_mended(pair, cache):
    def again(**options) -> tuple[OrtEngine, list[str]]:
        told = []
        return OrtEngine(pair.model, pair.torch.decoders, device="cpu", on_message=told.append, **options), told

    engine, told = again()
    assert engine.folder == pair.ort.folder and cache in engine.folder.parents and not told
    data = engine.folder / "unet.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 4
    data.write_bytes(content)
    _, told = again()
    assert told == ["writing the graphs of demo for ONNX Runtime, once"]
    engine.manifest.check_files(engine.folder)


def test_other_weights_have_other_graphs(pair):
    bias = pair.torch.decoders["pose"].final_layer.bias
    bias[0] += 1e-3
    try:
        changed = OrtEngine(pair.model, pair.torch.decoders, device="cpu", on_message=lambda line: None)
        assert changed.folder != pair.ort.folder
        latents, text = inputs(pair.torch, 1)
        heatmaps = [
            engine.annotate("pose", engine.denoise_and_capture(latents, 100, text)[1])["heatmaps"]
            for engine in (changed, pair.ort)
        ]
        assert (heatmaps[0] - heatmaps[1])[:, 0].mean() == pytest.approx(1e-3, rel=1e-2) and relative(
            heatmaps[0][:, 1:], heatmaps[1][:, 1:]
        ) <= 1e-6
    finally:
        bias[0] -= 1e-3


def test_slices_of_a_batch_share_the_threads_of_the_run(pair):
    latents, text = inputs(pair.torch, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(pair.ort.denoise(latents, 100, text))
            pair.ort.encode_text(["a"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for stage, shares in (("denoise", {1, 2}), ("encode_text", {1, 4})):  # two slices of four threads, or one
        sessions = pair.ort._stages[stage].sessions
        assert shares <= set(sessions)
        for share, session in sessions.items():
            options = session.get_session_options()
            assert options.intra_op_num_threads == share
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


# What is not there ----------------------------------------------------------------------------------------------------


def seconds_of(*arguments, cwd=None) -> tuple[subprocess.CompletedProcess, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.skipif(has_cuda_provider, reason="this ONNX Runtime has the CUDA provider")
@pytest.mark.parametrize("name", ["generate", "verify"])
def test_a_missing_provider_is_said_at_once(name, tmp_path):
    result, seconds = seconds_of("-m", f"datasetdm_fast.{name}", "--engine", "ort", "--provider", "cuda", cwd=tmp_path)
    assert result.returncode == 3 and result.stderr.splitlines()[0].startswith(
        "provider: cuda is not in the installed onnxruntime "
    )
    assert len(result.stderr.splitlines()) == 2 and seconds < 3


@pytest.mark.parametrize("module", ["onnxruntime", "onnx"])
def test_a_missing_library_is_said_at_once(module, tmp_path):
    code = f"""
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(name)
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *more: None if name == {module!r} else found(name, *more)
from datasetdm_fast.generate import main
code = main(["--engine", "ort"])
print("torch" in sys.modules)
sys.exit(code)
"""
    result, seconds = seconds_of("-c", code, cwd=tmp_path)
    assert result.returncode == 3 and result.stdout == "False\n" and seconds < 3
    cause, remedy = result.stderr.splitlines()
    assert (
        cause == f"engine: ort needs the library {module}, which is not installed" and "datasetdm-fast[ort]" in remedy
    )


def test_what_does_not_fit_is_refused(pair, monkeypatch):
    with pytest.raises(Refused, match="provider: 'dml' is none of auto, cpu, cuda, tensorrt"):
        check_engine("ort", provider="dml")
    with pytest.raises(Refused, match="the engine is fast"):
        check_engine("fast", provider="cpu")
    with pytest.raises(Refused, match="dtype: ONNX Runtime has no bf16"):
        build_engine("ort", pair.model, {}, dtype="bf16", device="cpu")
    with pytest.raises(Refused, match="dtype: 'int8'"):
        resolve_precision("int8", "cpu")
    with pytest.raises(Missing, match="no decoder for 'lanes'"):
        pair.ort.annotate("lanes", None)
    assert [resolve_precision("auto", name) for name in ("cpu", "cuda", "tensorrt")] == ["fp32", "fp16", "fp16"]
    if not torch.cuda.is_available():
        assert resolve_provider("auto", "auto") == resolve_provider("cpu", "cpu") == ("cpu", torch.device("cpu"))
        with pytest.raises(Missing, match="device: cuda"):
            resolve_provider("auto", "cuda")
    monkeypatch.setattr("datasetdm_fast.engine.engines.exported.ort.resolve_device", lambda name: torch.device(name))
    with pytest.raises(Refused, match="provider: cpu does not run on the device cuda"):
        resolve_provider("cpu", "cuda")


def test_providers_follow_devices_and_devices_providers(monkeypatch):
    """On a machine whose PyTorch sees a GPU."""
    installed = ["CPUExecutionProvider"]
    monkeypatch.setattr(ort, "installed_providers", lambda: installed)
    monkeypatch.setattr(providers, "installed_providers", lambda: installed)
    monkeypatch.setattr(ort, "resolve_device", lambda name: torch.device("cuda" if name == "auto" else name))
    on_cpu, on_gpu = ("cpu", torch.device("cpu")), ("cuda", torch.device("cuda"))
    assert resolve_provider("auto", "auto") == resolve_provider("auto", "cpu") == on_cpu
    with pytest.raises(Missing, match="provider: cuda is not in the installed onnxruntime .*, which has cpu"):
        resolve_provider("auto", "cuda")
    installed.append("CUDAExecutionProvider")
    assert resolve_provider("auto", "auto") == resolve_provider("auto", "cuda") == on_gpu
    assert resolve_provider("cuda", "auto") == on_gpu and resolve_provider("cpu", "auto") == on_cpu
    assert resolve_provider("tensorrt", "cuda:1") == ("tensorrt", torch.device("cuda:1"))
    for pair in (("tensorrt", "cpu"), ("cuda", "cpu"), ("cpu", "cuda:0")):
        with pytest.raises(Refused, match="provider: .* does not run on the device"):
            resolve_provider(*pair)


def test_a_session_is_of_the_provider_and_the_gpu_that_were_asked_for(monkeypatch, one_session_of_a_graph):
    opened, given = [], ["TensorrtExecutionProvider"]

    def session(path, options, providers):
        opened.append((options.intra_op_num_threads, providers))
        return SimpleNamespace(get_providers=lambda: given)

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", session)
    place, others = {"device_id": "1"}, ["CPUExecutionProvider"]
    one_session_of_a_graph(Path("some.onnx"), "tensorrt", torch.device("cuda:1"), 3)
    given[:] = ["CUDAExecutionProvider", *others]
    one_session_of_a_graph(Path("some.onnx"), "cuda", torch.device("cuda:1"), 3)
    cuda = ("CUDAExecutionProvider", place)
    assert opened == [(3, [("TensorrtExecutionProvider", place), cuda, *others]), (3, [cuda, *others])]
    with pytest.raises(Missing, match="provider: tensorrt could not be started, .* offers CUDAExecutionProvider, CPU"):
        one_session_of_a_graph(Path("some.onnx"), "tensorrt", torch.device("cuda"), 1)


def test_the_storage_by_itself_is_one_that_the_family_has(pair, monkeypatch):
    found = {}
    monkeypatch.setattr(ort, "require_provider", lambda provider: None)
    monkeypatch.setattr(ort, "resolve_provider", lambda provider, device: (provider, torch.device("cpu")))
    monkeypatch.setattr(graphs, "export_cached", lambda *_, **options: (Path(), found.update(options)))
    wide = replace(pair.model, backbone=replace(pair.model.backbone, halves=("bf16",)))
    for model, dtype, provider, told in (
        (pair.model, "auto", "cuda", ("fp16", "onnxruntime")),
        (pair.model, "auto", "tensorrt", ("fp16", "any")),
        (wide, "auto", "cuda", ("fp32", "onnxruntime")),
        (pair.model, "fp32", "cuda", ("fp32", "onnxruntime")),
        (pair.model, "auto", "cpu", ("fp32", "onnxruntime")),
    ):
        assert OrtEngine(model, {}, dtype=dtype, provider=provider).precision == told[0]
        assert (found["precision"], found["runtime"]) == told


# Speed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("DATASETDM_LONG_TESTS"), reason="a measurement; set DATASETDM_LONG_TESTS=1")
@pytest.mark.parametrize("batch", [1, 8])
def test_it_is_as_fast_as_torch_on_a_cpu(pair, batch):
    """Processor seconds of both in turn: unlike the clock, they do not grow with what else the machine is doing."""
    latents, text = inputs(pair.torch, batch)
    _, raw = pair.torch.denoise_and_capture(latents, 100, text)
    _, sums = pair.ort.denoise_and_capture(latents, 100, text)
    stages = {
        "denoise": lambda engine: engine.denoise(latents, 100, text),
        "denoise_and_capture": lambda engine: engine.denoise_and_capture(latents, 100, text),
        "decode_image": lambda engine: engine.decode_image(latents),
        "annotate": lambda engine: engine.annotate("semantic", raw if engine is pair.torch else sums),
    }
    for name, call in stages.items():
        spent = {"torch": [], "ort": []}
        for turn in range(9):
            for engine in (pair.torch, pair.ort):
                begin = time.process_time()
                call(engine)
                if turn:
                    spent[engine.name].append(time.process_time() - begin)
        ratio = statistics.median(spent["torch"]) / statistics.median(spent["ort"])
        print(f"{name}, batch {batch}: {ratio:.2f} times as fast as torch")
        assert ratio >= 1, name
