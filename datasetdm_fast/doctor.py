"""python -m datasetdm_fast.doctor: what is installed here, which engine can run and why another cannot, and whether a
first image comes out.
"""

# Nothing that may be broken is imported in this process: each question is put to a process of its own, which may fail,
# crash or hang.
from __future__ import annotations

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
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ENGINES, setting

LIBRARIES = (
    "torch diffusers transformers accelerate safetensors tokenizers numpy scipy pillow pycocotools pyyaml tqdm triton "
    "onnx onnxruntime onnxruntime-gpu onnxscript openvino tensorrt tensorrt-rtx ray openai datasets"
).split()
PATIENCE = 180.0  # seconds for one process
COUNTED = 200_000  # files of a cache looked at
MARK = "datasetdm-doctor:"
ASKED = """
import json
for name, code in {questions!r}.items():
    def tell(values, name=name):
        print({mark!r} + json.dumps({{name: {{"values": values}}}}), flush=True)
    try:
        exec(code, {{"tell": tell}})
    except BaseException as error:
        problem = type(error).__name__ + ": " + " ".join(str(error).split())
        print({mark!r} + json.dumps({{name: {{"problem": problem}}}}), flush=True)
"""

# The questions one process is asked in turn; another goes on behind the one it crashed or hung at.
QUESTIONS = {
    "extension": """
from datasetdm_fast import _C
tell({"path": _C.__file__, "cuda": bool(_C.built_with_cuda), "devices": int(_C.cuda_device_count())})
""",
    "gpu": """
from datasetdm_fast.export.tensorrt import flavours
tell({"driver": flavours.driver(), "capabilities": flavours.gpu_capabilities()})
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
from datasetdm_fast.engines import check_engine
from datasetdm_fast.errors import Missing, Refused
try:
    check_engine({name!r})
    import_module({kind.engine.partition(":")[0]!r})
    tell({{"runs": True, "cause": "", "remedy": ""}})
except (Missing, Refused) as stop:
    tell({{"runs": False, "cause": stop.cause, "remedy": stop.remedy}})
"""
        for name, kind in ENGINES.items()
    },
}
SELF_TEST = """
import contextlib, io
from pathlib import Path
from datasetdm_fast import generate
from datasetdm_fast.run_folder import audit
line = ["--number", "1", "--steps", "2", "--task", "semantic,instance,depth,pose", "--quiet", "--out", {out!r}]
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
    code = generate.main(line)
report = audit.audit(Path({out!r})) if code == 0 else None
findings = [f"{{found.place}}: {{found.what}}" for found in report.findings] if report else []
tell({{"code": code, "said": told.getvalue(), "findings": findings, "samples": report.done if report else 0}})
"""
LOCKS = """
import os
from pathlib import Path
from datasetdm_fast.foreign import pickles
tell({"lacking": pickles.leave_network() + pickles.confine(Path(os.getcwd()) / "x", 0)})
"""


@dataclass(frozen=True)
class DoctorConfig:
    json: bool = setting(False, "everything as one JSON object on stdout")


@dataclass(frozen=True)
class Answer:
    """What a process said, or why it said nothing."""

    values: dict[str, Any]
    problem: str = ""


def ask(questions: Mapping[str, str], patience: float = PATIENCE) -> dict[str, Answer]:
    """What processes of their own told; a crash, a hang or an error becomes a sentence, and does not keep the next
    question from being answered.
    """
    answers: dict[str, Answer] = {}
    while left := {name: code for name, code in questions.items() if name not in answers}:
        told, problem = _run(left, patience)
        for name in left.keys() & told.keys():
            answers[name] = Answer(told[name].get("values", {}), _printable(told[name].get("problem", "")))
        if silent := next((name for name in left if name not in answers), None):
            answers[silent] = Answer({}, problem)
    return answers


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
    return {
        "package": _package(answers["extension"]),
        "system": _system(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "gpu": _told(answers["gpu"]),
        "torch": _told(answers["torch"]),
        "engines": {name: _engine(answers[f"engine {name}"]) for name in ENGINES},
        "sandbox": _told(answers["sandbox"]),
        "caches": _caches(),
        "disk": {place: _free(Path(place)) for place in (os.getcwd(), tempfile.gettempdir(), str(Path.home()))},
        "self_test": _self_test(),
    }


def _told(answer: Answer) -> dict[str, Any]:
    return {"problem": answer.problem, **answer.values}


def _package(extension: Answer) -> dict[str, Any]:
    import datasetdm_fast

    return {
        "version": datasetdm_fast.__version__,
        "path": str(Path(datasetdm_fast.__file__).parent),
        "extension": _told(extension),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    except Exception as error:  # the description of a half-removed package
        return f"unknown ({type(error).__name__})"


def _system() -> dict[str, Any]:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0
    names = {"python": platform.python_version(), "platform": platform.platform()}
    return {**names, "cores": os.cpu_count() or 0, "memory": memory}


def _engine(answer: Answer) -> dict[str, Any]:
    if not answer.problem:
        return answer.values
    remedy = "Install the library that this names anew."
    return {"runs": False, "cause": f"it does not load ({answer.problem})", "remedy": remedy}


def _caches() -> dict[str, dict[str, Any]]:
    home = Path.home()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    kept = os.environ.get("DATASETDM_CACHE") or caches / "datasetdm_fast"
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface") / "hub"
    places = {
        "ours (converted checkpoints, graphs, plans)": Path(kept),
        "model hub": Path(hub),
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
    }
    return {name: {"path": str(path), **_size(path)} for name, path in places.items()}


def _size(path: Path) -> dict[str, Any]:
    """Bytes and files of a folder; of a very large one, those of its first files."""
    total = files = 0
    for folder, _, names in os.walk(path, onerror=lambda error: None):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
            files += 1
        if files > COUNTED:
            break
    return {"bytes": total, "files": files, "is_all": files <= COUNTED}


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def _self_test() -> dict[str, Any]:
    """One image of the demo model with all its labels, and an audit of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        answer = ask({"self-test": SELF_TEST.format(out=str(Path(folder) / "run"))})["self-test"]
    values, seconds = answer.values, round(time.monotonic() - begin, 1)
    problem = answer.problem
    if not problem and values["code"]:
        problem = _printable(next(iter(values["said"].strip().splitlines()), f"ended with code {values['code']}"))
    problem = problem or "; ".join(values.get("findings", []))
    if not problem and values.get("samples") != 1:
        problem = "no sample came out"
    return {"passed": not problem, "problem": problem, "seconds": seconds}


# Telling it -----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person, one subject a line."""
    package, system, torch, gpu, test = (found[name] for name in ("package", "system", "torch", "gpu", "self_test"))
    extension = package["extension"]
    built = extension["problem"] or ("built with CUDA" if extension["cuda"] else "built for the CPU")
    installed = [f"{name} {version}" for name, version in found["libraries"].items() if version]
    absent = [name for name, version in found["libraries"].items() if not version]
    devices = [
        f"{device['name']} (sm {device['capability']}, {_gigabytes(device['memory'])})"
        for device in torch.get("devices", [])
    ]
    lacking = found["sandbox"]["problem"] or "; ".join(found["sandbox"]["lacking"])
    cards = f"CUDA {torch.get('cuda') or 'none'}, GPUs: {', '.join(devices) or 'none'}"
    size = f"{system['cores']} cores, {_gigabytes(system['memory'])}"
    told = [
        ("package", f"datasetdm_fast {package['version']} in {package['path']}"),
        ("extension", built),
        ("system", f"Python {system['python']}, {system['platform']}, {size}"),
        ("libraries", ", ".join(installed)),
        ("not there", ", ".join(absent)),
        ("driver", gpu["problem"] or gpu["driver"]),
        ("torch", torch["problem"] or f"{torch['version']}, {cards}"),
    ]
    for name, engine in found["engines"].items():
        cause = f"does not run here: {engine['cause']}. {engine['remedy']}"
        told.append((f"--engine {name}", "runs here" if engine["runs"] else cause))
    sandbox = f"without {lacking}" if lacking else "by a process without network, programs and files"
    told.append(("pickles", f"read {sandbox}"))
    for name, cache in found["caches"].items():
        held = f"{'' if cache['is_all'] else 'at least '}{_gigabytes(cache['bytes'])} in {cache['files']} files"
        told.append(("cache", f"{name}: {held}, {cache['path']}"))
    told += [("disk", f"{_gigabytes(free)} free in {place}") for place, free in found["disk"].items()]
    told.append(("self-test", f"{'passed' if test['passed'] else 'FAILED: ' + test['problem']} ({test['seconds']} s)"))
    return [f"{name:<15}{text}" for name, text in told if text]


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
        print(
            f"datasetdm_fast.command_line.flags does not load: {type(error).__name__}: {_printable(str(error))}",
            file=sys.stderr,
        )
        print("Install the package anew.", file=sys.stderr)
        return 3
    return run_command(_command, arguments)


def _command(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.errors import Missing

    config, _ = parse(arguments, DoctorConfig, "python -m datasetdm_fast.doctor", __doc__)
    found = examine()
    print(json.dumps(found) if config.json else "\n".join(lines(found)))
    if not found["self_test"]["passed"]:
        raise Missing(
            f"the self-test failed: {found['self_test']['problem']}", "Mend what the lines above say, and ask again."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
