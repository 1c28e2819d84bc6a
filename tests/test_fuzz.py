"""Seeded damage to every kind of foreign file: read, or refused in one sentence with a remedy; no other error, no hang,
nothing written.

The seeds lie in tests/corpus, one folder a reader. What a longer run finds is added there, and then every run tries it
first.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torchless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendered import document, write_run

from datasetdm_fast import generate
from datasetdm_fast.command_line import flags
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.jobs.prompt_files import read_source
from datasetdm_fast.runs.run_folder import audit
from datasetdm_fast.runs.run_folder.document import LEDGER, read_document
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.untrusted import documents, images, onnx_graph, tensors

IS_LONG = bool(os.environ.get("DATASETDM_LONG_TESTS"))
CORPUS = Path(__file__).parent / "corpus"
CSRC = Path(__file__).parents[1] / "csrc"
INPUTS = 20_000 if IS_LONG else 300  # over all readers
SECONDS = 10  # more for one input is a hang
MEMORY = 512 * 2**20  # bytes the process may grow by


# The readers ----------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> None:
    for truncate in (False, True):
        config = RunConfig(prompts=str(path), truncate_prompts=truncate, number=3)
        plan = make_plan(
            read_source(config, has_captions=True),
            torchless.Engine(()).model.tokenizer,
            number=3,
            seed=0,
            batch_size=2,
            words=("ball", "cube"),
            truncate=truncate,
        )
        assert len(list(plan)) == 3


def read_settings(path: Path) -> None:
    config, _ = flags.parse(["--config", str(path)], RunConfig)
    assert isinstance(config, RunConfig)


def read_description(path: Path) -> None:
    path.rename(path.with_name("run.json"))
    read_document(path.parent)


def read_ledger(path: Path) -> None:
    folder = path.parent / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(document(3, 32)))
    shutil.copy(path, folder / LEDGER)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        list(ledger.rows())
    audit.audit(folder, threads=1)


def read_decoder(path: Path) -> None:
    import torch

    from datasetdm_fast.engine.decoders.checkpoint import build_decoder, read_config

    path.rename(path.with_name("config.json"))
    with torch.device("meta"):
        build_decoder(read_config(path.parent))


def read_safetensors(path: Path) -> None:
    tensors.check_safetensors(path)


def read_pickle(path: Path) -> None:
    """The reader behind the sandbox: its errors are the sandbox's to tell, but it may not write, hang or run
    anything.
    """
    from datasetdm_fast.untrusted import pickles

    pickles._check_beginning(path)
    try:
        pickles.read_tensors(path)
    except Exception as error:
        assert pickles._cause(error)


def read_rle(path: Path) -> None:
    value = documents.parse_json(storage.read(path, 2**20), str(path))
    try:
        mask = mask_rle.decode(value)
    except ValueError:
        return
    assert list(mask.shape) == value["size"]


def read_model(path: Path) -> None:
    """One config of the demo model exchanged for `path`, named like unet+config.json."""
    from datasetdm_fast.engine.loading import load_model
    from datasetdm_fast.engine.loading.folder import DEMO

    folder = path.parent / "model"
    shutil.copytree(DEMO, folder, copy_function=lambda source, target: os.symlink(Path(source).resolve(), target))
    target = folder / path.name.replace("+", "/")
    target.unlink(missing_ok=True)
    shutil.copy(path, target)
    load_model(str(folder))


READERS: dict[str, tuple[Callable[[Path], object], int]] = {  # and how many inputs one of the usual share is worth
    "prompts": (read_prompts, 1),
    "yaml": (read_settings, 1),
    "description": (read_description, 1),
    "ledger": (read_ledger, 1),
    "decoder": (read_decoder, 1),
    "safetensors": (read_safetensors, 1),
    "pickle": (read_pickle, 1),
    "onnx": (onnx_graph.check_onnx, 1),
    "xml": (documents.read_xml, 1),
    "image": (images.read_image, 1),
    "zip": (lambda path: documents.zip_members(path, most_bytes=1 << 20), 1),
    "json": (lambda path: documents.parse_json(storage.read(path, 2**29), str(path)), 1),
    "rle": (read_rle, 1),
    "model": (read_model, 8),
}


# The damage -----------------------------------------------------------------------------------------------------------

VALUES = (
    b"0",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"null",
    b"true",
    b'"x"',
    b"[]",
    b"{}",
    b"NaN",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"../../x",
    b"\x1b[2J",
    b"\xed\xa0\x80",
)
EDIT = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.just("end"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(
        st.just("insert"), st.floats(0, 1), st.one_of(st.sampled_from(VALUES), st.binary(min_size=1, max_size=8))
    ),
    st.tuples(st.just("exchange"), st.floats(0, 1), st.sampled_from(VALUES)),
)
NUMBER_OR_TEXT = re.compile(rb'-?\d+(?:\.\d+)?|"[^"\n]{0,40}"|true|false|null')


def edited(data: bytes, edits: list[tuple]) -> bytes:
    for kind, where, what in edits:
        place = int(where * len(data))
        if kind == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << what]) + data[place + 1 :]
        elif kind == "set" and place < len(data):
            data = data[:place] + bytes([what]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + int(what * (len(data) - place)) :]
        elif kind == "end":
            data = data[:place]
        elif kind == "repeat":
            data = data[:place] + data[place : place + 16] * what + data[place:]
        elif kind == "insert":
            data = data[:place] + what + data[place:]
        elif kind == "exchange" and (found := list(NUMBER_OR_TEXT.finditer(data[: 1 << 16]))):
            match = found[min(int(where * len(found)), len(found) - 1)]
            data = data[: match.start()] + what + data[match.end() :]
    return data


@contextmanager
def a_time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_refusal(cause: str, remedy: str) -> None:
    assert cause and remedy and "\n" not in cause + remedy and "Traceback" not in cause


def meet(reader: Callable[[Path], object], folder: Path, name: str, data: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data)
    with a_time_limit():
        try:
            reader(folder / name)
        except (Refused, Missing) as stop:
            check_refusal(stop.cause, stop.remedy)


def seeds(kind: str) -> list[Path]:
    return sorted((CORPUS / kind).iterdir())


@pytest.mark.parametrize("kind", READERS)
def test_every_seed_is_read_or_refused(kind, tmp_path):
    reader, _ = READERS[kind]
    for seed in seeds(kind):
        meet(reader, tmp_path / "case", seed.name, seed.read_bytes())


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    reader, cost = READERS[kind]
    files = [(path.name, path.read_bytes()) for path in seeds(kind)]
    if kind == "ledger":
        write_run(tmp_path / "made", 3, 32)
        files = [("made.sqlite", (tmp_path / "made" / LEDGER).read_bytes())]
    before, met = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0

    @settings(
        max_examples=INPUTS // len(READERS) // cost,
        derandomize=not IS_LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.sampled_from(files), st.lists(EDIT, min_size=1, max_size=6))
    def damage(file: tuple[str, bytes], edits: list[tuple]) -> None:
        nonlocal met
        met += 1
        meet(reader, tmp_path / "case", file[0], edited(file[1], edits))

    damage()
    print(f"{kind}: {met} inputs")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# The command line -----------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(
        [
            "",
            "-1",
            "0",
            "nan",
            "1e400",
            "99999999999999999999",
            "depth,depth",
            "x" * 5000,
            "a\0b",
            "\ud800",
            "\u202ea",
            "--",
            "-",
            "../..",
            "/",
            "\x1b[2J",
            "CON",
        ]
    ),
    st.text(max_size=12),
)
FLAGS = (
    "--number",
    "--batch-size",
    "--seed",
    "--task",
    "--classes",
    "--per-class",
    "--prompts",
    "--guidance",
    "--steps",
    "--size",
    "--limit",
    "--config",
    "--only",
    "--model",
)


@pytest.fixture
def arithmetic(monkeypatch, tmp_path):
    torchless.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)


def test_any_line_is_obeyed_or_refused_in_two_lines(arithmetic, tmp_path, capsys):
    out = tmp_path / "out" / "run"

    @settings(
        max_examples=INPUTS // 10,
        derandomize=not IS_LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.lists(st.tuples(st.sampled_from(FLAGS), WORDS), min_size=1, max_size=3))
    def run(given_flags: list[tuple[str, str]]) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        line = [word for pair in given_flags for word in pair]
        with a_time_limit():
            code = generate.main(["--number", "2", "--limit", "2", "--dry-run", "--out", str(out), *line])
        _, err = capsys.readouterr()
        assert code in (0, 2, 3), (code, err)
        if code:
            assert len(err.splitlines()) == 2 and all(err.splitlines()), err
            assert "\x1b" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == [], "something was written"

    run()


def test_hostile_prompts_are_kept_as_they_are(arithmetic, tmp_path, capsys):
    """Names of files are numbers; what a prompt says is stored exactly and goes nowhere else."""
    hostile = [
        "../../etc/passwd",
        "CON",
        "aux.txt",
        "-rf /",
        "a\u202eb",
        "e\u0301 \u00e9",
        "🎈" * 20,
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "a\\..\\b",
        "%s%n{0}",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(hostile), encoding="utf-8")
    assert (
        generate.main(
            ["--prompts", "prompts.txt", "--number", str(len(hostile)), "--batch-size", "4", "--quiet", "--out", "run"]
        )
        == 0
    )
    run = open_run("run")
    assert [sample.prompt for sample in run] == hostile
    assert {path.stem for path in Path("run/images").iterdir()} == {f"{k:08d}" for k in range(len(hostile))}
    lines = [json.loads(line)["prompt"] for line in Path("run/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == hostile and audit.audit(Path("run")).findings == []
    assert (
        generate.main(["--prompts", "prompts.txt", "--number", str(len(hostile)), "--dry-run", "--out", "other"]) == 0
    )
    assert "\u202e" not in "".join(capsys.readouterr())


# The C++ --------------------------------------------------------------------------------------------------------------

SPEED = "-O1" if IS_LONG else "-O0"  # few changes take less time than a compiler that optimises
SANITIZED = ("-g", SPEED, "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(compiler: str, target: Path, *options: str, sources: list[Path]) -> bool:
    """As one unit, as each would have its compiler read the same headers."""
    (unit := target.with_suffix(".cpp")).write_text("".join(f'#include "{source}"\n' for source in sources))
    line = [compiler, *SANITIZED, *options, str(unit), "-o", str(target)]
    return subprocess.run(line, capture_output=True).returncode == 0


TARGETS = {
    "masks": ("mask_runs.cpp",),
    "pictures": ("png_file.cpp", "deflate.cpp"),
}  # csrc/fuzz/NAME.cpp, and what it feeds


@pytest.mark.parametrize("target", TARGETS)
def test_the_native_code_takes_anything_without_a_report(target, tmp_path):
    """Under libFuzzer where clang is there and the test is long, else through the seeds and changes of them;
    AddressSanitizer and UBSan watch either.
    """
    corpus = CSRC / "fuzz" / "corpus" / target
    core = [CSRC / "fuzz" / f"{target}.cpp", *(CSRC / name for name in TARGETS[target])]
    if IS_LONG and shutil.which("clang++") and build("clang++", tmp_path / "fuzz", "-fsanitize=fuzzer", sources=core):
        (tmp_path / "found").mkdir()
        command = [
            tmp_path / "fuzz",
            "-max_total_time=180",
            "-print_final_stats=1",
            "-max_len=8192",
            tmp_path / "found",
            corpus,
        ]
    else:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if not compiler or not build(compiler, tmp_path / "empty", "-shared", sources=[]):
            pytest.skip("no compiler with AddressSanitizer")
        assert build(compiler, tmp_path / "fuzz", sources=[*core, CSRC / "fuzz" / "replay.cpp"])
        command = [tmp_path / "fuzz", f"-mutations={2_000_000 if IS_LONG else 2_000}", *sorted(corpus.iterdir())]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    if IS_LONG:
        print((ended.stdout + ended.stderr)[-600:])
