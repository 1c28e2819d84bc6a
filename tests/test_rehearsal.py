"""The CUDA path without a GPU: no finding, every planted fault found at its line, and a budget that may only fall."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from planted_faults import FAULTS, planted
from skips import IS_LONG, long_test

from bench.kernels.audit import name_of
from bench.kernels.files import FILES
from bench.rehearsal import budget, carried, command, compiled, cuda, operations, run, scenarios
from bench.rehearsal.command import GRADIENTS, SCENARIOS, RehearsalConfig, possible
from bench.rehearsal.compiled import IMAGE, TILES, gpus, loads_wide
from bench.rehearsal.kernels import (
    ACTIVATIONS,
    FLOPS,
    WIDE,
    WITHOUT_KERNEL,
    NotedLaunch,
    Pointer,
    accesses,
    calling_op,
    loaded,
    source_of,
    stated,
    storages,
    strided,
    written,
)
from bench.rehearsal.operations import adds_in_any_order, by_chance
from bench.rehearsal.page_locked import PageLocked, filled
from bench.rehearsal.roofline import Reckoning
from bench.rehearsal.run import Rehearsal, stage
from bench.rehearsal.timeline import AGAIN, EARLY, NUMBER, OTHERS, OURS, POLLS, WAIT, Flaw, HostThread, Timeline, ours
from datasetdm_fast import _C
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.kernels import OPS, launch, linear_geglu

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    launch.triton is None, reason="triton is not installed; pip install 'datasetdm-fast[triton]'"
)

needs_cpu_build = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch is built with CUDA")

# Of two batches of four samples, where it is not eight: several runs, two pictures, or answers of another kind.
SAMPLES = {"attention": 24, "tiles": 2, "labeller": 16, "files": 24, "library": 7, "features": 10, "samplers": 96}
SAMPLES |= {"between": 10, "cards": 16, "verify": 17, "joint": 16, "joint-verify": 16}
SAMPLES |= {"training": 4, "losses": 6, "bins": 2, "recomputed": 2, "students": 4}  # steps

# What is planted -> the rule that finds it, and the file whose line is named.
EXPECTED = {
    "images decoded by other threads": ("freed too early", "engines/fast/engine.py"),
    "sums given back too early": ("freed too early", "engine/loop/driver.py"),
    "the label stream does not wait": ("race", "engines/fast/on_gpu.py"),  # what it should have waited for
    "a number is read in the loop": ("host wait", "engine/loop/driver.py"),
    "fp32 in the fp16 network": ("error", "models/fused.py"),
    "a tensor of the host": ("host wait", "models/fused.py"),
    "the host reads before the copy is over": ("race", "kernels/transfer.py"),
    "a pageable copy at the start of a batch": ("host wait", "kernels/transfer.py"),
    "a graph recorded with another GPU's stream": ("wrong GPU", "engines/cuda_graph.py"),
    "a kernel launched on another GPU": ("wrong GPU", "kernels/layer_norm.py"),
    "the answer of a graph is not copied": ("overwritten", "engines/cuda_graph.py"),
    "graphs of one pool on several streams": ("pool", "engines/cuda_graph.py"),
    "a graph recorded at every call": ("host wait", "engines/cuda_graph.py"),
    "a recording that other threads can spoil": ("capture", "engines/cuda_graph.py"),
    "labels on the sampler's stream": ("wait for another thread", "engines/fast/engine.py"),
    "numbers of a schedule copied at every batch": ("host wait", "sampling/schedule.py"),
    "a tensor printed in the loop": ("host wait", "engine/loop/driver.py"),
    "fp64 in the network": ("dtype", "models/fused.py"),
    "fp32 that is TF32": ("precision", "engines/fast/engine.py"),
    "sums of attention on the host": ("device", "engine/loop/driver.py"),  # where they were made
    "a graph for other shapes": ("error", "engines/cuda_graph.py"),
    "a ring of earlier outputs that nothing fills": ("unwritten", "sampling/schedule.py"),
    "level sums that nothing clears": ("unwritten", "models/capture.py"),
    "sums of attention that nothing clears": ("unwritten", "engine/loop/driver.py"),
    "a kernel that gives way to its reference": ("fallback", "kernels/linear_norm.py"),
    "sums of attention in fp16": ("dtype", "kernels/attention_average.py"),
    "columns as a list": ("host wait", "tasks/attention.py"),
    "words left on the host": ("error", "tasks/captions.py"),
    "a wait of another kind where some are allowed": ("host wait", "tasks/instance.py"),
    "pictures copied while the host waits": ("host wait", "engine/loop/inverting.py"),
    "pictures encoded on a stream of its own": ("race", "engines/fast/engine.py"),  # where they are read
    "a generator of the host for noise on a GPU": ("device", "sampling/schedule.py"),
    "an event of another GPU": ("race", "engine/loop/driver.py"),  # which the race's stream waited for
    "a kernel of attention on another GPU": ("wrong GPU", "kernels/attention_shares.py"),
    "a tile is read before its copy is over": ("race", "tasks/attention.py"),
    "pictures of a labeller on the host": ("error", "tasks/labeller.py"),
    "another stream than that of the copies is waited for": ("race", "kernels/transfer.py"),
    "a region copied while the host waits": ("host wait", "compositions/edit.py"),
    "latents of a callback by way of the host": ("host wait", "engine/loop/diffusing.py"),
    "page-locked memory written while it is copied": ("race", "kernels/transfer.py"),
    "one of two texts on the host": ("error", "datasetdm_fast/engine/pipeline.py"),
    "earlier outputs of a sampler in fp16": ("dtype", "sampling/schedule.py"),
    "numbers drawn by a GPU": ("random", "engines/fast/engine.py"),
    "fp32 between the products of the fp16 network": ("dtype", "models/fused.py"),
    "an input of a graph is written to": ("stale", "engines/cuda_graph.py"),
    "an input of a graph is not copied": ("stale", "engines/cuda_graph.py"),  # where the graph is called
    "outputs of a graph are read before its replay": ("stale", "engines/fast/on_gpu.py"),  # where the graph is called
    "a graph over its caller's tensors": ("stale", "engines/fast/on_gpu.py"),  # where it is recorded
    "a graph that is not replayed": ("stale", "engines/fast/on_gpu.py"),  # where it is called
    "algorithms chosen by timing": ("choice", "models/fused.py"),
    "two threads record at once": ("capture", "engines/cuda_graph.py"),
    "graphs of a pool on two streams at once": ("race", "engines/cuda_graph.py"),
    "an autoencoder of fp32 is given fp16": ("dtype", "engines/fast/engine.py"),
    "a wait for the whole GPU where memory ran out": ("host wait", "engines/fast/on_gpu.py"),
    "memory given back at every batch": ("host wait", "engines/fast/on_gpu.py"),
    "the reference's tokens on the host": ("error", "engines/torch.py"),
    "captures copied while a thread waits": ("host wait", "captures/cache.py"),
    "a loss read for every part of a batch": ("host wait", "training/trainer.py"),
    "a resumed optimiser on the host": ("device", "training/trainer.py"),  # whose next step reads it
    "truth of each image copied while the host waits": ("host wait", "training/trainer.py"),
    "points drawn by a GPU": ("device", "training/losses.py"),
    "a training in fp32 that rounds to TF32": ("precision", "kernels/winograd.py"),
    "noise of pictures copied while the host waits": ("host wait", "engine/loop/inversion.py"),
    "words of a prompt copied while the host waits": ("host wait", "evaluation/measure.py"),
    "views of a student copied while the host waits": ("host wait", "students/course.py"),
    "texts of a graph that are freed": ("freed", "engines/cuda_graph.py"),  # where it is replayed
    "sums of a level added in any order": ("order", "models/capture.py"),
    "a kernel that adds in any order": ("order", "kernels/attention_shares.py"),
    "operations that have no kernel for a GPU": ("fallback", "kernels/choice.py"),
    "statistics of a norm in fp16": ("dtype", "kernels/add_statistics.py"),
    "sums of taps in fp16": ("dtype", "kernels/depth_head.py"),
    "rows of another type than their weights": ("dtype", "kernels/layer_norm.py"),
    "a weight with gaps": ("strides", "kernels/linear_norm.py"),
    "a norm's gain that is one number": ("strides", "kernels/layer_norm.py"),
    "a number printed in the loop": ("host wait", "engine/loop/driver.py"),
    "a loop that asks an event": ("host wait", "engine/loop/driver.py"),
    "page-locked memory filled through an array while it is copied": ("race", "kernels/transfer.py"),
    "page-locked memory filled past NumPy while it is copied": ("race", "kernels/transfer.py"),
    "rows that are filled again while they are copied": ("race", "captures/cache.py"),
    "a call that is over by an event of another GPU": ("wrong GPU", "engine/loop/driver.py"),
    "an event that is never recorded": ("race", "engine/loop/driver.py"),
    "latents by way of another GPU": ("wrong GPU", "engines/fast/engine.py"),
    "free memory of another GPU": ("wrong GPU", "engines/device.py"),
    "networks in fp32 where nobody asked for it": ("dtype", "models/fused.py"),
    "decoders in fp32": ("dtype", "decoders/segmentation.py"),
    "an encoder of pictures in fp32": ("dtype", "models/layers.py"),
    "projections of a capture in fp32": ("dtype", "models/capture.py"),
    "latents of pictures in fp16": ("dtype", "engines/fast/engine.py"),
    "an inverse in the loop": ("host wait", "engine/loop/driver.py"),
    "a training whose products are in fp32": ("dtype", "kernels/winograd.py"),
    "a graph that reads another tensor than its input": ("stale", "engines/fast/on_gpu.py"),
    "candidates of which equal ones come in any order": ("order", "tasks/instance.py"),
    "several values for one place": ("order", "tasks/open_vocabulary.py"),
    "costs copied image by image": ("host wait", "training/losses.py"),
    "a loss read before the step is queued": ("host wait", "training/trainer.py"),
    "a kernel launched with no blocks": ("grid", "kernels/layer_norm.py"),
    "more blocks than a GPU takes": ("grid", "kernels/upsample_concat.py"),
}


def ran(*arguments: str, seconds: float = 900, **variables: str) -> subprocess.CompletedProcess:
    """A program of its own: this process has its kernels in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


# With a U-Net of one layer a block, and an end that does not take apart all modules; each is a third of the time.
SMALL = """
import os, sys
from small_unets import with_small_unet
from bench.__main__ import dispatch, run_command
from datasetdm_fast.engine.loading import PRESETS
load = PRESETS["tiny"]
PRESETS["tiny"] = lambda size: with_small_unet(load(size))
code = run_command(dispatch)
sys.stdout.flush()
os._exit(code)
"""


def rehearsed(*flags: str, program: Sequence[str] = ("-m", "bench")) -> dict:
    """What a rehearsal of one scenario says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = forked.run([*program, "rehearse", "--json", *flags], cwd=ROOT, env=environment, timeout=900)
    assert done.stdout, done.stderr
    (found,) = json.loads(done.stdout)
    (facts,) = found["gpus"].values()
    return found | facts | {"code": done.returncode, "said": done.stderr}


def test_a_run_on_a_gpu_is_in_order():
    # From the third batch on nothing is recorded, so that no wait of a recording hides what is out of order.
    program = ("-m", "bench") if IS_LONG else ("-c", SMALL)
    found = rehearsed("--model", "tiny", "--batch", "4", "--batches", "3", program=program)
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == 12 and found["replays"] == 33 and found["kernels"] > 20


def test_so_is_a_run_of_an_mmdit():
    """Its text, too, lies on the GPU, where no call has to wait for it."""
    found = rehearsed("--model", "tiny", "--scenario", "joint", "--batches", "1", "--batch", "2")
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == 4


@long_test
def test_so_are_labels_of_pictures_that_exist():
    """A decoder and attention read them: encoder, noise, a captured call, two that add up attention."""
    found = rehearsed("--model", "tiny", "--batch", "2", "--scenario", "label")
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == 4 and found["replays"] == 8


@long_test
@needs_cpu_build
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_so_is_a_training(dtype):
    """Captures made anew, a step in fp16 or fp32 with its gradients, a look at a held-out image, what is stored."""
    flags = "--dtype", dtype, "--scenario", "recomputed"
    found = rehearsed("--model", "tiny", "--batch", "1", "--batches", "1", *flags)
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == 1
    assert {one["function"] for one in found["waits"] if one["phase"] == "batch 0"} == {"place_module", "_finite"}


@long_test
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_so_is_every_other_use_of_an_engine(scenario, device):
    if scenario in GRADIENTS and torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built with CUDA")
    found = rehearsed("--model", "tiny", "--scenario", scenario, "--device", device)
    assert found["findings"] == [] and found["code"] == 0, found["findings"]
    assert found["samples"] == SAMPLES.get(scenario, 8)


@long_test
@pytest.mark.parametrize(
    "flags",
    [
        *(("--model", "random-sd14", "--batch", str(batch)) for batch in (1, 8, 32)),
        ("--model", "random-sd14", "--scenario", "attention", "--batches", "1"),
        *(("--model", "random-sdxl", "--batches", "1", "--scenario", name) for name in ("decoders", "attention")),
        *(("--model", "tiny", "--dtype", dtype) for dtype in ("fp32", "tf32", "bf16")),
        *(("--model", "tiny", "--dtype", dtype, "--scenario", "label") for dtype in ("fp32", "bf16")),
    ],
    ids=" ".join,
)
def test_so_are_runs_of_every_size_and_precision(flags):
    found = rehearsed(*flags)
    assert found["findings"] == [] and found["code"] == 0, found["findings"]


def test_every_scenario_can_be_named():
    assert tuple(scenarios.SCENARIOS) == SCENARIOS


def test_every_rule_is_on_its_page():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench" / "rehearsal").glob("*.py"))
    rules = {*re.findall(r'\bfind\(\s*"([A-Za-z ]+)"', sources), WAIT, OTHERS, "wait in a recording"}
    told = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").partition("| rule |")[2].partition("\n\n")[0]
    assert {name for row in told.splitlines()[2:] for name in re.findall(r"`(.*?)`", row.split("|")[1])} == rules


def test_gradients_are_left_out_or_refused_where_pytorch_has_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert possible(("all",)) == SCENARIOS and possible(("training",)) == ("training",)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert set(SCENARIOS) - set(possible(("all",))) == set(GRADIENTS) and "students" in capsys.readouterr().err
    assert possible(("label",)) == ("label",)
    with pytest.raises(Missing, match="the scenario bins computes gradients"):
        possible(("label", "bins"))


@long_test
@needs_triton
@pytest.mark.parametrize("model", ["tiny", "random-sd14", "random-sdxl"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_kernel_of_a_run_fits_every_gpu(model, dtype):
    """No spills, loads of 16 bytes, tensor cores where there is a product."""
    found = ran("-m", "bench", "rehearse", "--compile", "--model", model, "--dtype", dtype, "--batches", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(f"sm_{target}" in found.stdout for target in (80, 90, 100, 120))


def test_kinds_of_gpus_with_rows_of_their_own_are_simulated_each(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op, "BLOCKS", {"untuned": {}}, raising=False)
        monkeypatch.setattr(op, "LIBRARY", (), raising=False)
    assert gpus(["80", "90", "100", "120"]) == {(8, 0): ["80", "90", "100", "120"]}
    monkeypatch.setitem(OPS["layer_norm"].BLOCKS, "sm_100", {})
    monkeypatch.setattr(OPS["attention"], "LIBRARY", ("sm_90", "sm_75"))
    assert gpus(["80", "90", "100", "120"]) == {(8, 0): ["80", "120"], (9, 0): ["90"], (10, 0): ["100"]}
    monkeypatch.setitem(OPS["geglu"].DEVICES, cuda.CARDS[8, 0], "plain")
    assert gpus(["120", "100", "80"]) == {(12, 0): ["120"], (10, 0): ["100"], (8, 0): ["80"]}


def test_a_simulated_gpu_takes_the_rows_of_its_kind():
    for capability, card in cuda.CARDS.items():
        with stage(Timeline(), capability):
            name = "sm_{}{}".format(*capability)
            assert launch.triton is None or launch.names_of(torch.device("cuda", 0)) == (name, card, "untuned")


def test_what_several_simulated_gpus_find_is_told_once(monkeypatch, capsys):
    def flaw(what):
        return Flaw("race", what, "file.py:1 <here>", "here", "code", "main", "batch 0")

    def rehearse(*sizes, capability, **others):
        found = {flaw("everywhere"): 2} | ({flaw("there"): 1} if capability == (9, 0) else {})
        return Rehearsal(found, {}, [], {}, {("form", capability): capability}, 3, 4)

    given = []
    monkeypatch.setattr(run, "rehearse", rehearse)
    monkeypatch.setattr(compiled, "gpus", lambda targets: {(8, 0): ["80", "120"], (9, 0): ["90"]})
    monkeypatch.setattr(compiled, "rows", lambda launches, targets: given.append((list(launches), targets)) or iter(()))
    for as_json in (False, True):
        with pytest.raises(GateFailed, match="2 findings, first race: everywhere"):
            command.rehearsed(RehearsalConfig(compile=True, json=as_json))
    assert given[:2] == [([(8, 0)], ["80", "120"]), ([(9, 0)], ["90"])]
    said = capsys.readouterr().out
    text, document = said[: said.index("[")], json.loads(said[said.index("[") :])
    assert re.findall(r"RACE: (.*)\n.*\((.*)\)", text) == [
        ("2 x everywhere", "main, batch 0, on 8.0 and 9.0"),
        ("1 x there", "main, batch 0, on 9.0"),
    ]
    assert [(one["what"], one["gpus"]) for one in document[0]["findings"]] == [
        ("everywhere", ["8.0", "9.0"]),
        ("there", ["9.0"]),
    ]
    assert len(document) == 1 and document[0]["gpus"].keys() == {"8.0", "9.0"}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_planted_has_its_line(name):
    """Whether it is found takes minutes to learn, whether it can still be planted does not."""
    with planted(FAULTS[name]) as line:
        assert line and name in EXPECTED


def test_nothing_is_expected_that_is_not_planted():
    assert EXPECTED.keys() == FAULTS.keys()


def test_a_kernel_has_one_name_whichever_way_its_folder_is_reached():
    for folder in ("kernels", "datasetdm_fast/kernels"):
        code = SimpleNamespace(co_filename=f"{ROOT}/{folder}/transfer.py", co_name="_copy")
        assert list(ours(SimpleNamespace(f_code=code), 7)) == [("kernels/transfer.py", 7, "_copy")]


def test_every_function_that_is_named_exists():
    """Else a wait would be a finding, and a rule would hold for nothing."""
    for file, function in {place[1:] for place in run.WAITS} | operations.TAUGHT | operations.IN_FP32:
        assert f"{ROOT / file}".startswith(OURS) and f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (
            file,
            function,
        )
    files = [
        path.as_posix() for folder in ("bench", "datasetdm_fast", "kernels") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    for name, (_, file) in EXPECTED.items():
        assert any(path.endswith(f"/{file}") for path in files), name


@long_test
def test_what_is_planted_is_found_at_its_line():
    done = ran("tests/planted_faults.py", seconds=2400)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in answers} == set(EXPECTED), done.stderr
    for one in answers:
        rule, file = EXPECTED[one["name"]]
        places = [f"{finding['place']} {finding['what']}" for finding in one["findings"] if finding["rule"] == rule]
        assert any(file in place for place in places), f"{one['name']}: {one['findings']}"


def test_memory_is_written_before_it_is_read():
    timeline, value, known = Timeline(), torch.empty(4), torch.zeros(4)
    timeline.allocated(value, 0)
    timeline.number(known, 0)
    timeline.check_written("a product", [value, known, torch.empty(2)])
    assert [(flaw.rule, flaw.what[:24]) for flaw in timeline.found] == [("unwritten", "a product reads 16 bytes")]
    timeline.launch("a fill", 0, [], [value])
    timeline.check_written("a product", [value])
    assert timeline.found.total() == 1
    head, step = OPS["depth_head"]._depth_head_kernel.fn, OPS["guided_step"]._guided_step_kernel.fn
    assert loaded(head) == {"x_ptr", "bias_ptr", "weight_ptr"}  # the sums of earlier channels only where there are some
    assert "history_ptr" in loaded(step) and "out_ptr" not in loaded(step)


def kernels() -> dict:
    """Every kernel by its name."""
    own = (one for module in FILES for name, one in vars(module).items() if name.endswith("_kernel"))
    return {name_of(kernel): kernel for kernel in own}


@needs_triton
def test_what_a_kernel_expects_is_read_from_its_source():
    """Through the functions that it calls, too; the comment of every pointer says at least a shape."""
    fns = {name: kernel.fn for name, kernel in kernels().items()}
    for name, fn in fns.items():
        pointers = {one for one in inspect.signature(fn).parameters if one.endswith("_ptr")}
        assert set(re.findall(r"(\w+_ptr),  # \[", source_of(fn))) == pointers, name
        assert pointers >= set(WIDE.get(name, ())), name
        assert written(fn) & pointers and stated(fn).keys() <= pointers, name
    assert stated(fns["add_statistics"]) == dict.fromkeys(("mean_ptr", "spread_ptr"), torch.float32)
    assert stated(fns["depth_head"]) == {"planes_ptr": torch.float32} and not stated(fns["layer_norm"])
    assert {"weight_ptr", "second_weight_ptr"} <= strided(fns["linear_add"]) and not strided(fns["linear_norm"])
    assert {"q_ptr", "k_ptr", "v_ptr", "k_place_ptr"} <= strided(fns["query_attention"])
    assert not {"logits_ptr", "out_ptr"} & strided(fns["query_attention"])
    assert {"x_ptr", "weight_ptr"} <= loaded(fns["linear_add"]) and "second_ptr" not in loaded(fns["linear_add"])
    described = fns["described_product"]
    assert {"x_desc", "weight_desc"} <= loaded(described) and "second_desc" not in loaded(described)
    assert written(described) == {"out_desc", "mean_ptr", "spread_ptr"}
    assert all(name in FLOPS for name, fn in fns.items() if "tl.dot" in source_of(fn))
    assert {one.kind for fn in fns.values() for one in accesses(fn)} == {"load", "store"}  # none adds in any order


def test_operations_without_a_kernel_have_none():
    assert all(not hasattr(OPS[name], "fused") for name in WITHOUT_KERNEL)
    assert {name for name, module in OPS.items() if not hasattr(module, "fused")} == set(WITHOUT_KERNEL)


def test_sums_in_any_order_are_known_by_their_names():
    x, whole = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    assert adds_in_any_order("index_add_", {"self": x, "index": whole})
    assert not adds_in_any_order("index_add_", {"self": whole})
    assert adds_in_any_order("scatter_reduce", {"self": x, "reduce": "sum"})
    assert not adds_in_any_order("scatter_reduce", {"self": x, "reduce": "amax"})
    assert not adds_in_any_order("scatter_", {"self": x, "src": x})
    assert adds_in_any_order("bincount", {"self": whole, "weights": x})
    assert not adds_in_any_order("bincount", {"self": whole, "weights": None})
    assert adds_in_any_order("put_", {"self": x, "accumulate": True}) and not adds_in_any_order("put_", {"self": x})


def test_what_is_left_to_chance_is_known():
    x, places = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for name, given in (
        ("topk", {"self": x}),
        ("sort", {"self": x, "stable": False}),
        ("scatter_", {"self": x, "src": x}),
        ("index_put_", {"self": x, "indices": [places], "values": x}),
        ("index_copy_", {"self": x, "source": x}),
    ):
        assert by_chance(name, given), name
    for name, given in (
        ("sort", {"self": x, "stable": True}),
        ("scatter_", {"self": x, "value": 1.0}),
        ("index_put_", {"self": x, "indices": [places], "values": x[:1]}),
        ("index_put_", {"self": x, "indices": [places], "values": x, "accumulate": True}),
        ("index_put_", {"self": x, "indices": [places > 0], "values": x}),
    ):
        assert not by_chance(name, given), name


def test_writes_through_an_array_are_heard_of():
    heard, array = [], np.zeros((2, 3)).view(PageLocked)
    array.on_write = lambda: heard.append(len(heard))
    for write in (
        lambda: array.fill(1),
        lambda: array[0].__setitem__(1, 2),
        lambda: np.add(array, 1, out=array),
        lambda: np.copyto(array.T, 0),
        lambda: np.stack([np.zeros(3)] * 2, out=array),
        lambda: array.reshape(6).__iadd__(1),
    ):
        heard.clear()
        write()
        assert heard
    heard.clear()
    copy = array.copy()
    copy[0] = 1
    (array + 1)[0] = array[array > 5].sum()
    np.sort(array)[0] = 1
    assert not heard and type(copy) is np.ndarray


def test_writes_past_numpy_are_seen():
    """By `readinto` and through memoryviews: at the next look, or when nothing shows the memory any more."""
    timeline, value = Timeline(), torch.empty(8, dtype=torch.uint8)
    timeline.pinned.add(value.untyped_storage()._cdata)
    own, content = filled((2, 4), "uint8", None)
    timeline.watch(value, own, content)
    shown = own.reshape(2, 4).view(PageLocked)
    io.BytesIO(b"1234").readinto(shown)  # no copy is under way
    timeline.launch("copy", 0, [value], [copied := torch.empty(8)])
    assert not timeline.found
    memoryview(shown)[0, 0] = 7
    timeline.launch("copy", 0, [value], [copied])
    assert [flaw.rule for flaw in timeline.found] == ["race"]
    timeline.host_waits("a copy", timeline.reached((0, 0)))
    memoryview(shown)[0, 0] = 8
    del own, shown
    assert timeline.found.total() == 2  # with the wait


def test_a_gpu_that_is_not_the_runs_is_not_used():
    timeline = Timeline()
    timeline.homes.add(1)
    timeline.launch("write", 1, [], [torch.empty(4)])
    assert not timeline.found
    timeline.launch("write", 0, [], [torch.empty(4)])
    with cuda.simulated(timeline):
        assert torch.cuda.get_device_capability(1) == torch.cuda.get_device_capability(0)
        torch.cuda.Event().record(torch.cuda.current_stream(0))
    assert [(flaw.rule, flaw.what) for flaw in timeline.found] == [
        ("wrong GPU", f"{what} on GPU 0, the run has 1")
        for what in ("write runs", "torch.cuda.get_device_capability() asks", "an event is recorded")
    ]


def test_an_event_has_to_be_recorded():
    timeline = Timeline()
    with cuda.simulated(timeline):
        torch.cuda.Event().synchronize()
        torch.cuda.current_stream().wait_event(torch.cuda.current_stream().record_event())
    assert [flaw.rule for flaw in timeline.found] == ["race", WAIT]


def test_the_host_waits_once_for_what_it_reads():
    timeline, value = Timeline(), torch.empty(4)
    for name in ("copy_", "add", "copy_"):
        timeline.launch(name, 0, [], [value])
        timeline.host_waits("a copy", {})
    assert [(flaw.what, count) for flaw, count in timeline.found.items()] == [("a copy", 2), (f"a copy{AGAIN}", 1)]
    timeline.found.clear()
    with timeline.a_step():
        timeline.host_waits(f"{NUMBER}float32", {})
        timeline.launch("add", 0, [], [value])
        timeline.host_waits(f"{NUMBER}bool", {})
    assert [flaw.what for flaw in timeline.found][2:] == [f"{NUMBER}float32{EARLY}"]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_step_in_cpp_is_given_the_current_stream_of_its_gpu(monkeypatch):
    """Where a GPU has no Triton."""
    given, timeline = [], Timeline()
    monkeypatch.setattr(_C, "built_with_cuda", True)
    monkeypatch.setattr(_C, "guided_step_cuda", lambda *arguments: given.append(arguments))
    with stage(timeline), torch.inference_mode():
        latents, history = (torch.empty(*count, 2, 4, 8, 8, device="cuda:1") for count in ((), (3,)))
        output, numbers = torch.empty(4, 4, 8, 8, device="cuda:1"), torch.empty(8, device="cuda:1")
        with torch.cuda.stream(stream := torch.cuda.Stream(1)), torch.cuda.device(0):
            OPS["guided_step"].native(output, latents, history, numbers)
    assert [one[-3:] for one in given] == [(latents.numel(), stream.cuda_stream, 2)]


def test_a_loop_that_asks_is_a_wait_and_ends():
    timeline, stream = Timeline(), (0, 1)
    timeline.counts[stream] = 1
    asked = [timeline.is_over("an event", timeline.reached(stream)) for _ in range(POLLS + 1)]
    assert asked == [False] * (POLLS - 1) + [True] * 2
    assert [(flaw.rule, count) for flaw, count in timeline.found.items()] == [(WAIT, 1)]
    assert timeline.is_over("an event that nobody recorded", {})


def test_a_graph_may_use_nothing_that_was_freed():
    timeline, outside = Timeline(), torch.empty(4)
    timeline.launch("write", 0, [], [outside])
    timeline.capture = SimpleNamespace(stream=(0, 0), launches=[])
    timeline.launch("a sum", 0, [outside], [within := torch.empty(4)])
    graph, timeline.capture = timeline.capture, None
    used = {number for one in graph.launches for number in (*one.reads, *one.writes)}
    del within  # the pool of the graph keeps its memory
    timeline.recorded(used)
    assert not timeline.found
    del outside
    timeline.recorded(used)
    assert [flaw.rule for flaw in timeline.found] == ["freed"]


def test_waits_and_events_order_what_they_should():
    timeline = Timeline()
    first, second = timeline.new_stream(0), timeline.new_stream(0)
    timeline.counts[first] = 3
    timeline.wait(second, timeline.reached(first))
    assert timeline.clocks[second] == {first: 3}
    worker = HostThread("worker")
    timeline.knows(worker, {first: 2})
    with timeline.on_thread(worker):
        assert timeline.thread is worker and worker.clock == {first: 2}
    assert timeline.thread.clock == {}


def used_on_two_streams(wait: str) -> list[str]:
    """The rules that a timeline finds broken where one stream writes and frees what another reads after `wait`; what
    frees it is the thread that waited, although another one is next.
    """
    timeline = Timeline()
    timeline.phase = "batch 0"
    first, second = timeline.new_stream(0), timeline.new_stream(0)
    value = torch.empty(8)
    timeline.thread.streams[0] = first[1]
    timeline.launch("write", 0, [], [value])
    timeline.thread.streams[0] = second[1]
    if wait != "none":
        timeline.wait(second, timeline.reached(first))
    timeline.launch("read", 0, [value], [])
    if wait == "kept":
        timeline.keep(value, second)
    if wait == "host":
        timeline.host_waits("a copy", timeline.reached(second))
    timeline.launch("copy", 0, [], [host := torch.empty(4)])
    timeline.read_by_host(host)
    del value
    with timeline.on_thread(HostThread("worker")):
        pass
    return [flaw.rule for flaw in timeline.found]


def test_uses_that_nothing_orders_are_found():
    """Each rule of order on its own; the long form finds them in the product's own lines."""
    unread = "race"  # the host reads what its last copy wrote
    assert used_on_two_streams("none") == ["race", unread, "freed too early"]
    assert used_on_two_streams("event") == [unread, "freed too early"]
    assert used_on_two_streams("kept") == [unread]
    assert used_on_two_streams("host") == ["host wait", unread]


def test_an_input_of_a_graph_that_is_written_to_is_found():
    timeline = Timeline()
    value, buffer = torch.empty(8), torch.empty(8)
    timeline.launch("write", 0, [], [value])
    timeline.launch("copy", 0, [value], [buffer])
    timeline.seen([value], [buffer])
    assert not timeline.found
    timeline.launch("write", 0, [], [value])
    timeline.seen([value], [buffer])
    assert [flaw.rule for flaw in timeline.found] == ["stale"]


def test_a_graph_is_replayed_between_its_inputs_and_its_answers():
    def found(*order):
        timeline, value = Timeline(), {name: torch.empty(8) for name in ("input", "output", "answer")}
        for name in order:
            timeline.launch(name, 0, [], [value[name]])
        timeline.answered([value["input"]], [value["output"]], [value["answer"]])
        return [flaw.rule for flaw in timeline.found]

    assert found("input", "output", "answer") == []
    for order in ("input answer output", "output input answer", "output answer input", "input answer"):
        assert found(*order.split()) == ["stale"], order


@long_test
@needs_triton
def test_the_budget_may_only_fall():
    """What a card is given for one call of SD 1.4, against bench/gpu_budget.json."""
    done = ran("-m", "bench", "rehearse", "--budget", "--json")
    assert done.stdout, done.stderr
    assert json.loads(done.stdout)["risen"] == [] and done.returncode == 0, done.stderr


@needs_triton
def test_a_kernel_of_several_operations_counts_for_the_one_that_launched_it(monkeypatch):
    """As products by descriptors do, whose file is no operation's."""
    noted, kernel = [], SimpleNamespace(params=[SimpleNamespace(name="x_desc")])

    def multiply(sizes, x, *given):
        blocks = launch.TensorDescriptor.from_tensor(x.flatten(0, -2), [16, 16])
        noted.append(NotedLaunch(kernel, (1,), (blocks,), {}, calling_op()))

    monkeypatch.setitem(linear_geglu.BLOCKS, launch.UNTUNED, linear_geglu.BLOCKS["sm_90"])
    monkeypatch.setattr(linear_geglu, "multiply", multiply)
    shapes = (2, 16, 32), (64, 32), (64,)
    linear_geglu.fused(*(torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes))
    assert storages(noted) == {"linear_geglu": ["fp16"]} and calling_op() == ""


def test_a_figure_that_rose_is_named():
    def reckoned(name="call", launches=655, ms=31.4, **kernels):
        return budget.Reckoned({name: Reckoning(launches, 37.3, 11.9, ms)}, kernels)

    before = reckoned(geglu=["fp16"])
    assert budget.risen(before, before) == []
    assert budget.risen(reckoned(launches=656, ms=31.3, geglu=["fp16"]), before) == [
        "call: 656 launches, the budget is 655"
    ]
    assert budget.risen(reckoned("other", geglu=["fp16"]), before) == [
        "call: only in one of the file and the reckoning",
        "other: only in one of the file and the reckoning",
    ]
    assert budget.risen(reckoned(geglu=["fp16", "fp32"]), before) == [
        "geglu of fp32: only in one of the file and the reckoning"
    ]


@long_test
@needs_triton
def test_compiled_kernels_are_found_in_another_folder(tmp_path):
    """Triton lists the files of a kernel with their whole paths, so a folder that was moved holds nothing for it."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert compiled_in(first) == [False] and compiled_in(first) == [True]
    carried.sign(first, ["90"], 1)
    first.rename(second)
    assert carried.adopt(second) == 1 and compiled_in(second) == [True]
    note = json.loads((second / carried.NOTE).read_text())
    (second / carried.NOTE).write_text(json.dumps(note | {"triton": "3.0.0"}))
    with pytest.raises(Missing, match="compiled with triton 3.0.0, this machine has"):
        carried.adopt(second)
    with pytest.raises(Refused, match="holds no compiled kernels"):
        carried.adopt(tmp_path)


COMPILED = """
from triton import knobs
from bench.kernels.audit import launches, resources
hits = []
knobs.compilation.listener = lambda cache_hit, **others: hits.append(cache_hit)
resources(next(launches("guided_step", "fp32", "90"))[1], "90")
print(hits)
"""


def compiled_in(cache: Path) -> list[bool]:
    """Whether Triton found the kernel of one operation in a folder, after which it is there."""
    done = ran("-c", COMPILED, TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.lower())


def test_wide_loads_are_asked_for_where_a_thread_has_16_bytes_to_load():
    def noted(channels, block, dtype=torch.float16):
        return launched("layer_norm", dtype, channels=channels, BLOCK_S=64, BLOCK_C=block)

    def launched(name, dtype=torch.float16, known=(), **given):
        params = [SimpleNamespace(name=one, is_constexpr=one in known) for one in given]
        kernel = SimpleNamespace(params=params, __name__=f"_{name}_kernel")
        return NotedLaunch(kernel, (1,), (), {"x_ptr": Pointer(dtype, 0), "num_warps": 4, **given}, name)

    assert loads_wide(noted(320, 64)) and loads_wide(noted(320, 16)) and loads_wide(noted(32, 8, torch.float32))
    assert not loads_wide(noted(320, 8)) and not loads_wide(noted(8, 64))
    product = {"channels": 8, "width": 320, "BLOCK_S": 16, "BLOCK_C": 16, "BLOCK_K": 64}
    assert loads_wide(launched("linear_add", **product)) and not loads_wide(
        launched("linear_add", **product | {"width": 8})
    )
    statistics = {"first_channels": 16, "TAKEN": 16, "BLOCK_S": 32, "BLOCK_C": 16, "BLOCK_N": 16, "BLOCK_W": 2}
    assert not loads_wide(launched("group_norm_parts", **statistics))  # tiles of statistics are none of activations
    head = {"queries": 100, "BLOCK_N": 64, "BLOCK_S": 64, "BLOCK_D": 32}
    assert loads_wide(
        launched("attention", known=("WIDTH",), WIDTH=40, **head)
    )  # a constant: 80 bytes are whole vectors
    assert not loads_wide(launched("attention", known=("WIDTH",), WIDTH=2, **head))


@needs_triton
def test_every_tile_that_is_to_be_loaded_wide_is_one_of_its_kernel():
    for name, (counts, tiles) in TILES.items():
        known = set(inspect.signature(kernels()[name].fn).parameters)
        assert known.issuperset(counts) and all(known.issuperset(tile) for tile in tiles), name
    others = [one for name, one in kernels().items() if name not in TILES]
    for one in others:
        known = set(inspect.signature(one.fn).parameters)
        assert not known.intersection(ACTIVATIONS) or known.issuperset({*IMAGE[0], *IMAGE[1][0]}), one
