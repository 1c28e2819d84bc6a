"""The TensorRT engine: with a stand-in for TensorRT that computes on the CPU, every buffer, shape and batch is
exercised; on a GPU the real one.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import fake_tensorrt
import pytest
import torch

from bench.decoders import load_decoders
from datasetdm_fast.config import TASKS
from datasetdm_fast.data import Request
from datasetdm_fast.engine.engines.device import is_out_of_memory
from datasetdm_fast.engine.engines.exported.trt import TrtEngine
from datasetdm_fast.engine.engines.exported.trt_plan import Queue
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.sampling import times
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.export.manifest import FileInfo, Manifest
from datasetdm_fast.export.onnx.to_onnx import export
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.runs.agreement import observe, verify


@pytest.fixture(scope="module")
def demo():
    model = load_model("demo")
    dict(model.modules)  # built here once, and not by each engine that asks for their digest
    return model, load_decoders("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def built(monkeypatch):
    return fake_tensorrt.fake_builder(monkeypatch)


def make_engine(demo, folder, module=fake_tensorrt, name="tensorrt-rtx", **choices):
    told = []
    flavour, queue = fake_tensorrt.FakeFlavour(module, name), fake_tensorrt.HostQueue()
    engine = TrtEngine(
        *demo, dtype="fp32", engines=folder, queue=queue, flavour=flavour, on_message=told.append, **choices
    )
    engine.told = told
    return engine


REQUESTS = [
    Request(0, "a red ball beside a cube", 5, ("ball", "cube")),
    Request(1, "two cones on a table", 6),
    Request(2, "a star", 7, ("star",)),
]


def test_it_agrees_with_the_reference_at_every_stage_and_task(demo, folder, built):
    engine, reference = make_engine(demo, folder), TorchEngine(*demo)
    recipe = make_recipe(reference, TASKS, steps=3)
    truth = observe.observe(reference, REQUESTS, recipe)
    led = observe.teacher_forced_distances(observe.observe(engine, REQUESTS, recipe, truth), truth)
    rows = verify.evaluate_gates(
        {name: values.reshape(-1, len(REQUESTS)) for name, values in led.items()}, verify.EXACT, {}
    )
    assert all(row.is_passed for row in rows), [row for row in rows if not row.is_passed]
    assert engine.told[0] == f"exporting the stages to {folder}"
    assert all(line.startswith("building ") for line in engine.told[1:])
    assert {order.stage for order in built} == set(Manifest.read(folder).stages) - {"encode_image"}


def test_its_plans_are_for_this_gpu_and_one_fixed_shape_each(demo, folder, built):
    engine = make_engine(demo, folder)
    context = engine.encode_text(["", "a ball"])
    engine.denoise(torch.zeros(1, 4, 16, 16), 401, context)
    order = next(order for order in built if order.stage == "denoise")
    assert order.capabilities == ("sm86",) and order.gpu == "" and order.precision == "fp32"
    assert order.batch == 1 and order.shapes == {"latents": (1, 4, 16, 16), "context": (2, 77, 64)}


def test_texts_of_any_number_go_through_one_shape(demo, folder, built):
    engine, reference = make_engine(demo, folder), TorchEngine(*demo)
    words = [f"a ball and {k} cubes" for k in range(11)]
    torch.testing.assert_close(*(one.encode_text(words).context for one in (engine, reference)), rtol=1e-4, atol=1e-5)
    assert len(engine.encode_text([""])) == 1
    assert list(engine._stages["encode_text"].plans) == [8]


def test_words_beyond_what_a_plan_takes_at_once_go_through_in_parts(demo, folder, built):
    engine, reference = make_engine(demo, folder), TorchEngine(*demo)
    context = reference.encode_text(["", "a red ball beside a cube"])
    latents = times.initial_noise(3, 4, 16, 16)[None]
    _, capture = reference.denoise_and_capture(latents, 21, context)
    text = reference.encode_classes(["ball", "cube", "cone", "star", "figure", "table"])[None]
    truth, found = (
        reference.annotate("open-vocabulary", capture, text),
        engine.annotate("open-vocabulary", capture, text),
    )
    assert found["pred_logits"].shape == truth["pred_logits"].shape
    for name, value in truth.items():
        assert observe.relative(found[name], value).max() < 1e-2
    single = engine.annotate("open-vocabulary", capture, text[:, 1])
    torch.testing.assert_close(single["pred_logits"], found["pred_logits"][:, 1])


def test_images_beyond_what_the_autoencoder_takes_at_once_go_through_in_parts(demo, folder, built, monkeypatch):
    from datasetdm_fast.export.tensorrt import to_tensorrt

    monkeypatch.setattr(to_tensorrt, "PIXELS", 2 * 128**2)
    engine, reference = make_engine(demo, folder), TorchEngine(*demo)
    latents = torch.stack([times.initial_noise(seed, 4, 16, 16) for seed in range(3)])
    images = engine.decode_image(latents)
    assert (images.int() - reference.decode_image(latents).int()).abs().max() <= 1
    torch.testing.assert_close(engine.encode_image(images), reference.encode_image(images), rtol=1e-3, atol=1e-3)
    generators = [[torch.Generator().manual_seed(k) for k in range(3)] for _ in range(2)]
    torch.testing.assert_close(
        engine.encode_image(images, generators[0]), reference.encode_image(images, generators[1]), rtol=1e-3, atol=1e-3
    )


def test_features_and_maps_themselves_come_from_a_plan_of_their_own(demo, folder, built):
    engine, reference = make_engine(demo, folder), TorchEngine(*demo)
    context, latents = reference.encode_text(["", "a ball"]), times.initial_noise(3, 4, 16, 16)[None]
    (noise, found), (expected, truth) = (
        one.denoise_and_capture_raw(latents, 21, context) for one in (engine, reference)
    )
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-4)
    for kind in ("features", "maps"):
        for mine, theirs in zip(getattr(found, kind), getattr(truth, kind), strict=True):
            for value, right in zip(mine, theirs, strict=True):
                assert observe.relative(value, right).max() < 1e-4


def test_without_decoders_it_captures_the_activations(demo, folder, built):
    engine = make_engine((demo[0], {}), folder / "bare")
    noise, capture = engine.denoise_and_capture(torch.zeros(1, 4, 16, 16), 21, engine.encode_text(["", "a ball"]))
    assert noise.shape == (2, 4, 16, 16) and len(capture.features) == 4
    with pytest.raises(Missing, match="no decoder for 'depth'"):
        engine.annotate("depth", capture)


def test_outputs_are_the_callers_own(demo, folder, built):
    engine = make_engine(demo, folder)
    context = engine.encode_text(["", "a ball"])
    first = engine.denoise(torch.zeros(1, 4, 16, 16), 401, context)
    kept = first.clone()
    engine.denoise(torch.ones(1, 4, 16, 16), 401, context)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


# Where TensorRT records nothing itself --------------------------------------------------------------------------------


def plain_module():
    """The full TensorRT: no graphs of its own, no check of validity."""

    class Engine(fake_tensorrt.Engine):
        offers_graphs = False

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, content):
            return Engine(fake_tensorrt.json.loads(content), self.log)

    names = {name: getattr(fake_tensorrt, name) for name in ("ILogger", "DataType")}
    return SimpleNamespace(Runtime=Runtime, **names)


def test_the_full_tensorrt_is_recorded_once_per_shape_and_bound_to_its_gpu(demo, two_stages, built, tmp_path):
    shutil.copytree(two_stages[0], tmp_path, dirs_exist_ok=True)
    engine = make_engine(demo, tmp_path, plain_module(), "tensorrt")
    context = engine.encode_text(["", "a ball"])
    for timestep in (401, 201, 1):
        engine.denoise(torch.zeros(1, 4, 16, 16), timestep, context)
    assert engine.queue.recorded == 2  # encode_text and denoise
    (context,) = engine._stages["denoise"].plans[1].engine.contexts
    assert context.runs == 1 + 1 + 3  # to warm up, for the golden output, and the three calls
    assert {order.gpu for order in built} == {"NVIDIA GeForce RTX 3090"}


def test_what_one_thread_queues_is_not_recorded_by_another(monkeypatch):
    """The first labels are recorded while the next batch is sampled."""
    stream = SimpleNamespace(cuda_stream=1, wait_stream=lambda other: None, synchronize=lambda: None)
    for name in ("Stream", "current_stream", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    queue, order = Queue(torch.device("cuda", 0)), []
    sampler = threading.Thread(target=queue.run, args=(lambda: order.append("a call"),))

    def labels():
        order.append("recording")
        sampler.start()
        sampler.join(0.2)
        order.append("recorded")

    queue.run(lambda: queue.record(labels))
    sampler.join()
    assert order == ["recording", "recorded", "a call"]
    with queue.use_device():
        sampler = threading.Thread(target=queue.run, args=(lambda: order.append("another"),))
        sampler.start()
        sampler.join(0.2)
        assert order[-1] == "a call"
    sampler.join()
    assert order[-1] == "another"


def test_buffers_of_a_call_are_written_after_other_threads_have_read_theirs(monkeypatch):
    waits, streams = [], [SimpleNamespace(cuda_stream=k, wait_stream=None) for k in range(2)]
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    for one in streams:
        one.wait_stream = lambda other, one=one: waits.append((one.cuda_stream, other.cuda_stream))
    queue = Queue(torch.device("cuda", 0))
    for k in (0, 0, 1, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, k=k: streams[k])
        with queue.take_turn():
            pass
    assert waits == [(1, 0), (0, 1)]


def test_tensorrt_rtx_records_its_calls_itself(demo, folder, built):
    engine = make_engine(demo, folder)
    engine.encode_text([""])
    loaded = engine._stages["encode_text"].plans[8]
    config = loaded.engine.contexts[0].config
    assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE" and engine.queue.recorded == 0


# Plans that are there already, and plans that must not be used --------------------------------------------------------


@pytest.fixture(scope="module")
def two_stages(demo, tmp_path_factory):
    """The exported text encoder and UNet call, and the engine that says what they should say."""
    from datasetdm_fast.engine.engines.fast import FastEngine

    folder = tmp_path_factory.mktemp("two")
    export(*demo, folder, precision="fp32", only=["encode_text", "denoise"])
    return folder, FastEngine(*demo, dtype="fp32", device="cpu")


def prebuilt(two_stages, folder, monkeypatch, batches, capabilities):
    """Plans of both as another machine would leave them."""
    from datasetdm_fast.export.golden import Reference
    from datasetdm_fast.export.tensorrt import to_tensorrt
    from datasetdm_fast.export.tensorrt.plans import PlanFolder

    exported, engine = two_stages
    built = fake_tensorrt.fake_builder(monkeypatch)
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    manifest = Manifest.read(folder)
    target = to_tensorrt.Target(fake_tensorrt.FakeFlavour(fake_tensorrt), capabilities)
    opened = PlanFolder(folder, lambda line: None)
    golden = Reference(lambda: engine)
    made = {}
    for stage in manifest.stages:
        for batch in {to_tensorrt.call_size(stage, manifest.size, batch) for batch in batches}:
            order = to_tensorrt.make_order(stage, manifest, target, batch)
            made[stage] = to_tensorrt.open_plan(opened, order, manifest, target.flavour, golden)
    built.clear()
    return manifest, made, built


@pytest.mark.parametrize("capabilities", [(), ("sm86", "sm89")])
def test_plans_built_elsewhere_are_used_for_every_batch_they_hold(
    demo, two_stages, tmp_path, monkeypatch, capabilities
):
    _, _, built = prebuilt(two_stages, tmp_path, monkeypatch, (1, 2), capabilities)
    engine = make_engine(demo, tmp_path)
    for batch in (2, 1):
        context = engine.encode_text([""] * batch + ["a ball"] * batch)
        assert engine.denoise(torch.zeros(batch, 4, 16, 16), 401, context).shape == (2 * batch, 4, 16, 16)
    assert not built and not engine.told
    engine.denoise(torch.zeros(3, 4, 16, 16), 401, engine.encode_text([""] * 6))
    assert [(order.stage, order.batch) for order in built] == [("denoise", 3)]


def test_plans_for_other_gpus_are_left_alone(demo, two_stages, tmp_path, monkeypatch):
    _, _, built = prebuilt(two_stages, tmp_path, monkeypatch, (1,), ("sm89",))
    make_engine(demo, tmp_path).encode_text([""])
    assert [order.capabilities for order in built] == [("sm86",)]


def test_a_modified_plan_is_named_and_never_reaches_tensorrt(demo, two_stages, tmp_path, monkeypatch):
    _, made, built = prebuilt(two_stages, tmp_path, monkeypatch, (1,), ("sm86",))
    path = made["encode_text"].path
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    engine, before = make_engine(demo, tmp_path), fake_tensorrt.Runtime.made
    engine.encode_text([""])
    assert fake_tensorrt.Runtime.made == before + 1 and [order.stage for order in built] == ["encode_text"]
    assert any("modified" in line and str(path) in line for line in engine.told)


def test_a_plan_that_says_something_else_than_its_golden_output_fails_the_gate(demo, two_stages, tmp_path, monkeypatch):
    manifest, made, _ = prebuilt(two_stages, tmp_path, monkeypatch, (1,), ("sm86",))
    # In its own place with a fitting manifest, but with the graph of weights that were changed afterwards.
    wrong = onnx_with_other_weights(tmp_path / manifest.stages["encode_text"].file)
    order_facts = made["encode_text"].facts
    forged = {"graph": str(wrong), "shapes": order_facts["shapes"], "capabilities": ["sm86"]}
    replace_plan(made["encode_text"].path, forged)
    with pytest.raises(GateFailed, match="output context is .* away from the golden one, at most 0.02"):
        make_engine(demo, tmp_path).encode_text([""])


def replace_plan(path, content):
    """Another plan in this place, with a manifest that fits it."""
    data = fake_tensorrt.json.dumps(content).encode()
    place = path.with_name(f"{path.name}.json")
    manifest = fake_tensorrt.json.loads(place.read_text())
    manifest["sha256"][".plan"] = hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    place.write_text(fake_tensorrt.json.dumps(manifest))


def onnx_with_other_weights(path):
    import onnx

    model = onnx.load(str(path))
    for constant in model.graph.initializer:
        value = onnx.numpy_helper.to_array(constant)
        if value.dtype == "float32" and value.ndim == 2 and value.size > 10000:
            constant.CopyFrom(onnx.numpy_helper.from_array(value * 1.5, constant.name))
    changed = path.with_name("changed.onnx")
    onnx.save(model, str(changed))
    return changed


def test_a_plan_the_gpu_cannot_run_says_why(demo, two_stages, tmp_path, monkeypatch):
    _, made, _ = prebuilt(two_stages, tmp_path, monkeypatch, (1,), ("sm86",))
    plan = made["encode_text"]
    content = fake_tensorrt.json.loads(plan.content) | {"capabilities": ["sm89"]}
    replace_plan(plan.path, content)
    with pytest.raises(Missing, match=r"cannot run this plan on NVIDIA GeForce RTX 3090 \(sm86\): UNSUPPORTED_CC"):
        make_engine(demo, tmp_path).encode_text([""])


def test_a_folder_of_another_model_is_refused(demo, built, tmp_path):
    other = demo[0], {"depth": demo[1]["depth"]}
    export(*other, tmp_path, only=["encode_text"])
    make_engine(other, tmp_path).encode_text([""])
    with pytest.raises(Refused, match="holds an export with another source than requested"):
        make_engine(demo, tmp_path).encode_text([""])


def test_a_hostile_graph_in_a_named_folder_is_refused_before_anything_reads_it(demo, folder, built, tmp_path):
    onnx = pytest.importorskip("onnx")
    make_engine(demo, folder).encode_text([""])
    built.clear()
    shutil.copytree(folder, tmp_path / "engines", ignore=shutil.ignore_patterns("*.plan*", "*.golden.safetensors"))
    path = tmp_path / "engines" / "encode_text.onnx"
    model = onnx.load(path, load_external_data=False)
    for node, word in (
        (onnx.helper.make_node("EPContext", ["tokens"], ["y"], domain="com.microsoft"), "compiled code"),
        (onnx.helper.make_node("Evil", ["tokens"], ["y"], domain="evil"), "'Evil' of 'evil' is not supported"),
    ):
        hostile = onnx.ModelProto()
        hostile.CopyFrom(model)
        hostile.graph.node.append(node)
        data = hostile.SerializeToString()
        path.write_bytes(data)
        manifest = Manifest.read(folder)
        files = {**manifest.files, path.name: FileInfo(hashlib.sha256(data).hexdigest(), len(data))}
        (path.parent / "manifest.json").write_text(replace(manifest, files=files).to_json())
        with pytest.raises(Refused, match=word):
            make_engine(demo, path.parent).encode_text([""])
    assert not built


def test_precisions_it_does_not_know_are_refused(demo, folder):
    with pytest.raises(Refused, match="'int8' is none of auto, fp32, fp16, bf16"):
        TrtEngine(
            *demo,
            dtype="int8",
            engines=folder,
            queue=fake_tensorrt.HostQueue(),
            flavour=fake_tensorrt.FakeFlavour(fake_tensorrt),
        )


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_makes_samples_with_every_label(demo, folder, built):
    from datasetdm_fast.data import Batch

    engine = make_engine(demo, folder)
    recipe = make_recipe(engine, TASKS, steps=3)
    ((_, samples),) = driver.generate([Batch(0, tuple(REQUESTS))], engine, recipe)
    assert [set(sample.annotations) for sample in samples] == [set(TASKS)] * 3
    assert engine.fingerprint() == {
        "engine": "trt",
        "device": "cpu",
        "device_name": "NVIDIA GeForce RTX 3090",
        "dtype": "fp32",
        "tensorrt": "TensorRT-RTX 1.7.1.116",
        "cuda": "13",
        "torch": torch.__version__,
    }


def test_every_plan_of_a_run_is_built_before_its_first_image(demo, folder, built, tmp_path, monkeypatch):
    from datasetdm_fast.data import Batch

    model, decoders = demo
    engine = make_engine((model, {"depth": decoders["depth"]}), tmp_path)
    sampled, denoise = [], engine.denoise
    monkeypatch.setattr(engine, "denoise", lambda *call: sampled.append(len(built)) or denoise(*call))
    list(driver.generate([Batch(0, tuple(REQUESTS[:2]))], engine, make_recipe(engine, ("depth",), steps=3)))
    assert set(sampled) == {len(built)} and len(built) == len(engine.manifest.stages) - 1
    assert sum(line.startswith("built ") for line in engine.told) == len(built)
    assert engine.told[-1].startswith(f"built {len(built)} of {len(built)}: ")


# What is missing ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("command", ["generate", "verify"])
def test_without_a_gpu_the_command_says_so_at_once(command, tmp_path):
    line = [sys.executable, "-X", "importtime", "-m", f"datasetdm_fast.{command}", "--engine", "trt"]
    before = os.times()
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    after = os.times()
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 3 and len(said) == 2
    assert said[0].startswith("engine trt: ") and "no NVIDIA driver was found" in said[0]
    assert "| torch\n" not in done.stderr and not list(tmp_path.iterdir())
    assert sum(after[2:4]) - sum(before[2:4]) < 3  # seconds of a core, whatever else the machine does


def test_what_was_found_is_named(monkeypatch):
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: [])
    monkeypatch.setattr(flavours, "find_flavour", lambda name: flavours.Flavour("tensorrt-rtx", "1.7.1.116", "13"))
    with pytest.raises(Missing, match="found the module tensorrt_rtx 1.7.1.116, "):
        flavours.require_gpu()


def test_a_plan_without_room_on_the_gpu_tells_how_much_it_takes(demo, folder, built, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.Engine, "device_memory_size_v2", 9_500_000_000)
    with pytest.raises(Missing, match="for encode_text in batches of 8: it takes 9.5 GB, and 8.0 GB") as caught:
        make_engine(demo, folder).prepare(2)
    assert is_out_of_memory(caught.value)


def raises(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("kind", "name", "answer", "said"),
    [
        (
            "Context",
            "infer_shapes",
            raises(RuntimeError("a tensor is not set")),
            "loading it: a tensor is not set",
        ),
        ("Context", "set_input_shape", raises(TypeError("no such type")), "loading it: no such type"),
        ("Context", "set_tensor_address", lambda *_: False, "failed at the address of tokens"),
        ("Context", "execute_async_v3", lambda *_: False, "failed at running it"),
        ("Context", "execute_async_v3", raises(RuntimeError("CUDA error")), "loading it: CUDA error"),
        ("Engine", "create_execution_context", lambda *_: None, "cannot run this plan"),
        ("Engine", "create_execution_context", raises(RuntimeError("no room")), "loading it: no room"),
        ("Runtime", "deserialize_cuda_engine", lambda *_: None, "cannot run this plan"),
        ("Runtime", "deserialize_cuda_engine", raises(RuntimeError("bad plan")), "loading it: bad plan"),
    ],
)
def test_what_fails_while_a_plan_is_loaded_is_told_with_the_plan(
    demo, two_stages, tmp_path, monkeypatch, kind, name, answer, said
):
    monkeypatch.setattr(getattr(fake_tensorrt, kind), name, answer)
    prebuilt(two_stages, tmp_path, monkeypatch, (1,), ("sm86",))
    with pytest.raises(Missing, match=f"encode_text-.*plan: .*{said}"):
        make_engine(demo, tmp_path).encode_text([""])


def test_a_recording_that_ends_early_is_told_with_the_plan(demo, two_stages, built, tmp_path, monkeypatch):
    shutil.copytree(two_stages[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(fake_tensorrt.HostQueue, "record", raises(RuntimeError("a previous error during capture")))
    with pytest.raises(Missing, match="encode_text-.*plan: TensorRT failed at loading it: a previous error during"):
        make_engine(demo, tmp_path, plain_module(), "tensorrt").encode_text([""])


def test_a_gpu_the_flavour_does_not_serve_is_named_with_those_it_does(monkeypatch):
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: ["sm90"])
    monkeypatch.setattr(flavours, "find_flavour", lambda name: fake_tensorrt.FakeFlavour(fake_tensorrt))
    monkeypatch.setattr(flavours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        Missing, match="serves sm75, sm86, sm89, and this machine has sm90.*\n.*pip install 'datasetdm-fast.trt-full"
    ):
        flavours.require_gpu()


def test_no_module_names_the_way_to_install_one(monkeypatch):
    monkeypatch.setattr(flavours.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: [])
    with pytest.raises(
        Missing, match=r"neither the module tensorrt nor tensorrt_rtx is installed.*\n.*datasetdm-fast\[trt\]"
    ):
        flavours.find_flavour()
    with pytest.raises(Missing, match="the module tensorrt is not installed.*\n.*pip install 'datasetdm-fast.trt-full"):
        flavours.find_flavour("tensorrt")


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_verify_passes_on_this_gpu(tmp_path, monkeypatch):
    from datasetdm_fast import verify

    try:
        flavours.require_gpu()
    except Missing as missing:
        pytest.skip(f"TensorRT cannot run here: {missing.cause}")
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path))
    assert verify.main(["--engine", "trt", "--number", "4", "--steps", "6", "--quiet"]) == 0
