"""The TensorRT engine: with a stand-in for TensorRT that computes on the CPU, every buffer, shape and batch is
exercised; on a GPU the real one.
"""

import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import fake_tensorrt
import pytest
import torch

from bench.decoders import load_decoders
from datasetdm_fast.config import TASKS
from datasetdm_fast.data import Batch, Request
from datasetdm_fast.engine.engines.device import is_out_of_memory
from datasetdm_fast.engine.engines.exported import trt
from datasetdm_fast.engine.engines.exported.trt import Queue, TrtEngine, TrtStage, _resolve_gpu, call_size
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.engine.sampling.schedule import ImageNoise
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import FileInfo, StageFile
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.runs.agreement import observe, verify


@pytest.fixture(scope="module")
def demo():
    model = load_model("demo")
    dict(model.modules)  # built here once, and not by each engine that asks for their digest
    return model, load_decoders("demo")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A cache, which the engines of this file fill with graphs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(exported, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(exported))
    return exported


@pytest.fixture
def unbuilt(exported, demo, tmp_path, monkeypatch):
    """A cache with the graphs alone."""
    make_engine(demo)
    shutil.copytree(exported, tmp_path, ignore=shutil.ignore_patterns("*.plan"), dirs_exist_ok=True)
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def built(monkeypatch):
    return fake_tensorrt.fake_builder(monkeypatch)


def make_engine(demo, module=fake_tensorrt, *kind, dtype="fp32"):
    told = []
    flavour, queue = fake_tensorrt.FakeFlavour(module, *kind), fake_tensorrt.HostQueue()
    engine = TrtEngine(*demo, dtype=dtype, queue=queue, flavour=flavour, on_message=told.append)
    engine.told = told
    return engine


REQUESTS = [
    Request(0, "a red ball beside a cube", 5, ("ball", "cube")),
    Request(1, "two cones on a table", 6),
    Request(2, "a star", 7, ("star",)),
]


def test_it_agrees_with_the_reference_at_every_stage_and_task(demo, unbuilt, built):
    engine, reference = make_engine(demo), TorchEngine(*demo)
    recipe = make_recipe(reference, TASKS, steps=3)
    truth = observe.observe(reference, REQUESTS, recipe)
    led = observe.teacher_forced_distances(observe.observe(engine, REQUESTS, recipe, truth), truth)
    rows = verify.evaluate_gates(
        {name: values.reshape(-1, len(REQUESTS)) for name, values in led.items()}, verify.EXACT, {}
    )
    assert all(row.is_passed for row in rows), [row for row in rows if not row.is_passed]
    assert all(line.startswith("building ") for line in engine.told)
    assert {stage for stage, *_ in built} == set(engine.manifest.stages) - {"encode_image"}
    assert {path.name.rsplit("-", 1)[0] for path in unbuilt.rglob("*.plan")} == {stage for stage, *_ in built}


def test_its_plans_are_for_this_gpu_and_one_fixed_shape_each(demo, unbuilt, built):
    engine = make_engine(demo)
    context = engine.encode_text(["", "a ball"])
    engine.denoise(torch.zeros(1, 4, 16, 16), 401, context)
    assert built[1] == ("denoise", {"latents": (1, 4, 16, 16), "context": (2, 77, 64)}, "sm86")


def test_texts_of_any_number_go_through_one_shape(demo, built):
    engine, reference = make_engine(demo), TorchEngine(*demo)
    words = [f"a ball and {k} cubes" for k in range(11)]
    torch.testing.assert_close(*(one.encode_text(words).context for one in (engine, reference)), rtol=1e-4, atol=1e-5)
    assert len(engine.encode_text([""])) == 1
    assert list(engine._stages["encode_text"].plans) == [8]


def test_words_beyond_what_a_plan_takes_at_once_go_through_in_parts(demo, built):
    engine, reference = make_engine(demo), TorchEngine(*demo)
    context = reference.encode_text(["", "a red ball beside a cube"])
    latents = ImageNoise([3], (4, 16, 16)).draw()
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


def test_images_beyond_what_the_autoencoder_takes_at_once_go_through_in_parts(demo, built, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.engines.exported.trt.PIXELS", 2 * 128**2)
    engine, reference = make_engine(demo), TorchEngine(*demo)
    latents = ImageNoise(range(3), (4, 16, 16)).draw()
    images = engine.decode_image(latents)
    assert (images.int() - reference.decode_image(latents).int()).abs().max() <= 1
    assert list(engine._stages["decode_image"].plans) == [2]  # the last image is a part of two
    torch.testing.assert_close(engine.encode_image(images), reference.encode_image(images), rtol=1e-3, atol=1e-3)
    generators = [[torch.Generator().manual_seed(k) for k in range(3)] for _ in range(2)]
    torch.testing.assert_close(
        engine.encode_image(images, generators[0]), reference.encode_image(images, generators[1]), rtol=1e-3, atol=1e-3
    )


def test_features_and_maps_themselves_come_from_a_plan_of_their_own(demo, built):
    engine, reference = make_engine(demo), TorchEngine(*demo)
    context, latents = reference.encode_text(["", "a ball"]), ImageNoise([3], (4, 16, 16)).draw()
    (noise, found), (expected, truth) = (
        one.denoise_and_capture_raw(latents, 21, context) for one in (engine, reference)
    )
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-4)
    for kind in ("features", "maps"):
        for mine, theirs in zip(getattr(found, kind), getattr(truth, kind), strict=True):
            for value, right in zip(mine, theirs, strict=True):
                assert observe.relative(value, right).max() < 1e-4


def test_without_decoders_it_captures_the_activations(demo, built):
    engine = make_engine((demo[0], {}))
    noise, capture = engine.denoise_and_capture(torch.zeros(1, 4, 16, 16), 21, engine.encode_text(["", "a ball"]))
    assert noise.shape == (2, 4, 16, 16) and len(capture.features) == 4
    with pytest.raises(Missing, match="no decoder for 'depth'"):
        engine.annotate("depth", capture)


def test_outputs_are_the_callers_own(demo, built):
    engine = make_engine(demo)
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


FULL = "TensorRT 10.16.1", ()


def test_the_full_tensorrt_is_recorded_once_per_shape(demo, unbuilt, built):
    engine = make_engine(demo, plain_module(), *FULL)
    context = engine.encode_text(["", "a ball"])
    for timestep in (401, 201, 1):
        engine.denoise(torch.zeros(1, 4, 16, 16), timestep, context)
    assert engine.queue.recorded == 2  # encode_text and denoise
    (context,) = engine._stages["denoise"].plans[1].engine.contexts
    assert context.runs == 1 + 3  # to warm up, and the three calls


def test_what_one_thread_queues_is_not_recorded_by_another(monkeypatch):
    """The first labels are recorded while the next batch is sampled."""
    stream = SimpleNamespace(cuda_stream=1, wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(trt, "new_stream", lambda device: stream)
    for name in ("current_stream", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    recorded = []
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _, **how: recorded.append(how) or nullcontext())
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
    assert recorded == [{"stream": stream, "capture_error_mode": "thread_local"}]
    with queue.use_device():
        sampler = threading.Thread(target=queue.run, args=(lambda: order.append("another"),))
        sampler.start()
        sampler.join(0.2)
        assert order[-1] == "a call"
    sampler.join()
    assert order[-1] == "another"


def test_a_queue_runs_between_what_its_caller_queued_before_and_after(monkeypatch):
    order = []

    def stream(name):
        return SimpleNamespace(name=name, cuda_stream=name, wait_stream=lambda other: order.append((name, other.name)))

    own, callers = stream("own"), stream("caller's")
    monkeypatch.setattr(trt, "new_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: callers)
    monkeypatch.setattr(torch.cuda, "stream", lambda used: order.append(used.name) or nullcontext())
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda device: (9, 0))
    Queue(torch.device("cuda", 0)).run(lambda: order.append("work"))
    assert order == [("own", "caller's"), "own", "work", ("caller's", "own")]


def test_buffers_of_a_call_are_written_after_other_threads_have_read_theirs(monkeypatch):
    waits, streams = [], [SimpleNamespace(cuda_stream=k, wait_stream=None) for k in range(2)]
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda device: (9, 0))
    monkeypatch.setattr(trt, "new_stream", lambda device: SimpleNamespace(cuda_stream=7))
    for one in streams:
        one.wait_stream = lambda other, one=one: waits.append((one.cuda_stream, other.cuda_stream))
    queue = Queue(torch.device("cuda", 0))
    for k in (0, 0, 1, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, k=k: streams[k])
        with queue.take_turn():
            pass
    assert waits == [(1, 0), (0, 1)]


def test_tensorrt_rtx_records_its_calls_itself(demo, built):
    engine = make_engine(demo)
    engine.encode_text([""])
    loaded = engine._stages["encode_text"].plans[8]
    config = loaded.engine.contexts[0].config
    assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE" and engine.queue.recorded == 0


# Plans that are there already, and plans that must not be used --------------------------------------------------------


def test_plans_of_an_earlier_process_are_used_for_every_batch_they_hold(demo, unbuilt, built):
    make_engine(demo).encode_text([""])
    built.clear()
    engine = make_engine(demo)
    engine.denoise(torch.zeros(3, 4, 16, 16), 401, engine.encode_text([""] * 6))
    assert [(stage, shapes["latents"][0]) for stage, shapes, _ in built] == [("denoise", 3)]


@pytest.mark.parametrize("change", ["gpu", "title"])
def test_plans_of_another_gpu_or_version_are_left_alone(demo, unbuilt, built, monkeypatch, change):
    make_engine(demo).encode_text([""])
    engine = make_engine(demo)
    monkeypatch.setattr(engine.flavour if change == "title" else engine.queue, change, "another")
    engine.encode_text([""])
    assert len(built) == 2 and len(list(unbuilt.rglob("encode_text-*.plan"))) == 2


def test_a_plan_is_named_by_all_that_decides_it(tmp_path):
    def name(batch=3, title="TensorRT 10", gpu="A100", capability="sm80", graph="1", data="2", stage="denoise"):
        files = {"some.onnx": FileInfo(graph, 1), "unet.data": FileInfo(data, 1)}
        stages = {stage: StageFile("some.onnx", "unet.data", (), ())}
        engine = SimpleNamespace(
            flavour=SimpleNamespace(title=title), queue=SimpleNamespace(gpu=gpu, capability=capability)
        )
        return TrtStage(engine, tmp_path, SimpleNamespace(stages=stages, files=files, size=512), stage).path(batch)

    others = [name(4), name(title="11"), name(gpu="A10"), name(capability="sm86"), name(graph="3"), name(data="3")]
    assert len({name(), *others, name(stage="decode_image")}) == 8 and name() == name()
    assert name(stage="encode_text", batch=2) == name(stage="encode_text", batch=9)


@pytest.mark.parametrize(
    ("stage", "size", "batch", "taken"),
    [
        ("encode_text", 512, 3, 8),
        ("denoise", 512, 20, 20),
        ("annotate_depth", 1024, 20, 20),
        ("decode_image", 512, 20, 8),
        ("decode_image", 128, 20, 20),
        ("encode_image", 1024, 20, 2),
        ("encode_image", 4096, 3, 1),
    ],
)
def test_a_call_takes_as_many_as_its_stage_has_memory_for(stage, size, batch, taken):
    assert call_size(stage, size, batch) == taken


def test_a_device_that_is_no_gpu_is_refused_and_a_gpu_that_is_missing_is_told(monkeypatch):
    with pytest.raises(Refused, match="the trt engine runs on a GPU, not on cpu"):
        _resolve_gpu("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match="engine trt: this PyTorch .* sees no GPU; "):
        _resolve_gpu("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert [_resolve_gpu(name).index for name in ("cuda:1", "cuda")] == [1, 2]


def test_a_plan_of_other_types_or_shapes_is_told(demo, unbuilt, built, monkeypatch):
    make_engine(demo).encode_text([""])
    shape_of = fake_tensorrt.Context.get_tensor_shape
    with monkeypatch.context() as patch:
        patch.setattr(fake_tensorrt.Context, "get_tensor_shape", lambda self, name: (*shape_of(self, name), 1))
        with pytest.raises(Missing, match="failed at the shape of context"):
            make_engine(demo).encode_text([""])
    with monkeypatch.context() as patch:
        patch.setattr(fake_tensorrt.Engine, "get_tensor_dtype", lambda *_: fake_tensorrt.DataType.INT64)
        with pytest.raises(Missing, match="its tensors are .*'context': 'int64'.*, expected .*'context': 'float32'"):
            make_engine(demo).encode_text([""])
    patched = raises(torch.OutOfMemoryError("no memory"))
    monkeypatch.setattr(fake_tensorrt.Engine, "create_execution_context", patched)
    with pytest.raises(torch.OutOfMemoryError):
        make_engine(demo).encode_text([""])


def test_engines_that_ask_at_once_make_one_build(demo, unbuilt, built, monkeypatch):
    from datasetdm_fast.export import staging
    from datasetdm_fast.export.tensorrt import plan_builder

    engines, waits = [make_engine(demo) for _ in range(2)], threading.Event()
    other = threading.Thread(target=engines[1].encode_text, args=([""],))
    monkeypatch.setattr(staging, "print_line", lambda line: waits.set())
    build = plan_builder.build_plan

    def build_while_another_waits(*arguments):
        other.start()
        assert waits.wait(60)
        build(*arguments)

    monkeypatch.setattr(plan_builder, "build_plan", build_while_another_waits)
    engines[0].encode_text([""])
    other.join(60)
    assert [stage for stage, *_ in built] == ["encode_text"] and list(engines[1]._stages["encode_text"].plans) == [8]


def test_a_build_that_fails_leaves_nothing(demo, unbuilt, monkeypatch):
    from datasetdm_fast.export.tensorrt import plan_builder

    def fail(graph, plan, *_):
        plan.write_bytes(b"half")
        raise Refused("encode_text: TensorRT gives no plan", "Use another.")

    monkeypatch.setattr(plan_builder, "build_plan", fail)
    with pytest.raises(Refused, match="gives no plan"):
        make_engine(demo).encode_text([""])
    assert not [path for path in unbuilt.rglob("*") if ".plan" in path.name]


def test_a_plan_the_gpu_cannot_run_says_why(demo, unbuilt, built):
    make_engine(demo).encode_text([""])
    (path,) = unbuilt.rglob("encode_text-*.plan")
    path.write_text(path.read_text().replace("sm86", "sm89"))
    with pytest.raises(Missing, match=r"cannot run this plan on NVIDIA GeForce RTX 3090 \(sm86\): UNSUPPORTED_CC"):
        make_engine(demo).encode_text([""])


def test_precisions_it_does_not_know_are_refused(demo):
    with pytest.raises(Refused, match="'int8' is none of auto, fp32, fp16, bf16"):
        make_engine(demo, dtype="int8")


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_makes_samples_with_every_label(demo, built):
    engine = make_engine(demo)
    recipe = make_recipe(engine, TASKS, steps=3)
    ((_, samples),) = driver.generate([Batch(0, tuple(REQUESTS))], engine, recipe)
    assert [set(sample.annotations) for sample in samples] == [set(TASKS)] * 3
    assert engine.fingerprint() == {
        "engine": "trt",
        "device": "cpu",
        "device_name": "NVIDIA GeForce RTX 3090",
        "dtype": "fp32",
        "tensorrt": "TensorRT-RTX 1.7.1.116",
        "torch": torch.__version__,
    }


def test_every_plan_of_a_run_is_built_before_its_first_image(demo, unbuilt, built, monkeypatch):
    engine = make_engine(demo)
    sampled, denoise = [], engine.denoise
    monkeypatch.setattr(engine, "denoise", lambda *call: sampled.append(len(built)) or denoise(*call))
    list(driver.generate([Batch(0, tuple(REQUESTS[:2]))], engine, make_recipe(engine, ("depth",), steps=3)))
    assert set(sampled) == {len(built)} and len(built) == len(engine.manifest.stages) - 1
    bars = [line for line in engine.told if line.startswith("plan ")]
    assert bars == [f"plan {place} of {len(built)}:" for place in range(1, len(built) + 1)]
    engine.told.clear()
    engine.prepare(2)
    assert engine.told == []


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
    monkeypatch.setattr(flavours, "find_flavour", lambda: fake_tensorrt.FakeFlavour(fake_tensorrt))
    with pytest.raises(Missing, match="found TensorRT-RTX 1.7.1.116, "):
        flavours.require_gpu()


def test_a_plan_without_room_on_the_gpu_tells_how_much_it_takes(demo, built, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.Engine, "device_memory_size_v2", 9_500_000_000)
    with pytest.raises(Missing, match="for encode_text in batches of 8: it takes 9.5 GB, and 8.0 GB") as caught:
        make_engine(demo).prepare(2)
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
        ("Context", "set_tensor_address", lambda *_: False, "the address of tokens"),
        ("Context", "execute_async_v3", lambda *_: False, "running it"),
        ("Context", "execute_async_v3", raises(RuntimeError("CUDA error")), "loading it: CUDA error"),
        ("Engine", "create_execution_context", lambda *_: None, "TensorRT-RTX 1.7.1.116 cannot run this plan"),
        ("Engine", "create_execution_context", raises(RuntimeError("no room")), "loading it: no room"),
        ("Runtime", "deserialize_cuda_engine", lambda *_: None, "TensorRT-RTX 1.7.1.116 cannot run this plan"),
        ("Runtime", "deserialize_cuda_engine", raises(RuntimeError("bad plan")), "loading it: bad plan"),
        (
            "Engine",
            "device_memory_size_v2",
            property(raises(AttributeError("no such size"))),
            "loading it: no such size",
        ),
    ],
)
def test_what_fails_while_a_plan_is_loaded_is_told_with_the_plan(demo, built, monkeypatch, kind, name, answer, said):
    monkeypatch.setattr(getattr(fake_tensorrt, kind), name, answer)
    with pytest.raises(Missing, match=f"^[^:]*encode_text-[^:]*plan: (TensorRT failed at )?{said}"):
        make_engine(demo).encode_text([""])


def test_memory_that_a_recording_lacks_is_no_fault_of_the_plan(demo, built, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.HostQueue, "record", raises(RuntimeError("CUDA error: out of memory")))
    with pytest.raises(RuntimeError, match="^CUDA error: out of memory"):
        make_engine(demo, plain_module(), *FULL).encode_text([""])


def test_a_recording_that_ends_early_is_told_with_the_plan(demo, built, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.HostQueue, "record", raises(RuntimeError("a previous error during capture")))
    with pytest.raises(Missing, match="encode_text-.*plan: TensorRT failed at loading it: a previous error during"):
        make_engine(demo, plain_module(), *FULL).encode_text([""])


def test_a_gpu_the_flavour_does_not_serve_is_named_with_those_it_does(monkeypatch):
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: ["sm90"])
    monkeypatch.setattr(flavours, "find_flavour", lambda: fake_tensorrt.FakeFlavour(fake_tensorrt))
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
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: ["sm90"])
    with pytest.raises(Missing, match="is installed.*\n.*pip install 'datasetdm-fast.trt-full"):
        flavours.find_flavour()


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
