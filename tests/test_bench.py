"""The bench: its rows agree at small widths, and nothing is timed that did not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
import zipfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rendered import document, rendered
from skips import long_test

from bench import __main__ as bench
from bench import environment, options, run, setting, suite
from bench.decoders import load_decoders
from bench.machine import limits, machine, measure
from bench.machine.processes import another_process
from bench.peers import PEERS
from bench.peers.engine import EnginePeer
from bench.peers.samples import samples_of
from bench.probe import calls, forms
from bench.report import report, results
from bench.rows import alone, layers, peers, race, scale, sharded
from datasetdm_fast import open_run
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.command_line.run_settings import complete_settings, read_spec
from datasetdm_fast.data import Request
from datasetdm_fast.engine.engines import device
from datasetdm_fast.engine.engines.device import engine_call
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import native, plain
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.workers.shard_worker import ShardRank, ShardWorker, work_on_shards
from datasetdm_fast.runs.workers.worker import Callbacks

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")

TINY = ["--model", "tiny", "--steps", "2", "--quick", "--seconds", "0.1"]
SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"


@pytest.fixture(scope="module", autouse=True)
def each_model_is_counted_once():
    """The operations of its stages; tests/test_peers.py counts them anew."""
    count, counted = setting.stage_flops, {}

    def stage_flops(model):
        key = model.name, model.size
        counted[key] = counted.get(key) or count(model)
        return dict(counted[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting, "stage_flops", stage_flops)
        yield


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """The limits of a machine that needs not be measured; test_peers.py measures those of this one."""
    known = {"tflops": {"fp32": 1.0, "bf16": 1.0}, "gbps": 100.0, "gexps": 1.0, "seconds": 0.0}
    monkeypatch.setattr(limits, "measure", lambda device, seconds: known)
    monkeypatch.setattr(layers, "fastest", lambda setting, dtype, seconds: 1e12)


def test_an_unknown_command_names_the_known():
    with pytest.raises(Refused, match="(?s)unknown measurement 'nothing'.*report.*kernels"):
        bench.dispatch(["nothing"])


def test_threads_that_wait_spin_for_a_moment_and_the_result_says_so(monkeypatch):
    for name in machine.OPENMP:
        monkeypatch.delenv(name, raising=False)
    options.prepare()
    found = machine.describe(torch.device("cpu"))["openmp"]
    assert found["OMP_WAIT_POLICY"] == "PASSIVE" and 1000 <= int(found["GOMP_SPINCOUNT"]) <= 100_000
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    options.prepare()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_peak_sees_what_was_allocated_and_freed():
    answer, grown = measure.with_peak(lambda: float(torch.ones(64 * 2**18).sum()))  # 64 MiB
    assert answer == 64 * 2**18 and 60 * 2**20 <= grown <= 100 * 2**20


def test_a_probe_times_algorithms_although_the_engine_asks_for_its_own_choice():
    """PyTorch would give a timed choice what it keeps of the same shape and wish: so the wishes differ, too."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    for is_timed in (False, True):
        with forms.timed_choice(is_timed):
            device.choose_by_shape(torch.device("cuda"))  # as every call of the engine on a GPU does
            assert (cudnn.benchmark, cudnn.deterministic) == (is_timed, not is_timed)
    assert (cudnn.benchmark, cudnn.deterministic) == before


@pytest.mark.usefixtures("tiny_has_one_layer")
def test_a_probe_of_speeds_times_the_forms_and_whole_images():
    engine = calls.engine_of(load_model("tiny"), torch.device("cpu"))
    call, *whole = calls.speeds(engine)
    assert call["what"] == "a call of 1, fp32, an image" and list(call["ms"]) == ["exact", "from deep features"]
    assert [row["what"].split()[-4] for row in whole] == ["exact,", "cache3,"]  # which takes no more than 25 steps
    assert all(value > 0 for row in (call, *whole) for value in row["ms"].values())


@pytest.mark.parametrize("number", [0, 1])
def test_a_probe_that_was_cut_has_its_rows_and_the_next_one_goes_on(number, tmp_path, monkeypatch):
    row = {"what": "a call", "ms": {"form": 1.0}}

    def cut(engine):
        yield from [row] * number
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "batches", cut)
    monkeypatch.setattr(calls, "engine_of", lambda *_: None)
    line = ["probe", "--device", "cpu", "--model", "tiny", "--parts", "batches", "--out", str(tmp_path / "probe.json")]
    with pytest.raises(KeyboardInterrupt):
        bench.dispatch(line)
    assert results.read(tmp_path / "probe.json")["parts"]["batches"].get("rows", []) == [row] * number
    assert bench.dispatch([*line, "--minutes", "0"]) == 4  # no time is left for it
    monkeypatch.setattr(calls, "batches", lambda engine: [row, row])
    assert bench.dispatch(line) == 0
    assert results.read(tmp_path / "probe.json")["parts"]["batches"]["rows"] == [row, row]


def test_memory_on_a_gpu_is_that_of_a_peer_and_of_its_graphs(monkeypatch):
    """Of what PyTorch holds, what a graph keeps is no longer allocated; the networks of other peers are not counted."""
    holding = {"now": 100, "most": 100}
    monkeypatch.setattr(measure, "release", lambda: None)
    monkeypatch.setattr(measure, "wait", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: holding["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: holding["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: holding.update(most=holding["now"]))
    others = measure.held(torch.device("cuda"))
    holding["now"] += 40  # the peer's networks and recorded graphs
    answer, most = measure.peak(torch.device("cuda"), lambda: holding.update(most=150) or "made", others)
    assert (answer, most) == ("made", 50)


def test_rounds_go_in_turn():
    said = []
    rounds = measure.interleaved({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 0.0, least=3)
    assert (
        said == ["a", "b"] * 3 and len(rounds["a"].seconds) == len(rounds["b"].seconds) == 3 and not rounds["a"].joules
    )


def test_joules_are_those_between_two_readings():
    counter = iter(range(0, 1000, 10))
    rounds = measure.interleaved({"a": lambda: None}, 0.0, lambda: float(next(counter)), least=2)
    assert rounds["a"].joules == [10.0, 10.0]


def test_a_short_call_is_made_until_its_round_has_lasted(monkeypatch):
    counts, now = {"short": 0, "long": 0}, [0]

    def call(name: str, seconds: int) -> None:
        counts[name] += 1
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])
    monkeypatch.setattr(measure, "time", clock)
    calls = {"short": lambda: call("short", 5), "long": lambda: call("long", 50)}
    rounds = measure.interleaved(calls, 0, least=2, lasting=48)
    assert counts == {"short": 20, "long": 2}
    assert rounds["short"].seconds == [5, 5] and rounds["long"].seconds == [50, 50]


@pytest.mark.parametrize(
    "slowness, kept, again",
    [
        ([1, 1, 1.3, 1], [0, 1, 3], 1),  # slower for all alike
        ([1, 1, 1.05], [0, 1, 2], 0),
        ([1, 0.7, 1], [0, 1, 2], 0),  # nothing is set aside for being fast
    ],
)
def test_rounds_in_which_the_machine_was_slower_are_made_again(monkeypatch, slowness, kept, again):
    left, own = iter(slowness), {"a": [2.0, 2.1, 2.2, 2.0], "b": [0.5] * 4}

    def interleaved(calls, seconds, meter, *, least, most=200, lasting):
        found = {name: measure.Rounds() for name in calls}
        for _ in range(least):
            for name, slower in zip(calls, [next(left)] * len(calls)):
                found[name].seconds.append(own[name][0] * slower)
        return found

    monkeypatch.setattr(measure, "interleaved", interleaved)
    rounds, found = measure.undisturbed(dict.fromkeys(own), 0.0, least=3, lasting=0.0)
    assert found == again
    assert rounds["a"].seconds == [2.0 * slowness[k] for k in kept]
    assert rounds["b"].seconds == [0.5 * slowness[k] for k in kept]


def test_a_peer_that_is_slow_alone_keeps_its_round():
    taken = {name: measure.Rounds([1.0, 1.0, 1.0]) for name in ("a", "b")} | {"c": measure.Rounds([1.0, 2.0, 1.0])}
    assert measure._as_usual(taken) == [0, 1, 2]


def test_the_suite_prints_ratios_parity_and_rows(monkeypatch, capsys):
    monkeypatch.setitem(race.CANDIDATES, True, (1, 2))
    monkeypatch.setattr(race, "LEAST_ROUNDS", 2)
    assert bench.dispatch([*TINY, "--peers", "torch,ours", "--parts", "peers", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parity"] == "pass" and said["ratios"]["fast_vs_torch"] > 0
    assert [row["peer"] for row in said["rows"]["peers"]] == ["torch", "ours"] and all(
        row["passed"] for row in said["rows"]["peers"][1]["parity"]
    )
    assert said["machine"]["device"] and said["machine"]["commit"] and said["setting"]["calls"] == 3


def test_a_kernel_broken_on_purpose_ends_with_4(monkeypatch, capsys):
    ops = SimpleNamespace(**{**vars(plain), "layer_norm": lambda *inputs: plain.layer_norm(*inputs) * 1.01})

    def build(setting, batch):
        return EnginePeer(FastEngine(setting.model, setting.reference.decoders, device="cpu", ops=ops), setting, batch)

    monkeypatch.setitem(PEERS, "ours", PEERS["ours"]._replace(build=build, batch=1))
    assert run_command(bench.dispatch, [*TINY, "--peers", "ours", "--parts", "peers", "--json"]) == 4
    said = capsys.readouterr()
    assert json.loads(said.out)["parity"] == "fail" and "FAILED: its outputs do not match the reference's" in said.err
    assert said.err.splitlines()[-2].startswith("bench: 1 rows failed")


def test_an_operation_broken_on_purpose_ends_with_4(monkeypatch, capsys):
    monkeypatch.setattr(native, "geglu", lambda x: plain.geglu(x) + 0.01)
    assert run_command(bench.dispatch, [*TINY, "--parts", "ops", "--json"]) == 4
    said = capsys.readouterr()
    rows = {row["op"]: row for row in json.loads(said.out)["rows"]["ops"] if row["form"] == "engine"}
    assert (
        rows["geglu"]["status"] == "failed" and "form_s" not in rows["geglu"] and rows["layer_norm"]["status"] == "ok"
    )
    assert "FAILED: geglu: differs from its reference by" in said.err


def test_peers_label_by_the_rules_of_generate():
    decoder = load_decoders("demo")["semantic"]
    recipe = SimpleNamespace(size=32)
    requests = [Request(0, "a red ball on a grey table", 0)]
    torch.manual_seed(0)
    raw = {"pred_logits": torch.randn(1, 16, len(decoder.config.classes) + 1), "pred_masks": torch.randn(1, 16, 8, 8)}
    (made,) = samples_of(requests, np.zeros((1, 32, 32, 3), np.uint8), {"semantic": raw}, {"semantic": decoder}, recipe)
    (free,) = TASKS["semantic"].postprocess(raw, decoder.config, 32)
    cone = decoder.config.classes.index("cone")
    assert (free.labels == cone).any() and not (
        made.annotations["semantic"].labels == cone
    ).any()  # no cone was asked for


@pytest.mark.parametrize("words", [["--parts", "peerz"], ["--peers", "nobody"], ["--seconds", "-1"], ["--nonsense"]])
def test_wrong_flags_are_refused(words):
    with pytest.raises(Refused):
        bench.dispatch(words)


def test_a_gpu_is_asked_for_before_anything_is_loaded():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Missing, match="no CUDA device"):
        bench.dispatch(["gpu"])


def test_gpu_parts_are_stored_and_continued(tmp_path, capsys):
    out = str(tmp_path / "gpu.json")
    line = ["gpu", "--device", "cpu", *TINY, "--out", out, "--parts"]
    assert bench.dispatch([*line, "layers"]) == 0
    before = results.read(Path(out))["parts"]
    assert bench.dispatch(["gpu", "--left", "--out", out, "--parts", "layers,chunks"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "chunks"
    assert bench.dispatch([*line, "layers,chunks"]) == 0
    after = results.read(Path(out))["parts"]
    assert list(after) == ["limits", "layers", "chunks"] and {name: after[name] for name in before} == before
    assert sum(row["of_work"] for row in after["layers"]["rows"]) == pytest.approx(1, abs=0.01)


def test_full_size_is_measured_in_parts(tmp_path):
    out = tmp_path / "sd14.json"
    assert bench.dispatch(["sd14", "--model", "tiny", "--steps", "2", "--out", str(out), "--parts", "limits"]) == 0
    document = results.read(out)
    assert document["suite"] == "cpu-tiny" and list(document["parts"]) == ["limits"]


def test_the_generation_loop_alone_is_timed_and_holds_its_memory(monkeypatch):
    monkeypatch.setattr(scale, "MARKS", {True: (16, 48)})
    monkeypatch.setattr(scale, "SCENE_SECONDS", 0.1)
    *runs, scenes, closed, disk = scale.rows(SimpleNamespace(setting=SimpleNamespace(quick=True)))
    assert [row["images"] for row in runs] == [16, 48]
    assert closed["closed"] == 64 and closed["closing_core_ms"] > 0 and 500 < closed["ledger_bytes"] < 4000
    assert all(row["ms"]["whole"] >= row["ms"]["own"] >= 0 for row in runs)
    assert runs[0]["ms"]["engine"] > 0  # which may have made all images before the writer is done with the first 16
    assert scenes["written"] >= scale.SCENE_COUNT and scenes["images_per_second"] > 0 and scenes["core_ms"] > 0
    assert disk["commit_ms"] > 0 and disk["files"] == 4  # image, semantic, confidence, depth


def test_copied_samples_fill_a_run_in_shards_that_readers_open(tmp_path, monkeypatch):
    labels = sharded.SMALL["task"]
    told = document(2, 64, image_format="jpg")
    told["config"] |= {"task": list(labels)}
    with RunFolder(tmp_path / "base", told) as folder:
        made = [rendered(k, 64) for k in range(2)]
        folder.add([replace(one, annotations={task: one.annotations[task] for task in labels}) for one in made], {})
        finish_run(folder)
    monkeypatch.setattr(ShardWorker, "_encode_samples", None)
    monkeypatch.setattr(sharded.shard_worker, "check_room", None)
    sharded.copy_samples(str(tmp_path / "base"))
    config = complete_settings(sharded.config_of(tmp_path / "run", 7, 4), {"out", "task"})
    place = sharded.shard_place(str(tmp_path / "run"))
    work_on_shards(replace(read_spec(config), may_mix=False), place, ShardRank(), Callbacks())
    run, first = open_run(tmp_path / "run"), open_run(tmp_path / "base")[0]
    assert [sample.id for sample in run] == [f"{k:08d}" for k in range(7)]
    assert run[6].read("semantic") == first.read("semantic") and run[6].row.labels == first.row.labels
    assert sharded.read(str(tmp_path / "run"), 7)["reader_mib"] > 0


def test_more_than_the_ranks_could_make_fails_its_row(monkeypatch):
    """Once published: 151 images a second of two ranks, 40 times what one made."""
    one, two = scale.rank_rows({1: 3.77, 2: 150.6})
    assert one["status"] == "ok" and two["status"] == "failed" and "39.9 times the rate of one rank" in two["why"]
    document = {"parts": {"scale": {"status": "done", "rows": [one, two]}}}
    assert suite.failed(document) == [f"scale, 2: {two['why']}"]
    (cells,) = [cells for _, title, cells in report.tables_of(document) if title == "Ranks of one thread each"]
    assert cells[1][1] == ["2", f"FAILED: {two['why']}", ""]
    assert [row["status"] for row in scale.rank_rows({1: 3.77, 2: 7.4})] == ["ok", "ok"]


def test_the_rate_of_ranks_is_from_the_first_image_made_to_the_last(monkeypatch):
    """Whatever the ranks' first batches brought was begun before; so the rate is never above what was reached."""
    monkeypatch.setattr(scale, "RANK_BATCH", 2)
    assert scale.rate([10.0, 10.0, 12.0, 12.0, 14.0, 14.0], ranks=1) == 1.0
    alike = [second for second in (10.0, 12.0, 14.0) for _ in range(4)]
    assert scale.rate(alike, ranks=2) == 2.0
    in_between = [second for second in (10.0, 11.0, 12.0, 13.0, 14.0, 15.0) for _ in range(2)]
    assert 1.5 < scale.rate(in_between, ranks=2) < 2.0


def test_ranks_share_the_cores_of_a_cpu_where_there_is_a_gpu_too(monkeypatch):
    def made(command, **_):
        assert command[command.index("--device") + 1] == "cpu"
        images = Path(command[command.index("--out") + 1], "images")
        images.mkdir(parents=True)
        (images / "0.png").touch()

    monkeypatch.setattr(scale.subprocess, "run", made)
    scale.images_per_second(2)


def test_help_names_the_numbers_of_the_code(capsys):
    with pytest.raises(SystemExit):
        bench.dispatch(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for values in (run.STEPS, run.SECONDS):
        assert f"0 = {values[False]:g}, with --quick {values[True]:g} " in shown


def script(call, out, *flags, **variables):
    """One call of bench/gpu.sh on this CPU: the command, and how it is run."""
    usual = {"DEVICE": "cpu", "MODEL": "tiny", "PYTHON": sys.executable, "VENV": str(out / "none"), "NAME": "one"}
    environment = {**os.environ, **usual, "OUT": str(out), **variables}
    return [str(SCRIPT), str(call), *flags], {"env": environment, "text": True, "stderr": subprocess.PIPE}


def test_the_gpu_script_shows_its_steps_and_runs_none(tmp_path):
    checked = [f"verify-{model}-{dtype}" for model in ("demo", "full") for dtype in ("fp16", "bf16", "fp32")]
    expected = {
        0: ["verify-full-fp16", "twice-one", "twice-two", "twice", "verify-full-bf16", "race-1", "probe"],
        1: ["tests", *checked[:-1], "twice-one", "twice-two", "twice", "probe"],
        2: ["bench-1"],
        3: ["tune", "memcheck", "counters"],
    }
    for call, steps in expected.items():
        line, options = script(call, tmp_path, "--dry-run", DEVICE="cuda", WHEELS="/w")
        said = subprocess.run(line, **options, stdout=subprocess.PIPE, check=True).stdout
        begun = [shown for shown in said.splitlines() if shown.startswith("==")]
        assert [shown.split()[1] for shown in begun] == ["environment", "build", *steps] and "/w" in begun[0]
        assert all(int(shown.split("at most ")[1].split()[0]) <= 540 for shown in begun)
        assert (
            call != 3 or "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer" in said
        )  # sees each tensor's bounds
        files = [word for word in said.split() if word.startswith("tests/")]
        assert call != 1 or {"tests/test_kernels.py", "tests/test_models.py"} <= set(files)
        assert not any("pycocotools" in Path(SCRIPT.parents[1], file).read_text() for file in files)
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_refuses_what_it_cannot_do_and_writes_nothing(tmp_path):
    (file := tmp_path / "file").write_text("#!/bin/sh\necho 2.13.0 False\n")  # an interpreter with a torch for CPUs
    file.chmod(0o755)
    none_here = () if torch.cuda.is_available() else (("1", {"DEVICE": "cuda"}, 3, "sees no GPU; DEVICE=cpu"),)
    for call, variables, code, sentence in (
        ("", {}, 2, "'' is neither a call"),
        ("4", {}, 2, "'4' is neither a call (0, 1, 2 or 3) nor --dry-run"),
        ("1", {"ONLY": "bench knit"}, 2, "ONLY names knit"),
        ("1", {"PYTHON": "/bin/false"}, 3, "cannot import torch"),
        ("1", {"PYTHON": str(file), "OUT": str(file / "out")}, 3, "cannot be written to"),
        *none_here,
    ):
        line, options = script(call, tmp_path / "out", **variables)
        said = subprocess.run(line, **options)
        assert said.returncode == code and sentence in said.stderr, said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_gpu_script_without_time_to_build_ends_with_4_and_says_what_is_left(tmp_path):
    (file := tmp_path / "file").write_text("#!/bin/sh\n[ $1 = -c ] && exec echo 2.13.0 False\nexit 7\n")
    file.chmod(0o755)
    for seconds, code, sentence in (
        ("4", 4, "left: environment and all that follows, as its time was over; the same line again resumes"),
        ("60", 3, "is not complete, "),
    ):
        line, options = script(0, tmp_path, PYTHON=str(file), SECONDS_ALL=seconds)
        said = subprocess.run(line, **options, stdout=subprocess.DEVNULL)
        assert said.returncode == code and sentence in said.stderr, said.stderr


def test_an_environment_that_was_cut_while_it_was_made_is_made_anew(tmp_path, monkeypatch):
    place, create = tmp_path / "venv", venv.create
    monkeypatch.setattr(environment, "has_pip", lambda: True)

    def cut(folder, **options):
        create(folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(venv, "create", cut)
        environment.made(place)
    assert not place.exists()
    environment.made(place)
    assert (place / "bin" / "python").exists() and [*place.glob(f"lib/*/site-packages/{environment.INHERITED}")]


@long_test
def test_the_gpu_script_completes_an_environment_and_leaves_torch_as_it_is(tmp_path):
    """A virtual environment made from another one that lacks diffusers, as GPU machines have it."""
    venv.create(tmp_path / "parent", with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("parent/lib/python3*/site-packages")
    for place in (Path(place) for place in sys.path if place.endswith("site-packages")):
        for path in place.iterdir():
            if path.suffix != ".pth" and not path.name.startswith(("diffusers", "__editable__")):
                (site / path.name).exists() or (site / path.name).symlink_to(path)
    wheel(tmp_path, "diffusers", "0.42.9")
    wheel(tmp_path, "torch", "99.0")
    parent = str(tmp_path / "parent" / "bin" / "python")
    variables = {"PYTHON": parent, "VENV": str(tmp_path / "venv"), "WHEELS": str(tmp_path), "ONLY": "environment"}
    line, options = script(1, tmp_path / "out", **variables)
    said = subprocess.run(line, **options, stdout=subprocess.PIPE)
    assert said.returncode == 0, said.stdout + said.stderr
    asked = "import diffusers, torch; print(diffusers.__version__, torch.__file__)"
    answers = [
        subprocess.run([tmp_path / name / "bin" / "python", "-c", asked], capture_output=True, text=True).stdout.split()
        for name in ("venv", "parent")
    ]
    assert answers == [["0.42.9", str(site / "torch" / "__init__.py")], []]


def wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of a module that knows its version."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


@long_test
def test_the_gpu_script_makes_a_run_twice(tmp_path):
    line, options = script(0, tmp_path, ONLY="twice")
    said = subprocess.run(line, **options, stdout=subprocess.PIPE)
    assert said.returncode == 0 and "== twice ended with 0" in said.stdout, said.stdout + said.stderr


@long_test
def test_the_gpu_script_cut_in_the_middle_keeps_what_it_had_and_goes_on(tmp_path):
    file = tmp_path / "one.json"
    line, options = script(2, tmp_path, ONLY="bench", PARTS="layers,chunks")
    with subprocess.Popen(line, **options, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 500
        while time.monotonic() < end and not (file.exists() and results.is_settled(results.read(file), "limits")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "interrupted; the logs and result files so far are in" in said
    kept = {name: part for name, part in results.read(file)["parts"].items() if part["status"] == "done"}
    log = tmp_path / "one-log-2.txt"
    assert "limits" in kept and "chunks" not in kept and "bench-1: did not end" in log.read_text()
    again = subprocess.run(line, **options, stdout=subprocess.PIPE)
    assert again.returncode == 0, again.stdout + again.stderr
    parts = results.read(file)["parts"]
    assert all(part["status"] == "done" for part in parts.values()) and list(parts) == ["limits", "layers", "chunks"]
    assert {name: parts[name] for name in kept} == kept  # not measured again
    assert "== bench-1 ended with 0" in log.read_text() and len(list(tmp_path.iterdir())) == 2


@long_test
@pytest.mark.parametrize(
    ("call", "variables", "said"),
    [
        (2, {"ONLY": "bench", "PARTS": "nonsense"}, r"failed: bench-1\(2\)"),
        (1, {"ONLY": "verify", "SECONDS_ALL": "7"}, r"verify-demo-bf16\((124|137|no time)\)"),
    ],
    ids=["a wrong part", "no time"],
)
def test_the_gpu_script_names_what_failed_or_took_too_long(tmp_path, call, variables, said):
    line, options = script(call, tmp_path, **variables)
    begin = time.monotonic()
    failed = subprocess.run(line, **options, stdout=subprocess.DEVNULL)
    assert failed.returncode == 4 and re.search(said, failed.stderr), failed.stderr
    assert call != 1 or time.monotonic() - begin < 60


@long_test
def test_an_interrupt_ends_with_130_and_leaves_the_parts_before(tmp_path):
    out = tmp_path / "one.json"
    line = [
        sys.executable,
        "-m",
        "bench",
        *TINY,
        "--peers",
        "torch,ours",
        "--parts",
        "peers",
        "--seconds",
        "60",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    with subprocess.Popen(
        line,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_interrupts,
    ) as process:
        end = time.monotonic() + 500
        while time.monotonic() < end and not (out.exists() and "peers" in results.read(out)["parts"]):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said[1], said
    parts = results.read(out)["parts"]
    assert parts["limits"]["status"] == "done" and list(parts)[-1] == "peers" and parts["peers"]["status"] == "begun"
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def heeds_interrupts():
    """Where the tests themselves run in the background, a child would ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def a_turn(seconds: float, call: float, others: float = 0.0) -> alone.Turn:
    attention = measure.CpuShare(0.5, 1.8, others)
    return alone.Turn(2.0, 2 * seconds, [seconds] * alone.IMAGES, [2 * call, call], 3 << 30, attention)


def test_engines_too_large_to_stand_side_by_side_take_turns(monkeypatch):
    """Each answer comes from a process of its own; what it takes is told beside ours, pair by pair."""
    order = []

    def answered(answer, config, name, *answers):
        order.append((answer.__name__, name))
        if answer is alone._answered:
            return b"the reference's"
        if answer is alone.timed:
            return a_turn(2.0, 0.5) if name == "ours" else a_turn(3.0, 0.6, others=0.02)
        if name == "ort-1":
            raise BrokenProcessPool("killed")
        return {"peer": name, "title": PEERS[name].title, "dtype": "fp32", "status": "ok"}

    monkeypatch.setattr(alone, "in_own_process", answered)
    monkeypatch.setattr(alone, "let_go", lambda setting: order.append("let go"))
    run = SimpleNamespace(setting=SimpleNamespace(flops=10**12), limits={"tflops": {"fp32": 1.0}})
    killed, theirs, ours = alone.taking_turns(run, ["ort-1", "openvino-1", "ours"], alone.TurnConfig("tiny", 2, 1))
    assert killed["status"] == "absent" and "killed" in killed["why"]
    assert order[:2] == ["let go", ("_answered", [])]  # before any peer holds memory
    assert order[5:] == [("timed", "openvino-1"), ("timed", "ours")] * alone.TURNS
    assert theirs["seconds_per_image"]["median"] == 3 and theirs["ours_over"]["median"] == 1.5
    assert len(theirs["ours_over"]["rounds"]) == alone.TURNS * alone.IMAGES >= 7
    assert theirs["call_s"]["rounds"] == [0.6] * alone.TURNS and theirs["call_over"]["median"] == 1.2
    assert theirs["peak_mib"] == 3072 and theirs["attention"]["others"] == 0.02 and theirs["first_s"] == 6
    assert ours["ours_over"]["median"] == ours["call_over"]["median"] == 1 and ours["tflops"] == 0.5


def test_a_peer_in_bf16_is_compared_with_ours_in_bf16():
    each = {"ours": [2.0] * 5, "ours-bf16": [1.0] * 5, "openvino-bf16": [1.5] * 5, "openvino": [3.0] * 5}
    rows = [{"peer": name, "dtype": "bf16" if "bf16" in name else "fp32"} for name in each]
    setting, limits = SimpleNamespace(flops=10**12), {"tflops": {}}
    race.add_times(rows, each, setting, limits)
    said = "1.5× (1.5–1.5) in bf16", "1.5× (1.5–1.5)"
    assert [peers.our_speedup(row) for row in rows] == ["", "2× as fast as in fp32", *said]
    on_gpu = [
        {"peer": name, "dtype": dtype} for name, dtype in zip(each, ("fp16", "bf16", "bf16", "fp16"), strict=True)
    ]
    on_gpu.append({"peer": "ours-1", "dtype": "fp16"})
    race.add_times(on_gpu, {"ours-1": [4.0] * 5, **each}, setting, limits)
    assert peers.our_speedup(on_gpu[1]) == "2× as fast as in fp16" and peers.our_speedup(on_gpu[4]) == "2× (2–2)"
    alone_rows = [row for row in rows if row["peer"] in ("ours", "openvino-bf16")]
    race.add_times(alone_rows, {"ours": each["ours"], "openvino-bf16": each["openvino-bf16"]}, setting, limits)
    assert alone_rows[1]["ours_over"]["median"] == 0.75


@pytest.mark.parametrize(("name", "status"), [("openvino-1", "absent"), ("ours", "failed")])
@pytest.mark.parametrize("error", [BrokenProcessPool("ended"), RuntimeError("killed by bad luck")])
def test_an_engine_that_ends_while_it_is_timed_leaves_the_others_their_rows(monkeypatch, name, status, error):
    taken = []

    def answered(answer, config, asked, *answers):
        if answer is alone._answered:
            return b"the reference's"
        if answer is not alone.timed:
            return {"peer": asked, "title": PEERS[asked].title, "dtype": "fp32", "status": "ok"}
        taken.append(asked)
        if asked == name and taken.count(name) == 2:
            raise error
        return a_turn(2.0, 0.5)

    monkeypatch.setattr(alone, "in_own_process", answered)
    monkeypatch.setattr(alone, "let_go", lambda setting: None)
    run = SimpleNamespace(setting=SimpleNamespace(flops=10**12), limits={"tflops": {"fp32": 1.0}})
    rows = alone.taking_turns(run, ["diffusers-1", "openvino-1", "ours"], alone.TurnConfig("tiny", 2, 1))
    assert [row["status"] for row in rows] == [status if row["peer"] == name else "ok" for row in rows]
    for row in rows:
        assert ("killed" in row["why"]) if row["peer"] == name else len(row["call_s"]["rounds"]) == alone.TURNS
        assert ("call_over" in row) == (row["peer"] != name and name != "ours")
    assert taken.count(name) == 2


def test_where_the_reference_finds_no_memory_every_row_says_so(monkeypatch):
    def answered(answer, config, *asked):
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(alone, "in_own_process", answered)
    monkeypatch.setattr(alone, "let_go", lambda setting: None)
    rows = alone.taking_turns(SimpleNamespace(setting=None), ["openvino-1", "ours"], alone.TurnConfig("tiny", 2, 1))
    assert [(row["status"], "killed" in row["why"]) for row in rows] == [("absent", True), ("failed", True)]


@long_test
def test_a_turn_is_an_image_and_calls_in_a_process_that_holds_no_other_engine():
    turn = alone.in_own_process(alone.timed, alone.TurnConfig("tiny", 2, 1), "ours")
    assert len(turn.images_s) == alone.IMAGES and all(0 < seconds < 60 for seconds in turn.images_s)
    assert len(turn.calls_s) == alone.CALLS and 0 < min(turn.calls_s) < min(turn.images_s)
    assert turn.peak > 100 << 20 and turn.load_s > 0 and turn.first_s > 0
    config = alone.TurnConfig("tiny", 2, 1)
    row = alone.compared(config, "ours-1", alone.answered(config, []))
    assert row["status"] == "ok" and row["parity"] and row["batch"] == 1


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def ended(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return is_gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_process_that_measures_ends_with_the_one_that_started_it(tmp_path):
    """After kill -9, too: what goes on would take the memory of the next run."""
    told = tmp_path / "pid"
    lines = ["import os, pathlib, sys, time", "from bench.machine.processes import another_process"]
    lines += ["if __name__ == '__main__':", "    with another_process() as pool:"]
    lines += ["        pathlib.Path(sys.argv[1]).write_text(str(pool.submit(os.getpid).result()))"]
    lines += ["        pool.submit(time.sleep, 600).result()"]
    (tmp_path / "starts.py").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    starter = subprocess.Popen([sys.executable, tmp_path / "starts.py", told], env=environment)
    try:
        while not (told.exists() and told.read_text()):
            assert starter.poll() is None
            time.sleep(0.05)
    finally:
        starter.kill()
        starter.wait()
    assert ended(int(told.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_process_that_measures_is_killed_where_its_answer_is_not_waited_for():
    with pytest.raises(KeyboardInterrupt), another_process() as pool:
        pid = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert ended(pid)


def test_a_probe_by_timing_lets_cudnn_time(monkeypatch):
    """Every call of an engine takes such a choice back; the probe is about what that costs."""
    seen = []

    class Engine:
        device, precision, decoders = torch.device("cuda"), "fp16", {}

        @engine_call
        def denoise(self, *given):
            seen.append(torch.backends.cudnn.benchmark)

        _forget = lambda self: None  # noqa: E731

    for name, value in (("benchmark", False), ("deterministic", False), ("allow_tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    monkeypatch.setattr(calls, "given", lambda engine, batch: ([None] * batch, None))
    monkeypatch.setattr(calls, "wait", lambda device: None)
    (row,) = calls.choices(Engine())
    assert list(row["ms"]) == ["cuDNN's choice", "timed choice"]
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)


def test_norms_are_probed_in_the_forms_that_there_are(monkeypatch):
    monkeypatch.setattr(forms, "row", lambda name, built, device: (name.split(",")[0], *built))
    found = set(forms.norms(SimpleNamespace(device=torch.device("cuda"), scale=1, rows=2)))
    assert found == {("group_norm", "ours", "PyTorch"), ("layer_norm", "ours", "PyTorch"), ("geglu", "ours", "PyTorch")}
