"""Processes of a run on this machine: each does a part of the work, and ends with the process that started it."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from datasetdm_fast.bug_report import report_bug
from datasetdm_fast.errors import Stop
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import Place

# The kernel is asked first to end the process with its parent (PR_SET_PDEATHSIG = 1, SIGKILL = 9).
WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); " if sys.platform == "linux" else ""
_BOOT = WITH_PARENT + "from datasetdm_fast.runs.workers.processes import enter; enter()"


class SpawnedProcess(subprocess.Popen):
    """A process of the run on this machine."""

    def ending(self) -> str | Stop | None:
        """How it has ended, empty where nothing was left to do, or what it refused; None while it runs."""
        code = self.poll()
        if not code:
            return None if code is None else ""
        if self.stdout and (content := self.stdout.read()):
            return pickle.loads(content)
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        """Asks it to end between two parts of its work."""
        with suppress(OSError):  # it has just ended
            self.stdin.write(b"\n")
            self.stdin.flush()

    def kill(self) -> None:
        super().kill()
        self.wait()


def start_process(
    place: Place, spec: RunSpec, on_start: Callable[[], None] | None, work: Callable[..., object], *arguments: Any
) -> SpawnedProcess:
    """A process at a place of this machine that calls `on_start`, and then `work` with the run, the arguments, and what
    tells it to stop.
    """
    spec = replace(spec, engine=replace(spec.engine, threads=place.threads))
    path = os.pathsep.join(path for path in sys.path if path)
    process = SpawnedProcess(
        [sys.executable, "-P", "-c", _BOOT],
        env={**os.environ, "PYTHONPATH": path, **place.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with suppress(BrokenPipeError):  # it has just ended
        pickle.dump((on_start, work, (spec, *arguments)), process.stdin)
        process.stdin.flush()
    return process


def enter() -> None:
    """One process of the run, from its start to its end; what it refuses is its standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all of the group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as report:
        os.dup2(2, 1)
        on_start, work, arguments = pickle.load(sys.stdin.buffer)
        stopping = threading.Event()
        threading.Thread(target=_listen, args=(stopping,), name="parent", daemon=True).start()
        if on_start:
            on_start()
        try:
            work(*arguments, stopping.is_set)
        except Stop as stop:
            pickle.dump(stop, report)
            report.flush()
            sys.exit(stop.exit_code)
        except Exception as error:
            sys.exit(report_bug(error))


def _listen(stopping: threading.Event) -> None:
    """Notes that the process is to stop, and ends it once its standard input is closed, as by the end of its parent."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
        stopping.set()
    os._exit(1)
