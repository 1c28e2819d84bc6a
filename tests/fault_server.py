"""A process with tests/fault_shim.c preloaded that forks a child for every run asked of it: a fault at any call costs
milliseconds, not an interpreter.

As a module it starts that process; as a script it is that process.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("nothing", "full", "broken", "short", "unsynced", "kill before", "kill after")  # as fault_shim.c counts them


def build_shim(folder: Path) -> Path:
    """The compiled shim."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    library = folder / "fault_shim.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "fault_shim.c", "-ldl"],
        check=True,
        capture_output=True,
    )
    return library


class FaultServer:
    """Runs of the generate command, each with one fault, each in a process of its own."""

    def __init__(self, folder: Path):
        environment = {
            **os.environ,
            "LD_PRELOAD": str(build_shim(folder)),
            "FAULT_SHIM": str(folder / "fault_shim.so"),
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def run(
        self,
        *arguments: object,
        out: Path,
        kind: str = "nothing",
        at: int = 0,
        lasting: bool = False,
        seconds: float = 0.0,
        signal: int = 14,
        record: Path | None = None,
    ) -> dict:
        """How `generate` with these arguments ended: code, signal, stderr, and how many calls the fault could have met.

        `seconds` sends it the signal after that long, SIGALRM ending it without a word; `record` is the file its calls
        are written to.
        """
        asked = {
            "arguments": [*map(str, arguments), "--out", str(out)],
            "folder": str(out),
            "kind": KINDS.index(kind),
            "at": at,
            "lasting": lasting,
            "seconds": seconds,
            "signal": signal,
            "record": str(record or ""),
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


def serve() -> None:
    import torchless

    from datasetdm_fast import audit  # noqa: F401 - imported once, for every child

    torchless.install()
    shim = ctypes.CDLL(os.environ["FAULT_SHIM"])
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    shim.fault_mark.argtypes = [ctypes.c_int64]
    shim.fault_seen.restype = ctypes.c_int64
    assert "torch" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(_answer(shim, json.loads(line))), flush=True)


def _answer(shim: ctypes.CDLL, asked: dict) -> dict:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as counted:
        child = os.fork()
        if not child:
            _child(shim, asked, said.fileno(), counted.fileno())
        _, status = os.waitpid(child, 0)
        for file in (said, counted):
            file.seek(0)
        killed = os.WIFSIGNALED(status)
        return {
            "code": None if killed else os.WEXITSTATUS(status),
            "signal": os.WTERMSIG(status) if killed else 0,
            "stderr": said.read().decode(errors="replace"),
            "seen": int(counted.read() or b"-1"),
        }


def _child(shim: ctypes.CDLL, asked: dict, said: int, counted: int) -> None:
    import signal

    from datasetdm_fast import generate

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    if asked["seconds"]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if asked["signal"] == signal.SIGALRM:
            signal.setitimer(
                signal.ITIMER_REAL, asked["seconds"]
            )  # not caught, so it ends the process as SIGKILL does, without a word
        else:
            threading.Timer(asked["seconds"], os.kill, (os.getpid(), asked["signal"])).start()
    if asked["record"]:
        shim.fault_record(os.open(asked["record"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        write_missing = generate.write_missing

        def marking(job, *, on_commit, **rest):
            total = 0

            def tell(count):
                nonlocal total
                total += count
                shim.fault_mark(total)
                on_commit(count)

            return write_missing(job, on_commit=tell, **rest)

        generate.write_missing = marking
    shim.fault_arm(asked["folder"].encode(), asked["kind"], asked["at"], asked["lasting"])
    try:
        code = generate.main(asked["arguments"])
    except BaseException as error:  # whatever escapes run_command is a failed test, not a dead server
        os.write(2, f"escaped: {error!r}\n".encode())
        code = 99
    seen = shim.fault_seen()
    shim.fault_arm(b"", 0, 0, 0)
    os.write(counted, str(seen).encode())
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
