"""What a machine has and what runs on it: each probe is run in another process, which may fail or hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from datasetdm_fast.config import ENGINES

TIMEOUT = 180.0  # seconds for one process
MARK = "datasetdm-doctor:"
RUNNER = f"""
import json, sys
for name, code in json.loads(sys.argv[1]).items():
    def report(name=name, **values):
        print({MARK!r} + json.dumps({{name: {{"problem": "", **values}}}}), flush=True)
    try:
        exec(code, {{"report": report}})
    except BaseException as error:
        report(problem=type(error).__name__ + ": " + " ".join(str(error).split()))
"""
PROBES = {  # name -> code, which calls report(); a new process continues after a probe that crashed or hung
    "extension": """
from datasetdm_fast import _C
report(path=_C.__file__, cuda=bool(_C.built_with_cuda), devices=int(_C.cuda_device_count()))
""",
    "gpu": """
from datasetdm_fast.export.tensorrt import flavours
report(driver=flavours.describe_driver(), capabilities=flavours.gpu_capabilities())
""",
    "torch": """
import torch
devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
report(version=torch.__version__, cuda=torch.version.cuda or "", threads=torch.get_num_threads(),
       devices=[{"name": d.name, "capability": f"{d.major}.{d.minor}", "memory": d.total_memory} for d in devices])
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
    report(runs=True, cause="", remedy="")
except (Missing, Refused) as stop:
    report(runs=False, cause=stop.cause, remedy=stop.remedy)
"""
        for name in ENGINES.names
    },
    "self-test": """
import contextlib, io, tempfile
from datasetdm_fast import generate
output = io.StringIO()
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    line = ["--number", "1", "--steps", "2", "--task", "semantic,instance,depth,pose", "--quiet", "--out", folder]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = generate.main(line)
report(problem=next(iter(output.getvalue().strip().splitlines()), f"ended with code {code}") if code else "")
""",
    "sandbox": """
import os
from pathlib import Path
from datasetdm_fast.untrusted import pickles
report(missing=pickles.leave_network() + pickles.confine(Path(os.getcwd()) / "x", 0))
""",
}
MODEL_PROBE = """
from pathlib import Path
from datasetdm_fast.config import ENGINES
from datasetdm_fast.engine.loading.folder import family_of
family = family_of(Path({folder!r}))
report(family=family.title, engines=[name for name in ENGINES.names if family.served_by(ENGINES[name].needs)])
"""


def run_probes(probes: Mapping[str, str], timeout: float = TIMEOUT) -> dict[str, dict[str, Any]]:
    """What each probe reported; a crash, a hang or an error becomes the `problem` of that probe alone."""
    reports: dict[str, dict[str, Any]] = {}
    while remaining := {name: code for name, code in probes.items() if name not in reports}:
        output, ending = _run_process(remaining, timeout)
        for line in output.splitlines():
            with suppress(ValueError):  # cut off by the crash
                reports |= json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else {}
        if silent := next((name for name in remaining if name not in reports), None):
            reports[silent] = {"problem": ending}
    return {name: {**values, "problem": make_printable(values["problem"])} for name, values in reports.items()}


def _run_process(probes: Mapping[str, str], timeout: float) -> tuple[str, str]:
    """The output of a process that runs these probes, and how it ended."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    options: dict[str, Any] = {"env": {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **offline}, "timeout": timeout}
    options |= {"stdin": subprocess.DEVNULL, "capture_output": True, "cwd": tempfile.gettempdir()}
    try:
        process = subprocess.run([sys.executable, "-c", RUNNER, json.dumps(probes)], **options)
    except subprocess.TimeoutExpired as stop:
        return (stop.stdout or b"").decode(errors="replace"), f"no answer within {timeout:.0f} s"
    except OSError as error:
        return "", f"no process could be started ({error.strerror})"
    code = process.returncode
    ending = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    return process.stdout.decode(errors="replace"), ending


def make_printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]
