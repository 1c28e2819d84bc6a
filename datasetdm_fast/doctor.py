"""python -m datasetdm_fast.doctor: report what is installed, which engines can run, why others cannot, and whether a
first image can be made.
"""

# Nothing that may be broken is imported in this process: each question is put to another, which may fail or hang.
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ENGINES
from datasetdm_fast.settings import setting
from datasetdm_fast.version import __version__

EXAMPLES = ("--json",)
LIBRARIES = (
    "torch diffusers transformers accelerate safetensors tokenizers numpy scipy pillow pycocotools pyyaml tqdm triton "
    "onnx onnxruntime onnxruntime-gpu onnxscript openvino tensorrt tensorrt-rtx xformers ray openai pyarrow"
).split()
EXTRAS = {  # of pip install 'datasetdm-fast[NAME]' -> the library it is about, and when to install it
    "trt-full": (
        "tensorrt",
        "for data-centre GPUs from Hopper on, which TensorRT-RTX does not support, and for plans built once for one "
        "kind of GPU",
    ),
    "ort-gpu": (
        "onnxruntime-gpu",
        "for --engine ort on an NVIDIA GPU, in an environment without onnxruntime, which it replaces; --engine fast "
        "needs neither",
    ),
    "xformers": (
        "xformers",
        "for diffusers pipelines that are run for comparison; no engine here calls it",
    ),
}
PATIENCE = 180.0  # seconds for one process
COUNTED = 200_000  # files of a cache looked at
MARK = "datasetdm-doctor:"
ASKED = """
import json
for name, code in {questions!r}.items():
    def tell(values, name=name):
        print({mark!r} + json.dumps({{name: {{"problem": "", **values}}}}), flush=True)
    try:
        exec(code, {{"tell": tell}})
    except BaseException as error:
        tell({{"problem": type(error).__name__ + ": " + " ".join(str(error).split())}})
"""

# The questions one process is asked in turn; another goes on behind the one it crashed or hung at.
QUESTIONS = {
    "extension": """
from datasetdm_fast import _C
tell({"path": _C.__file__, "cuda": bool(_C.built_with_cuda), "devices": int(_C.cuda_device_count())})
""",
    "gpu": """
from datasetdm_fast.export.tensorrt import flavours
tell({"driver": flavours.describe_driver(), "capabilities": flavours.gpu_capabilities()})
""",
    "torch": """
import torch
devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
tell({"version": torch.__version__, "cuda": torch.version.cuda or "", "threads": torch.get_num_threads(),
      "devices": [{"name": d.name, "capability": f"{d.major}.{d.minor}", "memory": d.total_memory} for d in devices]})
""",
    **{
        f"engine {name}": f"""
from importlib import import_module
from datasetdm_fast.config import ENGINES
from datasetdm_fast.engine.engines import check_engine
from datasetdm_fast.errors import Missing, Refused
try:
    check_engine({name!r})
    import_module(ENGINES[{name!r}].engine.partition(":")[0])
    tell({{"runs": True, "cause": "", "remedy": ""}})
except (Missing, Refused) as stop:
    tell({{"runs": False, "cause": stop.cause, "remedy": stop.remedy}})
"""
        for name in ENGINES.names
    },
}
SELF_TEST = """
import contextlib, io
from pathlib import Path
from datasetdm_fast import generate
from datasetdm_fast.runs.run_folder import audit
line = ["--number", "1", "--steps", "2", "--task", "semantic,instance,depth,pose", "--quiet", "--out", {out!r}]
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
    code = generate.main(line)
if code:
    problem = next(iter(told.getvalue().strip().splitlines()), f"ended with code {{code}}")
else:
    report = audit.audit(Path({out!r}))
    problem = "; ".join(f"{{found.place}}: {{found.what}}" for found in report.findings)
    problem = problem or ("" if report.done == 1 else "no sample came out")
tell({{"problem": problem}})
"""
LOCKS = """
import os
from pathlib import Path
from datasetdm_fast.untrusted import pickles
tell({"lacking": pickles.leave_network() + pickles.confine(Path(os.getcwd()) / "x", 0)})
"""


@dataclass(frozen=True)
class DoctorConfig:
    json: bool = setting(False, "everything as one JSON object on stdout")


def ask(questions: Mapping[str, str], patience: float = PATIENCE) -> dict[str, dict[str, Any]]:
    """What other processes answered; a crash, a hang or an error becomes the `problem` of that one question."""
    answers: dict[str, dict[str, Any]] = {}
    while left := {name: code for name, code in questions.items() if name not in answers}:
        told, problem = _run(left, patience)
        answers |= {name: told[name] for name in left if name in told}
        if silent := next((name for name in left if name not in answers), None):
            answers[silent] = {"problem": problem}
    return {name: {**values, "problem": _printable(values["problem"])} for name, values in answers.items()}


def _run(questions: Mapping[str, str], patience: float) -> tuple[dict[str, Any], str]:
    """The answers one process gave before it ended, and how it ended."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    options: dict[str, Any] = {"env": {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **quiet}, "timeout": patience}
    options |= {"stdin": subprocess.DEVNULL, "capture_output": True, "cwd": tempfile.gettempdir()}
    try:
        ended = subprocess.run([sys.executable, "-c", ASKED.format(mark=MARK, questions=dict(questions))], **options)
        out, how = ended.stdout, f"ended with code {ended.returncode}"
        if ended.returncode < 0:
            how = f"crashed ({signal.Signals(-ended.returncode).name})"
    except subprocess.TimeoutExpired as stop:
        out, how = stop.stdout or b"", f"no answer within {patience:.0f} s"
    except OSError as error:
        return {}, f"no process could be started ({error.strerror})"
    told: dict[str, Any] = {}
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            with suppress(ValueError):  # cut off by the crash
                told |= json.loads(line.removeprefix(MARK))
    return told, how


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]


def examine() -> dict[str, Any]:
    """Everything the command tells."""
    answers = ask(QUESTIONS) | ask({"sandbox": LOCKS})
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        problem = ask({"self-test": SELF_TEST.format(out=f"{folder}/run")})["self-test"]["problem"]
    test = {"passed": not problem, "problem": problem, "seconds": round(time.monotonic() - begin, 1)}
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0
    names = {"python": platform.python_version(), "platform": platform.platform()}
    return {
        "package": {"version": __version__, "path": str(Path(__file__).parent), "extension": answers["extension"]},
        "system": {**names, "cores": os.cpu_count() or 0, "memory": memory},
        "libraries": {name: _version(name) for name in LIBRARIES},
        "gpu": answers["gpu"],
        "torch": answers["torch"],
        "engines": {name: _engine(**answers[f"engine {name}"]) for name in ENGINES.names},
        "sandbox": answers["sandbox"],
        "caches": _caches(),
        "disk": {place: _free(Path(place)) for place in (os.getcwd(), tempfile.gettempdir(), str(Path.home()))},
        "self_test": test,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    except Exception as error:  # the description of a half-removed package
        return f"unknown ({type(error).__name__})"


def _engine(problem: str, **answer: Any) -> dict[str, Any]:
    cause, remedy = f"it does not load ({problem})", "Install the library that this names anew."
    return {"runs": False, "cause": cause, "remedy": remedy} if problem else answer


def _caches() -> dict[str, dict[str, Any]]:
    home = Path.home()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface") / "hub"
    places = {
        "ours (converted checkpoints, graphs, plans)": os.environ.get("DATASETDM_CACHE") or caches / "datasetdm_fast",
        "model hub": hub,
        "triton": os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache",
    }
    return {name: {"path": str(Path(path)), **_size(Path(path))} for name, path in places.items()}


def _size(path: Path) -> dict[str, Any]:
    """Bytes and files of a folder; of a very large one, those of its first files."""
    names, sizes = (os.path.join(place, name) for place, _, inside in os.walk(path) for name in inside), []
    for name in islice(names, COUNTED + 1):
        with suppress(OSError):
            sizes.append(os.lstat(name).st_size)
    return {"bytes": sum(sizes), "files": len(sizes), "is_all": len(sizes) <= COUNTED}


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person, one subject a line."""
    package, system, torch, gpu, test = (found[name] for name in ("package", "system", "torch", "gpu", "self_test"))
    extension, lacking = package["extension"], found["sandbox"]["problem"] or "; ".join(found["sandbox"]["lacking"])
    devices = [
        f"{one['name']} (sm {one['capability']}, {_gigabytes(one['memory'])})" for one in torch.get("devices", ())
    ]
    cards = f"CUDA {torch.get('cuda') or 'none'}, GPUs: {', '.join(devices) or 'none'}"
    size = f"{system['cores']} cores, {_gigabytes(system['memory'])}"
    told = [
        ("package", f"datasetdm_fast {package['version']} in {package['path']}"),
        ("extension", extension["problem"] or f"built {'with CUDA' if extension['cuda'] else 'for the CPU'}"),
        ("system", f"Python {system['python']}, {system['platform']}, {size}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in found["libraries"].items() if version)),
        ("missing", ", ".join(name for name, version in found["libraries"].items() if not version)),
        ("driver", gpu["problem"] or gpu["driver"]),
        ("torch", torch["problem"] or f"{torch['version']}, {cards}"),
    ]
    for name, (library, sentence) in EXTRAS.items():
        told.append(("extra", f"{name} ({found['libraries'][library] or 'not installed'}): {sentence}"))
    for name, engine in found["engines"].items():
        cause = f"does not run here: {engine['cause']}. {engine['remedy']}"
        told.append((f"--engine {name}", "runs here" if engine["runs"] else cause))
    guard = f"without {lacking}" if lacking else "by a process without access to network, programs and files"
    told.append(("pickles", f"checkpoints are read {guard}"))
    for name, cache in found["caches"].items():
        held = f"{'' if cache['is_all'] else 'at least '}{_gigabytes(cache['bytes'])} in {cache['files']} files"
        told.append(("cache", f"{name}: {held}, {cache['path']}"))
    told += [("disk", f"{_gigabytes(free)} free in {place}") for place, free in found["disk"].items()]
    told.append(("self-test", f"{'passed' if test['passed'] else 'FAILED: ' + test['problem']} ({test['seconds']} s)"))
    return [f"{name:<19}{text}" for name, text in told if text]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 0 else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0 where the self-test passed, 3 where something it needs is missing."""
    try:
        from datasetdm_fast.command_line.ending import run_command
    except Exception as error:  # even what every command begins with may be broken
        found = examine()
        asked = sys.argv[1:] if arguments is None else arguments
        print(json.dumps(found) if "--json" in asked else "\n".join(lines(found)))
        cause = f"datasetdm_fast.command_line.flags does not load: {type(error).__name__}: {_printable(str(error))}"
        print(cause, "Install the package anew.", sep="\n", file=sys.stderr)
        return 3
    return run_command(_command, arguments)


def _command(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.errors import Missing

    config, _ = parse(arguments, DoctorConfig, "python -m datasetdm_fast.doctor", __doc__, EXAMPLES)
    if not config.json:
        print("testing every engine, then generating a first image: about ten seconds", file=sys.stderr, flush=True)
    found = examine()
    print(json.dumps(found) if config.json else "\n".join(lines(found)))
    if problem := found["self_test"]["problem"]:
        raise Missing(f"the self-test failed: {problem}", "Fix what the lines above report, then run doctor again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
