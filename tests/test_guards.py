"""Every function of the room of untrusted input is reached by a command or a library call that is given a hostile file,
and each such file ends in an exit code and one sentence: a guard that nothing calls fails here.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import sqlite3
import sys
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import forked
import proofs
import pytest
import torch
from layouts import LAYOUTS
from PIL import Image
from rendered import write_run
from safetensors.torch import load_file, save_file

from datasetdm_fast import untrusted
from datasetdm_fast.engine.decoders.config import DEMO as DECODERS
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents, pickles

ROOM = Path(untrusted.__file__).parent
# What runs in the confined process, which cannot be watched from here: tests/proofs.py tries each of its locks.
CONFINED = {
    f"pickles.{name}"
    for name in ("child", "_cause", "read_tensors", "_save", "leave_network", "confine", "_landlock", "_refuse_event")
}
BAD, GATE = 2, 4  # exit codes

CASES: dict[str, Callable[[Path], int]] = {}
Ending = tuple[int, str, str]  # exit code, what stderr says, a piece of what it must say


def case(name: str) -> Callable:
    def add(function: Callable[[Path], Ending]) -> Callable:
        CASES[name] = function
        return function

    return add


def run(command: str, *line: object, ends: int, says: str) -> Ending:
    """A command in this process; the sentence may be on either stream, as audit's is its result."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = import_module(f"datasetdm_fast.{command}").main([str(word) for word in line])
    assert code == ends, (code, said.getvalue())
    return code, said.getvalue(), says


def model(path: Path, says: str) -> Ending:
    line = ["--model", path, "--prompts", "a ball", "--out", path.parent / "run", "--quiet"]
    return run("generate", *line, ends=BAD, says=says)


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return path


def description(folder: Path, text: str, says: str) -> Ending:
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(text)
    return run("generate", "--out", folder / "run", "--quiet", ends=BAD, says=says)


case("a description that is a list")(lambda folder: description(folder, "[]", "holds a JSON list"))
case("a description cut off")(lambda folder: description(folder, '{"format":', "not readable as JSON"))
case("a key twice")(lambda folder: description(folder, '{"a": 1, "b": 1, "b": 2}', "the key 'b' occurs twice"))
case("a number that is none")(lambda folder: description(folder, '{"a": NaN}', "NaN is no JSON number"))
case("lists in lists")(lambda folder: description(folder, "[" * 40 + "]" * 40, "nested more than 32 deep"))


@case("settings with an anchor")
def _(folder: Path) -> Ending:
    (folder / "run.yaml").write_text("size: &x 64\nseed: *x\n")
    return run("generate", "--config", folder / "run.yaml", ends=BAD, says="anchors and aliases are not read")


@case("a header longer than its file")
def _(folder: Path) -> Ending:
    (folder / "model.safetensors").write_bytes((99).to_bytes(8, "little") + b"{}")
    return model(folder / "model.safetensors", "is truncated or not a safetensors file")


@case("a tensor of another size than its type and shape have")
def _(folder: Path) -> Ending:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return model(folder / "model.safetensors", "invalid shape, data type, or offset for tensor")


case("a checkpoint that is a text")(
    lambda folder: ((folder / "model.ckpt").write_text("weights"), model(folder / "model.ckpt", "not a checkpoint"))[1]
)
case("a member outside its archive")(
    lambda folder: model(archive(folder / "model.ckpt", "../evil"), "leads out of its folder")
)


@case("a pickle that runs a program")
def _(folder: Path) -> Ending:
    (folder / "model.ckpt").write_bytes(proofs.call("os", "system", proofs.text("true")))
    return model(folder / "model.ckpt", "could run code and is not read")


@case("weights that hold together, of no model we know")
def _(folder: Path) -> Ending:
    torch.save({"w": torch.zeros(2)}, folder / "model.ckpt")
    return model(folder / "model.ckpt", "model: ")


def decoder(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None], says: str) -> Ending:
    """What generate says of the demo's depth decoder with spoilt weights."""
    shutil.copytree(DECODERS / "depth", folder / "decoders" / "depth")
    path = folder / "decoders" / "depth" / "model.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path)
    line = ["--decoder", folder / "decoders", "--task", "depth", "--number", 1, "--out", folder / "run", "--quiet"]
    return run("generate", *line, ends=BAD, says=says)


case("a decoder that lacks a weight")(
    lambda folder: decoder(folder, lambda weights: weights.pop(sorted(weights)[0]), "missing")
)
case("a decoder with a weight that is no number")(
    lambda folder: decoder(folder, lambda weights: weights[sorted(weights)[0]].fill_(float("nan")), "NaN")
)


def data_set(folder: Path, name: str, spoil: Callable[[Path], None], says: str) -> Ending:
    kind, write, tasks = LAYOUTS[name]
    write(folder / "data")
    spoil(folder / "data")
    line = ["--data", f"{kind}:{folder / 'data'}[train]", "--task", tasks[0], "--model", "tiny", "--steps", 1]
    return run("train", *line, "--out", folder / "decoder", "--cache", "off", "--quiet", ends=BAD, says=says)


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


@case("an annotation that declares an entity")
def _(folder: Path) -> Ending:
    def spoil(data: Path) -> None:
        for file in data.rglob("*.xml"):
            text = file.read_text()
            file.write_text(text.replace("<annotations>", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>'))

    kind, write, _ = LAYOUTS["cvat"]
    write(folder / "data")
    spoil(folder / "data")
    line = ["--data", f"{kind}:{folder / 'data'}", "--task", "instance", "--model", "tiny", "--steps", 1]
    says = "it declares a document type or an entity"
    return run("train", *line, "--out", folder / "decoder", "--cache", "off", "--quiet", ends=BAD, says=says)


@case("an image cut off")
def _(folder: Path) -> Ending:
    def spoil(data: Path) -> None:
        for file in (*data.rglob("*.png"), *data.rglob("*.jpg")):
            file.write_bytes(file.read_bytes()[:-20])

    return data_set(folder, "folder", spoil, "not a complete image")


@case("a photo of more pixels than a run stores, for tiles")
def _(folder: Path) -> Ending:
    (folder / "photos").mkdir()
    Image.new("1", (2**13, 2**11 + 1)).save(folder / "photos" / "a.png")
    line = [folder / "photos", "--tiles", "--classes", "ball", "--out", folder / "run", "--quiet"]
    return run("label", *line, ends=BAD, says="with --tiles at most 16,777,216")


@case("an image of more scans than any has")
def _(folder: Path) -> Ending:
    def spoil(data: Path) -> None:
        for file in (*data.rglob("*.png"), *data.rglob("*.jpg")):
            file.write_bytes(b"\xff\xd8" + b"\xff\xda\x00\x02" * 101)

    return data_set(folder, "folder", spoil, "or 100 scans")


@case("annotations cut off")
def _(folder: Path) -> Ending:
    def spoil(data: Path) -> None:
        for file in data.rglob("*.json"):
            file.write_text('{"note": "ü", ' + file.read_text()[1:-40])

    return data_set(folder, "coco", spoil, "not readable as JSON")


@case("annotations of another form")
def _(folder: Path) -> Ending:
    def spoil(data: Path) -> None:
        for file in data.rglob("*.json"):
            file.write_text(json.dumps({"images": [{"id": "one", "file_name": "ü"}], "annotations": [], "n": 1}))

    return data_set(folder, "coco", spoil, "expected a whole number")


def audited(folder: Path, spoil: Callable[[Path], None], says: str) -> Ending:
    write_run(folder / "run", 1)
    spoil(folder / "run")
    return run("audit", folder / "run", ends=GATE, says=says)


@case("a picture of a run cut off")
def _(folder: Path) -> Ending:
    def spoil(path: Path) -> None:
        file = first(path / "images", "*.png")
        file.write_bytes(file.read_bytes()[:-20])

    return audited(folder, spoil, "00000000.png")


@case("a row that names a file outside its folder")
def _(folder: Path) -> Ending:
    def spoil(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path / "state" / "ledger.sqlite")) as connection, connection:
            files = json.dumps({"image": ["", 1, "../evil"]})
            connection.execute("UPDATE samples SET files = ?", (files,))

    return audited(folder, spoil, "leads out of its folder")


def graph(folder: Path, data: bytes, says: str) -> Ending:
    """What the engine of ONNX Runtime says of a graph: the folder's manifest fits it, so the graph itself is judged."""
    (folder / "denoise.onnx").write_bytes(data)
    with pytest.raises(Refused) as refusal:
        proofs.open_in_onnx_runtime(folder, proofs.manifest_of(folder))
    return refusal.value.exit_code, refusal.value.cause, says


def node(operator: bytes, domain: bytes = b"") -> bytes:
    return proofs.message(1, proofs.message(4, operator) + proofs.message(7, domain))


case("a graph with data outside its folder")(
    lambda folder: graph(folder, proofs.onnx_model(tensors=proofs.external("../evil")), "leads out of its folder")
)
case("a graph with an operator of its own library")(
    lambda folder: graph(
        folder,
        proofs.onnx_model(nodes=node(b"Evil", b"evil")) + proofs.message(25, proofs.message(10, b"own")),
        "the operator 'Evil' of 'evil' is not supported",
    )
)
case("a graph cut off")(lambda folder: graph(folder, proofs.onnx_model()[:-1], "not an ONNX file"))


@pytest.fixture(scope="module")
def monkeypatch_of_file():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def results(tmp_path_factory, monkeypatch_of_file) -> dict[str, tuple[Ending, set[str]]]:
    """How each case ended, and which functions of the room it ran."""
    found: dict[str, tuple[Ending, set[str]]] = {}
    room = f"{ROOM}{os.sep}"
    monkeypatch_of_file.setattr(pickles, "subprocess", forked.subprocesses)
    for name, function in CASES.items():
        ran: set[str] = set()

        def hear(frame, event: str, _, ran=ran) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(room):
                ran.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}")

        sys.setprofile(hear)
        try:
            ending = function(tmp_path_factory.mktemp("hostile"))
        finally:
            sys.setprofile(None)
        found[name] = ending, ran
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_ends_in_an_exit_code_and_one_sentence(results, name):
    (code, said, expected), ran = results[name]
    assert code in (BAD, 3, GATE) and ran
    (line,) = [line for line in said.splitlines() if expected in line]
    assert "Traceback" not in said and all(letter.isprintable() for letter in line)


def guards() -> set[str]:
    """Every function and method of the room, those within others left out."""
    found = set()
    for path in ROOM.glob("*.py"):
        for one in ast.parse(path.read_text()).body:
            if isinstance(one, ast.FunctionDef):
                found.add(f"{path.stem}.{one.name}")
            elif isinstance(one, ast.ClassDef):
                methods = [part.name for part in one.body if isinstance(part, ast.FunctionDef)]
                found |= {f"{path.stem}.{one.name}.{name}" for name in methods}
    return found


def test_no_guard_stands_that_nothing_reaches(results):
    ran = set().union(*(functions for _, functions in results.values()))
    assert guards() - ran == CONFINED


def test_the_confined_process_was_reached(results):
    """Its refusal is told by the command, in words that only that process has."""
    assert "it asks for os.system" in results["a pickle that runs a program"][0][1]
    assert documents.one_line("a\n\x1b[31mb") == "a \\x1b[31mb"
