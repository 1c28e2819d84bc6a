"""Files that would run code in a careless reader. As a script: tries each on ours, and tells as JSON what happened.

What a case does is watched by an audit hook; what it must not do is leave the canary file behind.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sqlite3
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HERE = Path.cwd()
CANARY = HERE / "canary"
IS_LONG = bool(os.environ.get("DATASETDM_LONG_TESTS"))
TOUCH = f"touch {CANARY}"
PYTHON = f"open({str(CANARY)!r}, 'w').close()"
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
    "webbrowser.",
)
CASES: dict[str, Callable[[], str]] = {}


def case(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(function: Callable[[], str]) -> Callable[[], str]:
        assert name not in CASES
        CASES[name] = function
        return function

    return add


# Pickles --------------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: bytes, protocol: bytes = b"\x80\x02") -> bytes:
    """A pickle that calls module.name with pushed arguments."""
    return protocol + f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


def inner() -> bytes:
    return call("posix", "system", text(TOUCH))


def pushed(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


CALLS = {
    "os.system": call("os", "system", text(TOUCH)),
    "posix.system": call("posix", "system", text(TOUCH)),
    "subprocess.Popen": call(
        "subprocess", "Popen", text(TOUCH), b"K\xff", b"N", b"N", b"N", b"N", b"N", b"\x88", b"\x88"
    ),
    "subprocess.check_output": call(
        "subprocess", "check_output", b"]" + text("touch") + b"a" + text(str(CANARY)) + b"a"
    ),
    "builtins.eval": call("builtins", "eval", text(PYTHON)),
    "builtins.exec": call("builtins", "exec", text(PYTHON)),
    "__builtin__.eval": call("__builtin__", "eval", text(PYTHON)),
    "builtins.open": call("builtins", "open", text(str(CANARY)), text("w")),
    "builtins.getattr": call("builtins", "getattr", b"cos\npath\n", text("os")),
    "builtins.__import__": call("builtins", "__import__", text("antigravity")),
    "importlib.import_module": call("importlib", "import_module", text("antigravity")),
    "runpy.run_path": call("runpy", "run_path", text(str(HERE / "payload.py"))),
    "timeit.timeit": call("timeit", "timeit", text(PYTHON)),
    "code.InteractiveInterpreter": b"\x80\x02ccode\nInteractiveInterpreter\n(tR}(" + text("x") + b"Nub.",
    "pydoc.pipepager": call("pydoc", "pipepager", text("x"), text(TOUCH)),
    "pty.spawn": call("pty", "spawn", b"]" + text("touch") + b"a" + text(str(CANARY)) + b"a"),
    "asyncio subprocess": call("asyncio.unix_events", "_UnixSubprocessTransport._start", text(TOUCH)),
    "marshal.loads": call("marshal", "loads", pushed(b"\xe3\x00")),
    "types.FunctionType": call("types", "FunctionType", b"N", b"}"),
    "functools.partial": call("functools", "partial", b"cos\nsystem\n", text(TOUCH)),
    "operator.methodcaller": call("operator", "methodcaller", text("system"), text(TOUCH)),
    "pickle.loads": call("pickle", "loads", pushed(inner())),
    "torch.load": call("torch", "load", text(str(HERE / "inner.pt"))),
    "torch.hub.load": call("torch.hub", "load", text("someone/something"), text("model")),
    "numpy runstring": call("numpy.testing._private.utils", "runstring", text(PYTHON), b"}"),
    "bdb.Bdb.run": call("bdb", "Bdb.run", text(PYTHON)),
    "shutil.copyfile": call("shutil", "copyfile", text(__file__), text(str(CANARY))),
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(TOUCH) + b"tR.",
    "INST": b"(S'" + TOUCH.encode() + b"'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text(TOUCH) + b"o.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(" + text(TOUCH) + b"t}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "BUILD over __reduce__": b"\x80\x02ccollections\nOrderedDict\n)R}(" + text("__class__") + b"cos\nsystem\nub.",
    "persistent id": b"\x80\x02cos\nsystem\n(" + text(TOUCH) + b"tRQ.",
    "before a good pickle": inner()[:-1] + b"0}.",
    "after the end": b"\x80\x02}." + inner(),
}


def archive(data: bytes, *, more: dict[str, bytes] | None = None, pickle_name: str = "archive/data.pkl") -> bytes:
    """A zip as torch.save writes it around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as made:
        made.writestr(pickle_name, data)
        made.writestr("archive/byteorder", b"little")
        made.writestr("archive/version", b"3\n")
        for name, content in (more or {}).items():
            made.writestr(name, content)
    return buffer.getvalue()


def try_pickle(data: bytes, suffix: str = ".ckpt") -> str:
    """Through the whole door where the test is long; else through the reader that sits behind the sandbox, without the
    sandbox.
    """
    from datasetdm_fast.untrusted import pickles

    path = HERE / f"evil{suffix}"
    path.write_bytes(data)
    if IS_LONG:
        from safetensors import safe_open

        with safe_open(pickles.safe_copy(path), "np") as copy:
            return f"{len(list(copy.keys()))} tensors"
    pickles._check_beginning(path)
    return f"{len(pickles.read_tensors(path)[0])} tensors"


for _name, _data in CALLS.items():
    CASES[f"pickle: {_name}"] = lambda data=_data: try_pickle(data if data[:1] == b"\x80" else b"\x80\x02" + data)
    CASES[f"archive: {_name}"] = lambda data=_data: try_pickle(archive(data), ".pth")


@case("sandbox: a checkpoint with os.system")
def _() -> str:
    from datasetdm_fast.untrusted import pickles

    (HERE / "door.ckpt").write_bytes(archive(CALLS["os.system"]))
    return str(pickles.safe_copy(HERE / "door.ckpt"))


@case("sandbox: what gets past the reader meets the locks")
def _() -> str:
    """Each lock alone, in a process confined as the converter is, with code that really runs."""
    import subprocess

    tries = {
        "a program": f"os.system({TOUCH!r})",
        "a program without Python's knowledge": f"libc.system({TOUCH.encode()!r})",
        "a file": f"open({str(CANARY)!r}, 'w')",
        "a file without Python's knowledge": f"libc.open({str(CANARY).encode()!r}, 65, 420)",
        "a connection": "socket.create_connection(('127.0.0.1', 9))",
        "a connection without Python's knowledge": "libc.connect(libc.socket(2, 1, 0), "
        "bytes([2, 0, 0, 9, 127, 0, 0, 1]) + bytes(8), 16)",
        "memory": "bytearray(1 << 40)",
    }
    desk = HERE / "desk"
    desk.mkdir(exist_ok=True)
    told = {}
    for name, attempt in tries.items():
        code = (
            "import ctypes, os, socket, sys\nfrom pathlib import Path\nfrom datasetdm_fast.untrusted import "
            "pickles\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"lacking = pickles.leave_network() + pickles.confine(Path({str(desk / 'copy')!r}), 1000)\n"
            f"try:\n    result = {attempt}\nexcept BaseException as error:\n    result = type(error).__name__\n"
            "print(result, 'lacking', lacking, flush=True)\nos._exit(0)"
        )
        told[name] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    for name, result in told.items():
        is_lacking = "lock" in result or (
            "connection" in name and "network" in result
        )  # an old kernel, or a container that forbids it
        assert (
            result.split()[0] in ("PermissionError", "-1", "32512", "32256", "MemoryError", "OSError") or is_lacking
        ), (name, result)
    raise PermissionError(json.dumps(told))


@case("archive: a second data.pkl")
def _() -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return try_pickle(archive(b"\x80\x02}.", more={"archive/data.pkl": CALLS["os.system"]}))


@case("archive: local and central names differ")
def _() -> str:
    data = archive(CALLS["os.system"], pickle_name="archive/dat4.pkl")
    return try_pickle(data.replace(b"archive/dat4.pkl", b"archive/data.pkl", 1))


@case("archive: names that lead out of it")
def _() -> str:
    return try_pickle(archive(b"\x80\x02}.", more={"../../canary": b"x", "/tmp/canary": b"x"}))


@case("archive: one that unpacks without end")
def _() -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return try_pickle(buffer.getvalue())


@case("tar: torch's oldest format")
def _() -> str:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(inner())
            made.addfile(entry, io.BytesIO(inner()))
    return try_pickle(buffer.getvalue())


@case("legacy: magic number, then code")
def _() -> str:
    return try_pickle(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + inner())


@case("torchscript")
def _() -> str:
    return try_pickle(
        archive(inner(), more={"archive/constants.pkl": inner(), "archive/code/__torch__.py": PYTHON.encode()}), ".pth"
    )


@case("a pickle called safetensors")
def _() -> str:
    from datasetdm_fast.engine.decoders.checkpoint import load_decoder
    from datasetdm_fast.engine.decoders.config import DEMO

    (HERE / "evil").mkdir()
    (HERE / "evil" / "config.json").write_bytes((DEMO / "depth" / "config.json").read_bytes())
    (HERE / "evil" / "model.safetensors").write_bytes(inner())
    return str(load_decoder(HERE / "evil"))


@case("a numpy object array as weights")
def _() -> str:
    import numpy as np

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    return try_pickle(buffer.getvalue().replace(pickle.dumps({"a": 1}), inner()), ".pth")


# Models ---------------------------------------------------------------------------------------------------------------


def model_folder(changes: dict[str, dict], files: dict[str, bytes] | None = None) -> Path:
    """The demo model with other settings and more files."""
    import shutil

    from datasetdm_fast.engine.loading.folder import DEMO

    folder = HERE / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEMO, folder, copy_function=lambda source, target: os.symlink(Path(source).resolve(), target))
    for name, settings in changes.items():
        path = folder / name
        before = json.loads(path.read_text())
        path.unlink()
        path.write_text(json.dumps({**before, **settings}))
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def try_model(changes: dict[str, dict], files: dict[str, bytes] | None = None) -> str:
    from datasetdm_fast.engine.loading.folder import load_folder

    model = load_folder(model_folder(changes, files))
    return f"loaded, {len(model.tokenizer('a red ball').input_ids)} tokens"


REMOTE = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
MODULE = {
    "evil.py": PYTHON.encode(),
    "text_encoder/evil.py": PYTHON.encode(),
    "tokenizer/evil.py": PYTHON.encode(),
    "unet/evil.py": PYTHON.encode(),
}


@case("model: auto_map and trust_remote_code")
def _() -> str:
    parts = ("unet/config.json", "text_encoder/config.json", "vae/config.json", "tokenizer/tokenizer_config.json")
    return try_model({part: {"auto_map": REMOTE, "trust_remote_code": True} for part in parts}, MODULE)


@case("model: attention code from the hub")
def _() -> str:
    return try_model(
        {
            "text_encoder/config.json": {
                "_attn_implementation": "someone/kernels:evil",
                "attn_implementation": "someone/kernels:evil",
            }
        }
    )


@case("model: quantisation code")
def _() -> str:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "modules": "evil.Evil"}}
    return try_model({"unet/config.json": quantised, "text_encoder/config.json": quantised}, MODULE)


@case("model: adapters beside the weights")
def _() -> str:
    return try_model(
        {},
        {
            "text_encoder/adapter_config.json": b'{"peft_type": "LORA", "auto_mapping": {"base_model_class": "evil"}}',
            "text_encoder/adapter_model.bin": inner(),
        },
    )


@case("model: a pipeline of its own")
def _() -> str:
    return try_model(
        {"model_index.json": {"_class_name": ["pipeline.py", "Evil"], "unet": ["evil", "Evil"]}},
        {"pipeline.py": PYTHON.encode()},
    )


@case("model: a scheduler class by path")
def _() -> str:
    return try_model(
        {"scheduler/scheduler_config.json": {"_class_name": "os.system", "_target_": "os.system", "command": TOUCH}}
    )


@case("model: an activation by path")
def _() -> str:
    return try_model(
        {"unet/config.json": {"act_fn": "os.system"}, "text_encoder/config.json": {"hidden_act": "os.system"}}
    )


@case("model: a tokenizer class by path")
def _() -> str:
    return try_model(
        {
            "tokenizer/tokenizer_config.json": {
                "tokenizer_class": "evil.Evil",
                "tokenizer_file": str(HERE / "payload.py"),
                "processor_class": "evil",
            }
        },
        MODULE,
    )


@case("model: a chat template that climbs")
def _() -> str:
    template = "{{ cycler.__init__.__globals__.os.system('" + TOUCH + "') }}"
    return try_model(
        {"tokenizer/tokenizer_config.json": {"chat_template": template, "extra_special_tokens": {"x": template}}},
        {"tokenizer/chat_template.jinja": template.encode()},
    )


@case("model: weights outside of the folder")
def _() -> str:
    folder = model_folder({})
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../../../etc/passwd"}}'
    )
    from datasetdm_fast.engine.loading.folder import load_folder

    return load_folder(folder).name


@case("decoder: a target by path")
def _() -> str:
    from datasetdm_fast.engine.decoders.config import DecoderConfig

    return DecoderConfig.from_json(
        json.dumps({"_target_": "os.system", "kind": "depth", "task": "depth", "levels": []})
    ).kind


@case("decoder: a kind by path")
def _() -> str:
    from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig

    text = DecoderConfig("depth", "depth", SD1_LEVELS).to_json().replace('"kind": "depth"', '"kind": "os.system"')
    return DecoderConfig.from_json(text).kind


# Settings, prompts, run folders, graphs -------------------------------------------------------------------------------


def try_yaml(content: str) -> str:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.runs.run_settings import RunConfig

    (HERE / "run.yaml").write_text(content)
    return parse(["--config", str(HERE / "run.yaml")], RunConfig)[0].out


@case("yaml: python/object/apply")
def _() -> str:
    return try_yaml(f"out: !!python/object/apply:os.system ['{TOUCH}']")


@case("yaml: python/object/new")
def _() -> str:
    return try_yaml(f"out: !!python/object/new:subprocess.Popen [['touch', '{CANARY}']]")


@case("yaml: python/name")
def _() -> str:
    return try_yaml("out: !!python/name:os.system")


@case("yaml: a merge of aliases without end")
def _() -> str:
    return try_yaml(
        "a: &a [x, x]\n"
        + "".join(f"{chr(98 + k)}: &{chr(98 + k)} [*{chr(97 + k)}, *{chr(97 + k)}]\n" for k in range(24))
    )


@case("xml: an external entity")
def _() -> str:
    from datasetdm_fast.untrusted.documents import read_xml

    (HERE / "a.xml").write_text('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>')
    return str(read_xml(HERE / "a.xml").text)


@case("xml: a thousand million laughs")
def _() -> str:
    from datasetdm_fast.untrusted.documents import read_xml

    entities = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 10))
    (HERE / "a.xml").write_text(f'<!DOCTYPE a [<!ENTITY a0 "ha">{entities}]><a>&a9;</a>')
    return str(read_xml(HERE / "a.xml").text)


@case("prompts: a shell behind a pipe")
def _() -> str:
    from datasetdm_fast.engine.loop.prompts import split_prompts
    from datasetdm_fast.runs.jobs.prompt_files import read_prompts

    for given in (
        f"pipe:{TOUCH}",
        f"|{TOUCH}",
        f"$({TOUCH})",
        f"`{TOUCH}`",
        "{0.__class__.__init__.__globals__}",
        "{{ ''.__class__ }}",
    ):
        name, text = read_prompts(given)
        assert [(prompt.line, prompt.text) for prompt in split_prompts(text, name)] == [(1, given)]
    return "kept as they are"


@case("model: a shell behind a pipe")
def _() -> str:
    from datasetdm_fast.engine.loading import load_model

    return load_model(f"pipe:{TOUCH}").name


def hostile_run(statement: str) -> Path:
    import shutil

    from rendered import write_run

    path = HERE / "run"
    shutil.rmtree(path, ignore_errors=True)
    write_run(path, 2)
    with sqlite3.connect(path / "state/ledger.sqlite") as connection:
        connection.executescript(statement)
    connection.close()
    return path


@case("run folder: a path that leads out of it")
def _() -> str:
    from datasetdm_fast.runs.run_folder.reader import open_run

    return str(
        open_run(
            hostile_run("UPDATE samples SET files = json_set(files, '$.image[2]', '../../../../../../etc/1.png')")
        )[0].image
    )


@case("run folder: a table that is a program")
def _() -> str:
    from datasetdm_fast.runs.run_folder.reader import open_run

    path = hostile_run(
        "ALTER TABLE samples RENAME TO kept; CREATE VIEW samples AS SELECT \"index\", load_extension('/tmp/evil') AS "
        "prompt, seed, classes, status, reason, "
        "recipe, files, labels FROM kept;"
    )
    return open_run(path)[0].prompt


@case("run folder: a description with a target")
def _() -> str:
    from datasetdm_fast.runs.run_folder.document import read_document

    path = hostile_run("")
    document = json.loads((path / "run.json").read_text())
    document["engine"] = {"_target_": "os.system", "command": TOUCH}
    (path / "run.json").write_text(json.dumps(document))
    return str(sorted(read_document(path)["engine"]))


def message(number: int, content: bytes) -> bytes:
    """One length-delimited protobuf field."""
    length, size = bytearray(), len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return (
        bytes([number << 3 | 2 if number < 16 else (number << 3 | 2) & 127 | 128])
        + (bytes([number >> 4]) if number > 15 else b"")
        + bytes([*length, size])
        + content
    )


def onnx_model(*, nodes: bytes = b"", tensors: bytes = b"") -> bytes:
    return b"\x08\x0a" + message(8, message(1, b"") + b"\x10\x16") + message(7, nodes + tensors + message(2, b"g"))


def external(location: str) -> bytes:
    entry = message(13, message(1, b"location") + message(2, location.encode()))
    return message(5, message(8, b"w") + entry + b"\x70\x01")


def try_onnx(data: bytes) -> str:
    """The graph in a folder with a manifest that fits it, given to everything that hands graphs to a library."""
    from datasetdm_fast.errors import Refused

    folder = HERE / "graph"
    folder.mkdir(exist_ok=True)
    (folder / "denoise.onnx").write_bytes(data)
    refusals = []
    for door in (open_in_onnx_runtime, build_with_tensorrt):
        try:
            return f"{door.__name__}: {door(folder, manifest_of(folder))}"
        except Refused as stop:
            refusals.append(stop)
    assert len({stop.cause for stop in refusals}) == 1, refusals
    raise refusals[0]


def manifest_of(folder: Path):
    from datasetdm_fast.export.manifest import FileInfo, Manifest, StageFile

    data = (folder / "denoise.onnx").read_bytes()
    files = {"denoise.onnx": FileInfo(hashlib.sha256(data).hexdigest(), len(data))}
    stages = {"denoise": StageFile("denoise.onnx", "", (), ())}
    return Manifest(stages, files, "fp16", "any", 18, 64, "source", {}, {}, {}, "0")


def open_in_onnx_runtime(folder: Path, manifest):
    import torch

    from datasetdm_fast.data import Text
    from datasetdm_fast.engine.engines.exported import graphs, ort
    from datasetdm_fast.engine.loading import load_model

    export = graphs.export_cached
    graphs.export_cached = lambda *_, **options: (folder, manifest)  # the cache holds this very export
    try:
        engine = ort.OrtEngine(load_model("tiny"), device="cpu")
    finally:
        graphs.export_cached = export
    return engine.denoise(torch.zeros(1, 4, 8, 8), 1.0, Text(torch.zeros(2, 77, 32)))


def build_with_tensorrt(folder: Path, manifest):
    from types import SimpleNamespace

    from datasetdm_fast.engine.engines.exported.trt import TrtStage

    flavour = SimpleNamespace(title="TensorRT-RTX 1.0", capabilities=())
    queue = SimpleNamespace(gpu="a GPU", capability="sm86")
    engine = SimpleNamespace(flavour=flavour, queue=queue, on_message=lambda line: None)
    return TrtStage(engine, folder, manifest, "denoise").plan(1)


@case("onnx: data outside of its folder")
def _() -> str:
    return try_onnx(onnx_model(tensors=external("../../../../etc/passwd")))


@case("onnx: data by an absolute path")
def _() -> str:
    return try_onnx(onnx_model(tensors=external("/etc/passwd")))


@case("onnx: data behind a link")
def _() -> str:
    (HERE / "graph").mkdir(exist_ok=True)
    (HERE / "graph/link").unlink(missing_ok=True)
    (HERE / "graph/link").symlink_to("/etc/passwd")
    return try_onnx(onnx_model(tensors=external("link")))


@case("onnx: data in a file of two names")
def _() -> str:
    (HERE / "graph").mkdir(exist_ok=True)
    (HERE / "secret").write_bytes(b"secret")
    (HERE / "graph/hard").unlink(missing_ok=True)
    os.link(HERE / "secret", HERE / "graph/hard")
    return try_onnx(onnx_model(tensors=external("hard")))


@case("onnx: an operator that loads a library")
def _() -> str:
    return try_onnx(onnx_model(nodes=message(1, message(4, b"Evil") + message(7, b"evil.ops"))))


@case("onnx: a compiled engine inside the graph")
def _() -> str:
    return try_onnx(onnx_model(nodes=message(1, message(4, b"EPContext") + message(7, b"com.microsoft"))))


def main() -> None:
    # libraries that are loaded for the first time are no doing of a case
    import torch  # noqa: F401

    with suppress(ImportError):
        import ml_dtypes  # noqa: F401

    from datasetdm_fast.engine.loading.folder import DEMO, load_folder
    from datasetdm_fast.errors import Missing, Refused

    load_folder(DEMO)
    (HERE / "payload.py").write_text(PYTHON)
    (HERE / "inner.pt").write_bytes(inner())
    events: list[str] = []
    is_watching = False

    def watch(event: str, arguments: tuple) -> None:
        if is_watching and event.startswith(FORBIDDEN):
            events.append(event)

    sys.addaudithook(watch)
    results = {}
    for name, attempt in CASES.items():
        events.clear()
        is_watching = not name.startswith("sandbox") and not (
            IS_LONG and name.startswith(("pickle", "archive", "legacy", "torchscript", "tar", "a numpy"))
        )
        try:
            ended, said = "accepted", attempt()
        except (Refused, Missing) as stop:
            ended, said = type(stop).__name__, stop.cause
        except Exception as error:
            ended, said = "raised", f"{type(error).__name__}: {error}"
        is_watching = False
        results[name] = {"ended": ended, "said": said, "events": list(events), "canary": CANARY.exists()}
        CANARY.unlink(missing_ok=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
