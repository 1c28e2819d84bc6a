"""Batches that fit, and the forms of operations a device is given."""

import gc
import mmap
import os
import resource
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_unets import FEW_ATTENTIONS, with_small_unet

from bench.report.report import forms_table
from datasetdm_fast import cores
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, seeded_decoders
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.decoders.trunk import fold
from datasetdm_fast.engine.engines import build_engine, cuda_graph, fast
from datasetdm_fast.engine.engines import device as memory
from datasetdm_fast.engine.engines.device import choose_by_shape
from datasetdm_fast.engine.engines.fast import FastEngine, on_cpu, on_gpu
from datasetdm_fast.engine.engines.fast.on_gpu import GpuEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.models import blocks, packed
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import (
    OPS,
    ada_norm,
    attention_capture,
    choice,
    depth_head,
    fused,
    geglu,
    image_norm,
    launch,
    upsample_concat,
)
from datasetdm_fast.kernels.noise import noise


class Memory:
    """Holds `room` images."""

    def __init__(self, room, error=None):
        self.room, self.tried, self.forgot = room, [], 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def run(self, size):
        self.tried.append(size)
        if size > self.room:
            raise self.error
        return f"{size} images"

    def forget(self):
        self.forgot += 1


@pytest.mark.parametrize(("room", "size", "worked"), [(8, 8, 8), (5, 8, 4), (4, 7, 4), (1, 2, 1)])
def test_a_batch_is_halved_once(room, size, worked):
    held = Memory(room)
    assert memory.halve_until_fits(held.run, size, held.forget) == (f"{worked} images", worked)
    assert held.tried == ([size] if worked == size else [size, worked]) and held.forgot == (worked < size)


@pytest.mark.parametrize(("room", "size"), [(0, 1), (3, 8)])
def test_what_fits_not_even_then_is_said_in_a_sentence(room, size):
    held = Memory(room)
    with pytest.raises(Missing, match="does not have enough memory for"):
        memory.halve_until_fits(held.run, size, held.forget)


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory"])
def test_a_batch_is_halved_where_there_is_no_memory_for_a_graph_or_a_kernel(said):
    held = Memory(5, RuntimeError(said))
    assert memory.halve_until_fits(held.run, 8, held.forget) == ("4 images", 4)
    held = Memory(5, RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        memory.halve_until_fits(held.run, 8, held.forget)
    assert held.tried == [8]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA out of memory")])
def test_memory_that_runs_out_elsewhere_is_no_bug_either(capsys, error):
    def command(arguments):
        raise error

    assert run_command(command, []) == 3
    assert "GPU does not have enough memory\nChoose a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, partial(mmap.mmap, -1)], ids=["torch", "numpy", "mmap"])
def test_memory_of_the_machine_that_runs_out_is_no_bug(allocate, capsys):
    assert run_command(lambda _: int(allocate(2**50)[0]), []) == 3
    assert capsys.readouterr().err.startswith("memory: the machine does not have enough memory\nChoose a smaller ")
    with pytest.raises((RuntimeError, MemoryError, OSError)) as error:
        allocate(2**50)
    assert memory.is_out_of_memory(error.value)


def test_a_library_that_cannot_be_loaded_is_no_bug(monkeypatch, capsys):
    """As where it is not installed, of another version, or too large for the memory; our own modules are there."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    lines = ["import scipy.optimize", "from scipy import nothing_of_that_name", "import datasetdm_fast.nothing"]
    lines.append("raise ImportError('of no module')")
    assert [run_command(lambda _, line=line: exec(line), []) for line in lines] == [3, 3, 1, 1]
    err = capsys.readouterr().err
    assert err.count("a library cannot be loaded: ") == err.count("Install it anew") == 2
    assert "import of scipy.optimize halted" in err and err.count("this is a bug of ours") == 2


def test_the_bench_knows_both_ways_in_which_memory_runs_out():
    with pytest.raises(Missing) as stop:
        memory.halve_until_fits(Memory(0).run, 1, Memory(0).forget)
    assert memory.is_out_of_memory(stop.value) and memory.is_out_of_memory(torch.OutOfMemoryError())
    assert memory.is_out_of_memory(RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)"))
    assert not memory.is_out_of_memory(ValueError("memory"))


def test_a_batch_from_free_memory(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 99_999))
    assert (
        memory.suggest_batch(64, cuda, lambda batch: 600 + 470 * batch) == 14
    )  # 1 + (8000 - 1070) / 470 = 15.7, made even
    assert (
        memory.suggest_batch(64, cuda, lambda batch: 90_000 * batch) == 1
        and memory.suggest_batch(64, cuda, lambda batch: batch) == memory.LARGEST_SUGGESTED_BATCH
    )
    assert memory.suggest_batch(16, torch.device("cpu")) == 16 and memory.suggest_batch(64, torch.device("cpu")) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA out of memory")])
def test_a_gpu_with_memory_for_a_single_image_makes_one_at_a_time(monkeypatch, error):
    def bytes_of(batch):
        if batch > 1:
            raise error
        return 5000

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000, 1_000_000))
    assert memory.suggest_batch(64, torch.device("cuda", 0), bytes_of) == 1
    error = RuntimeError("an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal"):
        memory.suggest_batch(64, torch.device("cuda", 0), bytes_of)


def as_on_a_gpu(engine, monkeypatch):
    """Lets an engine of the CPU share a batch out as one of a GPU does."""
    engine.widest = engine.widest_chunk = engine.widest_labelled = 0
    for name in ("_parts", "_images", "_forget"):
        monkeypatch.setattr(engine, name, getattr(GpuEngine, name).__get__(engine), raising=False)


def test_an_engine_that_ran_out_of_memory_goes_on_in_halves(monkeypatch):
    """The path of a GPU, walked on the CPU: plain calls instead of graphs, and the failure instead of the driver's."""
    engine = FastEngine(load_model("tiny"), device="cpu")
    latents, text = torch.randn(5, 4, 16, 16), engine.encode_text([f"thing {k}" for k in range(10)])
    expected, asked = engine.denoise(latents, 5, text), []

    def replay(name, step, inputs):
        asked.append(len(inputs[0]))
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*inputs)

    as_on_a_gpu(engine, monkeypatch)
    engine._calls = cuda_graph.RecordedCalls()
    engine._calls.replay = replay
    for _ in range(2):
        assert torch.allclose(engine.denoise(latents, 5, text), expected, atol=1e-5)
    assert asked == [5, 3, 2, 3, 2] and engine.adjustments == {"unet_batch": 3}


def test_images_are_decoded_in_as_small_chunks_as_memory_asks_for(monkeypatch):
    """The same of the autoencoder, beside whose chunks the graphs of the UNet keep their memory."""
    engine = FastEngine(load_model("tiny"), device="cpu")
    latents, inner, asked = torch.randn(5, 4, 16, 16), engine._decode_part, []
    expected = engine.decode_and_check(latents)[0].int()

    def tight(chunk):
        asked.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(chunk)

    as_on_a_gpu(engine, monkeypatch)
    monkeypatch.setitem(fast.CHUNK_PIXELS, "cpu", 5 * engine.model.size**2)
    engine._decode_part, engine._label_calls = tight, cuda_graph.RecordedCalls()
    engine.adjustments = {"unet_batch": 3}
    for _ in range(2):
        images, is_finite = engine.decode_and_check(latents)
        assert (images.int() - expected).abs().max() <= 1 and is_finite.all()
    assert asked == [5, 3, 2, 2, 1, 2, 2, 1] and engine.adjustments == {"unet_batch": 3, "image_batch": 2}


class Recorded:
    """A recorded call, which the CPU makes anew: of as many inputs as were recorded."""

    def __init__(self, run, inputs, pool, fresh=1):
        self.run, self.count, self.fresh = run, len(inputs), fresh

    def __call__(self, *values):
        assert len(values) == self.count
        return self.run(*values)


KINDS = "segmentation", "depth", "open-vocabulary"


def engine_with_decoders():
    model = with_small_unet(load_model("tiny"), FEW_ATTENTIONS)
    sizes = {"levels": model.levels, "text_width": model.text_width, "width": 16, "mask_dim": 16, "depth_width": 16}
    return FastEngine(model, {kind: fold(build_decoder(upstream(kind, **sizes))) for kind in KINDS}, device="cpu")


def labels_as_on_a_gpu(engine, monkeypatch):
    as_on_a_gpu(engine, monkeypatch)
    for name in ("_replay_labels", "_run_decoder"):
        monkeypatch.setattr(engine, name, getattr(GpuEngine, name).__get__(engine), raising=False)
    engine._calls, engine._label_calls = cuda_graph.RecordedCalls(), cuda_graph.RecordedCalls()
    engine._output_names, engine._stored_decoders = {}, engine.decoders


def read_labels(engine, capture, words):
    return [
        value
        for task, decoder in engine.decoders.items()
        for value in engine.annotate(task, capture, words if decoder.config.has_text else None).values()
    ]


def test_every_step_and_label_of_a_gpu_has_a_recording_of_its_own(monkeypatch):
    monkeypatch.setattr(cuda_graph, "StepGraph", Recorded)
    monkeypatch.setattr(cuda_graph, "GraphPool", lambda place: place)
    engine = engine_with_decoders()
    latents, text = noise(2, 4, 16, 16), engine.encode_text(["", "", "a ball", "a cube"])
    words = engine.encode_classes(["ball", "cube", "star"]).expand(2, -1, -1)

    def call():
        noise, capture = engine.denoise_and_capture(latents, 5, text)
        return [engine.denoise(latents, 5, text), noise, *read_labels(engine, capture, words)]

    expected = call()
    labels_as_on_a_gpu(engine, monkeypatch)
    for mine, theirs in zip(call(), expected, strict=True):
        assert mine.dtype == torch.float32 and (mine - theirs).norm() <= 1e-2 * theirs.norm()
    assert len(engine._calls.graphs) == 2 and len(engine._label_calls.graphs) == len(KINDS)
    assert all(one.fresh == 1 < one.count for one in engine._calls.graphs.values())  # texts come from tables
    assert all(one.fresh == one.count for one in engine._label_calls.graphs.values())  # which captures do not


def test_labels_are_read_of_as_few_images_at_once_as_memory_asks_for(monkeypatch):
    """By default a batch is as large as the U-Net's memory allows, and decoders may need more."""
    engine, asked = engine_with_decoders(), []
    _, capture = engine.denoise_and_capture(noise(5, 4, 16, 16), 5, engine.encode_text(["a ball"] * 10))
    words = engine.encode_classes(["ball", "cube"]).expand(5, -1, -1)
    expected = read_labels(engine, capture, words)

    class Tight(Recorded):
        def __init__(self, run, inputs, *others):
            asked.append(len(inputs[0]))
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(run, inputs, *others)

    monkeypatch.setattr(cuda_graph, "StepGraph", Tight)
    monkeypatch.setattr(cuda_graph, "GraphPool", lambda place: place)
    labels_as_on_a_gpu(engine, monkeypatch)
    for _ in range(2):
        for mine, theirs in zip(read_labels(engine, capture, words), expected, strict=True):
            assert mine.shape == theirs.shape and (mine - theirs).norm() <= 1e-2 * theirs.norm()
    assert asked == [5, 3, 2, 1] + [2, 1] * (len(KINDS) - 1) and engine.adjustments == {"label_batch": 2}


def test_a_batch_is_measured_with_the_decoders_that_read_it(monkeypatch):
    """Their graphs have memory of their own beside the U-Net's."""
    engine, read = engine_with_decoders(), []
    engine.prepare(3)
    for decoder in engine._stored_decoders.values():
        decoder.register_forward_hook(lambda decoder, given, _: read.append((given[0].batch, given[1] is None)))
    before, peak = iter([200, 5000]), iter([1200, 5030])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(before))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peak))
    monkeypatch.setattr(engine, "_measure", GpuEngine._measure.__get__(engine), raising=False)
    with torch.inference_mode():
        assert GpuEngine._bytes_of(engine, 3) == 1000 + 30
    assert sorted(read) == [(3, False), (3, True), (3, True)]


def test_a_gpu_is_measured_for_batches_once(monkeypatch):
    """A program that calls a pipeline again and again finds ever less memory free, as graphs of its batches hold it."""
    engine = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(size=64), _bytes_of=None, _suggested=0)
    found = iter([1, 8, 4])
    monkeypatch.setattr(on_gpu, "suggest_batch", lambda *given: next(found))
    assert [GpuEngine.suggested_batch(engine) for _ in range(4)] == [1, 8, 8, 8]


def test_recordings_of_ever_new_shapes_do_not_add_up(monkeypatch):
    """As of a service whose clients name any number of classes."""
    monkeypatch.setattr(cuda_graph, "StepGraph", Recorded)
    monkeypatch.setattr(cuda_graph, "GraphPool", lambda place: place)
    waited, calls = [], cuda_graph.RecordedCalls()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for count in (*range(1, 3 * 64), 1):
        (double,) = calls.replay("double", lambda x: (2 * x,), (torch.ones(count),))
        assert double.shape == (count,) and double.sum() == 2 * count
        assert 1 <= len(calls.graphs) <= 64
    assert len(waited) == 2


def test_a_recording_that_another_thread_drops_meanwhile_is_still_called(monkeypatch):
    calls = cuda_graph.RecordedCalls()

    class Shared(dict):
        def __setitem__(self, key, value):
            """Another thread clears them at once."""

    monkeypatch.setattr(cuda_graph, "StepGraph", Recorded)
    monkeypatch.setattr(cuda_graph, "GraphPool", lambda place: "pool")
    calls.graphs = Shared()
    (double,) = calls.replay("double", lambda x: (2 * x,), (torch.ones(3),))
    assert double.tolist() == [2] * 3


@dataclass(frozen=True)
class Stream:
    number: int


def test_a_stream_of_a_gpu_is_given_to_one_holder_at_a_time(monkeypatch):
    numbers, device = cycle(range(32)), torch.device("cuda", 0)  # as PyTorch hands them out
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(numbers)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    pools = [cuda_graph.GraphPool(device) for _ in range(8)]
    for _ in range(40):
        with driver.LabelStream(device) as labels, driver.LabelStream(device) as others:
            held = [*(pool.stream for pool in pools), labels._stream, others._stream]
            assert len(set(held)) == 10


def test_a_recording_that_fails_leaves_the_thread_on_its_stream(monkeypatch):
    streams = [SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None), Stream(1)]
    streams[1].__dict__["wait_stream"] = lambda other: None
    current = streams[:1]

    class Switched:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, *_):
            del current[current.index(self.stream, 1) :]

    class Recording(Switched):
        def __init__(self, graph, pool, stream, capture_error_mode):
            super().__init__(stream)

        def __exit__(self, *_):  # as PyTorch's, which then does not switch back
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", Switched)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    pool = SimpleNamespace(handle=None, stream=streams[1], follow=lambda stream: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph.StepGraph(lambda x: (x,), [torch.zeros(1)], pool)
    assert current == streams[:1]


def test_a_recorded_call_reads_its_first_inputs_anew_and_tables_that_are_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    call = object.__new__(cuda_graph.StepGraph)
    call.inputs, call.outputs = [torch.zeros(2), torch.zeros(2)], (torch.zeros(2),)
    call.fresh, call.held, call.pool = 1, [None, None], SimpleNamespace(follow=lambda stream: None)
    call.graph = SimpleNamespace(replay=lambda: call.outputs[0].copy_(call.inputs[0] * 10 + call.inputs[1]))
    call.pointers, copied = call._pointers(), []
    latents, tables = torch.ones(2), [torch.full((2,), 2.0), torch.full((2,), 3.0)]
    found = []
    for table in (tables[0], tables[0], tables[1], tables[0]):
        found.append(call(latents, table)[0])
        copied.append(call.held[1] is table and call.held[0] is None)
        latents += 1
    assert [each[0].item() for each in found] == [12, 22, 33, 42] and all(copied)
    call.inputs[1] = torch.zeros(2)
    with pytest.raises(AssertionError, match="a buffer of a recorded call was moved"):
        call(latents, tables[0])


def test_an_engine_is_let_go_with_its_last_name():
    """Not when Python next looks for what refers to itself: until then a second engine would lack its memory."""
    engine = FastEngine(load_model("tiny"), device="cpu")
    engine.denoise(torch.randn(1, 4, 16, 16), 5, engine.encode_text(["", "a ball"]))
    alive = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 8192 << 10),
        ("0::/a/b\n", {"a/memory.max": "5000", "a/memory.current": "2000", "a/b/memory.max": "max"}, 3000),
        (
            "4:cpu,memory:/a\n0::/\n",
            {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "900"},
            0,
        ),
        (
            "0::/a\n",
            {
                "a/memory.max": "5000",
                "a/memory.current": "4900",
                "a/memory.stat": "anon 900\nfile 4000\ninactive_file 2500\n",
            },
            2600,
        ),
    ],
)
def test_available_memory_is_what_machine_and_container_leave(monkeypatch, tmp_path, groups, files, expected):
    for name, text in {"meminfo": "MemFree: 1 kB\nMemAvailable: 8192 kB\n", "groups": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(cores, "CONTAINERS", tmp_path / "groups")
    assert memory.available_memory() == expected
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "none")
    assert memory.available_memory() == 0


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (None, {}, 64),
        ("0::/\n", {}, 64),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a\n", {"a/cpu.max": "50000 100000"}, 1),
        ("2:cpu,cpuacct:/a\n0::/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("2:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("3:memory:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_those_that_a_container_has_time_of(monkeypatch, tmp_path, groups, files, expected):
    for name, text in {**files, **({} if groups is None else {"groups": groups})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    monkeypatch.setattr(cores, "CONTAINERS", tmp_path / "groups")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64), raising=False)  # macOS has none
    assert cores.count_cores() == expected


@pytest.mark.parametrize(("requested", "cores_there", "expected"), [(0, 1, 1), (3, 1, 3), (0, 64, None)])
def test_threads_are_no_more_than_a_container_has_cores(monkeypatch, requested, cores_there, expected):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(memory, "count_cores", lambda: cores_there)
    memory.set_threads(requested)
    assert chosen == ([] if expected is None else [expected])


def test_a_large_text_encoder_is_let_go_while_the_unet_works(monkeypatch):
    engine = FastEngine(load_model("tiny"), device="cpu")
    assert "text_encoder" not in vars(engine)
    text, latents = engine.encode_text(["", "a ball"]), torch.randn(1, 4, 16, 16)
    engine.denoise(latents, 5, text)
    assert "text_encoder" in vars(engine)
    monkeypatch.setattr(on_cpu, "LARGEST_IDLE", 0)
    for available, is_kept in ((on_cpu.PLENTY * on_cpu.size_of(engine.text_encoder), True), (0, False)):
        monkeypatch.setattr(on_cpu, "available_memory", lambda available=available: available)
        engine.denoise(latents, 5, text)
        assert ("text_encoder" in vars(engine)) == is_kept
    assert "text_encoder" not in vars(engine) and torch.equal(engine.encode_text(["", "a ball"]).context, text.context)


def test_networks_that_are_read_once_a_batch_are_let_go_while_others_work(monkeypatch):
    engine = FastEngine(load_model("tiny"), device="cpu")
    latents, large = torch.randn(8, 4, 16, 16), ("text_encoder", "image_decoder", "image_encoder")
    one, several = latents[:1], latents
    monkeypatch.setitem(fast.CHUNK_PIXELS, "cpu", 4 * engine.model.size**2)
    image, images = engine.decode_image(one), engine.decode_image(several)
    moments = engine.encode_image(image)
    monkeypatch.setattr(on_cpu, "LARGEST_IDLE", 0)
    assert torch.equal(engine.decode_image(one), image) and "image_decoder" in vars(engine)  # there is memory
    monkeypatch.setattr(on_cpu, "available_memory", lambda: 0)
    for call, kept in (
        (lambda: engine.encode_text([""]), ["text_encoder"]),
        (lambda: engine.decode_image(several), ["image_decoder"]),
        (lambda: engine.decode_image(one), []),  # its layers go one by one
        (lambda: engine.encode_image(image), ["image_encoder"]),
    ):
        call()
        assert [name for name in large if name in vars(engine)] == kept
    assert torch.equal(engine.decode_image(one), image) and torch.equal(engine.decode_image(several), images)
    assert torch.equal(engine.encode_image(image), moments)


def test_what_is_made_of_weights_at_every_call_is_what_is_held_of_smaller_ones(monkeypatch):
    """To rounding, as weights that are transformed at every call are so in fp32."""
    model = load_model("tiny")
    decoders = seeded_decoders(model.levels, model.text_width)
    decoders = {task: fold(decoders[task]) for task in ("semantic", "depth")}
    latents, answers = torch.randn(2, 4, 16, 16), []
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 0)
    for held in (1 << 30, 0):
        monkeypatch.setattr(packed, "LARGEST_HELD", held)
        monkeypatch.setattr(on_cpu.CpuEngine, "largest_stacked", held)
        engine = FastEngine(model, decoders, device="cpu")
        engine.prepare(2)
        assert bool(list(engine.projection.parameters())) == bool(held) and engine.weight_distance() == 0
        noise, capture = engine.denoise_and_capture(latents, 5, engine.encode_text(["", "", "a ball", "a red box"]))
        answers.append([noise, *capture.sums, engine.decode_image(latents).float()])
    (*held, held_image), (*made, made_image) = answers
    for one, other in zip(held, made, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
    assert (held_image - made_image).abs().max() <= 1
    assert not torch.equal(answers[0][0], answers[1][0])


def test_a_kernel_that_fails_its_probe_gives_way(monkeypatch):
    device = torch.device("cpu")
    assert choice.is_sound("image_norm", image_norm.reference, device, torch.float32)
    with pytest.warns(RuntimeWarning, match="relative error"):
        assert not choice.is_sound("image_norm", lambda x: 1.01 * image_norm.reference(x), device, torch.float32)

    def broken(x):
        raise RuntimeError("no binary for this GPU")

    with pytest.warns(RuntimeWarning, match="no binary for this GPU"):
        assert not choice.is_sound("image_norm", broken, device, torch.float32)


@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: x * torch.nan], ids=["wrong", "no number"])
def test_a_kernel_with_one_spoilt_output_gives_way(spoil):
    def spoilt(*inputs):
        total, normed = ada_norm.reference(*inputs)
        return total, spoil(normed)

    with pytest.warns(RuntimeWarning, match="relative error .*, expected at most 4e-03"):
        assert not choice.is_sound("ada_norm", spoilt, torch.device("cpu"), torch.float16)


def test_the_truth_of_a_probe_is_not_rounded_as_the_kernel_is(monkeypatch):
    monkeypatch.setitem(choice.BUDGETS, torch.float16, 1e-6)
    with pytest.warns(RuntimeWarning, match="relative error"):
        assert not choice.is_sound("ada_norm", ada_norm.reference, torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("name", [name for name in vars(fused) if name not in choice.OF_THE_LOOP])
def test_the_probes_pass_for_the_forms_themselves(name):
    """In the precision of a run on a GPU; test_kernels.py has every form in fp32."""
    assert choice.is_sound(name, getattr(fused, name), torch.device("cpu"), torch.float16)


@pytest.mark.skipif(not launch.IS_INTERPRETED, reason="kernels run in the interpreter where there is no GPU")
@pytest.mark.parametrize("name", ["linear_add", "linear_geglu"])
def test_a_product_by_descriptors_that_fails_its_probe_gives_way(name, monkeypatch):
    """A run on a GPU with a row by descriptors would launch them, whatever they return."""
    op = OPS[name]
    rows = {key: dict(sizes) for key, sizes in op.BLOCKS["sm_90"].items()}
    monkeypatch.setitem(op.BLOCKS, "cpu", op.BLOCKS["sm_90"])
    assert choice.is_sound(name, op.fused, torch.device("cpu"), torch.float16) and op.BLOCKS["sm_90"] == rows
    monkeypatch.setattr(op, "multiply", lambda sizes, x, weight, bias, out, **others: out.zero_())
    with pytest.warns(RuntimeWarning, match="relative error"):
        assert not choice.is_sound(name, op.fused, torch.device("cpu"), torch.float16)


def test_forms_by_device(monkeypatch):
    on_cpu = choice.operations(torch.device("cpu"), torch.float32)
    assert on_cpu.geglu is geglu.native and on_cpu.attention_capture is attention_capture.plain
    assert on_cpu.depth_head is depth_head.native
    monkeypatch.setitem(upsample_concat.DEVICES, "Some GPU", "plain")
    names = ("Some GPU", "untuned")
    assert choice.form_on("upsample_concat", *names) == "plain" and choice.form_on("layer_norm", *names) == "fused"
    assert choice.form_on("geglu", "without triton") == "plain" == choice.form_on("pyramid", *names)
    for name, op in OPS.items():
        assert all(hasattr(choice.FORM[form], name) for form in getattr(op, "DEVICES", {}).values())


def test_a_kernel_that_gave_way_is_written_down(monkeypatch):
    """Ranks whose kernels do not all work round differently: their engines are not the same."""
    lost = ["layer_norm", "attention_capture"]
    monkeypatch.setattr(choice, "is_sound", lambda name, *_: name not in lost)
    ops = choice.operations(torch.device("meta"), torch.float16)
    assert choice.gave_way(ops, torch.device("meta")) == lost and ops.attention_capture is attention_capture.plain
    engine = FastEngine(load_model("tiny"), device="cpu")
    engine.__class__, engine.ops, engine.device = GpuEngine, ops, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(choice, "names_of", lambda _: ("untuned",))
    assert engine.fingerprint()["plain"] == "layer_norm, attention_capture" and {"cudnn", "cuda", "triton"} <= set(
        engine.fingerprint()
    )
    monkeypatch.setattr(choice, "is_sound", lambda *_: True)
    engine.ops = choice.operations(torch.device("meta"), torch.float16)
    assert "plain" not in engine.fingerprint()


def test_cudnn_chooses_by_shape_alone(monkeypatch):
    for name, before in (("benchmark", True), ("deterministic", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, before)
    choose_by_shape(torch.device("cpu"))
    assert torch.backends.cudnn.benchmark
    choose_by_shape(torch.device("cuda"))
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_the_table_of_forms_has_a_row_for_each_operation():
    head, rows = forms_table()
    assert [row[0] for row in rows] == list(OPS) and all(len(row) == len(head) for row in rows)
    assert ["upsample_concat", "reference", "fused", "reference"] in rows


def test_compile_is_for_the_fast_engine_alone():
    with pytest.raises(Refused, match="--compile"):
        build_engine("torch", load_model("tiny"), device="cpu", compile=True)


def test_a_compiled_engine_says_the_same(monkeypatch):
    """Dynamo traces the whole step; the backend that compiles takes minutes here and is what bench times."""
    eager = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: eager(function, backend="eager", fullgraph=True, **options)
    )
    model = with_small_unet(load_model("tiny"), FEW_ATTENTIONS)  # a third of the layers to trace
    engine, plain = (FastEngine(model, device="cpu", compile=is_compiled) for is_compiled in (True, False))
    latents, text = torch.randn(2, 4, 16, 16), plain.encode_text(["", "", "a ball", "a cube"])
    assert torch.allclose(engine.denoise(latents, 5, text), plain.denoise(latents, 5, text), atol=1e-5)
    assert engine.fingerprint()["compiled"] == "yes" and "compiled" not in plain.fingerprint()


def test_large_images_take_huge_pages_where_linux_has_them(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})  # which the functions of pytest would leave changed where a name is new
    monkeypatch.setattr(cores, "HUGE_PAGES", tmp_path / "none")
    cores.before_torch()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and "THP_MEM_ALLOC_ENABLE" not in os.environ
    monkeypatch.setattr(cores, "HUGE_PAGES", tmp_path)
    cores.before_torch()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    os.environ |= {"THP_MEM_ALLOC_ENABLE": "0", "OMP_WAIT_POLICY": "ACTIVE"}  # the user's own words
    cores.before_torch()
    assert (os.environ["THP_MEM_ALLOC_ENABLE"], os.environ["OMP_WAIT_POLICY"]) == ("0", "ACTIVE")


FAULTS = """
import os, resource
from datasetdm_fast.engine.engines import open_engine
open_engine("tiny", None, engine="fast", device="cpu")
import torch
torch.ones(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
os._exit(0)  # to take apart what torch imported takes a second
"""


@pytest.mark.skipif(
    not (cores.HUGE_PAGES / "enabled").exists() or "[never]" in (cores.HUGE_PAGES / "enabled").read_text(),
    reason="this Linux has no huge pages",
)
def test_an_opened_engine_takes_fewer_page_faults():
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=True,
    )
    assert int(ran.stdout.splitlines()[-1]) < 0.5 * (64 << 22) / resource.getpagesize()  # one a page without them
