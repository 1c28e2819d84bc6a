"""Programs of tests as processes of their own that need not import torch, transformers and diffusers, which would take
most of their time: one process has imported these, nothing of ours, and forks for each of them.

As a module it starts such programs; as a script it is that process, or a new interpreter's stand-in: with the arguments
of one it passes on what a program reads and writes. What checks imports, page faults or how a process starts, or
compiles kernels of Triton, needs a new interpreter instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ADDRESS = "DATASETDM_FORKING"  # the variable that names the socket of this run of tests
ENDED = b"\n"  # of a message
MALLOC_OPTIONS = {-1: 2**28, -3: 2**25, -8: 1}  # those of engine/engines/device.py, which imports torch


class ForkedPython(subprocess.Popen):
    """`python ARGUMENTS`, forked: its process ID, signals, exit code, streams, folder and variables are those of any
    other process.
    """

    def __init__(self, arguments: Sequence[object], **options: Any):
        super().__init__([str(argument) for argument in arguments], **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[:9]
        session = rest[9 + 5]
        self._server = _connect()
        program = {"line": args, "folder": os.fspath(cwd or os.getcwd()), "session": session}
        program["variables"] = {os.fspath(name): os.fspath(value) for name, value in (env or os.environ).items()}
        streams = [own if own >= 0 else usual for own, usual in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
        socket.send_fds(self._server, [b"0"], streams)
        self._server.sendall(json.dumps(program).encode() + ENDED)
        self._answers = self._server.makefile()
        self.pid, self._child_created = int(self._answers.readline()), True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._server.close()
        return self.returncode


def retain_freed() -> None:
    """Has glibc retain freed memory, as a training does: half of all page faults are of memory that was freed."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in MALLOC_OPTIONS.items():
            library.mallopt(parameter, value)


def run(arguments: Sequence[object], timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess:
    """A program that has ended, with what it wrote as text."""
    with ForkedPython(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _run_as(line: Sequence[str], capture_output: bool, **options: Any) -> subprocess.CompletedProcess:
    """A line of this interpreter, forked, as subprocess.run would run it."""
    assert line[0] == sys.executable and capture_output
    ended = run(line[2 if line[1] == "-I" else 1 :], **options)
    return subprocess.CompletedProcess(line, ended.returncode, ended.stdout.encode(), ended.stderr.encode())


# What a module may have in the place of `subprocess`.
subprocesses = SimpleNamespace(**{**vars(subprocess), "run": _run_as})


def _connect() -> socket.socket:
    """A connection to the process that forks, which is started where there is none."""
    address = Path(os.environ[ADDRESS])
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(address))
        except OSError:
            address.unlink(missing_ok=True)
            variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            line = [sys.executable, __file__, str(address)]
            told, pipes = address.with_suffix(".log"), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            with told.open("w") as errors:  # it ends once this process has, as its standard input does
                process = subprocess.Popen(line, **pipes, stderr=errors, env=variables)
            assert process.stdout.readline() == b"ready\n", told.read_text()
            _started.append(process)
            connection.connect(str(address))
    return connection


_started: list[subprocess.Popen] = []


def _serve(address: str) -> dict[str, Any]:
    """Returns in the process of each program, with what it is to do."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return _fork(connection)
            connection.close()
            while _has_ended_child():
                pass
    Path(address).unlink(missing_ok=True)
    os._exit(0)


def _has_ended_child() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _fork(connection: socket.socket) -> dict[str, Any]:
    """Forks the program, and waits for it; returns in its process."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    content = b""
    while not content.endswith(ENDED):
        content += connection.recv(1 << 20)
    if program := os.fork():
        for stream in (*streams, 0, 1):
            os.close(stream)
        connection.sendall(f"{program}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        try:
            connection.sendall(f"{code}\n".encode())
        finally:
            os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(content)


def _become(program: dict[str, Any], paths: list[str]) -> None:
    """Is the program, as a new interpreter would be that has all these modules."""
    import gc
    import runpy
    import types

    if program["session"]:
        os.setsid()
    os.chdir(program["folder"])
    os.environ.clear()
    os.environ.update(program["variables"])
    tempfile.tempdir = None
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    kind, *line = program["line"]
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*own, *paths]
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):
        import sitecustomize  # noqa: F401
    gc.enable()
    if kind == "-c":
        code, *arguments = line
        sys.argv, sys.path[:] = ["-c", *arguments], ["", *own, *paths]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec", dont_inherit=True), vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.argv, sys.path[:] = line, [os.getcwd(), *own, *paths]
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = [kind, *line], [os.path.dirname(kind), *own, *paths]
        runpy.run_path(kind, run_name="__main__")


def _end(code: int) -> NoReturn:
    """Ends as an interpreter does, but for taking apart all modules, which would take six times as long as a fork."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "-u":
        sys.exit(ForkedPython(sys.argv[2:]).wait())

    import gc

    gc.disable()
    retain_freed()
    _paths = sys.path[1:]
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    gc.freeze()
    _program = _serve(sys.argv[1])
    try:
        _become(_program, _paths)
    except SystemExit as stop:
        if stop.code and not isinstance(stop.code, int):
            raise
        _end(stop.code or 0)
    _end(0)
